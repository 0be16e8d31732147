"""A compiled function knows its device: traced for it, by its options, in the precision given."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bmjax.machine import jit
from bmjax.machine.jit import jit_for
from bmjax.ops import target


def test_it_is_traced_for_the_device():
    seen = []

    def function(value):
        seen.append(target.platform())
        return value + 1

    assert jit_for(jax.devices()[0], function, "float32")(1) == 2
    assert seen == ["cpu"]
    assert target.platform() is None


def test_products_are_in_the_precision_asked_for():
    one = jnp.ones((2, 2))
    exact: Any = jit_for(jax.devices()[0], jnp.matmul, "float32")
    text = exact.lower(one, one).as_text()
    assert "HIGHEST" in text
    coarse: Any = jit_for(jax.devices()[0], jnp.matmul, "bfloat16")
    text = coarse.lower(one, one).as_text()
    assert "HIGHEST" not in text


def test_the_options_of_its_kind_are_given(monkeypatch):
    def of_kind(kind):
        assert kind == jax.devices()[0].device_kind
        return {"no_such_option": "1"}

    monkeypatch.setattr(jit, "for_kind", of_kind)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        jit_for(jax.devices()[0], lambda value: value * 3, "float32")(1)


def test_what_is_lowered_for_another_device_is_traced_for_that():
    """So is what `bench --compile-for` and the tests of lowered programs look at."""
    seen = []

    def function(value):
        seen.append(target.platform())
        return value

    with target.tracing_for("tpu"):
        jit_for(jax.devices()[0], function, "float32")(1)
    assert seen == ["tpu"]
