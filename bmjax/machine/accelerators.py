"""What may keep JAX from a GPU or TPU that is there: packages that don't fit, others' memory."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# Packages beside jaxlib that bring an accelerator's part of JAX; each belongs to one version of it.
_PLUGINS = ("libtpu", "jax-cuda", "jax-rocm")
# Google's number on the PCI bus, and those of its TPUs (it makes network cards, too), as in JAX's
# hardware_utils.py.
_GOOGLE = "0x1ae0"
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
_PCI = Path("/sys/bus/pci/devices")
_INSTALL = {
    "gpu": 'pip install --upgrade "jax[cuda12]"',
    "tpu": 'pip install --upgrade "jax[tpu]", and restart the runtime',
}
_NAMES = {"gpu": "an NVIDIA GPU", "tpu": "a TPU", "cpu": "the CPU"}
# Of a GPU's memory; what a driver and an idle desktop hold is less.
_LARGE_SHARE = 0.1
# A TPU takes its time to be found.
_SECONDS = 120


def seen() -> list[str]:
    """Returns which of `gpu` and `tpu` the machine seems to have, whatever JAX can do with it."""
    found = []
    if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists() or shutil.which("nvidia-smi"):
        found.append("gpu")
    told = {"TPU_NAME", "COLAB_TPU_ADDR", "TPU_ACCELERATOR_TYPE"} & os.environ.keys()
    if told or Path("/dev/accel0").exists() or _has_tpu_chip():
        found.append("tpu")
    return found


def _has_tpu_chip() -> bool:
    return any(
        _text(device / "vendor") == _GOOGLE and _text(device / "device") in _TPUS
        for device in _PCI.glob("*")
    )


def _text(path: Path) -> str:
    return path.read_text("utf-8").strip() if path.is_file() else ""


def absent(backend: str | None, expected: str) -> list[str]:
    """Says which accelerators JAX does not compute on although they are there, or are expected.

    Args:
        backend: what JAX computes on; None: on nothing.
        expected: `cpu`, `gpu`, `tpu`, or `any`.
    """
    missed = [] if expected in ("any", backend) else [expected]
    if expected == "any" and backend == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        missed = seen()
    return [_absent(kind, backend, kind == expected) for kind in missed]


def _absent(kind: str, backend: str | None, expected: bool) -> str:
    computes = f"JAX computes on {_NAMES.get(backend, backend)}" if backend else "JAX has no device"
    is_there = kind == "cpu" or kind in seen()
    if kind == "cpu":
        return f"the CPU is expected, but {computes}. Set JAX_PLATFORMS=cpu."
    if not is_there:
        return (
            f"{_NAMES[kind]} is expected, but {computes}, and the machine shows none. Choose a "
            f"runtime with {_NAMES[kind]} (Colab: Runtime, Change runtime type; Kaggle: Settings, "
            "Accelerator)."
        )
    problem = f"{_NAMES[kind]} is expected" if expected else f"there is {_NAMES[kind]}"
    reason = _reason(kind)
    said = f" JAX says: {reason}." if reason else ""
    return f"{problem}, but {computes}.{said} Install its build: {_INSTALL[kind]}."


def _reason(kind: str) -> str:
    """Returns why JAX cannot use an accelerator, asked in a process of its own."""
    platform = {"gpu": "cuda", "tpu": "tpu"}[kind]
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    words = [sys.executable, "-c", "import jax; jax.devices()"]
    lines = _lines(words, environment, errors=True)
    said = lines[-1].partition(": ")[2] if lines else ""
    return said.partition(" (set JAX_PLATFORMS")[0].rstrip(".")


def mismatches() -> list[str]:
    """Says which installed parts of JAX for accelerators belong to another version of it."""
    wanted: dict[str, Requirement] = {}
    for text in metadata.requires("jax") or []:
        requirement = Requirement(text)
        if requirement.name.startswith(_PLUGINS):
            wanted[requirement.name] = requirement
    problems = []
    for name, requirement in sorted(wanted.items()):
        installed = installed_version(name)
        if installed and not requirement.specifier.contains(installed, prereleases=True):
            problems.append(
                f"{name} {installed} does not fit jax {installed_version('jax')}, which needs "
                f"{name}{requirement.specifier}. Install both anew: "
                f"{_INSTALL['tpu' if name == 'libtpu' else 'gpu']}."
            )
    return problems + _foreign_libtpu()


def _foreign_libtpu() -> list[str]:
    """Says where another package has put its own libtpu in the place of JAX's."""
    if importlib.util.find_spec("libtpu") is None:
        return []
    if hasattr(importlib.import_module("libtpu"), "get_library_path"):
        return []
    others = [
        name
        for name in ("tensorflow-tpu", "torch-xla", "libtpu-nightly")
        if installed_version(name)
    ]
    cause = f", perhaps by {' or '.join(others)}" if others else ""
    return [
        f"the package libtpu is not the one that JAX needs{cause}. Install it anew: "
        'pip install --force-reinstall --upgrade "jax[tpu]", and restart the runtime.'
    ]


def taken() -> list[str]:
    """Says how much of each GPU's memory other programs hold, where it is much.

    TensorFlow takes all that is free when it first computes, and PyTorch keeps what it has used.
    """
    problems = []
    fields = "index,memory.used,memory.total"
    for line in _ask_nvidia(f"--query-gpu={fields}"):
        index, used, total = (part.strip() for part in line.split(","))
        if used.isdecimal() and total.isdecimal() and int(used) > _LARGE_SHARE * int(total):
            problems.append(
                f"{int(used):,} of {int(total):,} MiB of GPU {index} are taken{_holders()}. End "
                "what holds them (in a notebook: restart the kernel). TensorFlow leaves the GPU "
                'alone after tf.config.set_visible_devices([], "GPU"), and takes no more than it '
                "needs with TF_FORCE_GPU_ALLOW_GROWTH=true."
            )
    return problems


def _holders() -> str:
    named = []
    for line in _ask_nvidia("--query-compute-apps=pid,process_name,used_memory"):
        pid, _, rest = line.partition(",")
        if pid.strip() != str(os.getpid()):
            name, _, used = rest.rpartition(",")
            named.append(f"{name.strip()} (process {pid.strip()}, {used.strip()} MiB)")
    return f" by {', '.join(named)}" if named else ""


def _ask_nvidia(query: str) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    return _lines([program, query, "--format=csv,noheader,nounits"])


def _lines(
    words: Sequence[str], environment: dict[str, str] | None = None, errors: bool = False
) -> list[str]:
    """Returns the lines that a program prints, or of its errors; none where it does not end well.

    Args:
        words: of its command line.
        environment: None: this process's.
        errors: whether what it prints where it fails is wanted.
    """
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if bool(done.returncode) != errors:
        return []
    return (done.stderr if errors else done.stdout).strip().splitlines()


def installed_version(name: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
