"""`bmjax calibrate`, and what `predict --calibrated` makes of it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmjax.cli.main import main
from bmjax.config import CalibrateConfig, PredictConfig
from bmjax.data.sources import all_images
from bmjax.errors import UserError
from bmjax.evaluate.calibrate import FILE, calibrate, read_calibration
from bmjax.evaluate.calibration import fit_temperature
from bmjax.evaluate.prediction import predict
from bmjax.metrics.confidence import probabilities_of
from bmjax.runs.folder import lock_folder
from bmjax.runs.trained import load_run
from bmjax.train.loop import fit

from .conftest import small_config, write_npz
from .folder_helpers import write_class


@pytest.fixture(scope="module")
def once(tmp_path_factory, shapes, quiet):
    folder = tmp_path_factory.mktemp("calibrate")
    data = write_npz(folder / "shapes.npz", shapes)
    config = dataclasses.replace(small_config(folder / "run"), data=f"npz:{data}")
    fit(config, console=quiet)
    return folder / "run"


@pytest.fixture
def run(once, tmp_path):
    return str(shutil.copytree(once, tmp_path / "run"))


@pytest.fixture
def pictures(shapes, tmp_path):
    files = []
    for index, image in enumerate(all_images(shapes.test)[:4]):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image[..., 0]).save(files[-1])
    return tuple(files)


def code_of(*words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_it_is_fitted_on_validation_and_measured_on_test(run, shapes):
    got = calibrate(CalibrateConfig(run, coverage=0.8))
    trained = load_run(run)
    logits = trained.predict_logits(all_images(shapes.validation))
    expected = fit_temperature(logits, shapes.validation.labels)
    assert got["temperature"] == pytest.approx(expected, rel=1e-4)
    assert (got["examples"], got["measured_on"]) == (len(shapes.validation), "test")
    test, labels = trained.predict_logits(all_images(shapes.test)), shapes.test.labels
    for key, temperature in (("before", 1.0), ("after", expected)):
        shares = probabilities_of(test, temperature)[np.arange(len(labels)), labels]
        assert got[key]["loss"] == pytest.approx(-np.log(shares).mean(), rel=1e-3)
    assert set(got["sets"]) == {"lac", "aps", "class-conditional"}
    json.dumps(got)
    kept = read_calibration(trained)
    assert (kept.coverage, kept.examples) == (0.8, len(shapes.validation))
    assert kept.temperature == got["temperature"]
    sets = kept.sets(test, "lac")
    assert got["sets"]["lac"]["coverage"] == pytest.approx(sets[range(50), labels].mean())


def test_predictions_are_calibrated(run, pictures, shapes):
    calibrate(CalibrateConfig(run))
    trained = load_run(run)
    kept = read_calibration(trained)
    logits = trained.predict_logits(all_images(shapes.test)[:4])
    plain = predict(PredictConfig(run, pictures))
    got = predict(PredictConfig(run, pictures, calibrated=True, sets="aps"))
    for row, own, shares, chosen in zip(
        got, plain, kept.probabilities(logits), kept.sets(logits, "aps"), strict=True
    ):
        assert row["class"] == own["class"]
        assert row["probability"] == pytest.approx(shares.max(), rel=1e-4)
        assert row["probability"] != own["probability"]
        assert row["set"][0] == row["class"]
        assert set(row["set"]) == {trained.class_names[i] for i in np.flatnonzero(chosen)}
        assert row["unlike_training_data"] in (True, False)
        assert "set" not in own


def test_what_has_less_energy_than_nearly_all_is_flagged(run, pictures):
    calibrate(CalibrateConfig(run))
    trained = load_run(run)
    kept = read_calibration(trained)
    threshold = kept.familiarity["energy"]
    near = np.array([[threshold + 0.1, -50.0, -50.0], [threshold - 0.1, -50.0, -50.0]])
    assert kept.is_familiar(near).tolist() == [True, False]


def test_without_test_images_halves_of_validation_tell(run, tmp_path):
    for number, name in enumerate(load_run(run).class_names):
        write_class(tmp_path / "data" / "train" / name, 4, number)
        write_class(tmp_path / "data" / "validation" / name, 9, number)
    got = calibrate(CalibrateConfig(run, data=f"folder:{tmp_path / 'data'}"))
    assert got["measured_on"] == "halves of validation"
    assert got["examples"] == 27


def test_of_data_without_validation_images_nothing_is_fitted(run, shapes, tmp_path):
    # One image of each class: too few to split some off.
    places = [int(np.flatnonzero(shapes.test.labels == label)[0]) for label in range(3)]
    images, file = all_images(shapes.test)[places], tmp_path / "one.npz"
    np.savez(file, image=images, label=np.arange(3))
    with pytest.raises(UserError, match="has no validation images, and calibration needs some"):
        calibrate(CalibrateConfig(run, data=f"npz:{file}"))
    assert not (Path(run) / FILE).exists()


def test_of_a_single_validation_image_nothing_is_fitted(run, tmp_path):
    for number, name in enumerate(load_run(run).class_names):
        write_class(tmp_path / "data" / "train" / name, 4, number)
    write_class(tmp_path / "data" / "validation" / name, 1, number)
    with pytest.raises(UserError, match="has a single validation image"):
        calibrate(CalibrateConfig(run, data=f"folder:{tmp_path / 'data'}"))
    assert not (Path(run) / FILE).exists()


def test_a_calibration_of_other_params_is_refused(run, pictures):
    with pytest.raises(UserError, match=r"is not calibrated\. Run bmjax calibrate"):
        predict(PredictConfig(run, pictures, calibrated=True))
    calibrate(CalibrateConfig(run))
    file = Path(run) / FILE
    whole = file.read_text()
    file.write_text(whole.replace('"coverage": 0.9', '"coverage": 0.8'))
    with pytest.raises(UserError, match="SHA-256 does not fit"):
        predict(PredictConfig(run, pictures, calibrated=True))
    file.write_text(whole)
    others = dataclasses.replace(load_run(run), fingerprint="other", step=42)
    with pytest.raises(UserError, match="at step 36, and not of those in use, at step 42"):
        read_calibration(others)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--coverage", "1"), "--coverage is 1.0, but it must be in (0, 1), such as 0.9."),
        (("--familiar", "0"), "--familiar is 0.0, but it must be in (0, 1), such as 0.95."),
        (("--data", "npz:none.npz"), "there is no file none.npz"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(run, words, said, capsys):
    assert code_of("calibrate", run, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (Path(run) / FILE).exists()


def test_a_run_that_is_being_trained_is_left_alone(run):
    with lock_folder(Path(run)), pytest.raises(UserError, match="another process is training in"):
        calibrate(CalibrateConfig(run))


def test_the_command_line(run, pictures, capsys):
    assert code_of("calibrate", run) == 0
    said = capsys.readouterr().out
    assert "calibrated" in said
    assert "class-conditional" in said
    assert code_of("predict", run, pictures[0], "--calibrated") == 0
    assert " in {" in capsys.readouterr().out
    assert code_of("predict", run, pictures[0], "--calibrated", "--csv") == 0
    assert "probability,set,unlike training data,probability of" in capsys.readouterr().out
