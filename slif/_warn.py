"""Warnings about numbers that are valid but probably not intended.

Only Python and NumPy values are checked. The host value that a device array was made from is kept for as long as the
array lives, so that nothing is ever read back.
"""

import sys
import warnings
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from slif._host import holds_arrays

_LIBRARIES = ("slif", "flax", "jax", "contextlib", "functools")
_MADE_FROM: dict[int, tuple[weakref.ref, Any]] = {}


def made(array: Any, value: Any) -> Any:
    """The array, with the host value that it was made from kept for `known`."""
    if not isinstance(array, Tracer) and not isinstance(value, jax.Array):
        key = id(array)
        _MADE_FROM[key] = weakref.ref(array, lambda _: _MADE_FROM.pop(key, None)), value
    return array


def known(value: Any) -> Any:
    """The value of a number on the host: a Python or NumPy value, or what the array was made from; else None."""
    entry = _MADE_FROM.get(id(value))
    if entry is not None and entry[0]() is value:
        return entry[1]
    return None if isinstance(value, jax.Array) or holds_arrays(value) else value


def euler(tau_m: Any, dt: Any) -> None:
    """Warns of steps so long that the potential grows at each; both are scalars, or arrays with one value per point."""
    tau_m, dt = known(tau_m), known(dt)
    if tau_m is None or dt is None:
        return
    stable = 0.5 * dt <= tau_m
    if stable if isinstance(stable, bool) else stable.all():
        return
    steps, taus = np.broadcast_arrays(dt, tau_m)
    worst = np.argmax(steps / taus)
    _warn(
        f"dt: forward Euler diverges for dt > 2 tau_m, got dt = {steps.flat[worst]} and tau_m = {taus.flat[worst]} ms"
    )


def jitter(thr: Any, width: Any) -> None:
    """Warns of a jitter that can put thresholds below 0, the resting potential."""
    if isinstance(thr, jax.Array) or isinstance(width, jax.Array) or not width:
        return
    low = np.asarray(thr)
    if np.any((low >= 0) & (low <= width)):
        _warn(
            f"thr_jitter: units with a threshold below 0 fire at every step without input, got thr_jitter = {width} "
            f"and thr = {thr}"
        )


def clock(refract_time: Any, dt: Any, dtype: Any) -> None:
    """Warns of periods that a clock of this dtype never reaches; both are scalars, or arrays with one value per point.

    The clock stops at the first power of two where dt is half a unit in the last place, or less.
    """
    refract_time, dt = known(refract_time), known(dt)
    if refract_time is None or dt is None:
        return
    reached = refract_time * 2.0**-8 <= dt  # even in the coarsest dtype
    if reached if isinstance(reached, bool) else reached.all():
        return
    periods, steps = (np.asarray(x).astype(dtype).astype(np.float64) for x in (refract_time, dt))
    periods, steps = np.broadcast_arrays(periods, steps)
    last = 2.0 ** (np.ceil(np.log2(steps)) + jnp.finfo(dtype).nmant + 1)
    if (periods <= last).all():
        return
    worst = np.argmax(periods / last)
    _warn(
        f"refract_time: a unit that has fired never fires again, as its clock in {np.dtype(dtype)} stops at "
        f"{last.flat[worst]:g} ms, got dt = {steps.flat[worst]:g} and refract_time = {periods.flat[worst]:g} ms"
    )


def narrowed(name: str, asked: Any, stored: np.dtype) -> np.dtype:
    """Warns of a dtype that JAX only has under x64; `float` and `int` stand for whatever there is."""
    if asked is not None and asked is not float and asked is not int and np.dtype(asked) != stored:
        _warn(f"{name}: {np.dtype(asked)} needs jax_enable_x64, and is {stored} without it")
    return stored


def _warn(message: str) -> None:
    """Warns at the line of the user's program that the call came from."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
