import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.bench import jax_contenders, timing
from bmjax.bench.run import bench
from bmjax.bench.workload import Workload, normalized
from bmjax.config import BenchConfig
from bmjax.errors import UserError
from bmjax.models.flops import count_flops

TINY = Workload("mlp", 4, 8)


def test_flops_of_a_network_are_those_counted_by_hand():
    # A 3x3 convolution of 3 to 64 channels on 8x8 pixels, one of 64 to 128 on 4x4, and a dense
    # layer of 2 * 2 * 128 to 10.
    expected = 2 * (64 * 27 * 64 + 16 * 576 * 128 + 512 * 10)
    for contender in (jax_contenders.Bmjax, jax_contenders.Linen):
        assert contender(Workload("cnn", 8, 4), steps=1).flops == expected


def test_flops_inside_a_loop_or_a_compiled_function_count():
    def function(x):
        return jax.jit(lambda x: x @ x)(x)

    assert count_flops(function, jnp.ones((3, 3))) == 2 * 27


@pytest.mark.parametrize("teacher", ["", pytest.param("resnet_tiny", marks=pytest.mark.slow)])
def test_a_turn_of_bmjax_trains_on_every_batch(teacher, monkeypatch):
    workload = Workload("cnn", 32, 8, teacher=teacher)
    contender = jax_contenders.Bmjax(workload, steps=3)
    before = contender.variables()
    first = contender.train()
    for _ in range(10):
        last = contender.train()
    assert int(contender._state.step) == 33
    assert np.isfinite(first)
    assert last < first  # it learns 24 images by heart
    for old, new in zip(before, contender.variables(), strict=True):
        np.testing.assert_array_equal(old, new)  # inference is of the initial variables


def test_the_loop_of_linen_learns_too():
    contender = jax_contenders.Linen(Workload("mlp", 8, 8), steps=3)
    first = contender.train()
    for _ in range(20):
        last = contender.train()
    assert last < first


def test_pixels_are_normalised_as_those_of_bmjax():
    values = normalized(Workload("mlp", 28, 64).data(4)["image"])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


class Fake:
    flops = 100

    def __init__(self, name, size=10, loss=1.0):
        self.name, self.size, self.loss, self.trained = name, size, loss, 0

    def variables(self):
        return [np.zeros(self.size)]

    def train(self):
        self.trained += 1
        return self.loss

    def infer(self):
        pass


def test_contenders_take_turns_after_warming_up():
    both = [Fake("one"), Fake("other")]
    timings = timing.take_turns(both, TINY, steps=2, turns=3)
    assert [each.trained for each in both] == [3 + timing.WARM_UPS] * 2
    assert [(each.contender, each.job) for each in timings] == [
        ("one", "training"),
        ("other", "training"),
        ("one", "inference"),
        ("other", "inference"),
    ]
    assert all(len(each.seconds) == 3 for each in timings)
    assert [each.flops for each in timings] == [2400, 2400, 800, 800]


def test_a_ratio_says_how_many_times_as_fast_the_first_was():
    ours, theirs = timing.Timing("a", "training", [1, 2]), timing.Timing("b", "training", [3, 2])
    assert ours.ratios(theirs) == [3, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Fake("b", size=11), "b has 11 params, a 10"),
        (Fake("b", loss=float("nan")), "b trains to a loss of nan"),
    ],
)
def test_unequal_work_is_not_timed(other, message):
    with pytest.raises(UserError, match=message):
        timing.take_turns([Fake("a"), other], TINY, steps=1, turns=1)
    heavier = Fake("b")
    heavier.flops = 102
    with pytest.raises(UserError, match="b takes 102 FLOPs an image, a 100"):
        timing.check_equal_work([Fake("a"), heavier])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": ("bmjax", "tensorflow")}, "none by that name. Known: bmjax, linen"),
        ({"contenders": ("bmjax", "bmjax")}, "names one twice"),
        ({"model": "resnet152"}, "cannot be timed against others"),
        ({"teacher": "mlp"}, "none of resnet18"),
        ({"remat": True}, "--remat is for programs that are compiled alone: --compile-for."),
        ({"turns": 0}, "--turns must be at least 1"),
        ({"batch_size": -3}, "--batch-size must be at least 1"),
    ],
)
def test_what_cannot_be_timed_is_named(changes, message):
    config = BenchConfig(model="mlp", image_size=4, contenders=("bmjax", "linen"))
    with pytest.raises(UserError, match=message):
        bench(dataclasses.replace(config, **changes))


@pytest.mark.slow
def test_the_command_prints_one_json_object():
    flags = ["--model=mlp", "--image-size=8", "--batch-size=4", "--turns=1", "--json"]
    command = [sys.executable, "-m", "bmjax.cli", "bench", *flags, "--contenders", "bmjax", "linen"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert {row["contender"] for row in result["rows"]} == {"bmjax", "plain Linen"}
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
    assert result["rows"][0]["ratio"] == 1
    assert result["peak"] > 1e8
    assert result["seconds_to_first_turn"] > 0
