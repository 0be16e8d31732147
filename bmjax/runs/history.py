"""The metrics of a run, as it left them in `metrics.jsonl`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Of training alone, so that no split need be named.
_OF_TRAINING = ("learning_rate", "examples_per_second")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; lines that are no records (cut off by a kill) are left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def by_epoch(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins records of `metrics.jsonl` to a table with one row per epoch.

    Returns:
        Rows in order of the epochs: `epoch`, `step` (updates done at its end), `learning_rate` (of
        its last step), `examples_per_second`, and with the split before their names the metrics:
        `train_loss`, `validation_accuracy`, ... A run that never trained has a row of epoch 0, or
        none.
    """
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        epoch = record.get("epoch", 0)
        row = rows.setdefault(epoch, {"epoch": epoch, "step": record["step"]})
        for name, value in record.items():
            if name not in ("epoch", "step", "split"):
                row[name if name in _OF_TRAINING else f"{record.get('split')}_{name}"] = value
    return [rows[epoch] for epoch in sorted(rows)]
