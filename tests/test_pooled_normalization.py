"""Normalisation and pooling in the order of a TPU: the same values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bmjax
from bmjax.ops.target import platform, tracing_for
from tests.conftest import float64_enabled


def traced(model, variables, images, mask, target):
    def loss(params):
        both = {**variables, "params": params}
        logits, new = model.apply(both, images, train=True, mask=mask, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits)), (logits, new)

    with tracing_for(target):
        assert platform() == target
        return jax.jit(jax.grad(loss, has_aux=True)).trace(variables["params"])


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resnet_is_the_same_in_the_order_of_a_tpu(masked):
    with float64_enabled():
        random = np.random.default_rng(0)
        images = jnp.asarray(random.normal(1, 2, (6, 20, 20, 3)))
        mask = jnp.arange(6) < (4 if masked else 6)
        model = bmjax.create_model("resnet_tiny", num_classes=3, dtype=jnp.float64)
        variables = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf,
            jax.jit(model.init)(jax.random.key(0), images),
        )
        # Negative and positive scales, biases, and running means that are far from the batch's.
        norm = variables["params"]["stem_norm"]
        norm["scale"], norm["bias"] = jnp.linspace(-2, 2.1, 8), jnp.linspace(1, -1, 8)
        variables["batch_stats"]["stem_norm"]["mean"] = jnp.full(8, 0.7)
        ours = traced(model, variables, images, mask, "tpu")
        plain = traced(model, variables, images, mask, "cpu")
        assert str(ours.jaxpr) != str(plain.jaxpr)
        (got, (logits, new)), (expected, (others, old)) = (
            each.lower().compile()(variables["params"]) for each in (ours, plain)
        )
        np.testing.assert_allclose(logits[mask], others[mask], rtol=1e-9)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), new, old)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), got, expected
        )


def test_the_platform_is_known_only_while_a_program_is_traced_for_it():
    assert platform() is None
    with pytest.raises(KeyError), tracing_for("tpu"):
        raise KeyError
    assert platform() is None
