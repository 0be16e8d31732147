"""Methods of distillation against each other: every method, seed and pair of one table.

    uv run python experiments/leaderboard.py experiments/leaderboard_mnist5k.toml --out runs/board

The table (TOML) has `data`, `seeds`, perhaps `train_examples` (a part of the training split, as
many of each class), the settings in common by the names of `bmjax distill`'s flags under
`[settings]`, pairs of a teacher with its own settings and a student under `[[pairs]]`, and under
`[methods.NAME]` what each method changes. A teacher with `members = 3` is an ensemble of three that
differ by their seed. Where a paper has figures for a pair, they stand there as
`paper = { kd = 70.66 }` by method, with a `source`. It is stopped and started again at will. In OUT
it writes `leaderboard.csv`, `leaderboard.md` and `leaderboard.png`: mean and sample standard
deviation over seeds.

The student alone comes first and the teacher last, all with the same views for the same number of
steps. Test images are not loaded before every run is trained: what chooses an epoch cannot see
them. Each run is measured on them once, after its last epoch and with the params of the epoch
that validation chooses.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bmjax.config import DistillConfig, EvaluateConfig, RunConfig, TrainConfig
from bmjax.config.checks import check_distill, check_train
from bmjax.config.flat import flatten, unflatten
from bmjax.data import ArraySource, Dataset, load_dataset
from bmjax.data.sources import Source, all_images
from bmjax.distill.teachers import combine
from bmjax.distill.tour import train_student
from bmjax.errors import UserError
from bmjax.evaluate.measure import measure
from bmjax.machine.storage import write_atomically
from bmjax.runs.folder import CONFIG
from bmjax.runs.history import read_metrics
from bmjax.runs.trained import TrainedRun, load_run
from bmjax.train.loop import fit
from experiments.leaderboard_report import ALONE, TEACHER, draw, write_csv, write_markdown

# Between the seeds of an ensemble's members, so that no member of one is a member of another.
MEMBER_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Board:
    """A table that was read.

    Attributes:
        data: name of the dataset.
        seeds: of teacher and students alike.
        train_examples: of the training split; 0: all.
        settings: in common.
        pairs: each with `student`, `teacher`, the teacher's settings, and perhaps `paper`, figures
            by method, and their `source`.
        methods: name to its settings.
        out: where all of it goes.
    """

    data: str
    seeds: list[int]
    train_examples: int
    settings: dict[str, Any]
    pairs: list[dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    out: Path

    @classmethod
    def read(cls, path: Path, out: Path) -> "Board":
        """Reads a table; raises UserError where it cannot be."""
        try:
            content = tomllib.loads(path.read_text())
            for pair in content["pairs"]:
                _ = pair["student"], pair["teacher"]["model"]
            return cls(
                content["data"],
                content["seeds"],
                content.get("train_examples", 0),
                content.get("settings", {}),
                content["pairs"],
                content["methods"],
                out,
            )
        except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
            raise UserError(f"{path} is no table of a leaderboard: {error!r}.") from error

    def check(self) -> None:
        """Raises UserError where a setting is not one, before hours are spent on the others."""
        for pair in self.pairs:
            members = members_of(pair)
            if not (isinstance(members, int) and members >= 1):
                raise UserError(f"members = {members!r}: a teacher consists of 1 or more models.")
        if len({self.folder(pair, 0) for pair in self.pairs}) < len(self.pairs):
            raise UserError("two pairs of the table have the same teacher and student.")
        for pair in self.pairs:
            check_train(self.teachers(pair, self.seeds[0])[0])
            for method in [ALONE, *self.methods]:
                check_distill(self.student(pair, self.seeds[0], method))

    def folder(self, pair: dict[str, Any], seed: int) -> Path:
        """Returns the folder of a pair's runs with a seed."""
        name = f"{teacher_name(pair)}-to-{pair['student']}".replace(" ", "")
        return self.out / name / str(seed)

    def student(self, pair: dict[str, Any], seed: int, method: str) -> DistillConfig:
        """Returns the settings of a student; `alone` has those in common."""
        own = self.methods.get(method, {})
        folder = self.folder(pair, seed)
        flat = {**self.settings, **own, "student": pair["student"], "data": self.data, "seed": seed}
        config: DistillConfig = unflatten(DistillConfig, flat, f"the table's {method}")
        cached = bool(config.views.view_passes) and config.features == "none"
        # What a method changes about the views makes other logits.
        changed = any(name in flatten(config.views) for name in own)
        cache = str(folder / (f"logits-{method}" if changed else "logits"))
        return dataclasses.replace(
            config,
            teacher=tuple(str(path) for path in self.paths(pair, seed, TEACHER)),
            teacher_cache=cache if cached else "",
            out=str(folder / method),
            run=RunConfig(resume=True, tensorboard=False),
        )

    def teachers(self, pair: dict[str, Any], seed: int) -> list[TrainConfig]:
        """Returns the settings of a pair's teacher, or of each member of an ensemble."""
        known = flatten(TrainConfig())
        common = {k: v for k, v in self.settings.items() if k in known and k != "view_passes"}
        own = {k: v for k, v in pair["teacher"].items() if k != "members"}
        configs = []
        for index, path in enumerate(self.paths(pair, seed, TEACHER)):
            each = {"data": self.data, "seed": seed + index * MEMBER_SEED}
            config: TrainConfig = unflatten(
                TrainConfig, {**common, **own, **each}, "the table's teacher"
            )
            configs.append(dataclasses.replace(config, out=str(path)).resolved())
        return configs

    def paths(self, pair: dict[str, Any], seed: int, method: str) -> list[Path]:
        """Returns the folders of what stands in one row: a run, or the members of an ensemble."""
        folder = self.folder(pair, seed)
        number = members_of(pair) if method == TEACHER else 1
        return [folder / (f"{method}-{index}" if index else method) for index in range(number)]


