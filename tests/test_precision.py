"""The precision of products, as it stands in programs lowered for GPU and TPU."""

import re
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.bench.step import make_step
from bmjax.config import AUTO, BenchConfig, TrainConfig
from bmjax.errors import UserError
from bmjax.machine.parallel import Parallel
from bmjax.machine.precision import PRECISIONS, in_precision
from bmjax.models import create_model
from bmjax.ops.convolution import convolve


def of_products(text: str) -> set[str]:
    """Returns the precisions of the matmuls and convolutions in a lowered program."""
    found = set()
    for line in text.splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            said = re.search(r"(HIGHEST|HIGH|DEFAULT)", line)
            found.add(said[1] if said else "DEFAULT")
    return found


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("float32", {"HIGHEST"}),
        pytest.param("tf32", {"HIGH", "HIGHEST"}, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_has_products_of_its_precision(precision, expected):
    """Forward and backward, of convolutions, which are primitives of our own, and matmuls."""
    data = {"image": np.zeros((4, 8, 8, 3), np.uint8), "label": np.zeros(4, np.int32)}
    parallel = Parallel("jit", jax.devices()[:1], precision)
    steps, _, held = make_step(create_model("resnet_tiny", 3), data, parallel, 2)
    traced = steps.trace(*held, np.int32(1))
    # The statistics of batch normalisation are of float32 in any case.
    assert of_products(traced.lower(lowering_platforms=("cuda",)).as_text()) == expected
    assert of_products(traced.lower(lowering_platforms=("tpu",)).as_text()) == expected


def products(images, kernel, matrix):
    def total(kernel, matrix):
        hidden = convolve(images, kernel, ((1, 1), (1, 1)))
        return jnp.sum((hidden.reshape(len(images), -1) @ matrix) ** 2)

    return jax.value_and_grad(total, (0, 1))(kernel, matrix)


def operands(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (2, 4, 4, 3), (3, 3, 3, 5), (80, 7)
    return [jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes]


def test_bfloat16_is_left_as_it_is():
    lowered = jax.jit(in_precision(products, "bfloat16")).trace(*operands(jnp.bfloat16))
    assert of_products(lowered.lower(lowering_platforms=("tpu",)).as_text()) == {"DEFAULT"}


def test_on_cpu_no_bit_changes():
    plain = jax.jit(products)(*operands())
    for precision in ("float32", "tf32"):
        got = jax.jit(in_precision(products, precision))(*operands())
        jax.tree.map(np.testing.assert_array_equal, got, plain)


def test_what_is_called_precision_is_known_everywhere():
    for config in (TrainConfig, BenchConfig):
        assert set(get_args(get_type_hints(config)["precision"])) == {AUTO, *PRECISIONS}
    with pytest.raises(UserError, match="float32"):
        in_precision(products, "float23")
