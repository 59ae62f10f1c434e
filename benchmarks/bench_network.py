"""Layers and networks: time and memory of forward and forward + backward, compared with other packages.

    python benchmarks/bench_network.py [--json FILE] [--repeats R] [--shapes S ...] [--peers NAME ...] [--quick]

Three kinds of network, all without biases and with the same matrices for every entry:

    layers       x [T, B, D], uniform in [0, 1), to the spikes of the last of one or more Linear + LIF layers
    recurrent    currents [T, B, N] to the spikes of a layer that feeds s @ W back to itself
    speech       like examples/train_speech.py: Linear, recurrent LIF, Linear, leaky integrators, to the cross-entropy
                 of the mean potentials

Forward + backward also returns the gradient of every matrix, and of a recurrent layer's currents, for a given cotangent
where the output is spikes. Without recurrence each entry computes the products of all steps at once and then runs its
cells over time; peers.py describes the cells. "slif" trains with `arctan()`, as the others do, "slif secant" with its
default, "slif, masks" on sequences of different lengths. "slif.step in a scan" and "plain scan" are loops that a user
might write. "products alone" is the network without cells, the minimum for any JAX or PyTorch package. sparx is left
out of the recurrent networks.

Every entry has a separate process. They take turns in each repeat, and the table has medians. "MB" is the most by which
the resident set of the process grew during a run, including results but not inputs; "-" where the system does not
report it. For JAX, "temp" is the temporary memory of the compiled program for forward + backward, and "compile" the
time to compile it. Spikes and gradients are compared first.
"""

import argparse
import functools
import importlib
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import peers
from apart import Apart

import slif
import slif.linen


class Shape(NamedTuple):
    n_steps: int
    batch: int
    widths: tuple[int, ...]  # starting with the input's
    kind: str = "layers"

    def __str__(self) -> str:
        return "-".join(map(str, self.widths)) + ("" if self.kind == "layers" else f" {self.kind}")


SHAPES = {
    "512": Shape(500, 16, (512, 512)),
    "1024": Shape(500, 16, (1024, 1024)),
    "4096": Shape(500, 16, (4096, 4096)),
    "shd": Shape(256, 256, (128, 128, 128, 20)),
    "recurrent128": Shape(100, 64, (128,), "recurrent"),
    "recurrent128long": Shape(500, 64, (128,), "recurrent"),
    "recurrent512": Shape(100, 64, (512,), "recurrent"),
    "recurrent512long": Shape(500, 64, (512,), "recurrent"),
    "speech": Shape(87, 30, (24, 128, 9), "speech"),
}
QUICK = {
    "layer": Shape(20, 2, (16, 16)),
    "net": Shape(20, 4, (16, 16, 16, 4)),
    "recurrent": Shape(20, 4, (16,), "recurrent"),
    "speech": Shape(20, 4, (8, 16, 3), "speech"),
}
KINDS = ("forward", "both")
SURROGATES = {"slif": slif.arctan(), "slif secant": slif.secant()}
MASKED = {"slif, masks": "slif"}
LOOPS = ("slif.step in a scan", "plain scan")
FLOORS = {"products alone, JAX": "jax", "products alone, PyTorch": "torch"}


def entries(shape: Shape, names: list[str]) -> list[str]:
    if shape.kind == "layers":
        floors = [name for name, side in FLOORS.items() if side == "jax" or set(names) & set(peers.TORCH)]
        return [*SURROGATES, *names, *floors]
    recurrent = [name for name in names if name in (*peers.JAX_RECURRENT, *peers.TORCH_RECURRENT)]
    return [*SURROGATES, *(MASKED if shape.kind == "speech" else ()), *LOOPS, *recurrent]


def make_input(shape: Shape) -> np.ndarray:
    size = (shape.n_steps, shape.batch, shape.widths[0])
    return cases.make_currents(size) if shape.kind == "recurrent" else np.random.default_rng(0).random(size, np.float32)


def make_matrices(shape: Shape) -> list[np.ndarray]:
    """Drawn so that a unit in each layer fires about once in ten steps; a recurrent matrix comes first."""
    rng, matrices = np.random.default_rng(1), []
    for before, after in itertools.pairwise(shape.widths):
        mean = (2 if not matrices else 10) / before  # half of the input is on, a tenth of the spikes
        matrices.append((mean + rng.standard_normal((before, after), np.float32) / before**0.5).astype(np.float32))
    if shape.kind == "layers":
        return matrices
    n_units = shape.widths[-2:][0]
    return [rng.standard_normal((n_units, n_units), np.float32) / np.float32(n_units**0.5), *matrices]


def make_bar(shape: Shape) -> np.ndarray:
    """A cotangent for the spikes, or for the loss."""
    return np.ones((), np.float32) if shape.kind == "speech" else cases.make_bar((*shape[:2], shape.widths[-1]))


