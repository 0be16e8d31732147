"""Eight virtual CPU devices, strict settings, a small dataset, and a cache of the tests' own."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes many small objects, few of them garbage: looking for it so seldom saves a sixth.
gc.set_threshold(50_000, 20, 50)
# Compiling takes most of the tests' time, and half as long like this. Programs that tests start
# optimise as always, and so do all tests with JAX_DISABLE_MOST_OPTIMIZATIONS=0.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
# Broadcasting arrays of different rank hides mistakes, so it must be written out.
jax.config.update("jax_numpy_rank_promotion", "raise")

from bmjax.config import AugmentConfig, DeviceConfig, RunConfig, TrainConfig  # noqa: E402
from bmjax.data import ArraySource, Dataset  # noqa: E402
from bmjax.data.sources import all_images  # noqa: E402
from bmjax.evaluate import measure  # noqa: E402
from bmjax.machine.cache import COMPILED_BYTES, use_compilation_cache  # noqa: E402
from bmjax.models import registry  # noqa: E402
from bmjax.ops import onednn  # noqa: E402
from bmjax.runs.trained import TrainedRun, load_run  # noqa: E402
from bmjax.train.loop import fit  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    cache = tempfile.mkdtemp(prefix="bmjax-tests-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ["BMJAX_CACHE"] = cache
    # Compiled programs are kept from session to session, and for the commands that tests start:
    # compiling takes most of the time. JAX tells programs apart by all that they depend on.
    compiled = config.rootpath / ".pytest_cache" / "compiled"
    if sum(file.stat().st_size for file in compiled.glob("*")) > COMPILED_BYTES:
        shutil.rmtree(compiled, ignore_errors=True)
    compiled.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    # Programs that tests start leave their compiled modules for the next one, as usual.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    jax.devices()  # no test may be the first to say how many there are
    measure._SPEED_SECONDS = 0.0  # as few passes as a median needs
    use_compilation_cache()  # the same small programs are compiled in many tests
    for line in (
        "error",
        # Raised inside packages, about their own code or each other's.
        "ignore::DeprecationWarning:tensorflow_datasets.*",
        "ignore::DeprecationWarning:tensorboardX.*",
        "ignore::DeprecationWarning:google.*",
        "ignore::DeprecationWarning:orbax.*",
        "ignore::DeprecationWarning:flax.*",
        "ignore::DeprecationWarning:mlxtend.*",
        # Orbax says that it restores to the host when no sharding is given: as intended.
        "ignore:.*[Ss]harding.*:UserWarning:orbax.*",
    ):
        config.addinivalue_line("filterwarnings", line)
    warnings.simplefilter("default")


def with_cache(folder: Path) -> dict[str, str]:
    """Returns the environment of a process that keeps what it compiles in a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return {**environment, "BMJAX_CACHE": str(folder)}


def draw_shapes(num: int, seed: int, channels: int = 1, size: int = 12) -> ArraySource:
    """Three classes anyone can tell apart: a bright left half, top half, or centre."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (num, size, size, channels))
    labels = np.arange(num) % 3
    half, quarter = size // 2, size // 4
    images[labels == 0, :, :half] += 120
    images[labels == 1, :half] += 120
    images[labels == 2, quarter:-quarter, quarter:-quarter] += 120
    return ArraySource(images.astype(np.uint8), labels.astype(np.int32))


@contextlib.contextmanager
def float64_enabled() -> Iterator[None]:
    """Has JAX compute in float64; its own context manager has another name in each version."""
    before = bool(jax.config.read("jax_enable_x64"))
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def shapes() -> Dataset:
    return Dataset(
        "shapes", draw_shapes(90, 1), draw_shapes(30, 2), draw_shapes(50, 3), ("left", "top", "mid")
    )


@pytest.fixture
def shapes_npz(tmp_path: Path, shapes: Dataset) -> Path:
    return write_npz(tmp_path / "shapes.npz", shapes)


def write_npz(path: Path, dataset: Dataset) -> Path:
    arrays: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        arrays[f"{name}_image"] = all_images(dataset.split(name))
        arrays[f"{name}_label"] = dataset.split(name).labels
    np.savez(path, **arrays)
    return path


def small_config(out: Path) -> TrainConfig:
    """A run of two seconds: 6 epochs of 6 steps, on one device."""
    return TrainConfig(
        model="mlp",
        hidden_sizes=(16,),
        data="shapes",
        epochs=6,
        batch_size=16,
        out=str(out),
        views=AugmentConfig(shift=0.05),
        device=DeviceConfig(devices=1),
        run=RunConfig(tensorboard=False),
    )


@pytest.fixture
def small(tmp_path: Path) -> TrainConfig:
    return small_config(tmp_path / "run")


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory, shapes: Dataset, quiet: Console) -> Path:
    """The folder of a run that tests copy: a convolutional network that has learned the shapes."""
    folder = tmp_path_factory.mktemp("trained") / "teacher"
    config = dataclasses.replace(small_config(folder), model="cnn_tiny", hidden_sizes=())
    fit(config, shapes, console=quiet)
    return folder


@pytest.fixture
def teacher(tmp_path: Path, trained_once: Path) -> TrainedRun:
    """A convolutional network that has learned the shapes."""
    return load_run(shutil.copytree(trained_once, tmp_path / "teacher"))


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Forgets after the test what models it registered, and what modules it imported."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def quiet() -> Iterator[Console]:
    with open(os.devnull, "w") as nowhere:
        yield Console(file=nowhere)


@pytest.fixture
def nan_in_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the memory that oneDNN works in with NaN before each use."""
    scratch = onednn._scratch

    def filled(use: str, size: int) -> int:
        address = scratch(use, size)
        ctypes.memset(address, 0xFF, size)
        return address

    monkeypatch.setattr(onednn, "_scratch", filled)