def without_test(dataset: Dataset, train_examples: int) -> Dataset:
    """Returns what runs are trained on: no test images, and a balanced part of those to train."""
    images, labels = all_images(dataset.train), dataset.train.labels
    if train_examples:
        each = train_examples // dataset.num_classes
        kept = [np.flatnonzero(labels == label)[:each] for label in range(dataset.num_classes)]
        index = np.sort(np.concatenate(kept))
        images, labels = images[index], labels[index]
    train = ArraySource(images, labels)
    test = ArraySource(images[:0], labels[:0])
    return dataclasses.replace(dataset, train=train, test=test, content=None)


def train_all(board: Board, dataset: Dataset, console: Console) -> None:
    """Trains every run that is not finished yet; `dataset` has no test images."""
    for seed in board.seeds:
        for pair in board.pairs:
            folder = board.folder(pair, seed)
            for member in board.teachers(pair, seed):
                timed(member, None, None, dataset, console)
            teacher = load_all(board.paths(pair, seed, TEACHER))
            alone = board.student(pair, seed, ALONE).train_config(
                pair["student"], str(folder / ALONE)
            )
            timed(alone, None, None, dataset, console)
            for method in board.methods:
                config = board.student(pair, seed, method)
                timed(
                    config.train_config(config.student, config.folder),
                    config,
                    teacher,
                    dataset,
                    console,
                )


def timed(
    config: TrainConfig,
    distillation: DistillConfig | None,
    teacher: TrainedRun | None,
    dataset: Dataset,
    console: Console,
) -> None:
    """Trains one run, and keeps how long it took; of one that was interrupted nobody knows."""
    path = Path(config.folder)
    if (path / "seconds.json").is_file():
        return
    resumed = (path / CONFIG).is_file()
    begin = time.monotonic()
    if distillation is None:
        run = RunConfig(resume=resumed, tensorboard=False)
        fit(dataclasses.replace(config, run=run), dataset, console=console, title=str(path))
    else:
        train_student(distillation, teacher, path, dataset, console)
    seconds = None if resumed else time.monotonic() - begin
    write_atomically(path / "seconds.json", json.dumps(seconds))


def predictions(run: TrainedRun, test: Source) -> np.ndarray:
    """Returns the predicted labels, [examples]."""
    return run.predict(all_images(test)).argmax(axis=-1)


def load_all(paths: list[Path], which: str = "latest") -> TrainedRun:
    """Reads a run, or several as an ensemble."""
    return combine([load_run(path, which) for path in paths])


