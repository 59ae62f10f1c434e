"""A training batch of the network in examples/bfa_snn.py, compared with the same network of ngc-learn's components.

    python benchmarks/bench_bfa.py --data mnist.npz --json bfa.json

Both run a whole window (reset, Bernoulli input, two layers, the updates) as one compiled call, with 1000 hidden units
and batches of 250. This is the best case for ngc-learn, whose own processes compile single steps, or scan over steps.
First, both train on one batch with the same weights and input spikes, and must agree on what they learn.
"""

import argparse
import importlib
import importlib.util
import json
import operator
import sys
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
bfa: Any = importlib.import_module("bfa_snn")
digits: Any = importlib.import_module("digits")

HIDDEN, BATCH, RATE = bfa.MNIST["hidden"], bfa.MNIST["batch_size"], np.float32(bfa.MNIST["rate"])
N_INPUTS = 784


class Reference:
    """The network of ngc-learn's components; its whole state is a dict that is passed in and returned."""

    def __init__(self, weights: Any):
        ngclearn: Any = importlib.import_module("ngclearn")
        parts: Any = importlib.import_module("ngclearn.components")
        generator = importlib.import_module("ngclearn.utils.distribution_generator").DistributionGenerator
        manager = importlib.import_module("ngcsimlib.global_state").stateManager
        zeros = generator.constant(0.0)
        n, d, h, c = BATCH, N_INPUTS, HIDDEN, bfa.N_CLASSES
        synapse = {"weight_init": zeros, "w_bound": 0.0, "optim_type": "sgd", "sign_value": -1.0, "batch_size": n}
        with ngclearn.Context("bfa"):
            keys = iter(jax.random.split(jax.random.PRNGKey(0), 8))
            self.z0 = parts.BernoulliCell("z0", d, batch_size=n, key=next(keys))
            self.W1 = parts.HebbianSynapse(
                "W1", (d, h), eta=1.0, bias_init=zeros, post_wght=1 / d, key=next(keys), **synapse
            )
            self.z1 = parts.SLIFCell("z1", h, batch_size=n, key=next(keys), **bfa.CELL)
            self.W2 = parts.HebbianSynapse(
                "W2", (h, c), eta=1.0, bias_init=zeros, post_wght=1 / h, key=next(keys), **synapse
            )
            self.z2 = parts.SLIFCell("z2", c, batch_size=n, key=next(keys), **bfa.CELL)
            self.e2 = parts.GaussianErrorCell("e2", c, batch_size=n, key=next(keys))
            self.E2 = parts.HebbianSynapse("E2", (c, h), eta=0.0, key=next(keys), **synapse)
            self.d1 = parts.GaussianErrorCell("d1", h, batch_size=n, key=next(keys))

            for source, target in (
                (self.z0.outputs, self.W1.inputs),
                (self.W1.outputs, self.z1.j),
                (self.z1.s, self.W2.inputs),
                (self.W2.outputs, self.z2.j),
                (self.z2.s, self.e2.mu),
                (self.e2.dmu, self.E2.inputs),
                (self.E2.outputs, self.d1.target),
                (self.z1.surrogate, self.d1.modulator),
                (self.z0.outputs, self.W1.pre),
                (self.d1.dmu, self.W1.post),
                (self.z1.s, self.W2.pre),
                (self.e2.dmu, self.W2.post),
            ):
                operator.rshift(source, target)

            after_input = (self.W1, self.z1, self.W2, self.z2, self.e2, self.E2, self.d1)
            self.draw = ngclearn.MethodProcess("draw") >> self.z0.advance_state
            self.advance = ngclearn.MethodProcess("advance")
            self.reset = ngclearn.MethodProcess("reset") >> self.z0.reset
            for part in after_input:
                self.advance = self.advance >> part.advance_state
                self.reset = self.reset >> part.reset
            self.evolve = ngclearn.MethodProcess("evolve") >> self.W1.evolve >> self.W2.evolve
        start = {"W1": self.W1.weights, "W2": self.W2.weights, "E": self.E2.weights}
        self.state = {name: jnp.asarray(value) for name, value in manager.state.items()}
        # Some arrays, such as the thresholds, change shape at the first step, which a scan does not allow.
        after, _ = jax.eval_shape(self.advance.run.compiled, self.state, self.advance.pack_keywords(t=0.0, dt=bfa.DT))
        after, _ = jax.eval_shape(self.evolve.run.compiled, after, self.evolve.pack_keywords(dt=bfa.DT))
        self.state = jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), self.state, after)
        self.state |= {where.target: jnp.copy(getattr(weights, name)) for name, where in start.items()}

    def weights(self, state: dict[str, Array]) -> dict[str, Array]:
        learned = {"W1": self.W1.weights, "b1": self.W1.biases, "W2": self.W2.weights, "b2": self.W2.biases}
        return {name: state[where.target].squeeze() for name, where in learned.items()}

    def window(
        self, state: dict[str, Array], images: Array, y: Array, key: Array | None = None, pixels: Array | None = None
    ) -> dict[str, Array]:
        """Trains on a batch; with a key and pixels, on the input spikes that slif's network draws."""
        start, _ = self.reset.run.compiled(state, [])
        start |= {self.z0.inputs.target: images, self.e2.target.target: y}

        def advance(state, k):
            if key is None or pixels is None:
                state, _ = self.draw.run.compiled(state, self.draw.pack_keywords(t=k * bfa.DT))
            else:
                x = bfa.bernoulli(jax.random.fold_in(key, k), bfa.spike_threshold(images[:, pixels]))
                state = state | {self.z0.outputs.target: jnp.zeros_like(images).at[:, pixels].set(x)}
            return self.advance.run.compiled(state, self.advance.pack_keywords(t=k * bfa.DT, dt=bfa.DT))

        def advance_and_evolve(state, k):
            state, _ = advance(state, k)
            return self.evolve.run.compiled(state, self.evolve.pack_keywords(dt=bfa.DT))

        start = jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), start, state)
        state, _ = lax.scan(advance, start, jnp.arange(1, bfa.BURN_IN + 1))
        state, _ = lax.scan(advance_and_evolve, state, jnp.arange(bfa.BURN_IN + 1, bfa.N_STEPS + 1))
        return state


