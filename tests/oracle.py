"""The cell in float64 NumPy: its equations, in order, in a loop over time. The tests' independent reference."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Cell:
    """Numbers are scalars or, except rho_b, [N]; 0 stands for an absent mechanism."""

    tau_m: float
    resist_m: float
    thr: np.ndarray  # [N]
    refract_time: float = 0.0
    thr_gain: float = 0.0
    thr_leak: float = 0.0
    rho_b: float = 0.0
    resist_inh: float = 0.0
    inh_weights: np.ndarray | None = None  # [N, N]
    sticky_spikes: bool = False
    thr_persist: bool = False
    reset: str = "zero"
    feedback: np.ndarray | None = None  # [N, N]
    c2: float = 0.08


def rest(cell, shape):
    state = {name: np.zeros(shape) for name in ("j", "v", "s", "tols")}
    return state | {
        "thr": np.zeros(shape) + cell.thr,
        "rfr": np.zeros(shape) + cell.refract_time,
        "surrogate": np.ones(shape),
    }


def reset(cell, state):
    fresh = rest(cell, state["v"].shape)
    return fresh | {"thr": state["thr"]} if cell.thr_persist else fresh


def step(cell, state, j, t, dt):
    v, thr, rfr = state["v"], state["thr"], state["rfr"]

    if cell.feedback is not None:
        j = j + state["s"] @ cell.feedback
    i = j * cell.resist_m
    if cell.inh_weights is not None:
        hollow = cell.inh_weights * (1 - np.eye(len(cell.inh_weights)))
        i = i - (state["s"] @ hollow) * np.maximum(cell.resist_inh, 0)

    ready = rfr >= cell.refract_time
    u = np.where(ready, v + ((i - v) / cell.tau_m) * dt, v)
    z = u > thr
    v = np.where(z, 0 if cell.reset == "zero" else u - thr, u)

    if cell.rho_b > 0:
        thr = np.maximum(thr + (z.sum(-1, keepdims=True) - 1) * cell.rho_b, 0.025)
    else:
        thr = thr + z * cell.thr_gain - thr * cell.thr_leak

    s = z | ~ready if cell.sticky_spikes else z
    return {
        "j": i,
        "v": v,
        "s": s.astype(np.float64),
        "thr": thr,
        "rfr": np.where(z, dt, rfr + dt),
        "tols": np.where(s, t, state["tols"]),
        "surrogate": np.where(i > 0, 1 / np.cosh(cell.c2 * i), 0),
    }


def run(cell, currents, dt, t0=0.0, state=None, reset_at=None):
    """Runs currents [T, ..., N] and returns every field after every step, [T, ..., N]."""
    currents = np.asarray(currents, np.float64)
    state = rest(cell, currents.shape[1:]) if state is None else state
    trace = []
    for k, j in enumerate(currents):
        if k == reset_at:
            state = reset(cell, state)
        state = step(cell, state, j, t0 + k * dt, dt)
        trace.append(state)
    return {name: np.stack([state[name] for state in trace]) for name in state}
