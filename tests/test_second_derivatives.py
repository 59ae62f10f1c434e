"""Second derivatives, in every order of forward and reverse mode, against loops whose spikes JAX differentiates itself.

There a spike is z + G(x) - G(x) with the second G held constant: its value is z, and its derivatives of every order
are those of G, the integral of the surrogate's slope. No rule of slif's is involved.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, jit_quickly
from jax import lax

import slif

T, B, N = 7, 2, 3
FLOOR = 0.025


def _triangle(x, width=1.0):
    x = jnp.clip(x, -width, width)
    return x - jnp.sign(x) * x**2 / (2 * width)


INTEGRALS = {
    "secant": lambda i: jnp.where(i > 0, 2 * jnp.arctan(jnp.tanh(0.04 * i)) / 0.08, 0),
    "arctan": lambda x: jnp.arctan(jnp.pi * x) / jnp.pi,
    "boxcar": lambda x: jnp.clip(x, -1.0, 1.0),
    "fast_sigmoid": lambda x: x / (1 + 25 * jnp.abs(x)),
    "gaussian": lambda x: lax.erf(x / jnp.sqrt(2.0)) / 2,
    "sigmoid": lambda x: 1 / (1 + jnp.exp(-25 * x)),
    "straight_through": lambda x: x,
    "triangular": _triangle,
}
# Mechanisms that make spikes matter later, with both kinds of reset.
CASES = {
    "secant": {},
    "secant, inhibition": {"resist_inh": 0.3},
    "arctan, everything": {"thr_gain": 0.1, "thr_leak": 0.05, "resist_inh": 0.3, "refract_time": 2.0, "sticky": True},
    "fast_sigmoid, everything, reset": {
        **{"detach_reset": False, "thr_gain": 0.1, "thr_leak": 0.05},
        **{"resist_inh": 0.3, "refract_time": 2.0, "masked": True},
    },
    "gaussian, sparsity": {"detach_reset": False, "rho_b": 0.04},
    "sigmoid, sparsity": {"detach_reset": True, "rho_b": 0.04, "refract_time": 2.0},
    "triangular, masked": {"detach_reset": False, "refract_time": 2.0, "masked": True},
}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.5, 1.5, (T, B, N))
    weights = rng.uniform(0.025, 1, (N, N)) * (1 - np.eye(N))
    valid = np.arange(T)[:, None] < [[T, 4]]
    return jnp.asarray(x), jnp.asarray(weights), jnp.asarray(valid)


def numbers_of(case):
    """The scalars to differentiate by: a weight of the currents, and the parameters of the cell."""
    names = ("thr_gain", "thr_leak", "rho_b", "resist_inh")
    given = {"w": 1.1, "tau_m": 3.0, "resist_m": 2.0, "thr": 0.6, "dt": 1.0}
    return {name: jnp.asarray(x) for name, x in (given | {k: case[k] for k in names if k in case}).items()}


def loss_of(v, s, thr):
    """Not linear in any of its inputs, so that the weight of a spike depends on the spikes."""
    weight = jnp.arange(1.0, T + 1)[:, None, None]
    return jnp.sum(weight * s**2) + jnp.sum(s.sum(0) ** 2) + jnp.sum(jnp.sin(v) * thr)


def by_slif(numbers, name, case, x, weights, valid):
    make = getattr(slif, name)
    surrogate = make() if name == "secant" else make(detach_reset=case.get("detach_reset", True))
    leaves = {k: v for k, v in numbers.items() if k not in ("w", "dt", "thr")}
    params = slif.SLIFParams(
        **leaves,
        thr=jnp.broadcast_to(numbers["thr"], (N,)),
        inh_weights=weights if "resist_inh" in case else None,
        refract_time=jnp.asarray(case["refract_time"]) if "refract_time" in case else None,
        sticky_spikes="sticky" in case,
        surrogate=surrogate,
    )
    _, out = slif.simulate(
        params,
        slif.init_state(params, B),
        x * numbers["w"],
        dt=numbers["dt"],
        record=("v", "s", "thr"),
        valid=valid if "masked" in case else None,
    )
    return loss_of(out["v"], out["s"], out["thr"])


def by_loop(numbers, name, case, x, weights, valid):
    integral, current = INTEGRALS[name], name == "secant"
    constant = lax.stop_gradient

    def spike(z, x):
        g = integral(x)
        return z + g - constant(g)

    def body(carry, given):
        v, s, thr, rfr = carry
        j, live = given
        i = j * numbers["w"] * numbers["resist_m"]
        if "resist_inh" in case:
            i = i - (s @ weights) * numbers["resist_inh"]
        ready = rfr >= case.get("refract_time", 0.0)
        u = jnp.where(ready, v + (i - v) / numbers["tau_m"] * numbers["dt"], v)
        z = jnp.where(u > thr, 1.0, 0.0)
        z = z if current else spike(z, u - thr)
        v_new = (1 - (z if current or not case.get("detach_reset", True) else constant(z))) * u
        if "rho_b" in case:
            thr_new = jnp.maximum(thr + (z.sum(-1, keepdims=True) - 1) * numbers["rho_b"], FLOOR)
        else:
            thr_new = thr + z * numbers.get("thr_gain", 0.0) - thr * numbers.get("thr_leak", 0.0)
        rfr_new = constant(jnp.where(z > 0.5, numbers["dt"], rfr + numbers["dt"]))
        s_new = jnp.where(ready, z, 1.0) if "sticky" in case else z
        if current:
            v_new, s_new, thr_new = constant(v_new), spike(constant(s_new), i), constant(thr_new)
        new = (v_new, s_new, thr_new, rfr_new)
        shown = s_new
        if "masked" in case:
            new = jax.tree.map(lambda n, o: jnp.where(live[:, None], n, o), new, carry)
            shown = jnp.where(live[:, None], s_new, 0)
        return new, (new[0], shown, new[2])

    rest = jnp.zeros((B, N))
    start = (
        rest,
        rest,
        rest + (constant(numbers["thr"]) if current else numbers["thr"]),
        rest + case.get("refract_time", 0.0),
    )
    return loss_of(*lax.scan(body, start, (x, valid))[1])


def along(f, d):
    return lambda n: jax.jvp(f, (n,), (d,))[1]


def derivative(f, n):
    return f if n == 0 else jax.grad(derivative(f, n - 1))


def dot(x, y):
    return sum(jax.tree.leaves(jax.tree.map(jnp.multiply, x, y)))


# The second derivative of f times a vector d, which any wrong entry changes.
ORDERS = {
    "forward over forward": lambda f, d: jax.jacfwd(along(f, d)),
    "forward over reverse": lambda f, d: along(jax.grad(f), d),
    "reverse over forward": lambda f, d: jax.grad(along(f, d)),
    "reverse over reverse": lambda f, d: jax.grad(lambda n: dot(jax.grad(f)(n), d)),
}
# Each is a compilation of seconds.
CHOSEN = {
    "secant": tuple(ORDERS),
    "secant, inhibition": ("forward over reverse",),
    "arctan, everything": ("reverse over reverse",),
    "fast_sigmoid, everything, reset": ("reverse over forward",),
    "gaussian, sparsity": ("forward over forward",),
    "sigmoid, sparsity": ("forward over reverse",),
    "triangular, masked": ("reverse over reverse",),
}


@pytest.mark.parametrize("name", CASES)
def test_every_order_is_that_of_a_loop_by_hand(name):
    case, kind = CASES[name], name.partition(",")[0]
    with enable_x64():
        x, weights, valid = draw()
        fixed = {"name": kind, "case": case, "x": x, "weights": weights, "valid": valid}
        ours, hand = (functools.partial(f, **fixed) for f in (by_slif, by_loop))
        numbers = numbers_of(case)
        d = dict(zip(numbers, np.random.default_rng(1).uniform(0.5, 1.5, len(numbers)), strict=True))

        @jit_quickly
        def products(numbers):
            expected = ORDERS["forward over reverse"](hand, d)(numbers)
            return {order: ORDERS[order](ours, d)(numbers) for order in CHOSEN[name]}, expected

        products, expected = products(numbers)
        for order, product in products.items():
            close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8, err_msg=order)
            jax.tree.map(close, product, expected)
        read = {"w", "resist_m", "resist_inh"} & numbers.keys() if kind == "secant" else numbers.keys()
        assert all(abs(expected[name]) > 1e-3 for name in read), expected


def test_slopes_differentiate_as_their_integrals_do():
    x = np.linspace(-1.4, 1.4, 16)  # off the kinks at 0 and 1
    with enable_x64():
        first, second = jit_quickly(
            lambda x: [[jax.vmap(derivative(f, n))(x) for f in INTEGRALS.values()] for n in (1, 2)]
        )(x)
        slopes = {name: getattr(slif, name)() for name in INTEGRALS}
        ours = jit_quickly(lambda x: [(slope(x), jax.vmap(jax.grad(slope))(x)) for slope in slopes.values()])(x)
    for name, (slope, change), one, two in zip(INTEGRALS, ours, first, second, strict=True):
        np.testing.assert_allclose(slope, one, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(change, two, rtol=1e-9, atol=1e-12, err_msg=name)
