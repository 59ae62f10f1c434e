"""Forward and forward + backward of one layer of cells: slif, a plain scan, and any other packages installed.

    python benchmarks/bench_grad.py [--json FILE] [--repeats R] [--shapes S] [--peers NAME ...]

Forward returns the raster; forward + backward returns the raster and the gradient of the currents [T, B, N] for a given
cotangent of the raster. slif, the plain scan and other JAX packages are also compiled to return the final state (for
the plain scan, its voltage); ratios compare rows that return the same. peers.py describes what the packages run;
PyTorch packages each have a separate process. Two further tables show what the secant's gradient costs in addition to
the forward pass, and the memory that `checkpoint_every` saves.
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
from apart import Apart

import slif

SURROGATES = {"slif secant": slif.secant(), "slif voltage": slif.arctan()}


def slif_run(params: slif.SLIFParams, state: slif.SLIFState, currents: jax.Array) -> tuple[jax.Array, slif.SLIFState]:
    state, out = slif.simulate(params, state, currents, dt=cases.DT)
    return out["s"], state


def slif_raster(params: slif.SLIFParams, state: slif.SLIFState, currents: jax.Array) -> jax.Array:
    return slif_run(params, state, currents)[0]


def plain_run(params: slif.SLIFParams, state: slif.SLIFState, currents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The obvious scan, differentiated by JAX, with the arc tangent of `slif.arctan` and a detached reset."""

    def body(v, j):
        u = v + (j * params.resist_m - v) / params.tau_m * cases.DT
        z = cases.heaviside(u - params.thr)
        return u * (1 - jax.lax.stop_gradient(z)), z

    v, raster = jax.lax.scan(body, state.v, currents)
    return raster, v


def plain_raster(params: slif.SLIFParams, state: slif.SLIFState, currents: jax.Array) -> jax.Array:
    return plain_run(params, state, currents)[0]


