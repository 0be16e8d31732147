"""All that a run leaves behind and that must not depend on whether it was stopped."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.machine.storage import read_settings
from bmjax.runs import checkpoint
from bmjax.runs.folder import CONFIG
from bmjax.runs.history import read_metrics

_SPEEDS = ("examples_per_second", "inference_images_per_second")


def run_folders(out: Path) -> list[Path]:
    """Returns the folders of the runs that a command has begun: its own, or those in it."""
    try:
        inner = sorted(entry.path for entry in os.scandir(out) if entry.is_dir())
    except FileNotFoundError:
        return []
    return [path for path in (out, *map(Path, inner)) if (path / CONFIG).is_file()]


def contents(out: Path) -> dict[str, Any]:
    """Returns all that must be equal at the end, by name: arrays, and what JSON holds."""
    found: dict[str, Any] = {}
    for run in run_folders(out):
        name = str(run.relative_to(out))
        settings = read_settings(run / CONFIG)
        settings["config"].pop("out")
        settings["extra"].pop("teacher", None)
        metrics = read_metrics(run / "metrics.jsonl")
        step, said = checkpoint.newest_sound(run / "checkpoints")
        found |= {
            f"{name}: settings": settings,
            f"{name}: step": step,
            f"{name}: damage": said,
            f"{name}: metrics": [_without_speed(record) for record in metrics],
        }
        if step is not None:
            read = checkpoint.read(run / "checkpoints", step, ("state", "best"))
            found[f"{name}: meta"] = read["meta"]
            for item in ("state", "best"):
                arrays = read.get(item, {})
                found |= {f"{name}: {item}/{key}": array for key, array in arrays.items()}
    results = out / "results.json"
    if results.is_file():
        rows = json.loads(results.read_text("utf-8"))["rows"]
        found["results"] = [_without_speed(row) for row in rows]
    return found


def _without_speed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _SPEEDS}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Lists what is not the same to the bit, and where; of `contents`."""
    lines = [f"{name} is missing" for name in ours if name not in theirs]
    lines += [f"{name} is new" for name in theirs if name not in ours]
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        if isinstance(one, np.ndarray):
            lines += _different_arrays(name, one, other)
        elif isinstance(one, dict) and isinstance(other, dict):
            lines += differences(*({f"{name}, {k}": v for k, v in d.items()} for d in (one, other)))
        elif isinstance(one, list) and isinstance(other, list):
            pairs = zip(one, other, strict=False)
            lines += [f"{name}, {n}: {a} and {b}" for n, (a, b) in enumerate(pairs) if a != b][:1]
            if len(one) != len(other):
                lines.append(f"{name}: {len(one)} and {len(other)} of them")
        elif one != other:
            lines.append(f"{name}: {one} and {other}")
    return sorted(lines)


def _different_arrays(name: str, one: np.ndarray, other: np.ndarray) -> list[str]:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return [f"{name}: {one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"]
    width = f"u{one.dtype.itemsize}"
    unlike = np.atleast_1d(np.asarray(one).view(width) != np.asarray(other).view(width))
    if not unlike.any():
        return []
    place = tuple(int(axis[0]) for axis in np.nonzero(unlike))
    pair = np.atleast_1d(one)[unlike], np.atleast_1d(other)[unlike]
    apart = np.abs(pair[0].astype(float) - pair[1].astype(float)).max()
    return [
        f"{name}: {unlike.sum()} of {one.size} numbers, by {apart:.3g} at most, the first at "
        f"{list(place)}: {pair[0][0].item()} and {pair[1][0].item()}"
    ]
