"""What the compiler of TPUs makes of the programs; it need not be installed for the other tests."""

import importlib.util
import math
import re
from types import SimpleNamespace

import jax
import pytest

from bmjax.bench import compile_for
from bmjax.bench.compile_for import bench_compiled
from bmjax.bench.lowered import Bmjax
from bmjax.bench.workload import Workload
from bmjax.config import BenchConfig
from bmjax.data import feed
from bmjax.errors import UserError
from bmjax.machine.topologies import CHIPS, GPUS, Topology, compile_elsewhere, find_topology

TOPOLOGY = "v5e:2x4"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed"
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"jobs": ("trainin",)}, "unknown job 'trainin'"),
        ({"jobs": ("distillation",)}, "needs a --teacher"),
        (
            {"contenders": ("torch",)},
            "cannot be compiled for such devices; these can: bmjax, linen.",
        ),
        ({"model": "resnet_tiny"}, "resnet_tiny has no counterpart in plain Linen"),
        ({"teacher": "mlp"}, "--teacher mlp is none of"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"remat": True, "contenders": ("bmjax", "linen")}, "--remat is of bmjax's program alone"),
        ({"shard_params": 3, "contenders": ("bmjax",)}, "does not divide the 8 devices"),
        ({"batch_size": 12}, "does not divide over the 8 devices of v5e:2x4"),
    ],
)
def test_what_cannot_be_compiled_is_said_before(settings, said, monkeypatch):
    eight = Topology(TOPOLOGY, CHIPS["v5e"], jax.devices()[:1] * 8)
    monkeypatch.setattr(compile_for, "find_topology", lambda name: eight)
    with pytest.raises(UserError) as raised:
        bench_compiled(BenchConfig(compile_for=TOPOLOGY, **settings))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "job", ["training", "streamed", "divided data", "random views", "evaluation"]
)
def test_programs_are_those_that_run_here(job):
    """Each can be lowered and compiled for the devices of this machine, too."""
    workload = Workload("cnn_tiny", 32, 16)
    compiled = Bmjax(workload, jax.devices()[:2]).lower(job).compile()
    assert compiled.memory_analysis() is not None


def test_a_program_that_no_gpu_holds_is_refused():
    one = Topology("h100", GPUS["h100"], jax.devices()[:1], "cuda")
    sizes = dict.fromkeys(("output_size_in_bytes", "alias_size_in_bytes"), 2**30)
    memory = SimpleNamespace(argument_size_in_bytes=2**30, **sizes, temp_size_in_bytes=70 * 2**30)
    compile_for._check_room(memory, one)
    memory.temp_size_in_bytes = 80 * 2**30
    with pytest.raises(UserError, match=r"takes 81 GiB, and a device of h100 has 75"):
        compile_for._check_room(memory, one)


def test_figures_of_gpus_are_shown_with_who_counted():
    row = {
        "counted_by": "bmjax",
        "job": "training",
        "contender": "bmjax",
        "library_calls": 7,
        "convolutions": {"bf16 NHWC": 5},
        "fused_convolutions": 2,
        "transposes": 1,
        "transposed_bytes": 2e6,
        "transposed_activations": 0,
        "float32_activations": 0,
        "float32_activation_bytes": 0,
        "collectives_overlapped": 1,
        "collectives": [{}, {}],
    }
    first, second = compile_for._of_gpus([row])
    assert first.startswith("GB and FLOPs are bmjax's count")
    assert "7 calls of libraries (convolutions: 5 bf16 NHWC; 2 with bias or ReLU)" in second
    assert "1 of 2 collectives overlapped" in second
    assert compile_for._of_gpus([{**row, "counted_by": "the compiler"}]) == []


@pytest.mark.parametrize("job", ["training", "evaluation"])
def test_programs_divide_data_where_a_run_would(job, monkeypatch):
    monkeypatch.setattr(feed, "DIVIDED_FROM_BYTES", 1)
    workload = Workload("cnn_tiny", 32, 16)
    image = Bmjax(workload, jax.devices()[:2])._arrays(job)["image"]
    held = image.values.sharding.shard_shape(image.values.shape)
    assert 2 * math.prod(held) == math.prod(image.values.shape)
    assert image.divided == (job == "training")
    assert Bmjax(workload, jax.devices()[:2]).lower(job).compile() is not None


# Bytes of temporaries of a step per device, by jax 0.10.2 and libtpu 0.0.42.
TEMPORARIES = {"cnn": 1_389_056, "resnet_tiny": 8_596_992}


@needs_compiler
@pytest.mark.parametrize("model", ["cnn", "resnet_tiny"])
def test_a_step_for_a_tpu(model):
    workload = Workload(model, 32, 1024, "bfloat16")
    devices = find_topology(TOPOLOGY).devices
    compiled = compile_elsewhere(Bmjax(workload, devices).lower("training"))
    row = compile_for._row(compiled, find_topology(TOPOLOGY), workload)
    assert row["host_transfers"] == 0
    text = compiled.as_text() or ""
    assert not re.findall(r"= f32\[\d+,\d+,\d+,\d+\]\S* convolution\(", text)
    # State and totals are written over: all but the bytes of alignment.
    assert row["alias_bytes"] >= 0.9 * row["output_bytes"]
    norms = {"cnn": 0, "resnet_tiny": 9}[model]
    assert 1 <= row["all_reduces"] <= 2 * norms + 3
    assert row["temp_bytes"] == pytest.approx(TEMPORARIES[model], rel=0.05)


@needs_compiler
def test_divided_data_take_a_part_of_the_memory_of_each_chip():
    workload = Workload("cnn", 32, 1024, "bfloat16")
    topology = find_topology(TOPOLOGY)
    compiled = compile_elsewhere(Bmjax(workload, topology.devices).lower("divided data"))
    row = compile_for._row(compiled, topology, workload)
    # 8 GB of images, an eighth of them; beside them labels and the state, on each.
    assert 1.0e9 <= row["argument_bytes"] <= 1.1e9


@needs_compiler
def test_with_own_statistics_a_step_adds_up_twice_at_most(monkeypatch):
    """Images of divided data are exchanged besides, by the pair: nothing is added up for them."""
    monkeypatch.setattr(feed, "DIVIDED_FROM_BYTES", 1)
    workload = Workload("resnet_tiny", 32, 1024, "bfloat16")
    topology = find_topology(TOPOLOGY)
    compiled = compile_elsewhere(Bmjax(workload, topology.devices).lower("device statistics"))
    row = compile_for._row(compiled, topology, workload)
    assert row["all_reduces"] <= 2
    assert [each["kind"] for each in row["collectives"]].count("all-to-all") == 1
