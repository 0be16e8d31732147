import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bmjax.ops import matmul_convolution, onednn
from bmjax.ops.convolution import by_xla, convolve
from bmjax.ops.geometry import ROLES, Geometry
from tests.conftest import float64_enabled

CASES = [
    # side, channels, window, features, stride, padding, groups
    (9, 8, 3, 16, 1, (1, 1), 1),
    (9, 8, 3, 16, 2, (1, 1), 1),
    (8, 8, 3, 6, 2, (0, 1), 1),
    (9, 3, 7, 8, 2, (3, 3), 1),
    (7, 8, 1, 8, 1, (0, 0), 1),
    (8, 8, 1, 8, 2, (0, 0), 1),
    (2, 32, 3, 32, 1, (1, 1), 1),
    (1, 8, 3, 8, 2, (1, 1), 1),
    (3, 8, 7, 16, 2, (3, 3), 1),
    (4, 8, 3, 8, 2, (0, 1), 1),
    (7, 16, 3, 32, 1, (1, 1), 4),
    (8, 16, 3, 16, 2, (1, 1), 4),
]
needs_onednn = pytest.mark.skipif(onednn.library() is None, reason="oneDNN is not installed")


def operands(case, dtype, batch=4):
    """Returns the geometry, and images, kernel and a cotangent of the output."""
    side, channels, window, features, stride, padding, groups = case
    sizes = (batch, side, side + 1, channels, window, window, features, stride)
    geometry = Geometry(*(*sizes, *padding, *padding, groups))
    random = np.random.default_rng(0)
    arrays = {
        role: jnp.asarray(random.normal(size=geometry.shape(role)), dtype)
        for role in ("images", "kernel", "output")
    }
    return geometry, arrays


def in_float64(geometry, arrays):
    """Returns output, gradient by the images and gradient by the kernel, as Linen has them."""
    with float64_enabled():
        wide = {role: jnp.asarray(np.asarray(each, np.float64)) for role, each in arrays.items()}
        out, transposed = jax.vjp(
            lambda images, kernel: lax.conv_general_dilated(
                images,
                kernel,
                (geometry.stride, geometry.stride),
                geometry.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=geometry.groups,
            ),
            wide["images"],
            wide["kernel"],
        )
        by_images, by_kernel = transposed(wide["output"])
    return {
        role: np.asarray(each)
        for role, each in {"output": out, "images": by_images, "kernel": by_kernel}.items()
    }


LOWERINGS: dict[str, Any] = {
    "xla": by_xla,
    "matmul": partial(matmul_convolution.convolve, in_parts=False),
    "matmul in parts": partial(matmul_convolution.convolve, in_parts=True),
    "onednn": onednn.convolve,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("xla", marks=pytest.mark.slow),  # what the others are compared with elsewhere
        *("matmul", "matmul in parts"),
        pytest.param("onednn", marks=needs_onednn),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_each_lowering_equals_the_convolution_in_float64(case, name, dtype, monkeypatch):
    monkeypatch.setattr(matmul_convolution, "part_size", lambda *_: 2)
    geometry, arrays = operands(case, dtype)
    expected = in_float64(geometry, arrays)
    share = 1e-6 if dtype == jnp.float32 else 8e-3
    for role in arrays:
        given = [each for other, each in arrays.items() if other != role]
        if name == "onednn" and not onednn.can(role, geometry, jnp.dtype(dtype)):
            continue  # bfloat16 without AVX-512
        got = jax.jit(partial(LOWERINGS[name], role, geometry))(*given)
        assert got.dtype == dtype
        largest = np.abs(expected[role]).max()
        error = np.abs(np.asarray(got, np.float64) - expected[role]).max()
        assert error <= share * largest, f"{role}: {error / largest}"


@pytest.mark.parametrize("case", CASES[:4])
def test_derivatives_of_any_order_are_those_of_xla(case):
    geometry, arrays = operands(case, jnp.float32)
    images, kernel, tangent = arrays["images"], arrays["kernel"], arrays["output"]

    def every(function):
        def loss(images, kernel):
            return jnp.sum(jnp.sin(function(images, kernel)) * tangent)

        def slope(images, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(images, kernel))

        @jax.jit
        def derivatives(images, kernel):
            forward = jax.jvp(function, (images, kernel), (images + 1, kernel - 1))
            return forward, jax.grad(slope, (0, 1))(images, kernel)

        # Arguments, not constants: XLA of jax 0.7.2 folds its own convolution of constants wrongly.
        return derivatives(images, kernel)

    ours = every(
        lambda images, kernel: convolve(
            images, kernel, geometry.padding, geometry.stride, geometry.groups
        )
    )
    theirs = every(lambda images, kernel: by_xla("output", geometry, images, kernel))
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # The sine turns what is rounded off sums of some tens into as much of its own value.
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("mapped", list(itertools.product([None, 0, 2], repeat=2))[1:])
def test_a_mapped_convolution_equals_those_of_each(mapped):
    geometry, arrays = operands(CASES[1], jnp.float32, batch=2)
    images, kernel = (
        each if axis is None else jnp.stack([each, 2 * each, each + 1], axis)
        for each, axis in zip((arrays["images"], arrays["kernel"]), mapped, strict=True)
    )

    def values(function):
        def gradients(images, kernel):
            out, transposed = jax.vjp(function, images, kernel)
            return out, transposed(jnp.cos(out))

        return jax.jit(jax.vmap(gradients, mapped))(images, kernel)

    ours = values(lambda images, kernel: convolve(images, kernel, ((1, 1), (1, 1)), 2))
    theirs = values(lambda images, kernel: by_xla("output", geometry, images, kernel))
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("batch", "side", "size", "expected"),
    # 64 channels: 3 patches of a pixel are 768 bytes; 3 MiB are 4 images of 32 px.
    [(64, 32, 3, 4), (62, 32, 3, 2), (61, 32, 3, 1), (64, 32, 1, 64), (61, 4, 3, 61)],
)
def test_as_many_images_are_convolved_at_once_as_fit_a_cache(batch, side, size, expected):
    geometry = Geometry(batch, side, side, 64, size, size, 64, 1, 1, 1, 1, 1, 1)
    assert matmul_convolution.part_size(geometry, jnp.float32) == expected


