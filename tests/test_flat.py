"""Settings by flat names: unique, of their types, None where they are not given."""

from dataclasses import dataclass, field

import pytest

from bmjax.config import DeviceConfig, FinetuneConfig, OptimConfig, TrainConfig
from bmjax.config.flat import flatten, unflatten
from bmjax.config.names import check_flat_names
from bmjax.errors import UserError


@dataclass(frozen=True)
class Inner:
    clip_norm: float = 0.0


def test_two_settings_of_one_name_are_an_error_at_import():
    @dataclass(frozen=True)
    class Outer:
        optim: OptimConfig = field(default_factory=OptimConfig)
        inner: Inner = field(default_factory=Inner)

    with pytest.raises(TypeError, match="clip_norm is a setting of OptimConfig and of Inner"):
        check_flat_names(Outer)
    check_flat_names(TrainConfig)


def test_what_stood_for_not_given_is_none():
    older = {"image_size": 0, "epochs": 0, "patience": 0, "out": "", "clip_norm": 0.0}
    older |= {"devices": 0, "coordinator": "", "process_id": -1, "view_passes": 0}
    config = unflatten(TrainConfig, older, "config.json")
    assert {name: flatten(config)[name] for name in older} == dict.fromkeys(older)
    assert config == TrainConfig()
    assert DeviceConfig(process_id=0).process_id == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("image_size", "32", "image_size is '32', but it must be of type int"),
        ("image_size", 3.0, "of type int"),
        ("clip_norm", True, "of type float"),
        ("hidden_sizes", [1, "2"], "hidden_sizes"),
        ("optimizer", "sdg", "must be one of sgd"),
        ("out", 3, "of type str"),
    ],
)
def test_values_of_another_type_are_refused(name, value, said):
    with pytest.raises(UserError, match=said):
        unflatten(TrainConfig, {name: value}, "config.json")


def test_values_are_read_back_as_they_were():
    config = FinetuneConfig(
        weights="a.pth", image_size=32, optim=OptimConfig(clip_norm=1.0), freeze=("stem",)
    )
    flat = {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(config).items()}
    assert unflatten(FinetuneConfig, flat, "config.json") == config
    assert unflatten(TrainConfig, {"clip_norm": 1}, "config.json").optim.clip_norm == 1.0
