"""A user's own data, in any of the forms that people have them in, as a dataset."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from bmjax.data import preprocess
from bmjax.data.arrays import checked_images, checked_labels
from bmjax.data.classes import match_classes
from bmjax.data.sources import SPLITS, ArraySource, Dataset, NotLoaded, Source
from bmjax.errors import UserError

NAME = "own data"
_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "val", "valid"), "validation"
)
_IMAGE_COLUMNS = ("image", "img", "images", "pixels")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
_FORMS = (
    "Give a bmjax.Dataset; a pair (images, labels) of arrays; an object with len() and [i] whose "
    'items are {"image": ..., "label": ...} or (image, label); or a dict with such things under '
    '"train", "validation" and "test".'
)


@dataclass(frozen=True, eq=False)
class _Part:
    """One split as arrays, with the names of its classes where they are known."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] | None


def as_dataset(
    data: Any,
    *,
    name: str = NAME,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    memory_gib: float = 4.0,
) -> Dataset:
    """Returns a user's own data as a dataset.

    Args:
        data: a `Dataset`; a pair `(images, labels)` of arrays; any object with `len()` and `[i]`
            whose items are `{"image": ..., "label": ...}` or `(image, label)`, with images as
            arrays or Pillow's, such as a map-style dataset of PyTorch, or a `Dataset` of Hugging
            Face; or a dict of splits (train, validation, test) of any of these. Splits that are
            missing are cut as by `Dataset.from_arrays`.
        name: what it is called.
        class_names: one for each class, in order of the labels; None: those that the data know,
            or numbers.
        image_size: side in pixels that images are resized to, which may then differ; None
            keeps them. A `Dataset` stays as it is.
        memory_gib: GiB that decoded images may take.

    Raises:
        UserError: none of these, or data that are no labelled images; the message says why.

    Example:
        >>> images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2
        >>> len(as_dataset((images, labels)).test)
        8
    """
    if isinstance(data, Dataset):
        if not len(data.train):
            raise UserError(f"train of {data.name} is empty. Give at least one example per class.")
        return checked_dataset(data)
    given = _splits_of(data)
    parts = {
        split: _read(part, name if len(given) == 1 else split, image_size, memory_gib)
        for split, part in given.items()
    }
    train = parts["train"]
    if class_names is None:
        parts, names = _same_names(parts, train.class_names, name)
    else:
        names = tuple(class_names)
    others = {
        split: (part.images, part.labels) for split, part in parts.items() if split != "train"
    }
    return Dataset.from_arrays(train.images, train.labels, names, name=name, **others)


def as_split(
    data: Any,
    split: str,
    class_names: Sequence[str],
    *,
    image_size: int | None = None,
    memory_gib: float = 4.0,
) -> Dataset:
    """Returns own data that a model is measured on, as a dataset of which one split is loaded.

    What has no splits of its own is that split as a whole.

    Args:
        data: see `as_dataset`.
        split: train, validation or test.
        class_names: those of the model, where the data do not name theirs.
        image_size: see `as_dataset`.
        memory_gib: see `as_dataset`.

    Raises:
        UserError: see `as_dataset`; or there is no such split.
    """
    if isinstance(data, Dataset):
        return checked_dataset(data)
    given = _splits_of(data, "test" if split == "all" else split)
    if split not in (*given, "all"):
        raise UserError(f"the data have no {split} split, but {', '.join(given)}. Choose another.")
    wanted = list(given) if split == "all" else [split]
    parts = {each: _read(given[each], each, image_size, memory_gib) for each in wanted}
    parts, names = _same_names(parts, parts[wanted[0]].class_names, NAME)
    names = names or tuple(class_names)
    for each, part in parts.items():
        _check_range(part.labels, len(names), each)
    shape = ArraySource(parts[wanted[0]].images, parts[wanted[0]].labels).image_shape
    nothing = ArraySource(np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32))

    def source(each: str) -> Source:
        if each in parts:
            return ArraySource(parts[each].images, parts[each].labels)
        return nothing if split == "all" else NotLoaded(each, shape)

    train, validation, test = map(source, SPLITS)
    return checked_dataset(Dataset(NAME, train, validation, test, names))


