import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.tree_util import Partial

from bmjax.compiled import make_train_steps, zero_totals
from bmjax.config import AugmentConfig, OptimConfig
from bmjax.data import loader
from bmjax.models import create_model
from bmjax.optim import make_optimizer
from bmjax.parallel import Parallel
from bmjax.train import classification_loss, create_state

STATISTICS = {"mean": [0.5] * 3, "std": [0.3] * 3}
SIDE = 32


def collectives(name: str) -> list[tuple[str, list[int]]]:
    """Returns kind and sizes of the arrays of each collective in a step on eight devices."""
    parallel = Parallel("jit", jax.devices())
    model = create_model(name, 3)
    optimizer = make_optimizer(OptimConfig(optimizer="sgd"), lambda _: 0.1)
    shape = (SIDE, SIDE, 3)
    state = create_state(model, optimizer, shape, seed=0)
    loss_fn = Partial(classification_loss(model, STATISTICS))
    view = loader.make_view(AugmentConfig(augment=False), shape[:2], STATISTICS["mean"])
    steps = make_train_steps(parallel, optimizer, 16, view)
    arrays = {"image": np.zeros((32, *shape), np.uint8), "label": np.zeros(32, np.int32)}
    totals = zero_totals(loss_fn, state, shape)
    held = [parallel.put(tree) for tree in (state, totals, loss_fn, arrays)]
    compiled: Any = steps
    text = compiled.lower(*held, np.int32(2)).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1])
            found.append(
                (match[2], [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes])
            )
    return found


def num_params(name: str) -> int:
    variables = jax.eval_shape(
        create_model(name, 3).init, jax.random.key(0), np.zeros((1, SIDE, SIDE, 3), np.float32)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_a_step_on_eight_devices_adds_up_once():
    (kind, sizes), *more = collectives("mlp")
    assert not more
    assert kind == "all-reduce"
    # The gradients, and the sums of loss, accuracy and examples; nothing twice, nothing else.
    assert sum(sizes) == num_params("mlp") + 3


@pytest.mark.slow
def test_batch_normalisation_adds_two_sums_each_way_and_nothing_else():
    found = collectives("resnet_tiny")
    assert {kind for kind, _ in found} == {"all-reduce"}
    total = sum(sum(sizes) for _, sizes in found)
    norms = [8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    # Forward the mean with the number of values, and the variance; backward the gradients of scale
    # and bias, which are the sums that the gradient by the values needs, too.
    assert total <= num_params("resnet_tiny") + 3 + sum(2 * size + 1 for size in norms)
    # Three a layer, the gradients of all kernels joined to a few of them.
    assert len(found) <= 3 * len(norms)