def make_labels(shape: Shape) -> np.ndarray:
    return np.random.default_rng(2).integers(shape.widths[-1], size=shape.batch)


def make_masks(shape: Shape) -> np.ndarray:
    """Lengths of 7 to 29 of 29 frames, like the recordings."""
    lengths = np.random.default_rng(3).integers(7, 30, size=shape.batch) * shape.n_steps // 29
    return np.arange(shape.n_steps)[:, None] < lengths


def make_network(name: str, shape: Shape) -> Callable:
    """A function of "forward" or "both" that runs the network: returns its output, with "both" also the gradients."""
    if name in peers.TORCH or FLOORS.get(name) == "torch":
        return torch_network(name, shape)
    return jax_network(name, shape)


def jax_network(name: str, shape: Shape) -> Callable:
    forward = jax_forward(name, shape)

    def both(matrices, x, bar):
        if shape.kind == "recurrent":
            out, pull = jax.vjp(forward, matrices, x)
        else:
            out, pull = jax.vjp(lambda matrices: forward(matrices, x), matrices)
        return out, jax.tree.leaves(pull(bar))

    inputs = jax.device_put((make_matrices(shape), make_input(shape)))
    bar = jax.device_put(make_bar(shape))
    run_forward, _ = cases.compile_seconds(forward, *inputs)
    run_both, compiling = cases.compile_seconds(both, *inputs, bar)
    analysis: Any = run_both.memory_analysis()
    runs = {
        "forward": functools.partial(run_forward, *inputs),
        "both": functools.partial(run_both, *inputs, bar),
        "program": lambda: np.array([analysis.temp_size_in_bytes, compiling]),
    }
    return lambda kind: runs[kind]()


def jax_forward(name: str, shape: Shape) -> Callable:
    """A function of the matrices and the input."""
    if shape.kind == "layers":
        layers = [jax_layer(name, n, shape.batch) for n in shape.widths[1:]]

        def forward(matrices, x):
            for matrix, layer in zip(matrices, layers, strict=True):
                x = layer(x @ matrix)
            return x

        return forward

    valid = make_masks(shape) if name in MASKED else None
    name = MASKED.get(name, name)
    hidden = functools.partial(jax_recurrent, name, valid)
    if shape.kind == "recurrent":
        return lambda matrices, x: hidden(x, matrices[0])
    labels, weights = make_labels(shape), 1 / shape.n_steps if valid is None else (valid / valid.sum(0))[..., None]

    def loss(matrices, x):
        recurrent, into, out = matrices
        v = jax_integrator(name, valid, hidden(x @ into, recurrent) @ out)
        return -jax.nn.log_softmax((v * weights).sum(0))[np.arange(shape.batch), labels].mean()

    return loss


def jax_layer(name: str, n_units: int, batch: int) -> Callable:
    if name in FLOORS:
        return lambda j: j
    if name in peers.JAX:
        run = peers.JAX[name](n_units)
        return lambda j: run(j)[0]
    params = cases.make_params(n_units, surrogate=SURROGATES[name])
    return lambda j: slif.simulate(params, slif.init_state(params, batch), j, dt=cases.DT)[1]["s"]


def jax_recurrent(name: str, valid: np.ndarray | None, currents: jax.Array, weights: jax.Array) -> jax.Array:
    if name in peers.JAX_RECURRENT:
        return peers.JAX_RECURRENT[name](currents, weights)
    params = cases.make_params(len(weights), surrogate=SURROGATES.get(name, SURROGATES["slif"]))
    if name in SURROGATES:
        return slif.simulate(params, None, currents, dt=cases.DT, valid=valid, feedback=weights)[1]["s"]

    def step(state, x):
        j, t = x
        state = slif.step(params, state, j + state.s @ weights, t, cases.DT)
        return state, state.s

    def plain(carry, x):
        v, s = carry
        u = v + (x[0] + s @ weights - v) * peers.LEAK
        s = cases.heaviside(u - cases.THR)
        return (u * (1 - jax.lax.stop_gradient(s)), s), s

    rest = slif.init_state(params, currents.shape[1])
    body, carry = (plain, (rest.v, rest.s)) if name == "plain scan" else (step, rest)
    return jax.lax.scan(body, carry, (currents, cases.DT * jnp.arange(len(currents))))[1]


def jax_integrator(name: str, valid: np.ndarray | None, currents: jax.Array) -> jax.Array:
    if name in peers.JAX:
        return peers.jax_integrator(name, currents)
    if name != "plain scan":
        layer: Any = slif.linen.LeakyIntegrator(currents.shape[-1], dt=cases.DT, tau_m=cases.TAU_M, resist_m=1.0)
        return layer.apply({}, currents, valid=valid)

    def body(v, j):
        v = v + (j - v) * peers.LEAK
        return v, v

    return jax.lax.scan(body, jnp.zeros_like(currents[0]), currents)[1]


