"""Many settings of a 100-unit cell over 500 steps: a sweep compared with loops of separate runs, and its memory.

    python benchmarks/bench_sweep.py [--json FILE] [--points P ...] [--repeats R] [--batch-size K]

Each point has its own tau_m and thr and counts its spikes, as a study of firing rates would; rasters of 10,000 points
would take 2 GB. The loops are timed over a few points, and their times are per point:

    simulate     a Python loop over `simulate`, outside jit
    jitted       the same, with everything for a point in one compiled function
    ngclearn     ngc-learn's step in one jitted scan, if installed; the best case, since it is compiled once
    compiled     ngc-learn in a loop over settings, which are constants of its cell, so that it compiles for each
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import peers

import slif

N_STEPS, N_UNITS, LOOPED = 500, 100, 20


def points(n: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    numbers = {"tau_m": rng.uniform(5, 40, n), "thr": rng.uniform(0.2, 0.8, n)}
    return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


def swept(params: slif.SLIFParams, currents: jax.Array, over: dict, batch_size: int | None) -> jax.Array:
    _, out = slif.sweep(params, currents, over=over, dt=cases.DT, record=("spike_count",), batch_size=batch_size)
    return out["spike_count"]


def one(params: slif.SLIFParams, currents: jax.Array, tau_m: jax.Array, thr: jax.Array) -> jax.Array:
    params = params.replace(tau_m=tau_m, thr=jnp.broadcast_to(thr, (N_UNITS,)))
    return slif.simulate(params, slif.init_state(params), currents, dt=cases.DT, record=("spike_count",))[1][
        "spike_count"
    ]


def loop(point: Callable, params: slif.SLIFParams, currents: jax.Array, over: dict) -> list[jax.Array]:
    return [point(params, currents, tau_m, thr) for tau_m, thr in zip(over["tau_m"], over["thr"], strict=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--points", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=9, help="number of repeats to take the median of")
    parser.add_argument("--batch-size", type=int, default=100, help="points side by side when memory is bounded")
    options = parser.parse_args(arguments)

    params = cases.make_params(N_UNITS, refract_time=2.0)
    currents = jnp.asarray(cases.make_currents((N_STEPS, N_UNITS)))
    few = points(LOOPED)
    runs: dict[str, Any] = {
        name: functools.partial(loop, point, params, currents, few)
        for name, point in (("simulate", one), ("jitted", jax.jit(one)))
    }
    for run in runs.values():
        np.testing.assert_array_equal(swept(params, currents, few, None), jnp.stack(run()))
    if peers.installed(["ngclearn"]):
        single = np.asarray(currents)[:, None]
        forward = peers.ngclearn_forward(single, refract_time=2.0)
        runs["ngclearn"] = lambda: [forward() for _ in range(LOOPED)]
        runs["compiled"] = lambda: [peers.ngclearn_forward(single, refract_time=2.0)() for _ in range(LOOPED)]
    each = {name: x / LOOPED for name, x in cases.median_seconds(runs, options.repeats).items()}
    for name, seconds in each.items():
        print(f"{name:<10}{1e6 * seconds:>12.1f} us per point")

    print(f"\n{'P':>7}{'us/point':>12}{'MB':>9}{f'by {options.batch_size}: us':>15}{'MB':>9}{'compile s':>11}", end="")
    print("".join(f"{'x ' + name:>12}" for name in each))
    rows = []
    for n in options.points:
        over, row = points(n), {"points": n}
        for key, batch_size in (("all", None), ("chunks", options.batch_size)):
            run = functools.partial(swept, batch_size=batch_size)
            compiled, compiling = cases.compile_seconds(run, params, currents, over)
            call = functools.partial(compiled, params, currents, over)
            seconds = cases.median_seconds({"run": call}, options.repeats, budget=10.0)["run"]
            analysis: Any = compiled.memory_analysis()
            row |= {
                key + "_us": 1e6 * seconds / n,
                key + "_MB": analysis.temp_size_in_bytes / 1e6,
                "compile_s": compiling,
            }
        for name in each:
            row["over_" + name] = 1e6 * each[name] / row["all_us"]
        print(
            f"{n:>7}{row['all_us']:>12.2f}{row['all_MB']:>9.2f}{row['chunks_us']:>15.2f}{row['chunks_MB']:>9.2f}"
            f"{row['compile_s']:>11.2f}" + "".join(f"{row['over_' + name]:>12.1f}" for name in each),
            flush=True,
        )
        rows.append(row)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"each": each, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
