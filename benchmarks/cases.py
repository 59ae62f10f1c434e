"""Shapes, parameters, inputs and timing shared by the benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import slif

SHAPES = ((1000, 1, 1000), (500, 16, 1024), (100, 250, 1000))  # T, B, N
DT, TAU_M, THR = 1.0, 20.0, 0.4
SPIKES, BOTH = "spikes", "spikes + state"  # what a compiled function returns
Key = TypeVar("Key")


def make_params(n_units: int, **arguments: Any) -> slif.SLIFParams:
    """The textbook cell: no refractory period, no jitter, and only the mechanisms that are passed."""
    defaults: dict[str, Any] = {"tau_m": TAU_M, "resist_m": 1.0, "thr": THR, "thr_jitter": 0.0}
    return slif.init_params(jax.random.key(0), n_units, **(defaults | arguments))


def make_currents(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Currents [T, B, N] that make a unit fire about once in ten steps."""
    return np.random.default_rng(seed).uniform(0, 2, shape).astype(np.float32)


def make_bar(shape: tuple[int, ...]) -> np.ndarray:
    """A cotangent for the spikes."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@jax.custom_jvp
def heaviside(x: jax.Array) -> jax.Array:
    """The spikes of a plain scan, with the derivative of `slif.arctan`."""
    return (x > 0).astype(x.dtype)


heaviside.defjvps(lambda dx, _, x: dx / (1 + (jnp.pi * x) ** 2))


def compile_seconds(run: Callable, *args: Any) -> tuple[jax.stages.Compiled, float]:
    """Returns the compiled function, and how long it took to compile."""
    start = time.perf_counter()
    compiled = jax.jit(run).lower(*args).compile()
    return compiled, time.perf_counter() - start


def median_seconds(runs: dict[Key, Callable[[], Any]], repeats: int, budget: float = 20.0) -> dict[Key, float]:
    """The median of each, after a warm-up; repeats are interleaved, so that disturbances affect all equally.

    A run that has used up its budget of seconds is not repeated again.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(seconds[name]) > budget:
                continue
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
