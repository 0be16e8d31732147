"""What there is to compute with, and what is missing."""

import os
import platform
from typing import Any

from bmjax.machine import accelerators
from bmjax.machine.accelerators import installed_version
from bmjax.machine.cache import cache_folder, why_unusable
from bmjax.machine.compiler_settings import Setting, for_kind, of_environment
from bmjax.machine.shapes import advice
from bmjax.machine.threads import settings_of_bmjax
from bmjax.version import __version__

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "mlxtend",
    "numpy",
    "pillow",
    "rich",
    "tensorboardX",
    "tyro",
)


def examine(expected: str = "any") -> dict[str, Any]:
    """Looks at the machine.

    Args:
        expected: what is to be computed on: `cpu`, `gpu`, `tpu`; `any` for the best there is.

    Returns:
        `bmjax`, `python`, `platform`, `versions` by package (None: not installed), `backend`,
        `devices`, `cores`, `cache` (None: it cannot be written), `compiler`, its flags beyond
        defaults with `name`, `value` and `source`, `hints`, on the sizes that the devices like, and
        `problems`: for each what it is and the remedy.
    """
    problems: list[str] = []
    backend, devices = _devices(problems)
    versions = {name: installed_version(name) for name in _PACKAGES}
    for name, version in versions.items():
        if version is None:
            problems.append(f"{name} is not installed. Install bmjax anew: it brings it along.")
    if _series(versions["jax"]) != _series(versions["jaxlib"]):
        problems.append(
            f"jax {versions['jax']} and jaxlib {versions['jaxlib']} differ. Install both in one "
            "version: pip install --upgrade jax jaxlib."
        )
    settings = of_environment() + (settings_of_bmjax() if backend == "cpu" else [])
    settings += [Setting(*each, "bmjax") for each in for_kind((devices or [""])[0]).items()]
    hints = advice(backend, devices[0] if devices else "", len(devices))
    problems += accelerators.absent(backend, expected)
    problems += accelerators.mismatches()
    if backend != "cpu" or expected == "gpu":
        problems += accelerators.taken()
    if backend == "cpu":
        problems += _slow_convolutions()
    if why := why_unusable():
        problems.append(f"the cache has no folder: {why}. Set BMJAX_CACHE to one that it can have.")
    return {
        "bmjax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "backend": backend,
        "devices": devices,
        "cores": os.cpu_count(),
        "cache": None if why else str(cache_folder()),
        "compiler": [setting._asdict() for setting in settings],
        "hints": hints,
        "problems": problems,
    }


def _series(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _devices(problems: list[str]) -> tuple[str | None, list[str]]:
    import jax

    try:
        return jax.default_backend(), [
            f"{d.device_kind} ({d.platform}:{d.id})" for d in jax.devices()
        ]
    except RuntimeError as error:
        problems.append(
            f"JAX finds no device ({error}). Check JAX_PLATFORMS "
            f"({os.environ.get('JAX_PLATFORMS', 'not set')}) and the accelerator's driver."
        )
        return None, []


def _slow_convolutions() -> list[str]:
    """Says why convolutions are slower on this CPU than they can be."""
    from bmjax.ops import onednn

    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or onednn.library():
        return []
    cause, remedy = "cannot be loaded", "install libgomp1 (Debian, Ubuntu) or libgomp (Fedora)"
    if os.environ.get("BMJAX_ONEDNN") == "0":
        cause, remedy = "is switched off by BMJAX_ONEDNN=0", "unset it"
    elif installed_version(onednn.PACKAGE) is None:
        cause, remedy = "is not installed", f"pip install {onednn.PACKAGE}"
    return [f"oneDNN {cause}, so that convolutions are slower; {remedy}."]
