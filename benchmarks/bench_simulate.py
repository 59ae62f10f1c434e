"""`simulate` on a CPU with every mechanism, compared with a plain scan and other packages.

    python benchmarks/bench_simulate.py [--json FILE] [--png FILE] [--repeats R] [--shapes T,B,N ...] [--peers NAME ...]

Each row runs T steps of B x N units; an update is one step of one unit. slif and the plain scan are compiled twice: to
return only the spikes, as is usual in training, where XLA drops from the loop what only the final state needs, and to
return the spikes and the final state. "slif, v alone" returns only the voltage of that state, as the other packages do,
so XLA drops the rest too. "x slif" and "x bool" are times relative to slif returning the same. The plain scan is the
cell's equations line by line with its whole state as the carry. It and slif must agree before anything is timed.

Other packages run their closest cell (see peers.py), which has no refractory period except in ngc-learn, and are
compared with the first two mechanisms. JAX packages are compiled for both cases; PyTorch packages are the same in both,
and run in separate processes. "of copy" is the bandwidth of a run's currents and spikes, relative to that of one
elementwise pass over the currents.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import peers
from apart import Apart

import slif

SHAPES = (*cases.SHAPES, (2000, 1, 100_000))
MECHANISMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refractory": {"refract_time": 2.0, "sticky_spikes": True},
    "adaptive": {"refract_time": 2.0, "sticky_spikes": True, "thr_gain": 0.02, "thr_leak": 0.01},
    "rho_b": {"rho_b": 0.001},
    "inhibition": {"resist_inh": 0.001},
}
COMPARED = ("plain", "refractory")  # with other packages
LARGEST_MATRIX = 1024  # units; beyond it, only the matrix of inhibition would be timed
FIELDS = ("j", "v", "s", "thr", "rfr", "tols", "surrogate")
OWN_COLOURS = {"slif": "#08519c", "slif, bool": "#4292c6", "slif, v alone": "#9ecae1", "plain scan": "#7f7f7f"}
RETURNS = (cases.SPIKES, cases.BOTH)
Runs = dict[tuple[str, str], Callable[[], Any]]  # by name and what is returned


def slif_run(spikes: Any, params: slif.SLIFParams, state: slif.SLIFState, currents: jax.Array, dt: jax.Array) -> tuple:
    state, out = slif.simulate(params, state, currents, dt=dt, spike_dtype=spikes, implementation="xla")
    return vars(state), out["s"]


def voltage_alone(*inputs: Any) -> tuple:
    state, spikes = slif_run(jnp.float32, *inputs)
    return {"v": state["v"]}, spikes


def plain_run(params: slif.SLIFParams, state: slif.SLIFState, currents: jax.Array, dt: jax.Array) -> tuple:
    """The equations of the mechanisms present; dt is an argument, since XLA would drop a product with a literal 1."""
    p = params

    def body(carry, x):
        _, v, s, thr, rfr, tols, _ = carry
        j, t = x
        i = j * p.resist_m
        if p.inh_weights is not None:
            i = i - (s @ p.inh_weights) * p.resist_inh
        h = jnp.where(i > 0, 2 * jnp.exp(-0.08 * jnp.abs(i)) / (1 + jnp.exp(-0.16 * jnp.abs(i))), 0)
        u = v + ((i - v) * (1 / p.tau_m)) * dt
        if p.refract_time is not None:
            u = jnp.where(rfr >= p.refract_time, u, v)
        z = (u > thr).astype(u.dtype)
        v = jnp.where(z > 0, 0, u)
        if p.rho_b is not None:
            thr = jnp.maximum(thr + (z.sum(-1, keepdims=True) - 1) * p.rho_b, 0.025)
        elif p.thr_gain is not None:
            thr = (thr + z * p.thr_gain) - thr * p.thr_leak
        s = z
        if p.refract_time is not None and p.sticky_spikes:
            s = jnp.where(rfr >= p.refract_time, z, 1)
        rfr = jnp.where(z > 0, dt, rfr + dt)
        tols = jnp.where(s > 0, t, tols)
        return (i, v, s, thr, rfr, tols, h), s

    times = jnp.arange(len(currents), dtype=jnp.float32) * dt
    carry, raster = jax.lax.scan(body, tuple(getattr(state, name) for name in FIELDS), (currents, times))
    return dict(zip(FIELDS, carry, strict=True)), raster


def spikes_alone(function: Callable) -> Callable:
    return lambda *inputs: function(*inputs)[1]


OWN: dict[str, Callable] = {
    "slif": functools.partial(slif_run, jnp.float32),
    "slif, bool": functools.partial(slif_run, jnp.bool_),
    "slif, v alone": voltage_alone,
    "plain scan": plain_run,
}


def check(runs: Runs, mechanism: str) -> None:
    """slif's spikes equal the plain scan's, and its state to rounding; other packages' spikes up to ties."""
    state, s = runs["plain scan", cases.BOTH]()
    expected = np.asarray(s)
    for (name, returns), run in runs.items():
        result = run.result() if isinstance(run, Apart) else run()
        if name in OWN:
            own = result[1] if returns == cases.BOTH else result
            np.testing.assert_array_equal(np.asarray(own, np.float32), expected, err_msg=f"{name}, {returns}")
        same_equations = name == "ngclearn" or (name in peers.SAME_SPIKES and mechanism == "plain")
        if same_equations:
            same = np.mean(np.asarray(result) == expected)
            assert same > 0.999, f"{name}: only {same:.4%} of the spikes agree"
        for field in result[0] if name in OWN and returns == cases.BOTH else ():
            message = f"{name}, {field}"
            np.testing.assert_allclose(result[0][field], state[field], rtol=1e-5, atol=1e-6, err_msg=message)


