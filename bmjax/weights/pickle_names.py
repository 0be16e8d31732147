"""The names that a pickle may ask for: what makes tensors, what stays a name, what is refused.

No name is ever looked up, so that none can do harm here. A few are refused all the same: a file
that asks for them was made to run commands where something else reads it, and its owner should
know; or it holds tensors of a kind that would be lost without a word.
"""

import numpy as np

from bmjax.weights.tensors import DTYPES, STORAGES, BadFileError

STORAGE_OF = {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
STORAGE_OF |= {f"torch.cuda.{name}": dtype for name, dtype in STORAGES.items()}
STORAGE_OF["torch.storage.UntypedStorage"] = np.dtype(np.uint8)
DTYPE_OF = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}

DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
_REBUILD = "torch._utils._rebuild_"
# With how many arguments PyTorch calls each, at least and at most.
TENSORS = {
    f"{_REBUILD}tensor": (4, 4),
    f"{_REBUILD}tensor_v2": (6, 7),
    f"{_REBUILD}tensor_v3": (7, 8),
}
PARAMETERS = {
    f"{_REBUILD}parameter": (3, 3),
    f"{_REBUILD}parameter_with_state": (4, 4),
    # Before version 0.4 a parameter was called as a class, and its settings came after.
    "torch.nn.parameter.Parameter": (1, 2),
}
TENSOR_MAKERS = TENSORS | PARAMETERS
SIZE = "torch.Size"
# Tensors with attributes of their own, as some programs mark their parameters.
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
GETATTR = "builtins.getattr"
KNOWN = {*STORAGE_OF, *DTYPE_OF, *DICTS, *TENSOR_MAKERS, SIZE, FROM_TYPE}

_RUNNING_MODULES = {
    *("os", "posix", "nt", "subprocess", "pty", "sys", "shutil", "socket", "ctypes", "webbrowser"),
    *("importlib", "runpy", "code", "codeop", "pdb", "bdb", "timeit", "cProfile", "profile"),
    *("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pip"),
    *("urllib", "http", "requests", "asyncio", "multiprocessing", "commands"),
}
_RUNNING = {
    *(f"builtins.{name}" for name in ("eval", "exec", "compile", "execfile", "apply", "open")),
    *(f"builtins.{name}" for name in ("__import__", "input", "breakpoint", "globals", "locals")),
    *(f"builtins.{name}" for name in ("vars", "setattr", "delattr")),
    *("torch.load", "torch.jit.load", "torch.serialization.load", "numpy.load"),
    *("numpy.loadtxt", "numpy.fromfile", "numpy.memmap", "types.FunctionType", "types.CodeType"),
}
_RUNNING_PREFIXES = ("torch.hub.", "torch.package.", "torch.utils.cpp_extension.", "numpy.testing.")


def check(module: str, name: str) -> str:
    """Returns the full name of what a pickle would import.

    Raises:
        BadFileError: it can run commands, or makes a tensor of a kind that is not known.
    """
    full = f"{module}.{name}"
    if module in ("__builtin__", "builtins"):
        full = f"builtins.{name}"
    if full in KNOWN:
        return full
    runs = full in _RUNNING or full.startswith(_RUNNING_PREFIXES)
    if runs or module.split(".")[0] in _RUNNING_MODULES or reaches_inside(name):
        raise BadFileError(
            f"refused to import {shorten(full)[1:-1]}, which its pickle asks for, which can run "
            "commands, and which weights do not need; nothing of the file was run. It is hostile "
            "or damaged: do not load it with torch either, and get it from a source that you trust."
        )
    torchs_own = full.startswith("torch.") and full.endswith("Storage")
    if torchs_own or full.startswith(_REBUILD):
        raise BadFileError(
            f"refused to import {shorten(full)[1:-1]}, which its pickle asks for: it holds tensors "
            "of a kind that weights here do not have (quantized, sparse or complex), or is "
            "damaged. If you trust it, load it with torch and save plain tensors."
        )
    return full


def reaches_inside(name: str) -> bool:
    """Tells whether a name goes by Python's own attributes, such as `__globals__`."""
    return any(part.startswith("__") and part.endswith("__") for part in name.split("."))


def shorten(value: object) -> str:
    """Returns a value as it is shown in a message."""
    text = repr(value)
    return text if len(text) < 100 else f"{text[:95]}...'"