def both(raster: Callable, params: Any, state: Any, currents: jax.Array, bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    s, pull = jax.vjp(functools.partial(raster, params, state), currents)
    return s, pull(bar)[0]


def both_and_state(run: Callable, params: Any, state: Any, currents: jax.Array, bar: jax.Array) -> tuple:
    s, pull, final = jax.vjp(functools.partial(run, params, state), currents, has_aux=True)
    return s, pull(bar)[0], final


RUNS: dict[str, dict[str, Callable]] = {
    cases.SPIKES: {"slif": slif_raster, "plain": plain_raster, "gradient": both},
    cases.BOTH: {"slif": slif_run, "plain": plain_run, "gradient": both_and_state},
}


def check(
    results: dict[tuple[str, str], tuple], params: slif.SLIFParams, currents: np.ndarray, bar: np.ndarray
) -> None:
    """Rasters of the same equations agree up to ties; gradients agree with the closed form and the plain scan's."""
    i = currents * np.asarray(params.resist_m)
    expected_s, expected = (np.asarray(array) for array in results["slif voltage", cases.SPIKES])
    state = slif.init_state(params, currents.shape[1])
    through_reset = params.replace(surrogate=slif.arctan(detach_reset=False))
    inputs = (through_reset, state, jnp.asarray(currents), jnp.asarray(bar))
    through = np.asarray(jax.jit(functools.partial(both, slif_raster))(*inputs)[1])
    own = (*SURROGATES, "plain scan")
    for (name, returns), (s, gradient, *_) in results.items():
        if name in (*own, *peers.SAME_SPIKES):
            same = np.mean(np.asarray(s) == expected_s)
            assert same > 0.999, f"{name}, {returns}: only {same:.4%} of the spikes agree"
        if name == "slif secant":
            np.testing.assert_allclose(gradient, bar * (i > 0) / np.cosh(0.08 * i), rtol=1e-5)
        if name in ("slif voltage", "plain scan", *peers.SAME_SPIKES):
            reference = through if name in peers.THROUGH_RESET else expected
            close = np.isclose(np.asarray(gradient), reference, rtol=1e-3, atol=1e-5).mean()
            assert close > 0.99, f"{name}, {returns}: only {close:.4%} of the gradient agrees"
    voltage = results["plain scan", cases.BOTH][2]
    for name in SURROGATES:
        close = np.isclose(results[name, cases.BOTH][2].v, voltage, rtol=1e-3, atol=1e-5).mean()
        assert close > 0.99, f"{name}: only {close:.4%} of the final voltages agree"


def compare(shape: tuple[int, int, int], repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """A row for each implementation and, except for PyTorch packages, for each kind of return, at this shape."""
    currents, bar = cases.make_currents(shape), cases.make_bar(shape)
    x, x_bar = jnp.asarray(currents), jnp.asarray(bar)
    forwards, boths, compiling = {}, {}, {}
    params = cases.make_params(shape[-1])
    state = slif.init_state(params, shape[1])
    for returns, functions in RUNS.items():
        for name in (*SURROGATES, "plain scan"):
            run, gradient = functions["slif" if name in SURROGATES else "plain"], functions["gradient"]
            arguments = (params.replace(surrogate=SURROGATES.get(name, params.surrogate)), state, x)
            key = name, returns
            forward, _ = cases.compile_seconds(run, *arguments)
            backward, compiling[key] = cases.compile_seconds(functools.partial(gradient, run), *arguments, x_bar)
            forwards[key] = functools.partial(forward, *arguments)
            boths[key] = functools.partial(backward, *arguments, x_bar)
        for name in (name for name in names if name in peers.JAX):
            state_too = returns == cases.BOTH
            forwards[name, returns] = peers.jax_forward(name, currents, state_too)
            boths[name, returns] = peers.jax_both(name, currents, bar, state_too)
    for name in (name for name in names if name in peers.TORCH):
        forwards[name, cases.SPIKES] = Apart(peers.torch_forward, name, shape)
        boths[name, cases.SPIKES] = Apart(peers.torch_both, name, shape)

    results = {key: run.result() if isinstance(run, Apart) else run() for key, run in boths.items()}
    check(results, params, currents, bar)
    del results
    forward, backward = cases.median_seconds(forwards, repeats), cases.median_seconds(boths, repeats)
    for run in (*forwards.values(), *boths.values()):
        if isinstance(run, Apart):
            run.close()
    return [
        {
            "shape": shape,
            "name": name,
            "returns": returns,
            "forward_ms": 1e3 * forward[name, returns],
            "forward_backward_ms": 1e3 * backward[name, returns],
            "times_secant": backward[name, returns] / backward["slif secant", returns],
            "times_voltage": backward[name, returns] / backward["slif voltage", returns],
            "compile_s": compiling.get((name, returns)),
        }
        for name, returns in boths
    ]


def secant_cost(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Raster and gradient, compared with the raster alone and one elementwise pass delta * h(currents)."""
    params = cases.make_params(shape[-1])
    state = slif.init_state(params, shape[1])
    x, bar = jnp.asarray(cases.make_currents(shape)), jnp.asarray(cases.make_currents(shape, seed=1))
    arguments = (params, state, x)
    forward, _ = cases.compile_seconds(slif_raster, *arguments)
    elementwise, _ = cases.compile_seconds(lambda params, x, bar: bar * params.surrogate(x), params, x, bar)
    backward, _ = cases.compile_seconds(functools.partial(both, slif_raster), *arguments, bar)
    seconds = cases.median_seconds(
        {
            "forward_ms": functools.partial(forward, *arguments),
            "pass_ms": functools.partial(elementwise, params, x, bar),
            "both_ms": functools.partial(backward, *arguments, bar),
        },
        repeats,
    )
    row = {name: 1e3 * value for name, value in seconds.items()}
    return {"shape": shape, **row, "passes": (row["both_ms"] - row["forward_ms"]) / row["pass_ms"]}


def memory(every: int | None, shape: tuple[int, int, int] = (1000, 16, 1000)) -> int:
    """Bytes of temporary memory for raster and gradient with the voltage surrogate."""
    params = cases.make_params(shape[-1], surrogate=SURROGATES["slif voltage"])
    state = slif.init_state(params, shape[1])

    def raster(params, state, currents):
        return slif.simulate(params, state, currents, dt=cases.DT, checkpoint_every=every)[1]["s"]

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled, _ = cases.compile_seconds(functools.partial(both, raster), params, state, x, x)
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--repeats", type=int, default=9, help="number of repeats to take the median of")
    parser.add_argument("--shapes", type=int, default=len(cases.SHAPES), help="how many of the shapes to run")
    everyone = [*peers.JAX, *peers.TORCH]
    parser.add_argument("--peers", nargs="*", choices=everyone, default=everyone, help="other packages to compare with")
    options = parser.parse_args()
    shapes = cases.SHAPES[: options.shapes]

    names = peers.installed(options.peers)
    print(f"{'T, B, N':<18}{'returns':<16}{'':<14}{'forward':>10}{'+ backward':>12}", end="")
    print(f"{'x secant':>10}{'x voltage':>11}{'compile':>10}")
    rows = []
    for shape in shapes:
        for row in compare(shape, options.repeats, names):
            compiling = "" if row["compile_s"] is None else f"{row['compile_s']:.2f} s"
            print(
                f"{', '.join(map(str, shape)):<18}{row['returns']:<16}{row['name']:<14}{row['forward_ms']:>7.2f} ms"
                f"{row['forward_backward_ms']:>9.2f} ms{row['times_secant']:>10.2f}{row['times_voltage']:>11.2f}"
                f"{compiling:>10}",
                flush=True,
            )
            rows.append(row)

    print("\nThe secant's gradient, in elementwise passes delta * h(currents) beyond the forward pass (target: 1.3)")
    costs = [secant_cost(shape, 3 * options.repeats) for shape in shapes]
    for row in costs:
        print(
            f"{', '.join(map(str, row['shape'])):<18}forward {row['forward_ms']:.2f} ms, pass {row['pass_ms']:.2f} ms, "
            f"both {row['both_ms']:.2f} ms: {row['passes']:.2f} passes"
        )

    print("\nTemporary memory of the voltage gradient at (1000, 16, 1000), by checkpoint_every (target: a fifth)")
    kept = {every: memory(every) for every in (None, 8, 20, 25, 40, 50, 100)}
    for every, size in kept.items():
        print(f"{every or 'none':>6}{size / 1e6:>9.1f} MB{kept[None] / size:>7.1f} times smaller")

    if options.json:
        sizes = [{"checkpoint_every": every, "bytes": size} for every, size in kept.items()]
        with open(options.json, "w") as file:
            json.dump({"times": rows, "secant": costs, "memory": sizes}, file, indent=1)


if __name__ == "__main__":
    main()
