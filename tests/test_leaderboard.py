import csv
import sys

import numpy as np
import pytest

from bmjax.errors import UserError
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

[methods.kd]
temperature = 2.0
paper = 91.5

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
    assert rows[1]["paper"] == "91.5"
    assert float(rows[3]["agreement_mean"]) == 100
    alone, kd = ([float(v) for v in row["accuracy_each"].split()] for row in rows[:2])
    gains = [b - a for a, b in zip(alone, kd, strict=True)]
    assert float(rows[1]["over_alone_mean"]) == pytest.approx(np.mean(gains), abs=1e-3)
    assert float(rows[1]["accuracy_std"]) == pytest.approx(np.std(kd, ddof=1), abs=1e-3)
    assert "| cnn_tiny | mlp | alone |" in capsys.readouterr().out


def test_a_method_below_the_student_alone_is_told(tmp_path):
    values = {name: [1.0, 2.0] for name in leaderboard.COLUMNS}
    row = {"teacher": "a", "student": "b", "paper": "", **values}
    rows = [
        {**row, "method": "alone", "over_alone": [0.0, 0.0]},
        {**row, "method": "kd", "over_alone": [-0.5, 0.2], "seconds": [None, None]},
        {**row, "method": "teacher", "over_alone": [-1.0, -1.0]},
    ]
    leaderboard.write_tables(rows, tmp_path)
    alone, kd, teacher = (tmp_path / "leaderboard.md").read_text().splitlines()[2:]
    assert "-0.15 ± 0.49 (below the student alone)" in kd
    assert "below" not in alone + teacher
    assert "| - |" in kd


def test_what_is_no_table_is_named(tmp_path):
    (tmp_path / "table.toml").write_text("data = 'mnist5k'")
    for name in ("table.toml", "nothing.toml"):
        with pytest.raises(UserError, match="is no table of a leaderboard"):
            leaderboard.Board.read(tmp_path / name, tmp_path)
