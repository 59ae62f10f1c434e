"""Second derivatives, in every order of forward and reverse mode, beside loops whose spikes JAX differentiates itself.

There a spike is z + G(x) - G(x) with the second G held constant: its value is that of z, and its derivatives of every
order are those of G, the integral of the surrogate's slope. No rule of slif's is involved.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
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
# Each surrogate with mechanisms that make its spikes matter later, and each mechanism with both kinds of reset.
CASES = {
    "secant": {},
    "secant, inhibition": {"resist_inh": 0.3},
    "arctan": {"detach_reset": False},
    "arctan, everything": {"thr_gain": 0.1, "thr_leak": 0.05, "resist_inh": 0.3, "refract_time": 2.0, "sticky": True},
    "arctan, everything, reset": {
        **{"detach_reset": False, "thr_gain": 0.1, "thr_leak": 0.05},
        **{"resist_inh": 0.3, "refract_time": 2.0, "masked": True},
    },
    "boxcar": {"detach_reset": False, "thr_gain": 0.1},
    "fast_sigmoid, masked": {"detach_reset": True, "thr_leak": 0.05, "masked": True},
    "gaussian, sparsity": {"detach_reset": False, "rho_b": 0.04},
    "sigmoid, sparsity": {"detach_reset": True, "rho_b": 0.04, "refract_time": 2.0},
    "straight_through": {"detach_reset": True, "resist_inh": 0.3},
    "triangular, refractory": {"detach_reset": False, "refract_time": 2.0, "masked": True},
}  # fmt: skip


def draw(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.5, 1.5, (T, B, N))
    weights = rng.uniform(0.025, 1, (N, N)) * (1 - np.eye(N))
    valid = np.arange(T)[:, None] < [[T, 4]]
    return jnp.asarray(x), jnp.asarray(weights), jnp.asarray(valid)


def numbers_of(case):
    """What is differentiated, one scalar each: a weight of the currents, and the parameters of the cell."""
    names = ("thr_gain", "thr_leak", "rho_b", "resist_inh")
    given = {"w": 1.1, "tau_m": 3.0, "resist_m": 2.0, "thr": 0.6, "dt": 1.0}
    return {name: jnp.asarray(x) for name, x in (given | {k: case[k] for k in names if k in case}).items()}


def loss_of(v, s, thr):
    """Not linear in any of what it takes, so that what a spike is worth depends on the spikes."""
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


ORDERS = {
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_order_is_that_of_a_loop_by_hand(name):
    case, kind = CASES[name], name.partition(",")[0]
    with enable_x64():
        arguments = kind, case, *draw()
        numbers = numbers_of(case)

        @jax.jit
        def hessians(numbers):
            ours = functools.partial(
                by_slif, name=kind, case=case, x=arguments[2], weights=arguments[3], valid=arguments[4]
            )
            hand = functools.partial(
                by_loop, name=kind, case=case, x=arguments[2], weights=arguments[3], valid=arguments[4]
            )
            return {order: of(ours)(numbers) for order, of in ORDERS.items()}, ORDERS["forward over forward"](hand)(
                numbers
            )

        ours, expected = hessians(numbers)
        for order, hessian in ours.items():
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8, err_msg=order), hessian, expected
            )
        assert any(abs(x) > 1e-3 for x in jax.tree.leaves(expected)) or kind in ("straight_through",)
