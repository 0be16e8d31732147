"""Rows of what a compiler made of programs, kept in a file as they come."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What tells one row from another; all but the contender are a case.
KEY = ("precision", "topology", "model", "job", "contender")
Row = Mapping[str, Any]


def read(path: Path) -> list[dict[str, str]]:
    """Returns the rows that are there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(
    path: Path, rows: Iterable[Row], columns: Sequence[str], order: Sequence[Sequence[str]]
) -> None:
    """Writes rows in the order of the cases.

    Args:
        path: of the file.
        rows: each has those of `columns` that it knows.
        columns: all that are written.
        order: of precisions, topologies, models and jobs.
    """

    def place(row: Row) -> list[Any]:
        ranks = [known.index(row[name]) for name, known in zip(KEY, order, strict=False)]
        return [*ranks, row["contender"]]

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=place))


def compile_missing(
    path: Path,
    cases: Iterable[tuple[str, ...]],
    compile_rows: Callable[[tuple[str, ...]], list[dict[str, Any]]],
    write_rows: Callable[[Path, Iterable[Row]], None],
) -> Iterator[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Compiles the cases that a file has no row of, and keeps each as it comes; yields them.

    The file is read again before each is added: another process may add some, too.
    """
    for case in cases:
        if any(tuple(row[name] for name in KEY[:4]) == case for row in read(path)):
            continue
        made = compile_rows(case)
        write_rows(path, [*read(path), *made])
        yield case, made


def ratios(row: Row, plain: Row) -> str:
    """Returns bytes and temporaries as shares of plain Linen's."""
    figures = [(float(row[name]), float(plain[name])) for name in ("bytes_accessed", "temp_bytes")]
    return ", ".join(f"{one / other:.2f}" if other else "-" for one, other in figures)
