"""Functions as bare operations: kernels know neither custom derivatives nor jit, and would compute what nobody uses."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core


def inline_jaxpr(fun: Callable) -> Callable:
    """`fun` with every inner call taken apart and unused operations left out; it is traced once, at its first call."""
    traced: list[Any] = []

    def run(*args):
        leaves, tree = jax.tree.flatten(args)
        if not traced:
            closed, shapes = jax.make_jaxpr(lambda *x: fun(*tree.unflatten(x)), return_shape=True)(*leaves)
            traced.extend((closed, jax.tree.structure(shapes)))
        closed, out_tree = traced
        return out_tree.unflatten(_evaluate(closed.jaxpr, closed.consts, leaves))

    return run


def _evaluate(jaxpr: Any, consts: list[Any], args: list[Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(x):
        return x.val if isinstance(x, core.Literal) else values[x]

    for eqn in _used(jaxpr):
        inputs = [read(x) for x in eqn.invars]
        inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        if eqn.primitive.name == "stop_gradient":
            outputs = inputs
        elif eqn.primitive.name in _SPELT_OUT:
            outputs = [_SPELT_OUT[eqn.primitive.name](*inputs, **eqn.params)]
        elif inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            # Of arrays on a mesh; a kernel sees its own device's part alone.
            params = eqn.params | ({"sharding": None} if "sharding" in eqn.params else {})
            outputs = eqn.primitive.bind(*inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _integer_pow(x: Any, *, y: int) -> Any:
    power = x
    for _ in range(abs(y) - 1):
        power = power * x
    return power if y > 0 else 1 / power


# What Mosaic GPU does not lower.
_SPELT_OUT = {"add_any": lax.add, "integer_pow": _integer_pow}


def _used(jaxpr: Any) -> list[Any]:
    needed, equations = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(x for x in eqn.invars if not isinstance(x, core.Literal))
            equations.append(eqn)
    return equations[::-1]