def measure_once(
    paths: list[Path], asked: Callable[[], np.ndarray], test: Source
) -> dict[str, Any]:
    """Measures a run or an ensemble on the test images, or reads back what was measured.

    Args:
        paths: the folder of the run, or of each member of the ensemble.
        asked: gives the teacher's predictions.
        test: the test images.
    """
    file = paths[0] / "test.json"
    if not file.is_file():
        how = EvaluateConfig(str(paths[0]))
        last, best = load_all(paths), load_all(paths, "best")
        measured = measure(last, test, how)
        seconds = [json.loads((path / "seconds.json").read_text()) for path in paths]
        rates = [
            record["examples_per_second"]
            for path in paths
            for record in read_metrics(path / "metrics.jsonl")
            if record["split"] == "train"
        ]
        result = {
            "accuracy": 100 * measured["accuracy"],
            "best_accuracy": 100 * measure(best, test, how)["accuracy"],
            "agreement": 100 * float(np.mean(predictions(last, test) == asked())),
            "calibration_error": 100 * measured["expected_calibration_error"],
            "seconds": None if None in seconds else sum(seconds),
            "images_per_second": statistics.median(rates),
        }
        write_atomically(file, json.dumps(result))
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def rows_of(board: Board, pair: dict[str, Any], test: Source) -> list[dict[str, Any]]:
    """Returns a row for the student alone, each method and the teacher, with a list by seed."""
    # A teacher is asked once for all of its students, and not at all where all is measured.
    asked = {
        seed: functools.cache(
            lambda seed=seed: predictions(load_all(board.paths(pair, seed, TEACHER)), test)
        )
        for seed in board.seeds
    }
    rows: list[dict[str, Any]] = []
    for method in [ALONE, *board.methods, TEACHER]:
        measured = [
            measure_once(board.paths(pair, seed, method), asked[seed], test) for seed in board.seeds
        ]
        row: dict[str, Any] = {
            "teacher": teacher_name(pair),
            "student": pair["student"],
            "method": method,
            "paper": pair.get("paper", {}).get(method, ""),
            "source": pair.get("source", ""),
            **{name: [each[name] for each in measured] for name in measured[0]},
        }
        alone = rows[0]["accuracy"] if rows else row["accuracy"]
        row["over_alone"] = [a - b for a, b in zip(row["accuracy"], alone, strict=True)]
        rows.append(row)
    return rows


def members_of(pair: dict[str, Any]) -> Any:
    """Returns of how many models a pair's teacher consists, by the table."""
    return pair["teacher"].get("members", 1)


def teacher_name(pair: dict[str, Any]) -> str:
    """Returns a teacher's model, and how many of it there are."""
    model, members = pair["teacher"]["model"], members_of(pair)
    return f"{members} x {model}" if members > 1 else str(model)


def listed(settings: dict[str, Any]) -> str:
    """Writes settings in a line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def caption_of(board: Board, images: int) -> str:
    """Returns what the rows have in common, and what is each one's own."""
    # The folder that images lie in is no part of the result.
    kind, _, place = board.data.partition(":")
    data = f"{kind}:{Path(place).name}" if place else kind
    seeds = ", ".join(map(str, board.seeds))
    common = [data, f"{images:,} training images", listed(board.settings)]
    own = [f"{name}: {listed(settings)}" for name, settings in board.methods.items() if settings]
    for pair in board.pairs:
        settings = {k: v for k, v in pair["teacher"].items() if k not in ("model", "members")}
        own += [f"teacher {teacher_name(pair)}: {listed(settings)}"] if settings else []
    first = f"{', '.join(filter(None, common))}; seeds {seeds}; mean ± deviation."
    return first + (f"\n\nSettings of their own: {'; '.join(own)}." if own else "")


def run(board: Board) -> None:
    """Trains what is not trained yet, measures, writes the tables and prints the one to read."""
    board.check()
    size, split_seed = board.settings.get("image_size", 0), board.settings.get("split_seed", 0)
    names = ("train", "validation")
    seen = load_dataset(board.data, size, split_seed=split_seed, splits=names)
    seen = without_test(seen, board.train_examples)
    train_all(board, seen, Console())
    test = load_dataset(board.data, size, split_seed=split_seed, splits=("test",)).test
    rows = [row for pair in board.pairs for row in rows_of(board, pair, test)]
    write_csv(rows, board.out / "leaderboard.csv")
    write_markdown(rows, caption_of(board, len(seen.train)), board.out / "leaderboard.md")
    draw(rows, board.out / "leaderboard.png")
    print((board.out / "leaderboard.md").read_text())


def main() -> None:
    """Reads the command line; what is wrong with it or the table is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", type=Path)
    parser.add_argument("--data", help="dataset, in place of the table's")
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"))
    arguments = parser.parse_args()
    try:
        board = Board.read(arguments.table, arguments.out)
        run(dataclasses.replace(board, data=arguments.data or board.data))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
