"""What the tests of weight files share: files of PyTorch's own, and made ones with any content.

`tests/data/*.pth` were written by torch 2.15 itself. Their tensors count from 0, so that the
values expected of them are stated here without it.
"""

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np

from bmjax.weights import writing
from experiments import mutate_weights as mutate

DATA = Path(__file__).parent / "data"


def count(*shape, dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# `view` and `transposed` share one storage of 0 to 19; `expanded` repeats a row of 3 by stride 0.
EXPECTED = {
    "float": count(2, 3),
    "transposed": count(4, 5).T,
    "view": np.array([[7, 8], [12, 13]], np.float32),
    "expanded": np.array([[0, 1, 2]] * 4, np.float32),
    "half": count(3, dtype=np.float16),
    "bfloat": count(3, dtype=ml_dtypes.bfloat16),
    "double": count(3, dtype=np.float64),
    "long": np.array(2**40 + 7),
    "byte": count(3, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": count(2, 2),
}
SMALL = {"weight": count(2, 3), "bias": np.array([0.5, -1.0, np.nan], np.float32)}


def assert_equal(actual, expected):
    assert list(actual) == list(expected), list(actual)
    for name, array in expected.items():
        assert actual[name].shape == array.shape, name
        assert actual[name].dtype == array.dtype, name
        assert actual[name].tobytes() == array.tobytes(), name


SIX_ZEROS = np.zeros(6, np.float32)


def packed(tmp_path, pickled, storages=(SIX_ZEROS,), container="zip"):
    path = tmp_path / "made.pth"
    path.write_bytes(mutate.pack(container, pickled, list(storages)))
    return path


def piece(value):
    """What Python itself writes for a value, to stand within another pickle."""
    return pickle.dumps(value, 2)[2:-1]


def tensors_piece(named, first=0):
    """An OrderedDict of tensors, whose storages are numbered from `first` on."""
    items = [
        writing._text(name) + writing._dumped_tensor(str(first + number), np.asarray(array))
        for number, (name, array) in enumerate(named.items())
    ]
    return b"ccollections\nOrderedDict\n)R(" + b"".join(items) + b"u"


def dict_piece(**entries):
    """A dictionary of pieces, by name."""
    return b"}(" + b"".join(writing._text(key) + value for key, value in entries.items()) + b"u"


def several(tmp_path, **state_dicts):
    """A file with several state dicts by their keys, and an epoch."""
    entries: dict[str, bytes] = {}
    arrays: list[np.ndarray] = []
    for key, named in state_dicts.items():
        entries[key] = tensors_piece(named, len(arrays))
        arrays += [np.asarray(array) for array in named.values()]
    return packed(tmp_path, pickled(dict_piece(**entries, epoch=piece(3))), arrays)


def pickled(written):
    return b"\x80\x02" + written + b"."


def tensor_pickle(key="0", numel=6, offset=0, shape=(6,), strides=(1,), kind="FloatStorage"):
    """One tensor named t, with any fields: `dump` would not write wrong ones."""
    fields = [pickle.dumps(value, 2)[2:-1] for value in (key, numel, offset, shape, strides)]
    dumped_key, dumped_numel, *rest = fields
    storage = b"(X\7\0\0\0storagectorch\n" + kind.encode() + b"\n" + dumped_key
    storage += b"X\3\0\0\0cpu" + dumped_numel + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(rest) + b"\x89}tR"
    return b"\x80\x02}X\1\0\0\0t" + tensor + b"s."