def checked_dataset(dataset: Dataset) -> Dataset:
    """Checks a dataset that may have been put together by hand; looks at no image of a file.

    Raises:
        UserError: splits that are no labelled images of one shape, or labels out of range.
    """
    if len(dataset.class_names) < 2:
        raise UserError(
            f"{dataset.name} has {len(dataset.class_names)} class(es). A classifier needs two "
            "classes at least."
        )
    checked: dict[str, Source] = {}
    for name in SPLITS:
        source, where = dataset.split(name), f"{name} of {dataset.name}"
        checked[name] = source
        if isinstance(source, NotLoaded):
            continue
        if isinstance(source, ArraySource):
            checked[name] = source = _checked_source(source, where)
        _check_range(source.labels, dataset.num_classes, where)
        if len(source) and source.image_shape != dataset.image_shape:
            raise UserError(
                f"{where} has images of shape {source.image_shape}, but train has "
                f"{dataset.image_shape} (height, width, channels). Make them one size."
            )
    return replace(
        dataset,
        train=checked["train"],
        validation=checked["validation"],
        test=checked["test"],
    )


def _checked_source(source: ArraySource, where: str) -> ArraySource:
    images = source.images
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        images = checked_images(images, f"images in {where}")
    labels = checked_labels(source.labels, len(images), f"labels in {where}")
    return replace(source, images=images, labels=labels)


def _same_names(
    parts: dict[str, _Part], names: tuple[str, ...] | None, where: str
) -> tuple[dict[str, _Part], tuple[str, ...] | None]:
    """Returns all splits with the labels that the first one's names are in order of."""
    first = next(iter(parts))
    found = {}
    for split, part in parts.items():
        if names and part.class_names and part.class_names != names:
            us, them = f"{first} of {where}", f"{split} of {where}"
            _check_range(part.labels, len(part.class_names), them)
            match = match_classes(
                names, part.class_names, us, them, "Give all splits the same classes."
            )
            part = replace(part, labels=np.array(match.places, np.int32)[part.labels])
        found[split] = part
    return found, names


def _check_range(labels: np.ndarray, num_classes: int, where: str) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        hint = " They seem to count from 1: take labels - 1." if labels.min() == 1 else ""
        raise UserError(
            f"{where} has labels from {labels.min()} to {labels.max()}, but there are "
            f"{num_classes} classes, 0 to {num_classes - 1}.{hint}"
        )


def _splits_of(data: Any, whole: str = "train") -> dict[str, Any]:
    """Returns what was given by split; what has none is the split `whole`."""
    if not isinstance(data, Mapping):
        return {whole: data}
    given: dict[str, Any] = {}
    for name, part in data.items():
        split = _SPLITS.get(str(name).lower())
        if split is None:
            raise UserError(f"{name!r} is no split: train, validation or test. {_FORMS}")
        if split in given:
            raise UserError(f"there are two {split} splits: {', '.join(map(str, data))}.")
        given[split] = part
    if whole not in given and whole == "train":
        raise UserError(f"there is no train split, but {', '.join(given) or 'nothing'}. {_FORMS}")
    return given


def _read(data: Any, where: str, image_size: int | None, memory_gib: float) -> _Part:
    if isinstance(data, Dataset):
        raise UserError(f"{where} is a whole bmjax.Dataset: give one of its splits. {_FORMS}")
    if isinstance(data, ArraySource):
        data = (data.images, data.labels)
    if isinstance(data, tuple | list) and len(data) == 2 and not _is_item(data[0]):
        images = checked_images(data[0], f"images of {where}")
        labels = checked_labels(data[1], len(images), f"labels of {where}")
        if image_size and images.shape[1:3] != (image_size, image_size):
            images = preprocess.resize_all(images, image_size)
        names = None
    else:
        images, labels = _read_items(data, where, image_size, memory_gib)
        names = _known_names(data)
    if not len(images):
        raise UserError(f"{where} is empty. Give at least one example per class, or leave it out.")
    return _Part(images, labels, names)


def _is_item(first: Any) -> bool:
    """Whether the first of two things is an example, not all the images."""
    return isinstance(first, Mapping | tuple)


