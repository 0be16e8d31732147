"""`folder:PATH`: images sorted into folders by split and class, or by class alone."""

import hashlib
import os
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bmjax.config.paths import user_path
from bmjax.data import formats, hints
from bmjax.data.kinds.content import Content
from bmjax.data.kinds.files import TICK_NS, Encoded
from bmjax.data.kinds.prepare import Options, make_dataset
from bmjax.data.sources import SPLITS, Dataset
from bmjax.errors import UserError, printable

_FOLDERS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "val", "valid"), "validation"
)
# Most probably splits under another name; as classes they would make a useless classifier.
_LIKE_SPLITS = {*_FOLDERS, "training", "testing", "eval", "evaluation", "dev"}
# What systems leave behind, in lower case: of Windows, macOS, Linux, Synology and QNAP.
_SKIPPED = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("__macosx", "icon\r", "lost+found", "__pycache__"),
    *("@eadir", "#recycle", "@recycle", "@__thumb", "@recently-snapshot"),
}
_SKIPPED_ENDING = ":zone.identifier"
# File names need not be valid text.
_ANY_NAME = ("utf-8", "surrogateescape")
_SORTED = "PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or just PATH/CLASS/IMAGE"


class _File(NamedTuple):
    """A file by its path below the root, with slashes; size in bytes, and times of change in ns.

    The first can be set to anything, as copying does; the second is the system's own.
    """

    name: str
    size: int
    changed: int
    changed_really: int


@dataclass
class _Class:
    """The files below a class's folder: those named like images, and the names of others."""

    images: list[_File]
    others: list[str]


@dataclass(frozen=True)
class PathReader:
    """Reads files below a root, which are asked for by their relative paths."""

    root: str

    def read(self, key: str) -> bytes:
        """Returns a file's bytes."""
        with open(os.path.join(self.root, key), "rb") as file:
            return file.read()

    def name(self, key: str) -> str:
        """Returns the relative path, fit to be printed."""
        return _printable(key)


def load(path: str, options: Options) -> Dataset:
    """Loads the images below a folder.

    Splits are the folders `train`, `validation` (or `val`, `valid`) and `test`, classes the
    folders in them, numbers among which are ordered by value, and images all image files in those
    at any depth; what a file without an ending is, its content tells. A missing validation split
    is cut from train, 10% of each class; a missing test split stays empty. Without split folders,
    20% and 10% of each class become test and validation. Of a class with one image, none does.

    Args:
        path: the folder, perhaps with `~`.
        options: see `load.load_dataset`.

    Raises:
        UserError: no such folder, images that are not sorted into at least two classes, a class
            without images, or more files than `options.max_unreadable` that cannot be decoded.
    """
    begin, root = time.time_ns(), user_path(path)
    if not root.is_dir():
        raise hints.no_folder(root)
    try:
        folders = _find_splits(root)
        listed = {
            split: _list_classes(root, folder, optional=split in ("validation", "test"))
            for split, folder in folders.items()
        }
    except OSError as error:
        raise _unreadable(error) from error
    class_names = _check_classes(root, folders, listed)
    warnings = []
    for split in [split for split in SPLITS if listed.get(split) == {}]:
        instead = ": a tenth of train takes its place" if split == "validation" else ""
        warnings.append(f"{root / folders[split]} has no image and counts as absent{instead}")
        del listed[split]
    if "" in listed:
        shares = {"validation": 0.1, "test": 0.2}
        cut = _cut(listed.pop(""), shares, options.split_seed)
    elif "validation" not in listed:
        cut = _cut(listed["train"], {"validation": 0.1}, options.split_seed)
    else:
        cut = {}
    listed |= cut
    return _make(root, f"folder:{path}", listed, class_names, options, warnings, begin - TICK_NS)