def disagreement(ours: Any, theirs: dict[str, Array], start: Any) -> dict[str, float]:
    """The difference between the two, relative to what was learned."""
    differences = {}
    for name, weights in theirs.items():
        learned = np.asarray(weights) - np.asarray(getattr(start, name))
        differences[name] = float(np.linalg.norm(getattr(ours, name) - weights) / np.linalg.norm(learned))
    return differences


def random_batch() -> tuple[np.ndarray, np.ndarray]:
    """Images about as bright as MNIST's, with about as many pixels that none of them uses."""
    rng = np.random.default_rng(0)
    inner = rng.random((BATCH, 24, 24), np.float32) * (rng.random((BATCH, 24, 24)) < 0.35)
    images = np.pad(inner, ((0, 0), (2, 2), (2, 2))).reshape(BATCH, N_INPUTS)
    return bfa.MNIST["gain"] * images, rng.integers(bfa.N_CLASSES, size=BATCH)


def first_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = digits.load(path)
    images, classes = bfa.MNIST["gain"] * data.x_train[:BATCH], data.y_train[:BATCH]
    if images.shape != (BATCH, N_INPUTS):
        raise ValueError(f"{path}: expected {BATCH} images of {N_INPUTS} pixels or more, got {images.shape}")
    return images, classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz with MNIST's keys, or a folder with its IDX files")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--repeats", type=int, default=11, help="number of batches to take the median of")
    options = parser.parse_args()
    if importlib.util.find_spec("ngclearn") is None:
        parser.error("ngclearn is not installed: pip install ngclearn")
    try:
        images, classes = random_batch() if options.data is None else first_batch(options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    pixels = bfa.pixels_in_use(images)
    key, images, classes = jax.random.key(1), jnp.asarray(images), jnp.asarray(classes, jnp.int32)
    y = jax.nn.one_hot(classes, bfa.N_CLASSES)
    start = bfa.init_weights(jax.random.key(0), N_INPUTS, HIDDEN)
    cells = bfa.init_cells(HIDDEN)
    reference = Reference(start)

    batch = (key, images, pixels, classes, RATE)
    ours, compiling = cases.compile_seconds(bfa.train_batch, cells, start, *batch)
    theirs, reference_compiling = cases.compile_seconds(reference.window, reference.state, images, y)

    learned, _ = ours(cells, start, *batch)
    expected = reference.weights(jax.jit(reference.window)(reference.state, images, y, key, pixels))
    differences = disagreement(learned, expected, start)
    print("difference after a batch, relative to what was learned: ", end="")
    print(", ".join(f"{name} {share:.1e}" for name, share in differences.items()))
    assert max(differences.values()) < 1e-3, differences

    now = {"slif": start, "ngc-learn": reference.state}

    def run_ours():
        now["slif"], _ = ours(cells, now["slif"], *batch)
        return now["slif"]

    def run_theirs():
        now["ngc-learn"] = theirs(now["ngc-learn"], images, y)
        return now["ngc-learn"]

    seconds = cases.median_seconds({"slif": run_ours, "ngc-learn": run_theirs}, options.repeats, budget=60)
    ratio = seconds["slif"] / seconds["ngc-learn"]
    print(f"{'':<12}{'per batch':>10}{'compile':>10}")
    for name, compile_s in (("slif", compiling), ("ngc-learn", reference_compiling)):
        print(f"{name:<12}{seconds[name]:>8.3f} s{compile_s:>8.2f} s")
    print(f"ratio {ratio:.2f} (target: 0.75)")

    if options.json:
        figures = {
            "differences": differences,
            "seconds_per_batch": seconds,
            "ratio": ratio,
            "compile_s": {"slif": compiling, "ngc-learn": reference_compiling},
        }
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
