"""One neuron under a current that switches on and later halves: a table of its first steps, and its traces.

    python examples/single_neuron.py
    python examples/single_neuron.py --current 1.5 --refract-time 5 --sticky

The threshold rises with every spike and leaks back, so the neuron fires fast at first and then more slowly.
"""

import argparse
from pathlib import Path

import cli
import jax
import jax.numpy as jnp
import matplotlib
from jax import Array

import slif

matplotlib.use("Agg")
from slif import plot

RECORD = ("j", "u", "v", "thr", "rfr", "s")


def current(n_steps: int, dt: float, height: float) -> Array:
    """Zero, then the full height from a tenth to seven tenths of the time, then half of it."""
    share = jnp.arange(n_steps) * dt / (n_steps * dt)
    return height * jnp.where(share < 0.1, 0.0, jnp.where(share < 0.7, 1.0, 0.5))[:, None]


def simulate(args: argparse.Namespace) -> tuple[slif.SLIFParams, dict[str, Array]]:
    params = slif.init_params(
        jax.random.key(0),
        1,
        tau_m=20.0,
        resist_m=1.0,
        thr=0.4,
        thr_jitter=0.0,
        thr_gain=0.05,
        thr_leak=0.005 * args.dt,
        refract_time=args.refract_time,
        sticky_spikes=args.sticky,
    )
    j = current(round(args.duration / args.dt), args.dt, args.current)
    return params, slif.simulate(params, slif.init_state(params), j, dt=args.dt, record=RECORD)[1]


def table(out: dict[str, Array], dt: float, first: int, n_rows: int) -> str:
    lines = [f"{'t, ms':>8}" + "".join(f"{name:>8}" for name in RECORD)]
    for k in range(first, min(first + n_rows, len(out["v"]))):
        lines.append(f"{k * dt:>8g}" + "".join(f"{float(out[name][k, 0]):>8.3f}" for name in RECORD))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(description="One neuron: a table of its first steps, and its traces.")
    parser.add_argument("--current", type=cli.number(float, 0, 1000), default=1.2, help="height of the current")
    parser.add_argument("--refract-time", type=cli.number(float, 0, 1000), default=3.0, help="refractory period, ms")
    parser.add_argument("--sticky", action="store_true", help="hold the output at 1 while refractory")
    parser.add_argument("--dt", type=cli.number(float, 0.001, 10), default=0.5, help="length of a step, ms")
    parser.add_argument("--duration", type=cli.number(float, 1, 1e5), default=300.0, help="length of the run, ms")
    parser.add_argument("--out", type=Path, default=Path("out/single_neuron"), help="folder for single_neuron.png")
    args = parser.parse_args(arguments)
    parser.check_steps(args.duration, args.dt)
    parser.probe(args.out)

    params, out = simulate(args)
    start = round(0.1 * args.duration / args.dt)
    print(
        "The first steps under current: j, the potential before and after the reset, the threshold, the time since the"
    )
    print("last spike, s")
    print(table(out, args.dt, start, 24))
    times = jnp.flatnonzero(out["s"][:, 0] > 0) * args.dt
    print(f"{int(out['s'].sum())} steps with the output at 1 in {args.duration:g} ms", end="")
    print(f", the first at {float(times[0]):g} ms" if times.size else "; more current makes it fire")

    axes = plot.traces(out, params=params, dt=args.dt)
    axes[0].set_ylabel("current")
    axes[1].set_ylabel("potential")
    axes[1].set_title(
        "potential, threshold (dashed), spikes (ticks), refractory steps (shaded)",
        fontsize="medium",
    )
    path = args.out / "single_neuron.png"
    with cli.saved(path) as file:
        axes[0].figure.savefig(file, format="png", dpi=120)
    print(path)


if __name__ == "__main__":
    main()
