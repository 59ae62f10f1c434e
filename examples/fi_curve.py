"""Firing rate against current, over a grid of parameters, compared with theory.

    python examples/fi_curve.py                  a table and out/fi_curve/fi_curve.png

A cell with time constant tau, resistance R, threshold thr and refractory period t_ref fires under a constant current
I, where R I > thr, at the rate

    1 / (t_ref + tau ln(R I / (R I - thr))).

Each unit gets its own current, and one sweep runs all settings. The rate is measured between the first spike and the
last, so that the time from rest to the first does not count. The second panel shows the cell of Samadi, Lillicrap and
Tweed (2017), whose sticky spikes stay up for t_ref: the share of the time that they are up, compared with
0.82 tanh(0.08 j). The picture says why these differ.
"""

from pathlib import Path
from typing import IO, Any

import cli
import jax
import jax.numpy as jnp
import numpy as np

import slif

GRID: dict[str, Any] = {"tau_m": [10.0, 20.0, 40.0], "thr": [0.4, 1.0], "refract_time": [0.0, 2.0, 5.0]}
CURRENTS = np.linspace(0.05, 4, 80, dtype=np.float32)
PAPER = {"tau_m": 20.0, "resist_m": 1.0, "thr": 0.4, "refract_time": 1.0, "thr_jitter": 0.0, "sticky_spikes": True}
PAPER_DT, PAPER_CURRENTS = 0.25, np.linspace(0.25, 30, 120, dtype=np.float32)
WHY_THEY_DIFFER = """Dots: a period is a whole number of steps, and
the spike is up for 4 of them: 4/5, 4/6, 4/7, ...
Theory: the same cell in the limit of short steps.
tanh: what the paper uses instead of the cell's
own curve, for a smooth surrogate gradient."""


def analytic(current: Any, tau_m: Any, thr: Any, refract_time: Any, resist_m: float = 1.0) -> np.ndarray:
    """The rate of the leaky integrate-and-fire cell, per ms."""
    drive = resist_m * np.asarray(current, np.float64)
    above = drive > thr
    safe = np.where(above, drive, 2 * thr)
    return np.where(above, 1 / (refract_time + tau_m * np.log(safe / (safe - thr))), 0)


def simulated(over: dict[str, Any], dt: float, duration: float, currents: np.ndarray = CURRENTS) -> np.ndarray:
    """The rate of each unit at each point, [P, N], per ms; 0 where there are fewer than two spikes."""
    n = len(currents)
    params = slif.init_params(jax.random.key(0), n, tau_m=20.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
    j = jnp.broadcast_to(currents, (round(duration / dt), n))
    state, out = slif.sweep(params, j, over=over, dt=dt, record=("spike_count", "first_spike_time"))
    count, first = np.asarray(out["spike_count"]), np.asarray(out["first_spike_time"])
    span = np.where(count > 1, np.asarray(state.tols) - first, 1)
    return np.where(count > 1, (count - 1) / span, 0)


def deviations(rates: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest deviation at each point over all currents, as a share of the largest rate at that point."""
    return np.abs(rates - expected).max(-1) / expected.max(-1)


def paper_curve() -> np.ndarray:
    """The share of the time that a sticky spike is up, for the paper's own cell."""
    params = slif.init_params(jax.random.key(0), len(PAPER_CURRENTS), **PAPER)
    j = jnp.broadcast_to(PAPER_CURRENTS, (round(500 / PAPER_DT), len(PAPER_CURRENTS)))
    _, out = slif.simulate(params, slif.init_state(params), j, dt=PAPER_DT, record=("spike_count",))
    return np.asarray(out["spike_count"]) / len(j)


def plot(over: dict[str, np.ndarray], rates: np.ndarray, dt: float, file: IO[bytes]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = [k for k in range(len(rates)) if over["thr"][k] == GRID["thr"][0]]
    styles = dict(zip(GRID["refract_time"], ("-", "--", ":"), strict=True))
    for k in shown:
        tau, thr, refract = (float(over[name][k]) for name in GRID)
        colour = f"C{GRID['tau_m'].index(tau)}"
        left.plot(CURRENTS, 1e3 * analytic(CURRENTS, tau, thr, refract), styles[refract], color=colour, lw=1.2)
        left.plot(CURRENTS[::4], 1e3 * rates[k, ::4], "o", color=colour, ms=3)
    for k, tau in enumerate(GRID["tau_m"]):
        left.plot([], [], "o-", color=f"C{k}", ms=3, label=f"tau_m = {tau:g} ms")
    for refract, style in styles.items():
        left.plot([], [], style, color="0.4", label=f"refract_time = {refract:g} ms")
    left.set(xlabel="current", ylabel="rate, Hz", ylim=(-20, None))
    left.set_title(f"lines: theory; dots: simulated, dt = {dt:g} ms, thr = 0.4", fontsize="medium")
    left.legend(fontsize=8, frameon=False)
    share = PAPER["refract_time"] * analytic(PAPER_CURRENTS, PAPER["tau_m"], PAPER["thr"], PAPER["refract_time"])
    right.plot(PAPER_CURRENTS, paper_curve(), "o", color="C0", ms=2.5, label=f"simulated, dt = {PAPER_DT:g} ms")
    right.plot(PAPER_CURRENTS, share, color="C1", label="theory, dt -> 0")
    right.plot(PAPER_CURRENTS, 0.82 * np.tanh(0.08 * PAPER_CURRENTS), color="C2", label="0.82 tanh(0.08 j)")
    right.text(0.98, 0.04, WHY_THEY_DIFFER, transform=right.transAxes, ha="right", va="bottom", fontsize=8)
    right.set(xlabel="current j", ylabel="share of time with a spike up")
    right.set_title("the paper's cell, and why its three curves differ", fontsize="medium")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(description="Firing rate against current, in simulation and in theory.")
    parser.add_argument("--dt", type=cli.number(float, 0.001, 2), default=0.05, help="length of a step, ms")
    parser.add_argument("--duration", type=cli.number(float, 1, 1e5), default=1000.0, help="length of each run, ms")
    parser.add_argument("--out", type=Path, default=Path("out/fi_curve"), help="folder for fi_curve.png")
    args = parser.parse_args(arguments)
    parser.check_steps(args.duration, args.dt)
    parser.probe(args.out)

    over = {name: np.asarray(x) for name, x in slif.grid(**GRID).items()}
    tau, thr, refract = (over[name][:, None] for name in GRID)
    expected = analytic(CURRENTS, tau, thr, refract)
    steps = (4 * args.dt, 2 * args.dt, args.dt)
    rates = {dt: simulated(over, dt, args.duration) for dt in steps}
    print("Largest deviation from theory as a share of the largest rate, by step length in ms")
    print(f"{'tau_m':>8}{'thr':>6}{'refract_time':>14}" + "".join(f"{f'dt {dt:g}':>10}" for dt in steps))
    table = np.stack([deviations(rates[dt], expected) for dt in steps], -1)
    for k, row in enumerate(table):
        setting = (over[name][k] for name in GRID)
        print("{:>8g}{:>6g}{:>14g}".format(*setting) + "".join(f"{x:>10.2%}" for x in row))
    print(f"{'largest':>28}" + "".join(f"{x:>10.2%}" for x in table.max(0)))
    if short := int((expected.max(-1) * args.duration < 10).sum()):
        print(f"--duration {args.duration:g} is too short: {short} of {len(table)} settings fire fewer than 10 times")
    path = args.out / "fi_curve.png"
    with cli.saved(path) as file:
        plot(over, rates[args.dt], args.dt, file)
    print(path)


if __name__ == "__main__":
    main()
