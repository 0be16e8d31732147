import pytest

from bmjax.config import DistillConfig, TrainConfig
from bmjax.errors import UserError
from bmjax.runs import Run, check_same_settings


def test_settings_that_an_older_run_does_not_know_are_as_by_default(tmp_path):
    config = TrainConfig(model="mlp")
    extra = {"teacher_fingerprint": "f", "teacher_model": "", **DistillConfig().loss_settings()}
    older = {name: value for name, value in extra.items() if name != "temperature"}
    saved = Run(tmp_path, config, {}, older)
    check_same_settings(saved, config, extra)
    with pytest.raises(UserError, match=r"temperature is 4\.0 in the run and 2\.0 now"):
        check_same_settings(saved, config, {**extra, "temperature": 2.0})
    with pytest.raises(UserError, match="teacher_fingerprint is None in the run and 'f' now"):
        check_same_settings(Run(tmp_path, config, {}, {}), config, extra)