def lowered_for(platform, side=8):
    images, kernel = jnp.zeros((2, side, side, 8)), jnp.zeros((3, 3, 8, 8))
    traced = jax.jit(lambda x, k: convolve(x, k, ((1, 1), (1, 1)))).trace(images, kernel)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@needs_onednn
def test_a_cpu_has_onednn_and_other_backends_the_convolution_of_xla():
    assert "bmjax_convolution" in lowered_for("cpu")
    for platform in ("cuda", "tpu"):
        text = lowered_for(platform)
        assert "stablehlo.convolution" in text
        assert "bmjax_convolution" not in text


@pytest.mark.parametrize(("side", "places"), [(1, 1), (2, 9), (3, 9)])
def test_few_pixels_take_a_matmul_for_each_place_of_the_kernel_on_them(side, places):
    text = lowered_for("cpu", side)
    assert text.count("dot_general") == places
    assert "bmjax_convolution" not in text


@needs_onednn
def test_what_onednn_does_not_do_is_left_to_matmuls(monkeypatch):
    geometry, _ = operands(CASES[0], jnp.float32)
    assert onednn.can("output", geometry, jnp.dtype("float32"))
    assert not onednn.can("output", geometry, jnp.dtype("float64"))
    assert not onednn.can("output", geometry._replace(batch=0), jnp.dtype("float32"))

    def fail(name, *_):
        raise onednn.OneDnnError(f"{name} is not implemented")

    monkeypatch.setattr(onednn.Library, "new", fail)
    onednn._convolution.cache_clear()
    assert not onednn.can("output", geometry, jnp.dtype("float32"))
    assert "dot_general" in lowered_for("cpu")


@needs_onednn
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.slow
def test_onednn_computes_the_same_in_several_threads_at_a_time(role):
    # As XLA does with independent convolutions of a program.
    geometry, _ = operands((4, 128, 3, 128, 1, (1, 1), 1), jnp.float32, batch=16)
    dtype = jnp.dtype("bfloat16")
    if not onednn.can(role, geometry, dtype):  # without AVX-512
        dtype = jnp.dtype("float32")
    compute = onednn._convolution(onednn._key(role, geometry, dtype).tobytes())
    random = np.random.default_rng(0)

    def draw(of):
        return random.normal(size=geometry.shape(of)).astype(dtype)

    inputs = [[draw(of) for of in ROLES if of != role] for _ in range(4)]

    def result(arrays):
        out = np.zeros(geometry.shape(role), dtype)
        compute(*(each.ctypes.data for each in (*arrays, out)))
        return out

    alone = [result(each) for each in inputs]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for expected, found in zip(alone, threads.map(result, inputs), strict=True):
                np.testing.assert_array_equal(expected, found)


@needs_onednn
@pytest.mark.usefixtures("nan_in_scratch")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_no_result_depends_on_what_was_in_memory(width, dtype):
    geometry = Geometry(5, 20, width, 32, 3, 3, 64, 2, 1, 1, 1, 1, 1)
    random = np.random.default_rng(0)
    arrays = {of: jnp.asarray(random.normal(size=geometry.shape(of)), dtype) for of in ROLES}

    @jax.jit
    def derivatives(images, kernel, cotangent):
        forward = partial(convolve, padding=geometry.padding, stride=geometry.stride)
        out, transposed = jax.vjp(forward, images, kernel)
        by_images, by_kernel = transposed(cotangent)
        return {"output": out, "images": by_images, "kernel": by_kernel}

    found = derivatives(arrays["images"], arrays["kernel"], arrays["output"])
    for role, expected in in_float64(geometry, arrays).items():
        allowed = (1e-6 if dtype == jnp.float32 else 8e-3) * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(found[role], np.float64), expected, 0, allowed)


@needs_onednn
def test_without_onednn_convolutions_are_matmuls():
    code = (
        "import jax.numpy as jnp; from bmjax.ops.convolution import convolve; import jax;"
        "f = jax.jit(lambda x, k: convolve(x, k, ((1, 1), (1, 1))));"
        "print(f.lower(jnp.ones((1, 8, 8, 8)), jnp.ones((3, 3, 8, 8))).as_text())"
    )
    environment = {**os.environ, "BMJAX_ONEDNN": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "dot_general" in result.stdout
    assert "bmjax_convolution" not in result.stdout


@needs_onednn
def test_what_goes_wrong_in_onednn_is_an_error_of_the_program(monkeypatch):
    geometry, arrays = operands(CASES[0], jnp.float32)

    def fail(*_):
        raise RuntimeError("out of everything")

    monkeypatch.setattr(onednn.Convolution, "__call__", fail)
    compute = jax.jit(partial(onednn.convolve, "output", geometry))
    with pytest.raises(Exception, match="out of everything"):
        jax.block_until_ready(compute(arrays["images"], arrays["kernel"]))