def _make(
    root: Path,
    name: str,
    listed: Mapping[str, Mapping[str, _Class]],
    class_names: Sequence[str],
    options: Options,
    warnings: Sequence[str],
    settled_before: int,
) -> Dataset:
    parts, sizes, newest = {}, {}, 0
    where = os.path.realpath(root)
    for split in SPLITS:
        classes = listed.get(split, {})
        files = [
            (file, label)
            for label, class_name in enumerate(class_names)
            for file in classes.get(class_name, _Class([], [])).images
        ]
        identity = hashlib.sha256(f"{where}\n".encode(*_ANY_NAME))
        for file, _ in files:
            identity.update("\0".join(map(str, file)).encode(*_ANY_NAME) + b"\n")
            newest = max(newest, file.changed, file.changed_really)
        parts[split] = Encoded(
            PathReader(str(root)),
            [file.name for file, _ in files],
            np.array([label for _, label in files], np.int32),
            identity.hexdigest(),
            tuple(_printable(other) for each in classes.values() for other in each.others),
        )
        sizes[split] = [file.size for file, _ in files]
    settled = newest < settled_before
    parts = {split: replace(part, settled=settled) for split, part in parts.items()}
    content = Content(parts, sizes)
    return make_dataset(name, content.listening(), class_names, options, content, warnings)


def _find_splits(root: Path) -> dict[str, str]:
    """Returns the folder of each split, relative to the root; or {"": ""} if classes lie there."""
    names = [entry.name for entry in _entries(root) if entry.is_dir()]
    found: dict[str, list[str]] = {}
    for name in names:
        if name.lower() in _FOLDERS:
            found.setdefault(_FOLDERS[name.lower()], []).append(name)
    if "train" in found and not _is_class(root, names, found["train"]):
        for split, folders in found.items():
            if len(folders) > 1:
                raise UserError(
                    f"{root} has {' and '.join(sorted(folders))}, which all mean the {split} "
                    "split. Keep one of them."
                )
        return {split: folders[0] for split, folders in found.items()}
    for name in sorted(names):
        if name.lower() in _LIKE_SPLITS and _has_folders(root / name):
            raise UserError(
                f"{root} has no folder train, but {name}, which looks like a split. Name the "
                "folders of the splits train, validation and test; only train must be there."
            )
    return {"": ""}


def _is_class(root: Path, names: Sequence[str], found: Sequence[str]) -> bool:
    """Whether `train` is the class of what runs on rails: it has images, and other classes."""
    others = any(name.lower() not in _FOLDERS for name in names)
    return others and not any(_has_folders(root / name) for name in found)


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in _entries(folder))


def _entries(folder: str | Path) -> Iterator["os.DirEntry[str]"]:
    """Yields what is in a folder except for what systems leave behind, in any order."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            if not (name.startswith(".") or name in _SKIPPED or name.endswith(_SKIPPED_ENDING)):
                yield entry


def _list_classes(root: Path, folder: str, optional: bool) -> dict[str, _Class]:
    """Returns the classes below a split's folder; none where that holds nothing and may be absent.

    The same name composed and decomposed, as macOS writes it, is one class.
    """
    classes: dict[str, _Class] = {}
    flat, others = [], 0
    for entry in _entries(root / folder):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            found = _list_class(entry, name)
            class_name = unicodedata.normalize("NFC", entry.name)
            before = classes.get(class_name, _Class([], []))
            classes[class_name] = _Class(
                sorted(before.images + found.images), sorted(before.others + found.others)
            )
        elif formats.is_image(entry.path):
            flat.append(name)
        else:
            others += 1
    where = root / folder
    if flat:
        beside = "beside the folders of its classes" if classes else "and no folders of classes"
        raise UserError(
            f"{where} has {len(flat):,} images {beside}, such as {_printable(min(flat))}: their "
            f"class is not known. Put each into a folder named after its class: {_SORTED}."
        )
    if optional:
        classes = {name: each for name, each in classes.items() if each.images or each.others}
    if not classes and not (optional and not others):
        raise UserError(f"{where} has no folders of classes. Sort the images as {_SORTED}.")
    if empty := sorted(name for name, each in classes.items() if not each.images):
        raise UserError(
            f"{where} has {len(empty)} class folder(s) without an image: "
            f"{', '.join(map(_printable, empty))}. Add images, or remove what is no class."
        )
    return classes


def _list_class(entry: "os.DirEntry[str]", name: str) -> _Class:
    images, others = [], []
    for file, path in _files_below(entry, name, ()):
        if formats.is_image(path):
            images.append(file)
        else:
            others.append(file.name)
    return _Class(sorted(images), sorted(others))


def _files_below(
    folder: "os.DirEntry[str]", name: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[_File, str]]:
    """Yields the files in a folder and all folders in it with their paths; links may lead there."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return  # a link to a folder that holds it
    for entry in _entries(folder.path):
        below = f"{name}/{entry.name}"
        if entry.is_dir():
            yield from _files_below(entry, below, (*above, here))
            continue
        try:
            status = entry.stat()
            times = status.st_mtime_ns, status.st_ctime_ns
            yield _File(below, status.st_size, *times), entry.path
        except FileNotFoundError:  # a broken link, which decoding will report
            yield _File(below, 0, 0, 0), entry.path


