"""Programs for accelerators, lowered on this machine: nothing in them is of a CPU or of a host."""

import re

import jax
import pytest

from bmjax.bench.lowered import Bmjax
from bmjax.bench.workload import Workload
from bmjax.ops import onednn

# What JAX itself has computed by the runtime of an accelerator: random bits, on GPUs; and how
# arrays are divided over devices.
OF_JAX = {"cu_threefry2x32_ffi", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
JOBS = ("training", "random views", "streamed", "device statistics", "evaluation", "prediction")
SLOW = ("random views", "streamed", "device statistics")


def targets(job, platform, model, devices=1, teacher=None):
    """Returns the custom calls of a program in StableHLO."""
    workload = Workload(model, 32, 16, "bfloat16", teacher)
    lowered = Bmjax(workload, jax.devices()[:devices], platform).lower(job)
    return set(re.findall(r"stablehlo\.custom_call @(\w+)", lowered.as_text()))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("model", ["cnn", "resnet_tiny"])
@pytest.mark.parametrize(
    "job",
    [pytest.param(job, marks=pytest.mark.slow) if job in SLOW else job for job in JOBS],
)
def test_an_accelerator_calls_no_library_of_ours_and_no_host(job, model, platform):
    assert targets(job, platform, model) <= OF_JAX


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_nor_do_several(platform):
    assert targets("training", platform, "resnet_tiny", devices=8) <= OF_JAX


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_nor_does_a_student_with_a_teacher(platform):
    assert targets("distillation", platform, "resnet_tiny", teacher="cnn") <= OF_JAX


@pytest.mark.skipif(onednn.library() is None, reason="oneDNN is not installed")
def test_a_cpu_does():
    assert not targets("training", "cpu", "cnn") <= OF_JAX
