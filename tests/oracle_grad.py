"""The gradient of a run by hand: a float64 NumPy loop forward, one backward for each kind of estimator. No JAX.

Adjoints have the names of their variables: v_bar is the derivative of the loss with respect to v.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FLOOR = 0.025  # of the thresholds under the sparsity rule


def _logistic(x: NDArray) -> NDArray:
    return (1 + np.tanh(x / 2)) / 2


SLOPES: dict[str, Callable[..., NDArray]] = {
    "secant": lambda i, c1, c2: np.where(i > 0, 1 / np.cosh(c2 * i), 0),
    "secant squared": lambda i, c1, c2: np.where(i > 0, 1 / np.cosh(c2 * i) ** 2, 0),
    "secant scaled": lambda i, c1, c2: np.where(i > 0, c1 * c2 / np.cosh(c2 * i), 0),
    "secant squared scaled": lambda i, c1, c2: np.where(i > 0, c1 * c2 / np.cosh(c2 * i) ** 2, 0),
    "fast_sigmoid": lambda x, slope: 1 / (1 + slope * np.abs(x)) ** 2,
    "sigmoid": lambda x, slope: slope * _logistic(slope * x) * (1 - _logistic(slope * x)),
    "arctan": lambda x, alpha: alpha / 2 / (1 + (np.pi * alpha * x / 2) ** 2),
    "triangular": lambda x, width: np.maximum(0, 1 - np.abs(x) / width),
    "boxcar": lambda x, width: np.where(np.abs(x) <= width, 1.0, 0.0),
    "gaussian": lambda x, width: np.exp(-(x**2) / (2 * width**2)) / (width * np.sqrt(2 * np.pi)),
    "straight_through": np.ones_like,
}


@dataclass(frozen=True)
class Cell:
    """The parameters, named as in the package; `slope` is h(i) or g(u - thr)."""

    slope: Callable[[NDArray], NDArray]
    tau_m: NDArray
    resist_m: NDArray
    refract_time: NDArray | float = 0.0
    thr_gain: NDArray | float = 0.0
    thr_leak: NDArray | float = 0.0
    rho_b: NDArray | float = 0.0
    resist_inh: NDArray | float = 0.0
    inh_weights: NDArray | None = None
    sticky_spikes: bool = False
    detach_reset: bool = True
    reset: str = "zero"
    feedback: NDArray | None = None

    @property
    def inhibits(self) -> NDArray:
        """[N, N], 1 where a unit inhibits another: never itself, nor a unit whose resist_inh is not positive."""
        n_units = len(self.inh_weights)
        return (1 - np.eye(n_units)) * (np.broadcast_to(self.resist_inh, n_units) > 0)


@dataclass(frozen=True)
class Step:
    """What the backward loops read of one step: its input, the state before it, and what it computed."""

    j: NDArray  # feedback included
    v: NDArray
    s: NDArray
    thr: NDArray
    i: NDArray
    ready: NDArray
    u: NDArray
    z: NDArray


def run(cell: Cell, state: dict[str, NDArray], currents: NDArray, dt: float) -> tuple[list[Step], NDArray]:
    """The steps from the state v, s, thr, rfr [B, N] over currents [T, B, N], and the raster."""
    v, s, thr, rfr = (state[name] for name in ("v", "s", "thr", "rfr"))
    steps, raster = [], []
    for j in currents:
        j = j if cell.feedback is None else j + s @ cell.feedback
        i = j * cell.resist_m
        if cell.inh_weights is not None:
            i = i - (s @ (cell.inh_weights * cell.inhibits)) * cell.resist_inh
        ready = rfr >= cell.refract_time
        u = np.where(ready, v + (i - v) / cell.tau_m * dt, v)
        z = np.where(u > thr, 1.0, 0.0)
        steps.append(Step(j, v, s, thr, i, ready, u, z))
        v = (1 - z) * u if cell.reset == "zero" else u - z * thr
        if cell.rho_b > 0:
            thr = np.maximum(thr + (z.sum(-1, keepdims=True) - 1) * cell.rho_b, FLOOR)
        else:
            thr = thr + z * cell.thr_gain - thr * cell.thr_leak
        rfr = np.where(z > 0, dt, rfr + dt)
        s = np.where(ready, z, 1.0) if cell.sticky_spikes else z
        raster.append(s)
    return steps, np.stack(raster)


def _through_current(cell: Cell, step: Step, i_bar: NDArray, bars: dict[str, NDArray]) -> tuple[NDArray, NDArray]:
    """From i_bar to j_bar and to the adjoint of the spikes of the previous step."""
    bars["resist_m"] += i_bar * step.j
    j_bar = i_bar * cell.resist_m
    s_bar = np.zeros_like(i_bar)
    if cell.feedback is not None:
        bars["feedback"] += step.s.T @ j_bar
        s_bar = s_bar + j_bar @ cell.feedback.T
    if cell.inh_weights is None:
        return j_bar, s_bar
    weights, felt = cell.inh_weights * cell.inhibits, i_bar * cell.resist_inh
    bars["resist_inh"] -= i_bar * (step.s @ weights)
    bars["inh_weights"] -= (step.s.T @ felt) * cell.inhibits
    return j_bar, s_bar - felt @ weights.T


def backward_voltage(cell: Cell, steps: list[Step], raster_bars: dict[str, NDArray], dt: float) -> dict[str, NDArray]:
    """Back-propagation through time, given the cotangents [T, B, N] of the recorded s, v, thr and j.

    Returns the gradients of the currents, of the initial v, s and thr, and of the parameters, summed over time
    and, for inh_weights and feedback only, over the batch.
    """
    v_bar, s_bar, thr_bar = np.zeros((3, *steps[0].v.shape))
    bars, currents = defaultdict(float), []
    for k, step in reversed(list(enumerate(steps))):
        v_bar, s_bar, thr_bar = (b + raster_bars[n][k] for b, n in ((v_bar, "v"), (s_bar, "s"), (thr_bar, "thr")))
        z_bar = np.where(step.ready, s_bar, 0) if cell.sticky_spikes else s_bar

        if cell.rho_b > 0:
            surplus = step.z.sum(-1, keepdims=True) - 1
            raised = step.thr + surplus * cell.rho_b
            # At a tie the maximum splits its adjoint in half, as JAX's does.
            thr_bar = thr_bar * ((raised > FLOOR) + 0.5 * (raised == FLOOR))
            bars["rho_b"] += thr_bar * surplus
            z_bar = z_bar + thr_bar.sum(-1, keepdims=True) * cell.rho_b
        else:
            bars["thr_gain"] += thr_bar * step.z
            bars["thr_leak"] -= thr_bar * step.thr
            z_bar = z_bar + thr_bar * cell.thr_gain
            thr_bar = thr_bar * (1 - cell.thr_leak)

        soft = cell.reset == "subtract"
        if not cell.detach_reset:
            z_bar = z_bar - v_bar * (step.thr if soft else step.u)
        x_bar = z_bar * cell.slope(step.u - step.thr)
        u_bar = (v_bar if soft else v_bar * (1 - step.z)) + x_bar
        thr_bar = thr_bar - x_bar - (v_bar * step.z if soft else 0)

        moved = np.where(step.ready, u_bar, 0) * dt / cell.tau_m
        bars["tau_m"] -= moved * (step.i - step.v) / cell.tau_m
        v_bar = u_bar - moved
        j_bar, s_bar = _through_current(cell, step, moved + raster_bars["j"][k], bars)
        currents.append(j_bar)
    return bars | {"currents": np.stack(currents[::-1]), "v": v_bar, "s": s_bar, "thr": thr_bar}


def backward_current(cell: Cell, steps: list[Step], raster_bars: dict[str, NDArray]) -> dict[str, NDArray]:
    """The rule d s'/d i = h(i), with all else that a spike changes constant; arguments and results as above."""
    s_bar = np.zeros_like(steps[0].s)
    bars, currents = defaultdict(float), []
    for k, step in reversed(list(enumerate(steps))):
        i_bar = (s_bar + raster_bars["s"][k]) * cell.slope(step.i) + raster_bars["j"][k]
        j_bar, s_bar = _through_current(cell, step, i_bar, bars)
        currents.append(j_bar)
    return bars | {"currents": np.stack(currents[::-1]), "s": s_bar}
