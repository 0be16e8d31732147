"""The table of distillation losses: every row of it, on any number of devices."""

import dataclasses
import inspect
import re
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmjax.config import DistillConfig
from bmjax.config.flat import flatten
from bmjax.data.preprocess import Normalization
from bmjax.distill.loss import distillation_loss, match_features
from bmjax.losses.table import DISTILLATION_LOSSES, LOSS_PARAMS, DistillationLoss, names
from bmjax.machine.parallel import AXIS, Parallel
from bmjax.models import CNN
from bmjax.train.gradients import Parts
from bmjax.train.step import LossFn, create_state, train_step

SHAPE = (12, 12, 1)
ROWS = list(DISTILLATION_LOSSES.values())
# By which no part of a sum hides the other.
WEIGHTS = {
    "hint": 5.0,
    "attention": 50.0,
    "similarity": 50.0,
    "relational": 2.0,
    "contrastive": 1.0,
}


@pytest.mark.parametrize(("field", "kind"), [("method", "logits"), ("features", "features")])
def test_the_flags_offer_what_the_table_has(field, kind):
    choices = list(get_args(get_type_hints(DistillConfig)[field]))
    assert choices == [*(["none"] if kind == "features" else []), *names(kind)]


def test_the_help_says_what_the_table_says():
    help_text = " ".join((DistillConfig.__doc__ or "").split())
    for row in ROWS:
        if row.kind == "features":
            assert f"{row.name} {row.weight:g}" in help_text
    without = [row.name for row in ROWS if row.kind == "logits" and not row.has_temperature]
    assert f"{' and '.join(without)} have none" in help_text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_what_its_function_takes(row: DistillationLoss):
    arguments = inspect.signature(row.function).parameters
    given = {"student", "teacher", "student_logits", "teacher_logits"} & set(arguments)
    assert len(given) == 2
    assert row.needs_labels == ("labels" in arguments)
    assert row.over_batch == ("mask" in arguments)
    assert set(row.settings) <= set(arguments)
    needed = {name for name, one in arguments.items() if one.default is one.empty} - given
    assert needed <= {*row.settings, "labels", "mask"}
    known = flatten(DistillConfig())
    assert set(row.settings.values()) | set(row.one_positive) <= set(known)
    assert set(re.findall(r"{(\w+)", row.convention)) <= set(known)
    assert row.convention.format(**known)
    assert (row.layers != "") == (row.kind == "features")
    assert row.weight == 1 or row.kind == "features"


@pytest.mark.slow
def test_every_loss_is_the_same_on_any_devices():
    """Value and gradient, of a batch whose last part is filled up: one device has nothing else."""
    student, teacher = CNN(num_classes=3, features=(4, 8)), CNN(num_classes=3, features=(6, 10))
    unchanged = Normalization.none(1)
    variables = jax.jit(teacher.init)(jax.random.key(1), jnp.zeros((1, *SHAPE)))
    taught_by: Any = SimpleNamespace(
        model=teacher,
        normalization=unchanged,
        # Large enough for logits and features that are not all alike.
        variables=jax.tree.map(lambda leaf: 2 * leaf, variables),
        run=SimpleNamespace(data={"image_shape": SHAPE}),
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(0, 1, (1, 16, *SHAPE)).astype(np.float32),
        "label": (np.arange(16, dtype=np.int32) % 3)[None],
        "mask": (np.arange(16) < 11)[None],
    }
    state = create_state(student, optax.sgd(1.0), SHAPE, seed=0)

    def losses(axis_name: str | None) -> dict[str, tuple[LossFn, dict[str, Any]]]:
        # One of each kind at a time, as compiling is what takes the time.
        made = {}
        for method, features in zip(names("logits"), names("features"), strict=True):
            config = DistillConfig(
                alpha=1.0,
                temperature=2.0,
                student="cnn",
                method=cast(Any, method),
                features=cast(Any, features),
                feature_weight=WEIGHTS[features],
            )
            matching = match_features(config, student, ("cnn", teacher), SHAPE)
            assert matching is not None
            loss_fn = distillation_loss(
                student, unchanged, taught_by, config, None, matching, axis_name
            )
            made[f"{method} {features}"] = loss_fn, matching.init(jax.random.key(2))
        return made

    def results(kind: str, number: int) -> dict[str, Any]:
        parallel = Parallel("jit" if kind == "device" else kind, jax.devices()[:number])

        def each(state, batch):
            batch = parallel.divide({name: leaf[0] for name, leaf in batch.items()})
            found = {}
            axis_name = AXIS if kind == "device" else parallel.axis_name
            parts = Parts(AXIS, parallel.mesh) if kind == "device" else None
            for name, (loss_fn, of_loss) in losses(axis_name).items():
                params = {**state.params, **({LOSS_PARAMS: of_loss} if of_loss else {})}
                begun = dataclasses.replace(state, params=params)
                optimizer = optax.sgd(1.0)
                new, sums = train_step(
                    begun, batch, loss_fn, optimizer, axis_name=parallel.axis_name, parts=parts
                )
                found[name] = sums, jax.tree.map(jnp.subtract, params, new.params)
            return found

        compiled = parallel.compile(each, held=2)
        return parallel.get(compiled(parallel.put(state), parallel.put_windows(batch)))

    expected = results("jit", 1)
    assert {*" ".join(expected).split()} == set(DISTILLATION_LOSSES)
    for sums, grads in expected.values():
        assert float(sums["count"]) == 11
        assert float(sums["distillation"]) > 1e-2
        assert float(sums["features"]) > 1e-3
        assert largest(grads) > 1e-3
    # By parts the models compute the same, which have no batch statistics; losses see the batch.
    for kind in ("jit", "pmap", "device"):
        got = results(kind, 4)
        for name, (sums, grads) in expected.items():
            chex.assert_trees_all_close(got[name][0], sums, rtol=1e-4)
            chex.assert_trees_all_close(got[name][1], grads, rtol=0, atol=1e-4 * largest(grads))


def largest(tree: Any) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
