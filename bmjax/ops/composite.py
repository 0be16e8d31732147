"""Primitives of JAX that are, but for how a backend computes them, a function of JAX."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@functools.cache
def _compiled(primitive: Primitive, **options: Any) -> Any:
    return jax.jit(functools.partial(primitive.bind, **options))


def make_primitive(
    name: str,
    plain: Callable[..., Any],
    jvp: Callable[..., Any] | None = None,
    multiple_results: bool = True,
) -> Primitive:
    """Makes a primitive that computes, and is differentiated and batched, as a function.

    Args:
        name: in jaxprs.
        plain: the function, of arrays and of hashable options by keyword. It also is what the
            primitive is lowered to, where no other rule is registered.
        jvp: of primals, tangents and options; by default that of the function.
        multiple_results: whether the function returns a tuple, or one array.
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results

    def abstract(*operands: Any, **options: Any) -> Any:
        shapes = jax.eval_shape(functools.partial(plain, **options), *operands)
        made = jax.tree.map(lambda each: jax.core.ShapedArray(each.shape, each.dtype), shapes)
        return list(made) if multiple_results else made

    def of_formula(primals: Any, tangents: Any, **options: Any) -> Any:
        moves = [ad.instantiate_zeros(each) for each in tangents]
        return jax.jvp(functools.partial(plain, **options), tuple(primals), tuple(moves))

    def batched(operands: Any, dims: Any, **options: Any) -> Any:
        out = jax.vmap(functools.partial(plain, **options), in_axes=tuple(dims))(*operands)
        return out, (0,) * len(out) if multiple_results else 0

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(lambda *operands, **options: _compiled(primitive, **options)(*operands))
    ad.primitive_jvps[primitive] = jvp or of_formula
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=multiple_results))
    return primitive
