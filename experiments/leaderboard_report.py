"""The files of `leaderboard.py`: CSV, Markdown and plot of the same rows.

A row has `teacher`, `student`, `method`, `paper`, `source`, and under each name of `COLUMNS` a list
by seed, None where it is not known.
"""

import csv
import statistics
from pathlib import Path
from typing import Any

ALONE, TEACHER = "alone", "teacher"
COLUMNS = {
    "accuracy": "test accuracy, last epoch (%)",
    "best_accuracy": "the epoch chosen on validation (%)",
    "over_alone": "over alone (points)",
    "agreement": "agreement with the teacher (%)",
    "calibration_error": "calibration error (%)",
    "seconds": "seconds of training",
    "images_per_second": "images/s of training",
}


def spread(values: list[float | None]) -> str:
    """Formats mean and sample standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 0 if max(known) > 1000 else 2
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes mean, standard deviation and the value of each seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"{name}_{part}" for name in COLUMNS for part in ("mean", "std", "each")]
        first = ("teacher", "student", "method", "paper", "source")
        writer.writerow([*first, *names])
        for row in rows:
            cells: list[Any] = [row[name] for name in first]
            for name in COLUMNS:
                known = [value for value in row[name] if value is not None]
                deviation = statistics.stdev(known) if len(known) > 1 else ""
                each = " ".join("" if v is None else f"{v:.4f}" for v in row[name])
                cells += [statistics.mean(known) if known else "", deviation, each]
            writer.writerow(cells)


def write_markdown(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Writes mean and standard deviation; says which method is below the student alone."""
    headings = ["teacher", "student", "method", *COLUMNS.values(), "paper (%)"]
    lines = [caption, "", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row in rows:
        cells = [row["teacher"], row["student"], row["method"]]
        cells += [spread(row[name]) for name in COLUMNS]
        if row["method"] not in (ALONE, TEACHER) and statistics.mean(row["over_alone"]) < 0:
            cells[3 + list(COLUMNS).index("over_alone")] += " (below the student alone)"
        lines.append("| " + " | ".join([*cells, str(row["paper"])]) + " |")
    sources = dict.fromkeys(row["source"] for row in rows if row["source"])
    lines += [f"\nFigures of papers: {source}." for source in sources]
    path.write_text("\n".join(lines) + "\n")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the test accuracy of each method: a dot per seed, and the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys((row["teacher"], row["student"]) for row in rows))
    number = len(rows) // len(pairs)
    figure = Figure(figsize=(6 * len(pairs), 1 + 0.4 * number), layout="constrained")
    FigureCanvasAgg(figure)
    for pair, axes in zip(pairs, figure.subplots(1, len(pairs), squeeze=False)[0], strict=True):
        own = [row for row in rows if (row["teacher"], row["student"]) == pair]
        for place, row in enumerate(reversed(own)):
            colour = {ALONE: "C7", TEACHER: "C1"}.get(row["method"], "C0")
            axes.plot(row["accuracy"], [place] * len(row["accuracy"]), "o", color=colour, alpha=0.4)
            axes.plot(statistics.mean(row["accuracy"]), place, "|", color=colour, ms=18, mew=2.5)
        axes.axvline(statistics.mean(own[0]["accuracy"]), color="C7", lw=0.8, ls=":")
        axes.set_yticks(range(len(own)), [row["method"] for row in reversed(own)])
        axes.set(title=f"{pair[0]} to {pair[1]}", xlabel="test accuracy, last epoch (%)")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
