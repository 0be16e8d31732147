import csv
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bmjax import cli
from bmjax.config import AugmentConfig, DeviceConfig, PredictConfig, RunConfig, TrainConfig
from bmjax.errors import UserError
from bmjax.evaluate.prediction import NoImage, Prediction, predict, predict_each
from bmjax.runs.trained import TrainedRun, load_run
from bmjax.train.loop import fit


@pytest.fixture(scope="module")
def out(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("predict") / "run"
    config = TrainConfig(
        model="mlp",
        hidden_sizes=(16,),
        epochs=6,
        batch_size=16,
        out=str(path),
        views=AugmentConfig(shift=0.05),
        device=DeviceConfig(devices=1),
        run=RunConfig(tensorboard=False),
    )
    with open(os.devnull, "w") as nowhere:
        fit(config, shapes, console=Console(file=nowhere))
    return path


@pytest.fixture
def folder(tmp_path, shapes):
    """Eleven images, two of them further down, one broken file, and some that are no images."""
    path = tmp_path / "images"
    (path / "below" / "deep").mkdir(parents=True)
    for index in range(11):
        place = path / "below" / "deep" if index > 8 else path
        Image.fromarray(shapes.test.images[index, :, :, 0]).save(place / f"{index:02}.png")
    (path / "05b.jpg").write_bytes(b"\xff\xd8broken")
    (path / "notes.txt").write_text("no image")
    (path / ".hidden.png").write_text("no image")
    return path


def run(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_a_folder_is_classified_with_what_lies_below_and_around_a_broken_file(
    out, folder, shapes, capsys
):
    code, shown, err = run(capsys, "predict", out, folder, "--json")
    assert code == 2
    assert err.count("\n") == 2
    assert f"{folder}/05b.jpg cannot be read as an image" in err.splitlines()[0]
    assert err.splitlines()[1] == "bmjax: 1 of 12 files could not be classified"
    got = [json.loads(line) for line in shown.splitlines()]
    names = [f"{index:02}.png" for index in range(9)] + [
        f"below/deep/{n}.png" for n in ("09", "10")
    ]
    assert [each["file"] for each in got] == [f"{folder}/{name}" for name in names]
    assert [each["label"] for each in got] == shapes.test.labels[:11].tolist()
    again = load_run(out).predict(shapes.test.images[:11])
    for each, row in zip(got, again, strict=True):
        assert [each["probabilities"][name] for name in shapes.class_names] == row.tolist()


def test_one_broken_file_is_one_message(out, folder, capsys):
    code, shown, err = run(capsys, "predict", out, folder / "05b.jpg")
    assert (code, shown, err.count("\n")) == (2, "", 1)
    code, shown, err = run(capsys, "predict", out, "none.png", folder / "00.png", folder / "x.png")
    assert (code, shown.count("\n"), err.count("\n")) == (2, 1, 3)
    assert "there is no file none.png" in err


def test_csv(out, folder, shapes, capsys):
    name = folder / 'a "quoted", name.png'
    (folder / "00.png").rename(name)
    (folder / "05b.jpg").unlink()
    code, shown, err = run(capsys, "predict", out, folder, "--csv")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(shown)))
    shares = [f"probability of {each}" for each in shapes.class_names]
    assert list(rows[0]) == ["file", "class", "label", "probability", *shares]
    assert len(rows) == 11
    by_file = {row["file"]: row for row in rows}
    # By one program for both, as another size of batches may round in another way.
    _, shown, _ = run(capsys, "predict", out, folder, "--json")
    told = {each["file"]: each["probabilities"] for each in map(json.loads, shown.splitlines())}
    row, expected = by_file[str(name)], load_run(out).predict(shapes.test.images[:1])[0]
    exact = [told[str(name)][each] for each in shapes.class_names]
    assert [float(np.float32(row[share])) for share in shares] == exact
    np.testing.assert_allclose(exact, expected, rtol=1e-5)
    assert int(row["label"]) == expected.argmax()
    assert row["class"] == shapes.class_names[expected.argmax()]
    assert np.float32(row["probability"]) == max(exact)
    assert run(capsys, "predict", out, folder, "--csv", "--json")[0] == 2


def test_an_image_from_standard_input_without_any_cache(out, folder, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "bmjax.cli", "predict", str(out), "-", "--json"],
        input=(folder / "02.png").read_bytes(),
        env={**os.environ, "BMJAX_CACHE": str(tmp_path / "file" / "cache")},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    got = json.loads(done.stdout)
    assert (got["file"], got["class"]) == ("-", "mid")


def test_what_is_no_image_on_standard_input_is_said(out, tmp_path, monkeypatch):
    monkeypatch.setattr("bmjax.evaluate.prediction.os.fdopen", lambda *_, **__: io.BytesIO(b"text"))
    with pytest.raises(UserError, match=r"^standard input cannot be read as an image"):
        predict(PredictConfig(str(out), ("-",)))


def test_a_folder_without_an_image_is_said(out, tmp_path):
    with pytest.raises(UserError, match="there is no image in the folder"):
        predict(PredictConfig(str(out), (str(tmp_path),)))


def test_predictions_of_many_files_take_no_more_memory(out, folder, monkeypatch):
    images = tuple([str(folder / "00.png")] * 300)
    waiting, most = 0, 0
    decode = np.asarray(Image.open(images[0]))[:, :, None]

    class Transform:
        def apply(self, picture):
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            return decode

    monkeypatch.setattr(TrainedRun, "transform", Transform())
    number = 0
    for result in predict_each(PredictConfig(str(out), images)):
        assert isinstance(result, Prediction)
        number, waiting = number + 1, waiting - 1
    assert number == 300
    assert most <= 3 * 64 + 2


def test_one_program_whatever_the_number_of_files(out, folder, monkeypatch):
    sizes = set()
    apply = TrainedRun._apply.func  # type: ignore[attr-defined]

    def noting(self):
        run = apply(self)

        def noted(batch):
            sizes.add(len(batch))
            return run(batch)

        return noted

    monkeypatch.setattr(TrainedRun, "_apply", property(noting))
    files = (*[str(folder / "00.png")] * 70, str(folder / "05b.jpg"))
    results = list(predict_each(PredictConfig(str(out), files)))
    assert sizes == {64}
    assert isinstance(results[-1], NoImage)
    assert len(results) == 71


def test_outputs_that_are_not_finite_are_an_error_and_never_printed(
    out, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        TrainedRun, "_apply", lambda self, images: [np.full((len(images), 3), np.nan)] * 2
    )
    for words in ((), ("--json",), ("--csv",)):
        code, shown, err = run(capsys, "predict", out, folder / "00.png", *words)
        assert (code, shown) == (2, "")
        assert "outputs that are not finite" in err
        assert err.count("\n") == 1


def test_results_come_as_they_are_found(out, folder, shapes, monkeypatch):
    """Of 130 images the first are there before the last are looked at."""
    files = (*[str(folder / "00.png")] * 129, "none.png")
    results = predict_each(PredictConfig(str(out), files))
    first = next(results)
    assert isinstance(first, Prediction)
    assert first.label == shapes.test.labels[0]
    shutil.rmtree(folder)
    assert isinstance(list(results)[-1], NoImage)


def test_a_bar_shows_how_far_it_is_where_results_go_into_a_file(out, folder):
    from bmjax.machine.progress import shown_on

    console: Console = Console(file=io.StringIO(), force_terminal=True, stderr=True, width=100)
    with shown_on(console):
        list(predict_each(PredictConfig(str(out), (str(folder),)), bar=True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "classifying 12 images" in text
    assert "12 of 12" in text