def _read_items(
    data: Any, where: str, image_size: int | None, memory_gib: float
) -> tuple[np.ndarray, np.ndarray]:
    images, labels, taken = [], [], 0
    for index, (image, label) in enumerate(_items(data, where)):
        pixels = _pixels(image, f"image {index} of {where}", image_size)
        images.append(pixels)
        labels.append(_number(label, f"label {index} of {where}"))
        taken += pixels.nbytes
        if taken > memory_gib * 2**30:
            raise UserError(
                f"the images of {where} take more than the {memory_gib:g} GiB of memory that they "
                "may. Raise --memory-gib, set a smaller image size, or write them to files for "
                "folder:PATH, which are read when they are needed."
            )
    if len({image.shape[2] for image in images}) > 1:
        images = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images]
    shapes = sorted({image.shape[:2] for image in images})
    if len(shapes) > 1:
        raise UserError(
            f"the images of {where} have different sizes, such as {shapes[0]} and {shapes[-1]} "
            "(height, width). Resize them, or say what to by image_size."
        )
    return np.stack(images) if images else np.zeros((0, 1, 1, 1), np.uint8), np.array(
        labels, np.int32
    )


def _items(data: Any, where: str) -> Iterator[tuple[Any, Any]]:
    """Yields image and label of each example."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, str):
        raise UserError(f"{where} is of type {type(data).__name__}, which is no dataset. {_FORMS}")
    columns = _columns(data)
    for index in range(len(data)):
        item = data[index]
        if isinstance(item, Mapping):
            columns = columns or _named_columns(list(item), where)
            yield item[columns[0]], item[columns[1]]
        elif isinstance(item, tuple | list) and len(item) == 2:
            yield item[0], item[1]
        else:
            raise UserError(
                f"item {index} of {where} is of type {type(item).__name__}, but must be "
                '{"image": ..., "label": ...} or (image, label).'
            )


def _columns(data: Any) -> tuple[str, str] | None:
    """Returns the columns of a Hugging Face dataset that hold images and labels; None: no such."""
    features = getattr(data, "features", None)
    if not isinstance(features, Mapping):
        return None
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    labels = [name for name, kind in features.items() if hasattr(kind, "names")]
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    return _named_columns(list(features), "the dataset")


def _named_columns(found: Sequence[str], where: str) -> tuple[str, str]:
    image = next((name for name in _IMAGE_COLUMNS if name in found), None)
    label = next((name for name in _LABEL_COLUMNS if name in found), None)
    if image is None or label is None:
        raise UserError(
            f"the examples of {where} have {', '.join(map(str, found)) or 'nothing'}, and it does "
            'not show which is the image and which the label. Rename them "image" and "label".'
        )
    return image, label


def _known_names(data: Any) -> tuple[str, ...] | None:
    """Returns the names of classes that a dataset of another library knows."""
    features = getattr(data, "features", None)
    columns = _columns(data)
    names = getattr(features[columns[1]], "names", None) if features and columns else None
    names = names or getattr(data, "classes", None)
    return tuple(map(str, names)) if isinstance(names, list | tuple) and names else None


def _pixels(image: Any, where: str, image_size: int | None) -> np.ndarray:
    """Returns an image as [height, width, channels] uint8, resized where a size is given."""
    if isinstance(image, Image.Image):
        image = image if image.mode in ("L", "RGB") else image.convert(_mode_for(image.mode))
    pixels = checked_images(np.asarray(image)[None], where)[0]
    if image_size and pixels.shape[:2] != (image_size, image_size):
        pixels = preprocess.resize_all(pixels[None], image_size)[0]
    return pixels


def _mode_for(mode: str) -> str:
    return "L" if mode in ("1", "LA") else "RGB"


def _number(label: Any, where: str) -> int:
    array = np.asarray(label)
    if array.ndim:
        array = checked_labels(array[None], 1, where)[0]
    try:
        number = operator.index(array.item())
    except TypeError:
        raise UserError(
            f"{where} is {label!r}, but must be an integer from 0. Number the classes."
        ) from None
    return int(checked_labels([number], 1, where)[0])
