"""The programs that are compiled for devices this machine does not have: all that a kernel can do."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import slif
from slif.request import RECORDS

VOLTAGE = (
    slif.arctan, slif.boxcar, slif.fast_sigmoid, slif.gaussian, slif.sigmoid, slif.straight_through, slif.triangular,
)  # fmt: skip
WIDTHS = {"narrow": 40, "wide": 136}  # units per row: both tile widths, with a partial last tile
WIDE_FROM = 512  # units from which tiles are wide here, so that small programs have wide ones
T, B, DT = 28, 5, 0.25  # three and a half blocks of steps: with two, the compiler makes no loop

Program = tuple[str, Callable, tuple[Any, ...], int]  # name, function, arguments, number of devices


def make_params(n_units: int, surrogate: Any, everything: bool, **options: Any) -> slif.SLIFParams:
    more = {"thr_gain": 0.1, "thr_leak": 0.01, "sticky_spikes": True, "refract_time": 1.0} if everything else {}
    own = jnp.linspace(5.0, 20.0, n_units) if everything else 20.0
    more |= options
    return slif.init_params(jax.random.key(0), n_units, tau_m=own, resist_m=1.0, thr=0.4, surrogate=surrogate, **more)


def run(params: slif.SLIFParams, x: Any, valid: Any = None, implementation: str = "pallas", **options: Any) -> Any:
    state = slif.init_state(params, x.shape[1:-1])
    return slif.simulate(params, state, x, dt=DT, valid=valid, implementation=implementation, **options)


def gradients(params: slif.SLIFParams, x: Any, *args: Any, **options: Any) -> Any:
    def loss(params, x):
        state, out = run(params, x, *args, **options)
        return sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves((state.v, out)))

    return jax.grad(loss, argnums=(0, 1))(params, x)


def input_gradient(params: slif.SLIFParams, x: Any, **options: Any) -> Any:
    return jax.grad(lambda x: (run(params, x, **options)[1]["s"] ** 2).sum())(x)


def programs() -> Iterator[Program]:
    """Programs that are compiled and executed: every surrogate, record, mask, tile width and dtype."""
    for width, n in WIDTHS.items():
        for name, function, args in _programs(n):
            yield f"{width}, {name}", function, args, 1
    # Rows that start at no multiple of anything; less than one tile; rows of whole tiles.
    for width, rows, n in (("narrow", 7, 37), ("narrow", 3, 1), ("narrow", 3, 128), ("wide", 3, 512)):
        x = jax.ShapeDtypeStruct((T, rows, n), jnp.float32)
        yield f"{width}, training, {rows} x {n} units", gradients, (make_params(n, slif.arctan(), True), x), 1


def _programs(n: int) -> Iterator[tuple[str, Callable, tuple[Any, ...]]]:
    x, valid = jax.ShapeDtypeStruct((T, B, n), jnp.float32), jax.ShapeDtypeStruct((T, B), bool)
    bare, full = (make_params(n, slif.secant(), everything) for everything in (False, True))
    yield "forward", run, (bare, x)
    for dtype in (bool, jnp.int32):
        yield f"forward, {jnp.dtype(dtype)}", functools.partial(run, spike_dtype=dtype), (full, x)
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jax.ShapeDtypeStruct(x.shape, dtype)
        yield f"forward, {jnp.dtype(dtype)}", functools.partial(run, spike_dtype=dtype), (full, half)
    for record in (*((name,) for name in RECORDS), RECORDS):
        name = record[0] if len(record) == 1 else "all records"
        yield f"forward, valid, {name}", functools.partial(run, record=record), (full, x, valid)
    for make in VOLTAGE:
        for detach in (False, True):
            surrogate = make(detach_reset=detach)
            yield f"training, {make.__name__}{' detached' * detach}", gradients, (make_params(n, surrogate, True), x)
    params = make_params(n, slif.arctan(), True)
    for everything in (False, True):
        name = "training, input alone" + ", full" * everything
        yield name, input_gradient, (make_params(n, slif.arctan(), everything), x)
    yield "training, plain", gradients, (make_params(n, slif.arctan(), False), x)
    yield "training, soft reset", gradients, (make_params(n, slif.arctan(), True, reset="subtract"), x)
    yield "training, valid", gradients, (params, x, valid)
    most = ("s", "u", "v", "thr", "j", "spike_count")
    yield "training, valid, all records", functools.partial(gradients, record=most), (params, x, valid)
    yield "training, bfloat16", gradients, (params, jax.ShapeDtypeStruct(x.shape, jnp.bfloat16))
    params, row = make_params(B * n, slif.arctan(), True), jax.ShapeDtypeStruct((T, B * n), jnp.float32)
    yield "training, one mask for all", gradients, (params, row, jax.ShapeDtypeStruct((T,), bool))


def many_devices(n: int) -> Iterator[Program]:
    params = make_params(4096, slif.arctan(), True)
    for what, spec in (("batch", P(None, "x")), ("units", P(None, None, "x"))):
        x = jax.ShapeDtypeStruct((100, 8, 4096), jnp.float32)
        for kind, function in (("forward", lambda params, x: run(params, x)), ("training", gradients)):
            function = function if kind == "forward" else (lambda params, x: gradients(params, x)[1])
            yield f"{n} devices, {what}, {kind}", function, (params, (x, spec)), n
    taus = (jax.ShapeDtypeStruct((65536,), jnp.float32), P("x"))
    one = make_params(1, slif.arctan(), False)
    x = jax.ShapeDtypeStruct((100, 1), jnp.float32)

    def sweep(params, x, taus):
        return jax.vmap(lambda tau: run(params.replace(tau_m=tau), x)[1]["s"].sum(0))(taus)

    def trained(params, x, taus):
        return jax.vmap(jax.grad(lambda tau: run(params.replace(tau_m=tau), x)[1]["s"].sum()))(taus)

    yield f"{n} devices, points, forward", sweep, (one, x, taus), n
    yield f"{n} devices, points, training", trained, (one, x, taus), n


def points() -> Program:
    """100,000 points of one unit over 1000 steps."""

    def sweep(params, x, taus):
        return jax.vmap(lambda tau: run(params.replace(tau_m=tau), x)[1]["s"])(taus)

    x, taus = jax.ShapeDtypeStruct((1000, 1), jnp.float32), jax.ShapeDtypeStruct((100_000,), jnp.float32)
    return "100,000 points of 1 unit", sweep, (make_params(1, slif.secant(), False), x, taus), 1
