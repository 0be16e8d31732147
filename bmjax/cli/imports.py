"""The user's own code, imported because the command line says so, and for no other reason."""

import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from bmjax.errors import UserError

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def import_own(asked: Any) -> None:
    """Imports what `--import` names, in order, before any model is looked up by its name.

    Args:
        asked: the config of a command; one without `imports` asks for nothing.

    Raises:
        UserError: a file or module that is not there, or that fails.
    """
    names = getattr(asked, "imports", ())
    if names and hasattr(asked, "device"):
        from bmjax.machine.parallel import request_devices

        request_devices(asked.device)  # the user's code may be the first to use JAX
    for name in names:
        import_one(name)


def import_one(name: str) -> ModuleType:
    """Imports a file such as `mine.py`, or a module such as `package.models`; each once.

    The folder of a file, and for a module the current one, come last among those that Python looks
    for modules in.

    Raises:
        UserError: it is not there, or fails.
    """
    file = Path(name).expanduser()
    if file.is_file() or file.suffix == ".py" or not _MODULE.fullmatch(name):
        return _import_file(name, file.resolve())
    _find_modules_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"--import {name}: there is no such module, nor a file of that name. Give a file "
                "such as mine.py, or a module that Python finds from here."
            ) from error
        raise _failed(name, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def _import_file(name: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"--import {name}: there is no such file. Check the path.")
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(file):
            return module
    spec = importlib.util.spec_from_file_location(_module_name(file), file)
    if spec is None or spec.loader is None:
        raise UserError(f"--import {name}: this is no file of Python. Give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _find_modules_in(file.parent)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[spec.name]
        if isinstance(error, Exception | SystemExit):
            raise _failed(name, error) from error
        raise
    return module


def _module_name(file: Path) -> str:
    """Returns the file's own name, or where another module is known so, one that is free."""
    try:
        found = importlib.util.find_spec(file.stem)
        taken = found is not None and found.origin != str(file)
    except (ImportError, ValueError):  # such as of "a.b", in "a.b.py"
        taken = True
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    return f"{file.stem}_{digest}" if taken else file.stem


def _find_modules_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _failed(name: str, error: BaseException) -> UserError:
    """Returns what is said of the user's own code: its last line, and where it happened."""
    said = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, UserError):
        said = str(error).rstrip(".")
    if isinstance(error, SyntaxError):
        place = f"line {error.lineno} of {error.filename}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((each for each in reversed(frames) if _is_users(each.filename)), frames[-1])
        place = f"line {last.lineno} of {last.filename}"
    return UserError(f"--import {name} failed: {said} ({place}).")


def _is_users(file: str) -> bool:
    """Whether a file is neither ours, nor Python's, nor of an installed package."""
    others = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), "<frozen")
    return not file.startswith(others) and "site-packages" not in file
