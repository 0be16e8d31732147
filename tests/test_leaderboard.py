import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bmjax.data import load_dataset
from bmjax.data.sources import all_images
from bmjax.distill.teachers import combine
from bmjax.errors import UserError
from bmjax.runs.trained import load_run
from experiments import leaderboard

TABLE = """
data = "npz:{path}"
seeds = [0, 1]
train_examples = 60

[settings]
epochs = 2
batch_size = 16
hidden_sizes = [16]
view_passes = 1
devices = 1

[[pairs]]
student = "mlp"
teacher = {{ model = "cnn_tiny", epochs = 1, hidden_sizes = [] }}
paper = {{ kd = 91.5 }}
source = "A paper, 2020"

[methods.kd]
temperature = 2.0

[methods.hint]
features = "hint"
"""


@pytest.mark.slow
def test_twice_the_same_files_and_no_test_image_before_the_end(
    tmp_path, shapes_npz, monkeypatch, capsys
):
    table = tmp_path / "table.toml"
    table.write_text(TABLE.format(path=shapes_npz))
    out = tmp_path / "board"
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(table), "--out", str(out)])
    trained: list[int] = []
    timed = leaderboard.timed

    def watch(config, distillation, teacher, dataset, console):
        assert len(dataset.test) == 0
        assert np.bincount(dataset.train.labels).tolist() == [20, 20, 20]
        assert not list(out.rglob("test.json"))
        trained.append(1)
        timed(config, distillation, teacher, dataset, console)

    monkeypatch.setattr(leaderboard, "timed", watch)
    leaderboard.main()
    assert len(trained) == 8
    names = ("leaderboard.csv", "leaderboard.md", "leaderboard.png")
    first = [(out / name).read_bytes() for name in names]
    monkeypatch.setattr(leaderboard, "train_all", lambda *_: None)
    leaderboard.main()
    assert [(out / name).read_bytes() for name in names] == first
    rows = list(csv.DictReader(first[0].decode().splitlines()))
    assert [row["method"] for row in rows] == ["alone", "kd", "hint", "teacher"]
    assert [row["paper"] for row in rows] == ["", "91.5", "", ""]
    assert float(rows[3]["agreement_mean"]) == 100
    alone, kd = ([float(v) for v in row["accuracy_each"].split()] for row in rows[:2])
    gains = [b - a for a, b in zip(alone, kd, strict=True)]
    assert float(rows[1]["over_alone_mean"]) == pytest.approx(np.mean(gains), abs=1e-3)
    assert float(rows[1]["accuracy_std"]) == pytest.approx(np.std(kd, ddof=1), abs=1e-3)
    printed = capsys.readouterr().out
    assert "| cnn_tiny | mlp | alone |" in printed
    assert "60 training images, epochs 2, batch_size 16" in printed
    assert "kd: temperature 2.0; hint: features hint; teacher cnn_tiny: epochs 1" in printed
    assert "Figures of papers: A paper, 2020." in printed


def test_what_is_no_table_is_named(tmp_path):
    (tmp_path / "table.toml").write_text("data = 'mnist5k'")
    content = 'data = "mnist5k"\nseeds = [0]\npairs = [{student = "mlp"}]\nmethods = {}\n'
    (tmp_path / "pair.toml").write_text(content)
    for name in ("table.toml", "pair.toml", "nothing.toml"):
        with pytest.raises(UserError, match="is no table of a leaderboard"):
            leaderboard.Board.read(tmp_path / name, tmp_path)


def test_a_method_with_other_views_has_a_cache_of_its_own(tmp_path):
    methods: dict = {"kd": {}, "mixed": {"mixup": 0.8}, "hint": {"features": "hint"}}
    pair = {"student": "mlp", "teacher": {"model": "cnn"}}
    board = leaderboard.Board("mnist5k", [0], 0, {"view_passes": 2}, [pair], methods, tmp_path)
    caches = [board.student(pair, 0, name).teacher_cache for name in methods]
    names = [cache and Path(cache).name for cache in caches]
    assert names == ["logits", "logits-mixed", None]


@pytest.mark.slow
def test_a_teacher_of_several_members_is_asked_and_measured_as_one(tmp_path, shapes_npz):
    text = TABLE.format(path=shapes_npz).replace("epochs = 1", "epochs = 1, members = 2")
    text = text.replace("seeds = [0, 1]", "seeds = [3]").partition("[methods.hint]")[0]
    (tmp_path / "table.toml").write_text(text)
    board = leaderboard.Board.read(tmp_path / "table.toml", tmp_path / "board")
    leaderboard.run(board)
    folder = tmp_path / "board" / "2xcnn_tiny-to-mlp" / "3"
    members = [load_run(folder / "teacher"), load_run(folder / "teacher-1")]
    assert [run.run.config.seed for run in members] == [3, 1003]
    test = load_dataset(board.data).test
    logits = sum(np.log(run.predict(all_images(test))) for run in members)
    correct = 100 * np.mean(np.argmax(logits, -1) == test.labels)
    rows = csv.DictReader((tmp_path / "board" / "leaderboard.csv").read_text().splitlines())
    kd, teacher = [row for row in rows if row["method"] in ("kd", "teacher")]
    assert teacher["teacher"] == "2 x cnn_tiny"
    assert float(teacher["accuracy_mean"]) == pytest.approx(correct)
    assert float(teacher["agreement_mean"]) == 100 > float(kd["agreement_mean"])
    seconds = [float((run.run.path / "seconds.json").read_text()) for run in members]
    assert float(teacher["seconds_mean"]) == pytest.approx(sum(seconds))
    cache = json.loads((folder / "logits" / "cache.json").read_text())
    assert cache["of"]["teacher"] == combine(members).fingerprint


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([{"model": "cnn", "members": 0}], "members = 0"),
        ([{"model": "cnn", "members": "two"}], "members = 'two'"),
        ([{"model": "cnn"}, {"model": "cnn", "epochs": 3}], "the same teacher and student"),
        ([{"model": "cnn", "epoch": 3}], "epoch"),
    ],
)
def test_a_pair_that_cannot_be_is_named(tmp_path, pairs, said):
    pairs = [{"student": "mlp", "teacher": teacher} for teacher in pairs]
    board = leaderboard.Board("mnist5k", [0], 0, {}, pairs, {"kd": {}}, tmp_path)
    with pytest.raises(UserError, match=said):
        board.check()


def test_a_mistake_in_the_table_is_one_line(tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.toml"
    table.write_text(TABLE.format(path="x").replace("temperature", "temprature"))
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(table), "--data", "mnist5k"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        leaderboard.main()
    assert "temprature" in capsys.readouterr().err