def torch_network(name: str, shape: Shape) -> Callable:
    torch = importlib.import_module("torch")
    x, bar = torch.from_numpy(make_input(shape)), torch.as_tensor(make_bar(shape))
    matrices = [torch.from_numpy(m) for m in make_matrices(shape)]
    hidden, recurrent = (None, None) if shape.kind == "layers" else peers.TORCH_RECURRENT[name](matrices.pop(0))
    x.requires_grad_(shape.kind == "recurrent")
    linears = [torch.nn.Linear(*m.shape, bias=False) for m in matrices]
    for linear, matrix in zip(linears, matrices, strict=True):
        linear.weight.data = matrix.T.contiguous()
    if hidden is None:
        layers = [(lambda j: j) if name in FLOORS else peers.TORCH[name]() for _ in linears]
    else:
        layers = [hidden, peers.torch_integrator(name)]
    labels = torch.from_numpy(make_labels(shape))
    leaves = [*([] if recurrent is None else [recurrent]), *(linear.weight for linear in linears), x]

    def forward():
        if shape.kind == "recurrent":
            return layers[0](x)
        s = x
        for linear, layer in zip(linears, layers, strict=True):
            s = layer(linear(s))
        return torch.nn.functional.cross_entropy(s.mean(0), labels) if shape.kind == "speech" else s

    def run(kind):
        if kind == "program":
            return None
        if kind == "forward":
            with torch.no_grad():
                return forward()
        for leaf in leaves:
            leaf.grad = None
        out = forward()
        out.backward(bar)
        gradients = [leaf.grad.T for leaf in leaves[:-1]]
        if recurrent is not None:
            gradients[0] = gradients[0][-len(recurrent) :]
        return out.detach(), [*gradients, *([] if x.grad is None else [x.grad])]

    return run


def check(networks: dict[str, Apart]) -> None:
    """Outputs and gradients of the same equations agree, up to ties and the order of sums in products."""
    expected = networks["slif"].result("both")
    for name, network in networks.items():
        out, gradients = network.result("both")
        assert np.allclose(out, network.result("forward"), rtol=1e-5), f"{name}: forward returns something else"
        if name not in (*SURROGATES, *LOOPS, *peers.SAME_SPIKES):
            continue
        same = np.isclose(out, expected[0], rtol=1e-3).mean()
        assert same > 0.99, f"{name}: only {same:.3%} of the output agrees"
        if name not in ("slif secant", *peers.THROUGH_RESET):
            for own, other in zip(gradients, expected[1], strict=True):
                cosine = np.vdot(own, other) / np.linalg.norm(own) / np.linalg.norm(other)
                assert cosine > 0.98, f"{name}: the gradient differs, with a cosine of {cosine:.4f}"


def compare(shape: Shape, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """A row for each entry."""
    networks = {name: Apart(make_network, name, shape) for name in entries(shape, names)}
    rows = {name: {"shape": shape, "name": name} for name in networks}
    check(networks)
    for name, network in networks.items():
        program = network.result("program")
        size, seconds = (None, None) if program is None else program.tolist()
        rows[name] |= {"temporary_MB": None if size is None else size / 1e6, "compile_s": seconds}
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
    for name, network in networks.items():
        peaks = {kind: network.peak(kind) for kind in KINDS}
        rows[name] |= {f"{kind}_MB": None if peak is None else peak / 1e6 for kind, peak in peaks.items()}
        network.close()
    return list(rows.values())


def as_text(number: float | None, digits: int = 0) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--repeats", type=int, default=5, help="number of repeats to take the median of")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    everyone = [*peers.JAX, *peers.TORCH]
    parser.add_argument("--peers", nargs="*", choices=everyone, default=everyone, help="other packages to compare with")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to check that everything runs")
    options = parser.parse_args()
    shapes = list(QUICK.values()) if options.quick else [SHAPES[name] for name in options.shapes]

    names = peers.installed(options.peers)
    head = (f"{kind:>{room}}{'x slif':>8}{'MB':>8}" for kind, room in (("forward", 13), ("+ backward", 14)))
    print(f"{'T, B':<10}{'widths':<19}{'':<25}", *head, f"{'temp':>8}{'compile':>9}", sep="")
    rows = []
    for shape in shapes:
        for row in compare(shape, options.repeats, names):
            print(f"{f'{shape.n_steps}, {shape.batch}':<10}{shape!s:<19}{row['name']:<25}", end="")
            for kind, room in zip(KINDS, (10, 11), strict=True):
                print(f"{row[f'{kind}_ms']:>{room}.1f} ms{row[f'{kind}_times_slif']:>8.2f}", end="")
                print(f"{as_text(row[f'{kind}_MB']):>8}", end="")
            print(f"{as_text(row['temporary_MB']):>8}{as_text(row['compile_s'], 1):>7} s", flush=True)
            rows.append(row)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
