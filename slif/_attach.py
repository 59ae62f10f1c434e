"""A value with a derivative attached, which all surrogate gradients are built from."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def attach(value: Array, x: Array, slope: Array) -> Array:
    """The value, with d value = slope dx and nothing else; the slope is differentiable, for derivatives of any order.

    It is a primitive rather than a `jax.custom_jvp`: before jax 0.12 a scan in reverse mode drops the custom rules in
    its body, so that second derivatives that begin with reverse mode are silently wrong.
    """
    return attach_p.bind(value, x, slope)


attach_p = Primitive("slif_attach")
attach_p.def_impl(lambda value, x, slope: value)
attach_p.def_abstract_eval(lambda value, x, slope: value)
mlir.register_lowering(attach_p, lambda context, value, x, slope: [value])


def _jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    value, _, slope = primals
    return attach_p.bind(*primals), _like((slope * ad.instantiate_zeros(tangents[1])).astype(value.dtype), value)


def _batch(args: Any, axes: Any) -> tuple[Array, int]:
    args = [jnp.expand_dims(x, 0) if n is None else jnp.moveaxis(x, n, 0) for x, n in zip(args, axes, strict=True)]
    mapped = next(x for x, n in zip(args, axes, strict=True) if n is not None)
    return attach_p.bind(_like(args[0], mapped), *args[1:]), 0


def _like(x: Array, other: Array) -> Array:
    """x with the axes and the sharding of the other; the compiler drops the select."""
    return x if x.shape == other.shape else jnp.where(other == other, x, x)


ad.primitive_jvps[attach_p] = _jvp
batching.primitive_batchers[attach_p] = _batch
