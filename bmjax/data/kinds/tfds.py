"""`tfds:NAME`: datasets that TFDS has prepared as array_record files, without TensorFlow."""

import contextlib
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config.paths import user_path
from bmjax.data.kinds.files import TICK_NS, Encoded
from bmjax.data.kinds.kept import remembered
from bmjax.data.kinds.prepare import Options, in_threads, make_dataset
from bmjax.data.sources import SPLITS, Dataset
from bmjax.errors import UserError
from bmjax.machine.quiet import errors_only

_INFO = "dataset_info.json"
_NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class RecordReader:
    """Reads the encoded images of one split of a prepared dataset, by their number.

    Attributes:
        folder: of the prepared dataset.
        split: as TFDS calls it.
        image: name of the image feature.
        label: name of the label feature.
    """

    folder: str
    split: str
    image: str
    label: str

    def read(self, key: int) -> bytes:
        """Returns an encoded image."""
        return bytes(self._example(key)[self.image])

    def read_label(self, key: int) -> int:
        """Returns a label, below 0 where there is none; raises OSError."""
        return int(self._example(key)[self.label])

    def name(self, key: int) -> str:
        """Returns what messages call an example."""
        return f"{self.split}[{key}]"

    def _example(self, key: int) -> Any:
        try:
            return self._parse(self._records[int(key)])
        except Exception as error:  # TFDS and array_record raise RuntimeError, ValueError, ...
            raise OSError(" ".join(str(error).split())[:200]) from error

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.folder)

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return self._builder.as_data_source(split=self.split, deserialize_method=raw)

    @functools.cached_property
    def _parse(self) -> Callable[[bytes], Any]:
        """Returns the function that takes image and label, still encoded, out of a record.

        Others stay where they are: to decode them, TFDS may need TensorFlow, and time.
        """
        import tensorflow_datasets as tfds

        features = self._builder.info.features
        two = tfds.features.FeaturesDict(
            {name: features[name] for name in (self.image, self.label)}
        )
        decoders = {self.image: tfds.decode.SkipDecoding()}
        return functools.partial(two.deserialize_example_np, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not go to another process.
        return {name: value for name, value in vars(self).items() if name[0] != "_"}


def load(name: str, options: Options) -> Dataset:
    """Loads a dataset that was prepared by TFDS, from its folder for data.

    That is `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`. The images are decoded as those of a
    folder. Splits are `train`, `validation` (or `val`, `valid`) and `test`; where there is no
    validation split, a tenth of train is cut; where there is no test split, it stays empty.
    Examples without a label are left out, with a warning.

    Args:
        name: as `tfds.builder` takes it (`NAME`, `NAME:VERSION`, `NAME/CONFIG`), or the folder of
            a prepared dataset, where `dataset_info.json` lies.
        options: see `load.load_dataset`.

    Raises:
        UserError: no such dataset, one that is not prepared as array_record, or one that has not
            just one image and one label.
    """
    with _quiet():
        builder = _open(name)
        image, label = _find_features(builder, name)
    rows = _find_splits(builder, name, options.split_seed)
    identity, settled = _identity(builder)
    parts: dict[str, Encoded] = {}
    warnings: list[str] = []
    for split in SPLITS:
        own, keys = rows.get(split, ("", np.arange(0)))
        reader = RecordReader(str(builder.data_dir), own, image, label)
        labels = np.zeros(len(keys), np.int32)
        if split in options.splits and len(keys):
            labels = _labels(reader, int(builder.info.splits[own].num_examples), identity)[keys]
        if unlabelled := int((labels < 0).sum()):
            what = f"{unlabelled:,} of {len(keys):,} examples of {split}"
            warnings.append(f"{what} have no label and are left out")
            keys, labels = keys[labels >= 0], labels[labels >= 0]
        chosen = f"{identity} {own} {hashlib.sha256(keys.astype('<i8').tobytes()).hexdigest()}"
        parts[split] = Encoded(reader, keys.tolist(), labels, chosen, settled=settled)
    class_names = tuple(builder.info.features[label].names)
    content = functools.partial(_digest, builder.info, rows)
    return make_dataset(f"tfds:{name}", parts, class_names, options, content, warnings)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what TFDS says of versions, and of the TensorFlow it would rather have."""
    nowhere = io.StringIO()
    with errors_only(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _open(name: str) -> Any:
    """Returns the builder of a dataset that can be read here."""
    folder = user_path(name)
    is_folder = name.startswith(("/", "~", ".")) or (folder / _INFO).is_file()
    builder = _open_folder(folder) if is_folder else _open_named(name)
    how = (
        'Where TensorFlow is installed, run python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{builder.info.full_name.rpartition('/')[0]}', file_format='array_record')"
        '.download_and_prepare()" and bring the folder here; or write a builder that yields '
        "encoded images, which needs no TensorFlow."
    )
    if not builder.is_prepared():
        raise UserError(f"{name} is not prepared in {builder.data_dir}. {how}")
    kind = builder.info.file_format
    if kind is None or kind.value != "array_record":
        raise UserError(
            f"{name} is prepared in {builder.data_dir} as {kind.value if kind else 'unknown'} "
            f"files, but bmjax reads array_record. {how}"
        )
    return builder


def _open_named(name: str) -> Any:
    import tensorflow_datasets as tfds

    # TFDS itself looks at the variable only when it is imported.
    data_dir = user_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    try:
        return tfds.builder(name, data_dir=str(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"TFDS has no dataset {name}, and there is none of that name in {data_dir}. Look it "
            "up at www.tensorflow.org/datasets/catalog; set TFDS_DATA_DIR where it lies "
            "elsewhere, or give the folder of one you prepared, tfds:FOLDER/NAME/VERSION."
        ) from error
    except Exception as error:  # AssertionError for a version, ValueError for a config, ...
        raise UserError(
            f"TFDS cannot open {name} ({_first_sentence(error)}). Name it NAME, NAME:VERSION "
            "or NAME/CONFIG, as TFDS does."
        ) from error


def _open_folder(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    if not (folder / _INFO).is_file():
        found = sorted(
            path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{_INFO}")
        )
        hint = f"Do you mean tfds:{found[-1]}?" if found else "Check the path after 'tfds:'."
        raise UserError(f"{folder} holds no dataset prepared by TFDS, no {_INFO}. {hint}")
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(
            f"{folder} cannot be opened as a dataset of TFDS ({_first_sentence(error)}). "
            "Prepare it anew."
        ) from error


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:300] or type(error).__name__


def _find_features(builder: Any, name: str) -> tuple[str, str]:
    """Returns the names of the image and of the label."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features or {})
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    # Exactly these kinds: what is made of them, such as a picture of labels, is another thing.
    found = [[key for key in features if type(features[key]) is kind] for kind in kinds]
    if [len(keys) for keys in found] != [1, 1]:
        kinds_of = {key: type(value).__name__ for key, value in features.items()}
        listed = ", ".join(f"{key}: {kind}" for key, kind in sorted(kinds_of.items()))
        raise UserError(
            f"{name} has the features {listed}, but it takes just one Image and one ClassLabel. "
            "Choose another dataset, or write its images into folders and use folder:PATH."
        )
    ((image,), (label,)) = found
    if np.dtype(features[image].np_dtype) == np.float32:
        raise UserError(f"{name} has images of floats, whose range is not known. Use another.")
    if (features[label].num_classes or 0) < 2:
        raise UserError(f"{name} has fewer than two classes. A classifier needs two at least.")
    return image, label


def _find_splits(builder: Any, name: str, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Returns for each split the name it has in TFDS, and the numbers of its examples."""
    splits = builder.info.splits
    found = {}
    for split, names in _NAMES.items():
        for own in names:
            if own in splits and split not in found:
                found[split] = (own, np.arange(splits[own].num_examples))
    if "train" not in found:
        raise UserError(
            f"{name} has no split train, but {', '.join(splits)}. Choose a dataset that has one."
        )
    if "validation" not in found:
        own, rows = found["train"]
        order = sorted(rows.tolist(), key=lambda row: _hash(f"{seed}:{row}"))
        count = min(max(1, round(0.1 * len(rows))), len(rows) - 1)
        found["validation"] = own, np.sort(np.array(order[:count], int))
        found["train"] = own, np.sort(np.array(order[count:], int))
    return found


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _identity(builder: Any) -> tuple[str, bool]:
    """Returns a digest that changes when the files do, and whether it does so in any case."""
    begin, newest = time.time_ns(), 0
    folder = Path(builder.data_dir)
    digest = hashlib.sha256(f"{os.path.realpath(folder)} {builder.info.full_name}".encode())
    for path in sorted(folder.iterdir()):
        status = path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        digest.update(f"{path.name}\0{status.st_size}\0{times}\n".encode())
        newest = max(newest, *times)
    return digest.hexdigest(), newest < begin - TICK_NS


def _labels(reader: RecordReader, number: int, identity: str) -> np.ndarray:
    """Returns the labels of a whole split, which lie beside the images: all is read once."""

    def read_all() -> list[int]:
        labels = np.empty(number, np.int32)

        def read(index: int) -> None:
            labels[index] = reader.read_label(index)

        try:
            in_threads(read, number, f"reading labels of {reader.split}")
        except OSError as error:
            raise UserError(
                f"the files in {reader.folder} cannot be read ({error}). Prepare them anew."
            ) from error
        return labels.tolist()

    return np.array(remembered(f"labels {identity} {reader.split}", read_all), np.int32)


def _digest(info: Any, rows: Mapping[str, tuple[str, np.ndarray]]) -> str:
    made: list[Sequence[Any]] = [[info.full_name]]
    for split in SPLITS:
        own, keys = rows.get(split, ("", np.arange(0)))
        size = int(info.splits[own].num_bytes) if own else 0
        made.append([split, own, size, hashlib.sha256(keys.astype("<i8").tobytes()).hexdigest()])
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()
