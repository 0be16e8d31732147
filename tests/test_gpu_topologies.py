"""GPUs that are not there; their compiler need not be installed."""

import importlib.util
import re
from types import SimpleNamespace

import pytest

from bmjax.errors import UserError
from bmjax.machine import gpu_topologies, topologies
from bmjax.machine.gpu_targets import H100


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h200", "unknown GPU 'h200'. Did you mean h100?"),
        ("h100:9", "a machine has 1 to 8 GPUs of h100, such as h100:8."),
        ("h100:0", "a machine has 1 to 8 GPUs"),
        ("h100:2x4", "or a GPU and how many of them, such as h100, h100:8."),
    ],
)
def test_a_gpu_that_cannot_be_is_refused_in_words(name, said, monkeypatch):
    monkeypatch.setattr(gpu_topologies, "gpu_devices", lambda *given: pytest.fail("asked"))
    with pytest.raises(UserError, match=re.escape(said)):
        topologies.find_topology(name)


@pytest.mark.parametrize("missing", [None, ModuleNotFoundError("No module named 'jax_plugins'")])
def test_without_the_compiler_it_is_said_how_to_get_it(missing, monkeypatch):
    def find_spec(name):
        if missing:
            raise missing

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    said = r'no GPU is needed for it: pip install "jax\[cuda12\]"'
    with pytest.raises(UserError, match=said):
        topologies.find_topology("h100")


@pytest.mark.parametrize(("name", "shape"), [("h100", "1x1x1"), ("h100:8", "1x1x8")])
def test_all_gpus_are_of_one_machine(name, shape, monkeypatch):
    from jax.experimental import topologies as of_jax

    def describe(**asked):
        assert asked["platform"] == "cuda"
        assert asked["topology"] == shape
        return SimpleNamespace(devices=["gpu"] * int(shape[-1]))

    monkeypatch.setattr(of_jax, "get_topology_desc", describe)
    monkeypatch.setattr(gpu_topologies, "_installed", lambda plugin: True)
    found = topologies.find_topology(name)
    assert (found.platform, len(found.devices)) == ("cuda", int(shape[-1]))
    assert found.chip.flops_per_second == 989e12


def test_a_compiler_of_another_version_is_said(monkeypatch):
    from jax.experimental import topologies as of_jax

    def describe(**asked):
        raise RuntimeError("Unknown backend cuda\nand more")

    monkeypatch.setattr(of_jax, "get_topology_desc", describe)
    monkeypatch.setattr(gpu_topologies, "_installed", lambda plugin: True)
    with pytest.raises(UserError, match=r"of the same version as jax \(Unknown backend cuda\)$"):
        topologies.find_topology("h100")


def test_the_target_is_a_message_in_text():
    text = H100.text()
    assert text.count("{") == text.count("}") == 3
    assert "  cuda_compute_capability { major: 9 minor: 0 }\n" in text
    assert "  memory_bandwidth: 3352320000000\n" in text
    assert text.endswith('device_description_str: "NVIDIA H100 80GB HBM3"')
