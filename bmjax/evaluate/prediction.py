"""Classes of image files: decoded ahead by threads, classified in batches of one size."""

import contextlib
import io
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from bmjax.config import PredictConfig
from bmjax.data import preprocess
from bmjax.data.kinds.folder import images_below
from bmjax.data.kinds.prepare import num_threads, quiet_pillow
from bmjax.errors import UserError
from bmjax.evaluate.calibrate import Calibration, read_calibration
from bmjax.evaluate.calibration import Method
from bmjax.machine.cache import use_compilation_cache
from bmjax.machine.progress import stage
from bmjax.runs.trained import TrainedRun, batch_size_for, load_run

STANDARD_INPUT = "-"


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a run says of an image.

    Attributes:
        file: as it was named, or found in a folder.
        shares: probabilities of the classes, [classes] float32.
        class_names: in the same order.
        possible: numbers of the classes of its set, the likeliest first, where it is calibrated.
        familiar: whether it is like those of validation, where it is calibrated.
    """

    file: str
    shares: np.ndarray
    class_names: Sequence[str]
    possible: Sequence[int] | None = None
    familiar: bool | None = None

    @property
    def label(self) -> int:
        """Number of the likeliest class."""
        return int(self.shares.argmax())

    def as_dict(self) -> dict[str, Any]:
        """Returns what `predict` does for one file."""
        order = np.argsort(-self.shares, kind="stable")
        found = {
            "file": self.file,
            "class": self.class_names[self.label],
            "label": self.label,
            "probability": float(self.shares[self.label]),
            "probabilities": {self.class_names[i]: float(self.shares[i]) for i in order},
        }
        if self.possible is not None:
            found["set"] = [self.class_names[each] for each in self.possible]
            found["unlike_training_data"] = not self.familiar
        return found


@dataclass(frozen=True)
class NoImage:
    """A file that could not be classified.

    Attributes:
        file: as it was named.
        error: why.
    """

    file: str
    error: UserError


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """Classifies image files.

    Returns:
        For each file, in order: `file`, `class` (its name), `label` (its number), `probability`
        and `probabilities`, `{class name: probability}`, the likeliest first; and where they are
        calibrated, `set`, names of classes, and `unlike_training_data`.

    Raises:
        UserError: no such run, a file that is no image, or a run whose outputs are not finite.
    """
    results = []
    for result in predict_each(config):
        if isinstance(result, NoImage):
            raise result.error
        results.append(result.as_dict())
    return results


def predict_each(config: PredictConfig, bar: bool = False) -> Iterator[Prediction | NoImage]:
    """Classifies image files one after the other, in memory that does not grow with their number.

    Args:
        config: as of `predict`; a folder stands for the images in it and below, by name.
        bar: whether a terminal is shown how far it is.

    Returns:
        An iterator over a `Prediction` of each file, or a `NoImage` where it cannot be read.

    Raises:
        UserError: no such run, or no image at all; while iterating, outputs that are not finite.
    """
    if config.top < 1:
        raise UserError(f"--top is {config.top}, but it must be at least 1.")
    if config.json and config.csv:
        raise UserError("--json and --csv are two ways to print the same. Choose one.")
    if not config.images:
        raise UserError("there is no image to classify. Name at least one file.")
    files = list(_files(config.images))
    use_compilation_cache(needed=False)
    trained = load_run(config.path, config.checkpoint)
    calibration = read_calibration(trained) if config.calibrated else None
    return _classify(trained, files, bar, Classifier(trained, calibration, config.sets))


def _files(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if name == STANDARD_INPUT or not os.path.isdir(name):
            yield name
            continue
        found = images_below(name)
        if not found:
            raise UserError(f"there is no image in the folder {name} or below. Check the path.")
        yield from found


def _classify(
    trained: TrainedRun, files: Sequence[str], bar: bool, classifier: "Classifier"
) -> Iterator[Prediction | NoImage]:
    size = batch_size_for(len(files))
    left = iter(files)
    decoded = _decoded(trained, files, ahead=2 * size)
    shown = stage(f"classifying {len(files):,} images", len(files), line=False)
    with contextlib.closing(decoded), shown if bar else contextlib.nullcontext() as advance:
        while batch := list(islice(decoded, size)):
            images = [image for image in batch if isinstance(image, np.ndarray)]
            rows = iter(classifier.classify(np.stack(images), size) if images else ())
            for image, file in zip(batch, left, strict=False):
                if isinstance(image, UserError):
                    yield NoImage(file, image)
                else:
                    yield replace(next(rows), file=file)
            if advance:
                advance(len(batch))


@dataclass(frozen=True, eq=False)
class Classifier:
    """What a run says of images, calibrated or not.

    Attributes:
        trained: the run.
        calibration: None: as it is.
        method: by which sets are made.
    """

    trained: TrainedRun
    calibration: Calibration | None
    method: Method

    def classify(self, images: np.ndarray, size: int) -> list[Prediction]:
        """Returns what it says of each image, [batch, height, width, channels] uint8."""
        names = self.trained.run.data["class_names"]
        if self.calibration is None:
            return [Prediction("", row, names) for row in self.trained.predict(images, size)]
        logits = self.trained.predict_logits(images, size)
        rows = zip(
            self.calibration.probabilities(logits),
            self.calibration.sets(logits, self.method),
            self.calibration.is_familiar(logits),
            strict=True,
        )
        return [
            Prediction("", shares, names, _likeliest_first(shares, chosen), bool(familiar))
            for shares, chosen, familiar in rows
        ]


def _likeliest_first(shares: np.ndarray, chosen: np.ndarray) -> list[int]:
    return [int(each) for each in np.argsort(-shares, kind="stable") if chosen[each]]


def _decoded(
    trained: TrainedRun, files: Sequence[str], ahead: int
) -> Generator[np.ndarray | UserError, None, None]:
    """Yields the images in order, or why there is none, while threads decode the next ones."""
    quiet_pillow()
    channels = trained.run.data["image_shape"][2]

    def decode(file: str) -> np.ndarray | UserError:
        try:
            source = _standard_input() if file == STANDARD_INPUT else file
            return trained.transform.apply(preprocess.decode(source, channels))
        except UserError as error:
            return error

    waiting: deque[Future[np.ndarray | UserError]] = deque()
    with ThreadPoolExecutor(num_threads()) as executor:
        try:
            for file in files:
                waiting.append(executor.submit(decode, file))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


class _StandardInput(io.BytesIO):
    name = "standard input"


def _standard_input() -> io.BytesIO:
    with os.fdopen(0, "rb", closefd=False) as stream:
        return _StandardInput(stream.read())
