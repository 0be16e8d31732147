import os
import subprocess
import sys

import pytest

from bmjax.machine import threads
from bmjax.machine.threads import suits_one_thread
from bmjax.models import create_model, find

# Counts the threads of a process that has computed, without those that are just about to end.
CODE = """
import os
import time
import jax
from bmjax.machine.threads import compute_in_calling_thread
print(compute_in_calling_thread())
jax.jit(lambda x: x @ x)(jax.numpy.ones((300, 300))).block_until_ready()
counts = []
while len(counts) < 10:
    counts.append(len(os.listdir("/proc/self/task")))
    time.sleep(0.03)
print(min(counts))
"""
REMOVED = ("NPROC", "PJRT_NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")


def run(**environment):
    base = {name: value for name, value in os.environ.items() if name not in REMOVED}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**base, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    tried, threads = done.stdout.split()
    return tried == "True", int(threads)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are not listed here")
@pytest.mark.slow
def test_one_thread_computes_unless_told_otherwise():
    tried, threads = run()
    assert tried
    assert run(PJRT_NPROC="1") == (False, threads)
    tried, more = run(PJRT_NPROC="2")
    assert not tried
    assert more > threads
    tried, more = run(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert not tried
    assert more > threads


@pytest.mark.parametrize(
    ("name", "size", "batch_size", "suits"),
    [
        ("mlp", 28, 64, True),  # 14 million
        ("mlp", 28, 128, False),
        ("mlp", 64, 8, True),
        ("mlp", 64, 64, False),
        ("cnn", 8, 1, False),
    ],
)
def test_little_work_suits_one_thread(name, size, batch_size, suits):
    flops = batch_size * find(name).forward_flops(create_model(name, 10), (size, size, 1))
    assert suits_one_thread(flops) == suits


def test_flops_of_an_mlp_are_counted_by_hand():
    model = create_model("mlp", 10, hidden_sizes=(5, 3))
    assert find("mlp").forward_flops(model, (7, 2, 1)) == 2 * (14 * 5 + 5 * 3 + 3 * 10)


@pytest.mark.parametrize(
    ("option", "known"), [("xla_cpu_enable_fast_min_max", True), ("xla_no_such_option", False)]
)
def test_options_are_those_that_jax_knows_and_only_for_one_thread(monkeypatch, option, known):
    options = {option: True}
    monkeypatch.setattr(threads, "_OPTIONS", options)
    monkeypatch.setattr(threads, "_chosen", [])
    assert threads.compiler_options() == {}
    monkeypatch.setattr(threads, "_chosen", [True])
    assert threads.compiler_options() == (options if known else {})
