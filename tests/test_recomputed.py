"""What GPUs compute again: its formulas here, by the compiler of this machine."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.models import create_model
from bmjax.ops import recomputed
from bmjax.ops.convolution import Pending, convolve, make_pending
from bmjax.ops.fused_convolution import finish, finish_rounded
from bmjax.ops.recomputed import Source, activate, computed, prepared_again
from bmjax.ops.target import tracing_for

SIDES = ((1, 1), (1, 1))


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def source_of(values):
    channels = values.shape[-1]
    return Source(values, *(draw(channels, seed=number) for number in (1, 2, 3)))


def normalized(source):
    return recomputed.normalize_by(*source)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("numbers", [1, 2])
def test_rounding_before_relu_changes_no_bit(numbers, dtype):
    given = [draw(3, 4, 4, 8, seed=number, dtype=dtype) for number in range(numbers)]
    expected = recomputed._plain_activate(*given, numbers=numbers)
    assert expected.dtype == dtype
    np.testing.assert_array_equal(recomputed._activate_on_gpu(*given, numbers=numbers), expected)
    shortcut = given[1] if numbers == 2 else None
    for relu in (False, True):
        plain, rounded = (each(given[0], shortcut, relu) for each in (finish, finish_rounded))
        np.testing.assert_array_equal(rounded, plain)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_where_relu_was_positive_is_told_by_its_output_and_by_its_source(dtype):
    source = source_of(draw(3, 4, 4, 8, dtype=dtype))
    before, moved = normalized(source), draw(3, 4, 4, 8, seed=9, dtype=dtype)
    expected = recomputed._plain_where_positive(moved, before > 0)
    assert 0 < np.count_nonzero(expected) < expected.size
    for by in ((jax.nn.relu(before),), source):
        found = recomputed._where_positive_on_gpu(moved, jnp.zeros(before.shape, bool), *by)
        np.testing.assert_array_equal(found, expected)


def test_a_kernels_gradient_needs_no_images_but_their_source():
    source = source_of(draw(2, 5, 5, 4))
    images = jax.nn.relu(normalized(source))
    geometry = make_pending(images, draw(3, 3, 4, 6), SIDES).geometry
    cotangent = draw(*geometry.shape("output"), seed=5)
    given = cotangent, images * np.nan, *source
    expected = recomputed._plain_kernel_gradient(cotangent, images, geometry=geometry)
    found = recomputed._kernel_gradient_on_gpu(*given, geometry=geometry)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_on_a_tpu_a_sum_of_two_is_computed_again_and_one_is_not():
    sources = source_of(draw(2, 5, 5, 4)), source_of(draw(2, 5, 5, 4, seed=7))
    before = normalized(sources[0]) + normalized(sources[1])
    images = jax.nn.relu(before)
    geometry = make_pending(images, draw(3, 3, 4, 6), SIDES).geometry
    cotangent = draw(*geometry.shape("output"), seed=5)
    both, nothing = (*sources[0], *sources[1]), images * np.nan
    expected = recomputed._plain_kernel_gradient(cotangent, images, geometry=geometry)
    gradient = recomputed._kernel_gradient_on_tpu
    found = gradient(cotangent, nothing, *both, geometry=geometry)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(gradient(cotangent, nothing, *sources[0], geometry=geometry)).any()

    moved = draw(2, 5, 5, 4, seed=9)
    expected = recomputed._plain_where_positive(moved, before > 0)
    assert 0 < np.count_nonzero(expected) < expected.size
    told = recomputed._where_positive_on_tpu
    np.testing.assert_array_equal(told(moved, jnp.zeros(before.shape, bool), *both), expected)
    np.testing.assert_array_equal(told(moved, before > 0, *sources[0]), expected)
    np.testing.assert_array_equal(told(moved, jnp.zeros(before.shape, bool), images), expected)


def through(values, kernel, shortcut=None, *, inner=True):
    """Normalises, activates and convolves, with what is computed from what told or not."""
    source = source_of(values)
    out = normalized(source)
    if not inner:
        return convolve(jax.nn.relu(out if shortcut is None else out + shortcut), kernel, SIDES)
    held = jax.lax.stop_gradient(source) if shortcut is None else None
    images = activate(out, shortcut, held)
    return computed(make_pending(images, kernel, SIDES)._replace(source=held or ()))


@pytest.mark.parametrize("with_shortcut", [False, True])
def test_derivatives_are_those_of_the_plain_formulas(with_shortcut):
    given = [draw(2, 5, 5, 4), draw(3, 3, 4, 6, seed=4)]
    given += [draw(2, 5, 5, 4, seed=6)] if with_shortcut else []

    def slopes(inner):
        def loss(*given):
            return jnp.sum(jnp.sin(through(*given, inner=inner)))

        numbers = tuple(range(len(given)))
        forward = jax.jvp(loss, given, [each + 1 for each in given])
        again = jax.grad(lambda *given: jnp.sum(jax.grad(loss)(*given) ** 2), numbers)
        return jax.grad(loss, numbers)(*given), forward, again(*given)

    chex.assert_trees_all_close(slopes(True), slopes(False), rtol=1e-4, atol=1e-4)


def test_examples_can_be_mapped_over():
    values, kernel = draw(3, 2, 5, 5, 4), draw(3, 3, 4, 6, seed=4)
    each = jax.grad(lambda *given: jnp.sum(through(*given) ** 2), (0, 1))
    found = jax.vmap(each, in_axes=(0, None))(values, kernel)
    expected = [each(one, kernel) for one in values]
    chex.assert_trees_all_close(
        found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected), rtol=1e-4, atol=1e-5
    )


def test_a_kernel_that_is_not_trained_costs_no_gradient():
    values, kernel = draw(2, 5, 5, 4), draw(3, 3, 4, 6, seed=4)

    def gradient(inner):
        return jax.grad(lambda values: jnp.sum(jnp.sin(through(values, kernel, inner=inner))))

    jaxpr = str(jax.make_jaxpr(gradient(True))(values))
    assert "where_positive" in jaxpr
    assert not re.search("kernel_gradient|convolution_by_kernel", jaxpr)
    chex.assert_trees_all_close(
        gradient(True)(values), gradient(False)(values), rtol=1e-4, atol=1e-5
    )


def test_what_a_gpu_and_a_tpu_compute_again():
    model = create_model("resnet_tiny", 3, dtype=jnp.bfloat16)
    images = jnp.zeros((4, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params, variables, images):
        both = {**variables, "params": params}
        out, _ = model.apply(both, images, train=True, mutable=["batch_stats"])
        return jnp.sum(out**2)

    traced = jax.jit(jax.grad(loss)).trace(variables["params"], variables, images)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    again = {platform: text.count("optimization_barrier") for platform, text in texts.items()}
    # Of each of the four blocks: what the second kernel's gradient needs, that this gradient comes
    # first, where its input was positive, and the block's output; the stem's output, and the places
    # of its maxima.
    # A TPU reads where the blocks' outputs, and the stem's, were positive off these themselves.
    assert again == {"cpu": 0, "tpu": 4 + 1, "cuda": 4 * 4 + 2}
    with tracing_for("tpu"):
        traced = jax.jit(jax.grad(loss)).trace(variables["params"], variables, images)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # Again, of the three blocks that change the shape: where their sums were positive; and what
    # another such block takes, for the gradients of its first kernel and of the one beside.
    assert text.count("optimization_barrier") == 4 + 1 + 2 * 2


def test_a_convolution_of_plain_images_is_as_ever():
    images, kernel = draw(2, 5, 5, 4), draw(3, 3, 4, 6)
    pending = make_pending(images, kernel, SIDES)
    assert isinstance(pending, Pending)
    np.testing.assert_array_equal(computed(pending), pending.compute())
    assert computed(images) is images


def test_images_are_prepared_again_for_a_second_model_on_a_tpu():
    def two_models(images):
        first = jnp.sum((images / 255) ** 2)
        again, first = prepared_again(images, first)
        return first + jnp.sum((again / 255) ** 3)

    values = draw(2, 4)
    plain = jax.make_jaxpr(two_models)(values)
    with tracing_for("tpu"):
        divided = jax.make_jaxpr(lambda images: two_models(images))(values)
        result = two_models(values)
    assert "optimization_barrier" not in str(plain)
    assert "optimization_barrier" in str(divided)
    assert result == two_models(values)
