"""Rows of what a compiler made of programs, kept in a file as they come."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.bench.lowered import CONTENDERS, JOBS, does

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
    compile_rows: Callable[[tuple[str, ...], tuple[str, ...]], list[dict[str, Any]]],
    write_rows: Callable[[Path, Iterable[Row]], None],
) -> Iterator[tuple[tuple[str, ...], list[dict[str, Any]]]]:
    """Compiles the rows that a file lacks, and keeps those of a case as they come; yields them.

    The file is read again before each is added: another process may add some, too.

    Args:
        path: of the file.
        cases: of whose rows.
        compile_rows: makes those of a case by contenders, named as in `lowered.CONTENDERS`.
        write_rows: writes all to a file.
    """
    for case in cases:
        job, there = case[3], {tuple(row[name] for name in KEY) for row in read(path)}
        missing = tuple(
            name
            for name, contender in CONTENDERS.items()
            # Other names than those of jobs are of programs of bmjax alone.
            if does(name, job if job in JOBS else "streamed")
            and (*case, contender.name) not in there
        )
        if not missing:
            continue
        made = compile_rows(case, missing)
        write_rows(path, [*read(path), *made])
        yield case, made


def ratios(row: Row, plain: Row) -> str:
    """Returns bytes and temporaries as shares of plain Linen's."""
    figures = [(float(row[name]), float(plain[name])) for name in ("bytes_accessed", "temp_bytes")]
    return ", ".join(f"{one / other:.2f}" if other else "-" for one, other in figures)
