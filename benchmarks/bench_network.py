"""Whole layers, Linear and LIF: time and memory of forward and of forward + backward, beside other packages.

    python benchmarks/bench_network.py [--json FILE] [--repeats R] [--shapes S ...] [--peers NAME ...] [--quick]

A network takes x [T, B, D], uniform in [0, 1), and gives the spikes of its last layer; forward + backward also gives
the gradient of every matrix, for a given cotangent of these spikes. All networks have the same matrices and no bias. As
no layer is recurrent, each takes the products of all steps at once and then runs its cells over time; what the cells
are is told in peers.py. "slif" trains with `arctan()`, as the others do, "slif secant" with its default. "products
alone" is the network without cells, the floor for any package on that side.

Every entry has a process of its own. They run in turn, repeat after repeat, and the median is told. "MB" is by how much
the resident set of the process grew at most during a run, its results included and its inputs not; "-" where the system
does not tell. Spikes and gradients are compared first.
"""

import argparse
import functools
import importlib
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import cases
import jax
import numpy as np
import peers
from apart import Apart

import slif

# T, B and the widths, input first.
SHAPES = {
    "512": (500, 16, (512, 512)),
    "1024": (500, 16, (1024, 1024)),
    "4096": (500, 16, (4096, 4096)),
    "shd": (256, 256, (128, 128, 128, 20)),
}
QUICK = {"layer": (20, 2, (16, 16)), "net": (20, 4, (16, 16, 16, 4))}
KINDS = ("forward", "both")
SURROGATES = {"slif": slif.arctan(), "slif secant": slif.secant()}
FLOORS = {"products alone, JAX": "jax", "products alone, PyTorch": "torch"}
Shape = tuple[int, int, tuple[int, ...]]


def make_input(shape: Shape) -> np.ndarray:
    n_steps, batch, widths = shape
    return np.random.default_rng(0).random((n_steps, batch, widths[0]), np.float32)


def make_matrices(widths: tuple[int, ...]) -> list[np.ndarray]:
    """Drawn so that in each layer a unit fires about once in ten steps."""
    rng, matrices = np.random.default_rng(1), []
    for before, after in itertools.pairwise(widths):
        mean = (2 if not matrices else 10) / before  # of the input half is on, of spikes a tenth
        matrices.append((mean + rng.standard_normal((before, after), np.float32) / before**0.5).astype(np.float32))
    return matrices


def make_network(name: str, shape: Shape) -> Callable:
    """A function of "forward" or "both", which runs the network and gives the raster, or that and the gradients."""
    if name in peers.TORCH or FLOORS.get(name) == "torch":
        return torch_network(name, shape)
    return jax_network(name, shape)


def jax_network(name: str, shape: Shape) -> Callable:
    layers = [jax_layer(name, n, shape[1]) for n in shape[2][1:]]

    def forward(matrices, x):
        for matrix, layer in zip(matrices, layers, strict=True):
            x = layer(x @ matrix)
        return x

    def both(matrices, x, bar):
        s, pull = jax.vjp(lambda matrices: forward(matrices, x), matrices)
        return s, pull(bar)[0]

    inputs = jax.device_put((make_matrices(shape[2]), make_input(shape)))
    bar = jax.device_put(cases.make_bar((*shape[:2], shape[2][-1])))
    runs = {
        "forward": functools.partial(jax.jit(forward), *inputs),
        "both": functools.partial(jax.jit(both), *inputs, bar),
    }
    return lambda kind: runs[kind]()


def jax_layer(name: str, n_units: int, batch: int) -> Callable:
    if name in FLOORS:
        return lambda j: j
    if name in peers.JAX:
        run = peers.JAX[name](n_units)
        return lambda j: run(j)[0]
    params = cases.make_params(n_units, surrogate=SURROGATES[name])
    return lambda j: slif.simulate(params, slif.init_state(params, batch), j, dt=cases.DT)[1]["s"]


