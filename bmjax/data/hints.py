"""What a person may have meant whose `--data` leads nowhere."""

from pathlib import Path

from bmjax.config.paths import user_path
from bmjax.data import formats
from bmjax.errors import UserError, printable, unknown_name

_KINDS = ("npz", "folder", "tfds")
_FORMS = ("mnist5k", "npz:PATH", "folder:PATH", "tfds:NAME")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_INFO_OF_TFDS = "dataset_info.json"


def unknown(name: str) -> UserError:
    """Returns the error for the name of a dataset that is of no known kind."""
    kind, colon, path = name.partition(":")
    if colon and kind.lower() in _KINDS and path:
        return UserError(f"unknown dataset {name!r}. Do you mean {kind.lower()}:{path}?")
    if _is_address(name):
        return UserError(f"{printable(name)} is an address. {_DOWNLOAD}")
    place = user_path(name) if name else Path("nowhere")
    if place.exists():
        return UserError(f"{printable(name)} is a path without its kind. {meant(place)}")
    if colon or ("/" not in name and not Path(name).suffix):
        return unknown_name("dataset", name, _FORMS)
    return UserError(
        f"there is nothing at {printable(name)}. Check the path, and name its kind: "
        f"{', '.join(_FORMS)}."
    )


def no_folder(path: Path) -> UserError:
    """Returns the error for a `folder:PATH` that is none."""
    if _is_address(str(path)):
        return UserError(f"{printable(str(path))} is an address. {_DOWNLOAD}")
    what = "is a file, not a folder" if path.exists() else "does not exist"
    return UserError(f"{printable(str(path))} {what}. {meant(path, 'folder')}")


_DOWNLOAD = "Download it, unpack it, and give the folder: folder:PATH."


def _is_address(name: str) -> bool:
    # A path has one slash of the two.
    return name.lower().removeprefix("folder:").startswith(("http:/", "https:/", "s3:/", "gs:/"))


def meant(path: Path, kind: str = "") -> str:
    """Returns the remedy, as a sentence, for a path that was given for data of a kind.

    Args:
        path: what was given.
        kind: `folder` or `npz`; none: the path alone.
    """
    shown = printable(str(path))
    if path.is_dir():
        is_tfds = (path / _INFO_OF_TFDS).is_file()
        return f"Do you mean {'tfds' if is_tfds else 'folder'}:{shown}?"
    if not path.exists():
        return f"Check the path after '{kind}:'."
    suffix = path.suffix.lower()
    if suffix == ".npz" and kind != "npz":
        return f"Do you mean npz:{shown}?"
    if suffix in _ARCHIVES:
        return "Unpack it, and give the folder that it becomes: folder:PATH."
    if suffix in (".npz", ".npy"):
        return "Write images and labels by numpy.savez(PATH, image=images, label=labels)."
    if formats.is_image(str(path)):
        return "Give the folder that holds a folder of images per class: folder:PATH."
    return (
        "Data is a folder with a folder of images per class, folder:PATH, or arrays of images and "
        "labels, npz:PATH."
    )