def compile_own(inputs: tuple) -> tuple[Runs, dict[tuple[str, str], float]]:
    """slif and the plain scan, for both kinds of return, and the seconds that compiling took."""
    runs, compiling = {}, {}
    for name, function in OWN.items():
        for returns in RETURNS:
            returned = function if returns == cases.BOTH else spikes_alone(function)
            compiled, compiling[name, returns] = cases.compile_seconds(returned, *inputs)
            runs[name, returns] = functools.partial(compiled, *inputs)
    return runs, compiling


def peer_runs(currents: np.ndarray, arguments: dict[str, Any], names: list[str]) -> Runs:
    runs: Runs = {}
    for name in names:
        if name in peers.TORCH:
            runs[name, cases.SPIKES] = runs[name, cases.BOTH] = Apart(peers.torch_forward, name, currents.shape)
            continue
        for returns in RETURNS:
            state_too = returns == cases.BOTH
            if name == "ngclearn":
                runs[name, returns] = peers.ngclearn_forward(currents, state_too, **arguments)
            else:
                runs[name, returns] = peers.jax_forward(name, currents, state_too)
    return runs


def compare(shape: tuple[int, int, int], mechanism: str, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """A row for each implementation and each kind of return, at this shape."""
    arguments = MECHANISMS[mechanism]
    names = names if mechanism in COMPARED else []
    currents = cases.make_currents(shape)
    params = cases.make_params(shape[-1], **arguments)
    inputs = (params, slif.init_state(params, shape[1]), jnp.asarray(currents), jnp.float32(cases.DT))
    runs, compiling = compile_own(inputs)
    runs |= peer_runs(currents, arguments, names)
    check(runs, mechanism)
    copy, _ = cases.compile_seconds(lambda x: x + 1, inputs[2])
    runs["copy", ""] = functools.partial(copy, inputs[2])
    seconds = cases.median_seconds(runs, repeats, budget=8.0)
    for run in runs.values():
        if isinstance(run, Apart):
            run.close()
    size, bandwidth = int(np.prod(shape)), 2 * currents.nbytes / seconds["copy", ""]
    rows = []
    for returns in RETURNS:
        for name in (*OWN, *names):
            taken = seconds[name, returns]
            moved = currents.itemsize + (1 if name == "slif, bool" else 4)
            rows.append(
                {
                    "shape": shape,
                    "mechanism": mechanism,
                    "returns": returns,
                    "name": name,
                    "ms": 1e3 * taken,
                    "G_updates_s": size / taken / 1e9,
                    "bytes_per_update": moved,
                    "of_copy": size * moved / taken / bandwidth,
                    "times_slif": taken / seconds["slif", returns],
                    "times_bool": taken / seconds["slif, bool", returns],
                    "compile_s": compiling.get((name, returns)),
                }
            )
    return rows


def print_row(row: dict[str, Any]) -> None:
    own = row["compile_s"] is not None
    print(
        f"{', '.join(map(str, row['shape'])):<17}{row['mechanism']:<12}{row['returns']:<16}{row['name']:<15}"
        f"{row['ms']:>9.2f}{row['G_updates_s']:>9.3f}{row['bytes_per_update']:>7}{row['of_copy']:>9.2f}"
        f"{row['times_slif']:>9.2f}{row['times_bool']:>8.2f}" + (f"{row['compile_s']:>10.2f}" if own else ""),
        flush=True,
    )


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Updates per second of the refractory cell: a row for each kind of return, a column for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["mechanism"] == "refractory"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    of_shape = {row["shape"]: [other["name"] for other in rows if other["shape"] == row["shape"]] for row in rows}
    shapes = [shape for shape in of_shape if set(of_shape[shape]) == set(names)]  # those that every entry ran
    size = (2 + 3 * len(shapes), 1 + 0.5 * len(names))
    figure, panels = plt.subplots(
        2, len(shapes), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for panel, (returns, shape) in zip(panels.flat, itertools.product(RETURNS, shapes), strict=True):
        own = [row for row in rows if (row["returns"], row["shape"]) == (returns, shape)]
        titles = [peers.TITLES.get(row["name"], row["name"]) for row in own]
        bars = panel.barh(titles, [row["G_updates_s"] for row in own], color=[colour(row["name"]) for row in own])
        panel.bar_label(bars, fmt="%.2g", fontsize=8, padding=2)
        panel.set_title(f"T, B, N = {', '.join(map(str, shape))}; {returns}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels.flat[0].set_xscale("log")
    low, high = panels.flat[0].get_xlim()
    panels.flat[0].set_xlim(low, 2.5 * high)  # room for the labels
    panels.flat[0].invert_yaxis()
    for panel in panels[-1]:
        panel.set_xlabel("10^9 updates per second (log)")
    figure.suptitle("Blue, grey and ngc-learn have a refractory period, the others do not", fontsize=9)
    figure.savefig(path, dpi=110)


def colour(name: str) -> str:
    """slif in blue, other JAX packages in orange, PyTorch packages in purple."""
    return OWN_COLOURS.get(name, "#7a5195" if name in peers.TORCH else "#d9730d")


def shape_of(text: str) -> tuple[int, int, int]:
    t, b, n = map(int, text.split(","))
    return t, b, n


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--png", metavar="FILE", help="plot them to this file")
    parser.add_argument("--repeats", type=int, default=9, help="number of repeats to take the median of")
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=list(SHAPES), metavar="T,B,N")
    everyone = ["ngclearn", *peers.JAX, *peers.TORCH]
    parser.add_argument("--peers", nargs="*", choices=everyone, default=everyone, help="other packages to compare with")
    options = parser.parse_args(arguments)

    installed = peers.installed(options.peers)
    print(f"{'T, B, N':<17}{'mechanism':<12}{'returns':<16}{'':<15}{'ms':>9}{'G upd/s':>9}", end="")
    print(f"{'bytes':>7}{'of copy':>9}{'x slif':>9}{'x bool':>8}{'compile s':>10}")
    rows = []
    for shape in options.shapes:
        large = np.prod(shape) > 10**8  # 800 MB and more: only the two compared mechanisms, and no peers
        for mechanism in COMPARED if large else MECHANISMS:
            if mechanism == "inhibition" and shape[-1] > LARGEST_MATRIX:
                continue
            names = [] if large else installed
            for row in compare(shape, mechanism, options.repeats, names):
                print_row(row)
                rows.append(row)
    if options.png:
        draw(rows, options.png)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