def torch_network(name: str, shape: Shape) -> Callable:
    torch = importlib.import_module("torch")
    x, bar = (torch.from_numpy(a) for a in (make_input(shape), cases.make_bar((*shape[:2], shape[2][-1]))))
    linears = [torch.nn.Linear(*m.shape, bias=False) for m in make_matrices(shape[2])]
    for linear, matrix in zip(linears, make_matrices(shape[2]), strict=True):
        linear.weight.data = torch.from_numpy(matrix.T.copy())
    layers = [(lambda j: j) if name in FLOORS else peers.TORCH[name]() for _ in linears]

    def forward():
        s = x
        for linear, layer in zip(linears, layers, strict=True):
            s = layer(linear(s))
        return s

    def run(kind):
        if kind == "forward":
            with torch.no_grad():
                return forward()
        for linear in linears:
            linear.weight.grad = None
        s = forward()
        s.backward(bar)
        return s.detach(), [linear.weight.grad.T for linear in linears]

    return run


def check(networks: dict[str, Apart]) -> None:
    """Spikes and gradients of the same equations agree, up to ties and the order of sums in products."""
    expected = networks["slif"].result("both")
    for name, network in networks.items():
        if name not in (*SURROGATES, *peers.SAME_SPIKES):
            continue
        s, gradients = network.result("both")
        same = np.mean(s == expected[0])
        assert same > 0.99, f"{name}: only {same:.3%} of the spikes agree"
        assert np.array_equal(s, network.result("forward")), f"{name}: forward gives other spikes"
        if name not in ("slif secant", *peers.THROUGH_RESET):
            for own, other in zip(gradients, expected[1], strict=True):
                cosine = np.vdot(own, other) / np.linalg.norm(own) / np.linalg.norm(other)
                assert cosine > 0.98, f"{name}: the gradient is another one, with a cosine of {cosine:.4f}"


def compare(shape: Shape, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """A row for each entry."""
    floors = [name for name, side in FLOORS.items() if side == "jax" or set(names) & set(peers.TORCH)]
    rows = {}
    for name in (*SURROGATES, *names, *floors):
        network = Apart(make_network, name, shape)
        peaks = {kind: network.peak(kind) for kind in KINDS}
        network.close()  # what measures memory would slow the clock
        rows[name] = {"shape": shape, "name": name}
        rows[name] |= {f"{kind}_MB": None if peak is None else peak / 1e6 for kind, peak in peaks.items()}
    networks = {name: Apart(make_network, name, shape) for name in rows}
    check(networks)
    for kind in KINDS:
        taken = {name: [] for name in networks}
        for _ in range(repeats):
            for name, network in networks.items():
                if sum(taken[name]) < 20:
                    taken[name].append(network.seconds(kind))
        for name in networks:
            rows[name][f"{kind}_ms"] = 1e3 * statistics.median(taken[name])
    for row in rows.values():
        row |= {f"{kind}_times_slif": row[f"{kind}_ms"] / rows["slif"][f"{kind}_ms"] for kind in KINDS}
    for network in networks.values():
        network.close()
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of which the median is told")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    everyone = [*peers.JAX, *peers.TORCH]
    parser.add_argument("--peers", nargs="*", choices=everyone, default=everyone, help="packages to run beside")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all of it runs")
    options = parser.parse_args()
    shapes = list(QUICK.values()) if options.quick else [SHAPES[name] for name in options.shapes]

    names = peers.installed(options.peers)
    head = (f"{kind:>{room}}{'x slif':>8}{'MB':>8}" for kind, room in (("forward", 12), ("+ backward", 14)))
    print(f"{'T, B':<10}{'widths':<18}{'':<25}", *head, sep="")
    rows = []
    for shape in shapes:
        for row in compare(shape, options.repeats, names):
            n_steps, batch, widths = shape
            print(f"{f'{n_steps}, {batch}':<10}{'-'.join(map(str, widths)):<18}{row['name']:<25}", end="")
            for kind, room in zip(KINDS, (9, 11), strict=True):
                megabytes = "-" if row[f"{kind}_MB"] is None else f"{row[f'{kind}_MB']:.0f}"
                print(f"{row[f'{kind}_ms']:>{room}.1f} ms{row[f'{kind}_times_slif']:>8.2f}{megabytes:>8}", end="")
            print(flush=True)
            rows.append(row)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
