"""Time and memory per update as T, B, N, the points of a sweep and the devices grow, each over three decades or more.

    python benchmarks/bench_scale.py [--json FILE] [--tables NAME ...] [--repeats R] [--largest UPDATES]

An update is one step of one unit. Each row is a compiled call: spikes alone, with the final state, with the gradient of
`secant()` and of `arctan()`; a sweep counts spikes, all points at once or in batches of 100. "Temporary" is what the
compiled program needs besides its arguments and results, by XLA's account.

"devices" shards the batch over a mesh in `jax.jit`, in a process with eight virtual devices if the machine has one:
"weak" with a batch of 8 per device, "strong" with 64 in all. Virtual devices share the machine's cores, so there the
best is the time of one device for the same work.
"""

import argparse
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from apart import Apart
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import slif

SHAPES = {
    "T": [(t, 16, 1024) for t in (1, 10, 100, 1000, 10_000)],
    "B": [(100, b, 100) for b in (1, 10, 100, 1000, 10_000)],
    "N": [(100, 16, n) for n in (1, 10, 100, 1000, 10_000, 100_000)],
}
POINTS, BATCH = (1, 10, 100, 1000, 10_000, 100_000), 100
SWEPT = (100, 10)  # steps and units of each point
TABLES = (*SHAPES, "points", "devices")
VIRTUAL, WEAK, STRONG, PER_DEVICE = 8, 8, 64, (500, 1024)


def spikes(params: slif.SLIFParams, x: jax.Array) -> jax.Array:
    return slif.simulate(params, None, x, dt=cases.DT)[1]["s"]


def with_state(params: slif.SLIFParams, x: jax.Array) -> Any:
    return slif.simulate(params, None, x, dt=cases.DT)


def with_gradient(params: slif.SLIFParams, x: jax.Array) -> Any:
    s, pull = jax.vjp(functools.partial(spikes, params), x)
    return s, pull(jnp.ones_like(s))[0]


RUNS = {
    "spikes": (spikes, slif.secant),
    "and state": (with_state, slif.secant),
    "secant": (with_gradient, slif.secant),
    "arctan": (with_gradient, slif.arctan),
}


def measure(functions: dict[str, tuple[Callable, tuple]], updates: int, repeats: int) -> dict[str, Any]:
    """Nanoseconds and temporary bytes per update."""
    runs, temporary = {}, {}
    for name, (function, arguments) in functions.items():
        compiled, _ = cases.compile_seconds(function, *arguments)
        runs[name] = functools.partial(compiled, *arguments)
        analysis: Any = compiled.memory_analysis()
        temporary[name] = analysis.temp_size_in_bytes / updates
    seconds = cases.median_seconds(runs, repeats, budget=3.0)
    return {name: {"ns": 1e9 * seconds[name] / updates, "bytes": temporary[name]} for name in functions}


def of_shape(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    x = jnp.asarray(cases.make_currents(shape))
    functions = {
        name: (function, (cases.make_params(shape[-1], surrogate=surrogate()), x))
        for name, (function, surrogate) in RUNS.items()
    }
    return measure(functions, math.prod(shape), repeats)


def of_points(n: int, repeats: int) -> dict[str, Any]:
    n_steps, n_units = SWEPT
    x, params = jnp.asarray(cases.make_currents(SWEPT)), cases.make_params(n_units)
    over = {"tau_m": jnp.linspace(5.0, 40.0, n)}

    def counts(batch_size: int | None, params: slif.SLIFParams, x: jax.Array, over: dict) -> jax.Array:
        out = slif.sweep(params, x, over=over, dt=cases.DT, record=("spike_count",), batch_size=batch_size)[1]
        return out["spike_count"]

    sizes = {"all at once": None, f"in batches of {BATCH}": BATCH}
    functions = {name: (functools.partial(counts, size), (params, x, over)) for name, size in sizes.items()}
    return measure(functions, n * n_steps * n_units, repeats)


def on_devices(repeats: int) -> Callable:
    """For a process of its own: the milliseconds of each row, as JSON."""

    def rows() -> Iterator[dict[str, Any]]:
        n_steps, n_units = PER_DEVICE
        n = 1
        while n <= len(jax.devices()):
            for kind, batch in (("weak", WEAK * n), ("strong", STRONG)):
                mesh = Mesh(np.array(jax.devices()[:n]), ("batch",))
                x = jnp.asarray(cases.make_currents((n_steps, batch, n_units)))
                x = jax.device_put(x, NamedSharding(mesh, P(None, "batch")))
                whole = jnp.asarray(np.asarray(x))
                functions: dict[str, tuple[Callable, tuple]] = {}
                for name, (function, surrogate) in RUNS.items():
                    params = cases.make_params(n_units, surrogate=surrogate())
                    functions[name] = (function, (params, x))
                    functions[f"{name}, one device"] = (function, (params, whole))
                found = measure(functions, x.size, repeats)
                times = {name: 1e-6 * x.size * found[name]["ns"] for name in functions}
                yield {"devices": n, "kind": kind, "batch": batch} | {
                    name: (times[name], times[f"{name}, one device"]) for name in RUNS
                }
            n *= 2

    return lambda: np.frombuffer(json.dumps(list(rows())).encode(), np.uint8)


def print_row(title: str, found: dict[str, Any]) -> None:
    print(f"{title:>20}" + "".join(f"{x['ns']:>12.3g}{x['bytes']:>10.3g}" for x in found.values()), flush=True)


def print_head(title: str, names: list[str]) -> None:
    print(f"\n{title:>20}" + "".join(f"{name:>22}" for name in names))
    print(f"{'':>20}" + f"{'ns':>12}{'bytes':>10}" * len(names))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--repeats", type=int, default=9, help="number of repeats to take the median of")
    parser.add_argument("--largest", type=int, default=2 * 10**8, help="leave out rows with more updates than this")
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores; per update")
    results: dict[str, Any] = {}
    for table in options.tables:
        if table in SHAPES:
            print_head(f"{table} of (T, B, N)", list(RUNS))
            for shape in SHAPES[table]:
                if math.prod(shape) <= options.largest:
                    results[f"{table} {shape}"] = of_shape(shape, options.repeats)
                    print_row(str(shape), results[f"{table} {shape}"])
        elif table == "points":
            print_head(f"points of {SWEPT}", ["all at once", f"in batches of {BATCH}"])
            for n in POINTS:
                if n * math.prod(SWEPT) <= options.largest:
                    results[f"points {n}"] = of_points(n, options.repeats)
                    print_row(f"{n:,}", results[f"points {n}"])
        else:
            results["devices"] = devices(options.repeats)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file)


def devices(repeats: int) -> list[dict[str, Any]]:
    flags = os.environ.get("XLA_FLAGS", "")
    if len(jax.devices()) == 1:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={VIRTUAL}"
    process = Apart(on_devices, repeats)
    os.environ["XLA_FLAGS"] = flags
    rows = json.loads(process.result().tobytes())
    process.close()
    print("\nms on the mesh, and of one device for the same work")
    print(f"{'devices':>8}{'':>8}{'batch':>6}" + "".join(f"{name:>22}" for name in RUNS))
    for row in rows:
        times = "".join(f"{mesh:>12.2f}{one:>10.2f}" for mesh, one in (row[name] for name in RUNS))
        print(f"{row['devices']:>8}{row['kind']:>8}{row['batch']:>6}" + times)
    return rows


if __name__ == "__main__":
    main()