def images_below(folder: str) -> list[str]:
    """Returns the paths of the images in a folder and all folders in it, sorted.

    Raises:
        UserError: a folder that cannot be read.
    """
    paths: list[str] = []
    try:
        for entry in _entries(folder):
            if entry.is_dir():
                paths += [path for _, path in _files_below(entry, entry.name, ())]
            else:
                paths.append(entry.path)
    except OSError as error:
        raise _unreadable(error) from error
    return sorted(path for path in paths if formats.is_image(path))


def _check_classes(
    root: Path, folders: Mapping[str, str], listed: Mapping[str, Mapping[str, _Class]]
) -> list[str]:
    """Returns the classes: numbers by value, others as torchvision's `ImageFolder` orders them."""
    first = "" if "" in listed else "train"
    known = _in_order(listed[first])
    if len(known) < 2:
        inner = root / folders[first] / known[0]
        hint = f"Do you mean folder:{inner}?" if _has_folders(inner) else f"Sort as {_SORTED}."
        raise UserError(
            f"{inner.parent} has only one class, {_printable(known[0])}. A classifier needs two "
            f"at least. {hint}"
        )
    for split, classes in listed.items():
        if unknown := sorted(set(classes) - set(known)):
            raise UserError(
                f"{root / folders[split]} has {len(unknown)} class(es) that {folders[first]} has "
                f"not: {', '.join(map(_printable, unknown))}. Are they written alike? Rename "
                "them, or add training images of them."
            )
    return known


def _in_order(names: Iterable[str]) -> list[str]:
    names = list(names)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _cut(
    classes: Mapping[str, _Class], shares: Mapping[str, float], seed: int
) -> dict[str, dict[str, _Class]]:
    """Cuts splits out of each class; what is left is `train`.

    Each gets its share of the class, but at least one image, as long as one is left for train.
    The order within a class is that of hashes of seed and name, which neither the file system nor
    a random number generator has a hand in.
    """
    parts: dict[str, dict[str, _Class]] = {split: {} for split in ("train", *shares)}
    for class_name, each in classes.items():
        left = sorted(each.images, key=lambda file: _hash(f"{seed}:{file.name}"))
        number = len(left)
        for split, share in shares.items():
            count = min(max(1, round(share * number)), len(left) - 1)
            parts[split][class_name] = _Class(sorted(left[:count]), [])
            left = left[count:]
        parts["train"][class_name] = _Class(sorted(left), each.others)
    return parts


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(*_ANY_NAME)).digest()


def _printable(name: str) -> str:
    return printable(name.encode(*_ANY_NAME).decode("utf-8", "replace"))


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename} cannot be read ({error.strerror}). Check its permissions.")
