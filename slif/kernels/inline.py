"""Functions as plain operations: kernels know no custom derivatives and no jit, and would compute unused values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

# Primitives that only call a function, once, with their own inputs, as jax 0.10 to 0.12 name them.
CALLS = {"jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"}
# Primitives that return their first input.
PASSING = {"copy", "slif_attach", "stop_gradient"}
# Elementwise primitives that Mosaic GPU lowers in all of these releases, or that are spelt out below.
ELEMENTWISE = {
    *("abs", "add", "add_any", "clamp", "div", "integer_pow", "max", "min", "mul", "neg", "one_minus_square", "sub"),
    *("and", "or", "xor", "eq", "ge", "gt", "le", "lt", "ne", "round", "select_n", "sign"),
    *("cos", "exp", "exp2", "log", "logistic", "rsqrt", "sin", "square", "tanh"),
    *("broadcast_in_dim", "convert_element_type", "copy", "is_finite", "stop_gradient"),
}


def inline_jaxpr(fun: Callable) -> Callable:
    """`fun` with every inner call inlined and unused operations left out; it is traced once, at its first call."""
    traced: list[Any] = []

    def run(*args):
        leaves, tree = jax.tree.flatten(args)
        if not traced:
            closed, shapes = jax.make_jaxpr(lambda *x: fun(*tree.unflatten(x)), return_shape=True)(*leaves)
            traced.extend((closed, jax.tree.structure(shapes)))
        closed, out_tree = traced
        return out_tree.unflatten(_evaluate(closed.jaxpr, closed.consts, leaves))

    return run


def obstacle(fun: Callable, *args: Any) -> str | None:
    """What keeps `fun` from being elementwise on these arguments, or None."""
    return _obstacle(jax.make_jaxpr(fun)(*args).jaxpr)


def _obstacle(jaxpr: Any) -> str | None:
    equations = _used(jaxpr)
    if _variables(jaxpr.outvars, *map(_inputs, equations)).intersection(jaxpr.constvars):
        return "a closed-over array"
    for eqn in equations:
        inner, _ = _called(eqn)
        if inner is not None:
            found = _obstacle(inner)
        else:
            found = None if eqn.primitive.name in ELEMENTWISE else f"the primitive `{eqn.primitive.name}`"
        if found is not None:
            return found
    return None


def _evaluate(jaxpr: Any, consts: Any, args: list[Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(x):
        return x.val if isinstance(x, core.Literal) else values[x]

    for eqn in _used(jaxpr):
        inputs = [read(x) for x in _inputs(eqn)]
        inner, consts = _called(eqn)
        if inner is not None:
            outputs = _evaluate(inner, consts, inputs)
        elif eqn.primitive.name in PASSING:
            outputs = inputs
        elif eqn.primitive.name in _SPELT_OUT:
            outputs = [_SPELT_OUT[eqn.primitive.name](*inputs, **eqn.params)]
        else:
            # Of arrays on a mesh, a kernel sees only its own device's part.
            params = eqn.params | ({"sharding": None} if "sharding" in eqn.params else {})
            outputs = eqn.primitive.bind(*inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _called(eqn: Any) -> tuple[Any, Any]:
    """The function and the constants of an equation that is only a call; None for any other."""
    if eqn.primitive.name not in CALLS:
        return None, ()
    inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _integer_pow(x: Any, *, y: int) -> Any:
    power = x if y else jnp.ones_like(x)
    for _ in range(abs(y) - 1):
        power = power * x
    return 1 / power if y < 0 else power


# What Mosaic GPU does not lower.
_SPELT_OUT = {"add_any": lax.add, "integer_pow": _integer_pow, "is_finite": lambda x: jnp.abs(x) < jnp.inf}


def _used(jaxpr: Any) -> list[Any]:
    needed, equations = _variables(jaxpr.outvars), []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed |= _variables(_inputs(eqn))
            equations.append(eqn)
    return equations[::-1]


def _inputs(eqn: Any) -> list[Any]:
    return eqn.invars[:1] if eqn.primitive.name in PASSING else eqn.invars


def _variables(*atoms: Any) -> set[Any]:
    return {x for some in atoms for x in some if not isinstance(x, core.Literal)}
