"""A recurrent spiking network tells nine speakers apart in recordings of different lengths.

    python examples/train_speech.py                                      Japanese Vowels from sktime, no download
    python examples/train_speech.py --data speech.npz                    other utterances, padded, and their lengths
    python examples/train_speech.py --eval out/train_speech/weights.npz  test accuracy of weights saved before

Dense -> recurrent SLIF -> Dense -> LeakyIntegrator: the mean potentials of the integrators are the logits. `valid`
masks the padding, and noise is added to the training utterances. Over seeds 0 .. 4 it classifies 97.8 to 98.9 % of the
test utterances, 98.38 % on average with a standard deviation of 0.43 %, in about 30 s on two CPU cores.

Source: Kudo, Toyama & Shimbo (1999), Multidimensional curve classification using passing-through regions, Pattern
Recognition Letters 20(11-13): two vowels by nine speakers, 270 utterances to train on and 370 to test, as 12 cepstral
coefficients in each of 7 to 29 frames (UCI Machine Learning Repository, CC BY 4.0).
"""

import argparse
import functools
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cli
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import slif
import slif.linen

# Chosen by cross-validation on the training utterances; the test utterances had no part in it.
STEPS_PER_FRAME = 3
TAU_HIDDEN, TAU_READOUT = 5.0, 20.0  # steps
RECURRENT_SCALE = 0.5
NOISE, OFFSET = 0.3, 0.3  # standard deviations, drawn per frame and per utterance
BATCH_SIZE = 30
LEARNING_RATE, WEIGHT_DECAY, CLIP = 5e-3, 1e-2, 1.0

KEYS = tuple(f"{name}_{part}" for part in ("train", "test") for name in "xny")
# The leaves of the parameters, in the order in which Flax keeps them.
WEIGHTS = ("bias1", "kernel1", "bias2", "kernel2", "recurrent_kernel")


class Utterances(NamedTuple):
    x: np.ndarray  # [n, F, C], padded at the end
    n: np.ndarray  # [n], numbers of frames
    y: np.ndarray  # [n], classes


def load(path: Path | None) -> tuple[Utterances, Utterances]:
    """Utterances to train on and to test, from an .npz with x_train, n_train, y_train, x_test, ..., or from sktime."""
    if path is None:
        return bundled("train"), bundled("test")
    arrays = cli.read_npz(path, KEYS)
    train, test = (Utterances(*(arrays[f"{name}_{part}"] for name in "xny")) for part in ("train", "test"))
    for x, n, y in (train, test):
        if x.ndim != 3 or not x.size or not n.shape == y.shape == x.shape[:1]:
            raise ValueError(f"{path}: expected x [n, F, C], n [n] and y [n], got {x.shape}, {n.shape} and {y.shape}")
        if x.dtype.kind not in "iuf" or n.dtype.kind not in "iu" or y.dtype.kind not in "iu":
            raise ValueError(f"{path}: expected x of numbers, n and y of integers, got {x.dtype}, {n.dtype}, {y.dtype}")
        if n.min() < 1 or n.max() > x.shape[1]:
            raise ValueError(f"{path}: expected lengths of 1 to {x.shape[1]} frames, got {n.min()} to {n.max()}")
        if not np.isfinite(x).all():
            raise ValueError(f"{path}: expected finite numbers in x")
    classes = np.unique(train.y)
    if not np.array_equal(classes, np.arange(len(classes))) or not np.isin(test.y, classes).all():
        raise ValueError(f"{path}: expected classes 0 .. K - 1, each with training utterances, got {classes}")
    if train.x.shape[2] != test.x.shape[2]:
        raise ValueError(f"{path}: {train.x.shape[2]} channels to train on, but {test.x.shape[2]} to test")
    return train, test


def bundled(part: str) -> Utterances:
    try:
        datasets = importlib.import_module("sktime.datasets")
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}: pip install ".[speech]" gets the recordings; or give your own as --data') from error
    table, speakers = datasets.load_japanese_vowels(part, return_type="nested_univ")  # a series in each cell
    frames = [np.stack(row, axis=-1) for row in table.to_numpy()]
    x = np.zeros((len(frames), max(map(len, frames)), table.shape[1]), np.float32)
    for padded, given in zip(x, frames, strict=True):
        padded[: len(given)] = given
    return Utterances(x, np.array([len(given) for given in frames]), speakers.astype(int) - 1)


def with_differences(train: Utterances, test: Utterances) -> tuple[Utterances, Utterances]:
    """Scales channels to mean 0 and deviation 1 over the training frames, and appends twice their change per frame."""
    frames = train.x[np.arange(train.x.shape[1]) < train.n[:, None]].astype(np.float64)
    mean, deviation = frames.mean(0), frames.std(0)

    def prepared(part: Utterances) -> Utterances:
        x = (part.x - mean) / np.where(deviation > 0, deviation, 1)
        x = np.concatenate([x, 2 * np.diff(x, axis=1, prepend=x[:, :1])], axis=2)
        return Utterances(x.astype(np.float32), part.n.astype(np.int32), part.y.astype(np.int32))

    return prepared(train), prepared(test)


class Network(nn.Module):
    units: int
    n_classes: int

    @nn.compact
    def __call__(self, x: Array, n: Array) -> tuple[Array, Array]:
        """Logits [B, K] and hidden spikes [T, B, units] of utterances [B, F, C] with n [B] frames."""
        x = jnp.repeat(x, STEPS_PER_FRAME, axis=1).swapaxes(0, 1)
        valid = jnp.arange(len(x))[:, None] < STEPS_PER_FRAME * n
        spikes = slif.linen.SLIF(
            self.units,
            dt=1.0,
            tau_m=TAU_HIDDEN,
            thr=1.0,
            thr_jitter=0.0,
            surrogate=slif.arctan(2.0),
            recurrent=True,
            recurrent_kernel_init=nn.initializers.orthogonal(RECURRENT_SCALE),
        )(nn.Dense(self.units)(x), valid=valid)
        v = slif.linen.LeakyIntegrator(self.n_classes, dt=1.0, tau_m=TAU_READOUT)(nn.Dense(self.n_classes)(spikes))
        return jnp.where(valid[..., None], v, 0).sum(0) / valid.sum(0)[:, None], spikes


def with_noise(key: Array, x: Any) -> Array:
    k1, k2 = jax.random.split(key)
    rows, _, channels = x.shape
    return x + NOISE * jax.random.normal(k1, x.shape) + OFFSET * jax.random.normal(k2, (rows, 1, channels))


def make_optimiser(n_updates: int) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(LEARNING_RATE, n_updates)
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=WEIGHT_DECAY))


@functools.partial(jax.jit, static_argnames=("network", "n_updates"))
def start(network: Network, n_updates: int, data: Utterances, key: Array) -> tuple[Any, Any]:
    params = network.init(key, data.x[:1], data.n[:1])
    return params, make_optimiser(n_updates).init(params)


@functools.partial(jax.jit, static_argnames=("network", "n_updates"))
def run_epoch(
    network: Network, n_updates: int, data: Utterances, params: Any, opt_state: Any, key: Array
) -> tuple[Any, Any, Array, Array]:
    """One pass over the training set in random batches, as one compiled scan; an incomplete last batch is left out."""
    optimiser = make_optimiser(n_updates)
    order_key, noise_key = jax.random.split(key)
    size = min(BATCH_SIZE, len(data.y))
    batches = jax.random.permutation(order_key, len(data.y))[: len(data.y) // size * size].reshape(-1, size)

    def loss(params, x, n, y):
        logits, _ = network.apply(params, x, n)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (logits.argmax(-1) == y).mean()

    def update(carry, given):
        params, opt_state = carry
        key, rows = given
        x = with_noise(key, data.x[rows])
        metrics, gradient = jax.value_and_grad(loss, has_aux=True)(params, x, data.n[rows], data.y[rows])
        updates, opt_state = optimiser.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    carry, metrics = jax.lax.scan(update, (params, opt_state), (jax.random.split(noise_key, len(batches)), batches))
    return *carry, *(m.mean() for m in metrics)


@functools.partial(jax.jit, static_argnames="network")
def run(network: Network, params: Any, x: Any, n: Any) -> Any:
    return network.apply(params, x, n)


def predict(network: Network, params: Any, data: Utterances) -> np.ndarray:
    return np.asarray(run(network, params, data.x, data.n)[0].argmax(-1))


class Epoch(NamedTuple):
    loss: float
    learning: float  # accuracy on the training utterances while learning, noise included
    test: float


def train(args: argparse.Namespace, network: Network, data: Utterances, test: Utterances) -> tuple[Any, list[Epoch]]:
    """Trains the network and saves its weights after each epoch; returns the last weights, and figures by epoch."""
    data, test = jax.device_put((data, test))
    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    n_updates = args.epochs * max(1, len(data.y) // BATCH_SIZE)
    params, opt_state = start(network, n_updates, data, init_key)
    history = []
    with tqdm(jax.random.split(run_key, args.epochs), unit="epoch", dynamic_ncols=True) as progress:
        for key in progress:
            params, opt_state, loss, learning = run_epoch(network, n_updates, data, params, opt_state, key)
            history.append(
                Epoch(float(loss), float(learning), float((predict(network, params, test) == test.y).mean()))
            )
            save_weights(args.out / "weights.npz", params)
            progress.set_postfix(loss=f"{history[-1].loss:.3f}", test=f"{history[-1].test:.2%}")
    return params, history


def save_weights(path: Path, params: Any) -> None:
    arrays: dict[str, Any] = dict(zip(WEIGHTS, map(np.asarray, jax.tree.leaves(params)), strict=True))
    with cli.saved(path) as file:
        np.savez(file, **arrays)


def load_weights(path: Path, n_classes: int, data: Utterances) -> tuple[Network, Any]:
    """The network with the weights of a file, which determine the number of units."""
    arrays = cli.read_npz(path, WEIGHTS)
    network = Network(max(arrays["bias1"].size, 1), n_classes)
    like, structure = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0), data.x[:1], data.n[:1]))
    cli.check_weights(path, arrays, dict(zip(WEIGHTS, like, strict=True)), f"{n_classes} classes")
    return network, jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in WEIGHTS])


def draw(path: Path, network: Network, params: Any, test: Utterances, history: list[Epoch]) -> None:
    """Saves a PNG of hidden spikes for one utterance of each class, learning curves and the confusion matrix."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes: Any = figure.subplot_mosaic([["spikes"] * 3, ["loss", "accuracy", "confusion"]])
    predicted = predict(network, params, test)
    draw_spikes(axes["spikes"], network, params, test, predicted)
    draw_curves(axes["loss"], axes["accuracy"], history)
    draw_confusion(axes["confusion"], network.n_classes, test.y, predicted)
    with cli.saved(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_spikes(axes: Any, network: Network, params: Any, test: Utterances, predicted: np.ndarray) -> None:
    """The first test utterance of each class, side by side, without padding."""
    shown = np.unique(test.y, return_index=True)[1]
    _, spikes = run(network, params, test.x[shown], test.n[shown])
    lengths = STEPS_PER_FRAME * test.n[shown]
    raster = np.concatenate([np.asarray(spikes)[:length, k] for k, length in enumerate(lengths)])
    ends = np.cumsum(lengths)
    extent = (0, ends[-1], network.units, 0)
    axes.imshow(raster.T, cmap="binary", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    for row, end, length in zip(shown, ends, lengths, strict=True):
        axes.axvline(end, color="C1")
        right = predicted[row] == test.y[row]
        label = f"speaker {test.y[row] + 1}" + ("" if right else f",\npredicted {predicted[row] + 1}")
        axes.text(end - length / 2, -1, label, ha="center", va="bottom", color="black" if right else "C3", fontsize=8)
    rate = raster.mean()
    axes.set(xlabel=f"step, {STEPS_PER_FRAME} per frame", ylabel="hidden unit")
    axes.set_title(f"Hidden spikes for one test utterance of each speaker; {rate:.1%} of units fire per step", pad=24)


def draw_curves(left: Any, right: Any, history: list[Epoch]) -> None:
    epochs = np.arange(1, len(history) + 1)
    marker = "o" if len(epochs) < 20 else None
    loss, learning, test = np.transpose(history)
    left.plot(epochs, loss, color="C2", marker=marker)
    # Around a single value a logarithmic axis has too few ticks to read it off.
    left.set(ylabel="training loss (cross-entropy)", yscale="log" if len(epochs) > 1 else "linear", title="Loss")
    right.plot(epochs, 100 * learning, color="0.6", marker=marker, label="while learning, with noise")
    right.plot(epochs, 100 * test, color="C0", marker=marker, label=f"test, {test[-1]:.2%} at the end")
    right.set(ylabel="accuracy (%)", title="Accuracy")
    right.legend(loc="lower right", fontsize=8)
    for axes in (left, right):
        axes.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
        axes.grid(alpha=0.3, which="both")
        axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def draw_confusion(axes: Any, n_classes: int, y: np.ndarray, predicted: np.ndarray) -> None:
    counts = np.zeros((n_classes, n_classes), int)
    np.add.at(counts, (y, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    ticks = np.arange(n_classes)
    axes.set_xticks(ticks, ticks + 1)
    axes.set_yticks(ticks, ticks + 1)
    axes.set(
        xlabel="predicted speaker",
        ylabel="true speaker",
        title=f"Test utterances, {np.trace(counts)} of {len(y)} correct",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="train_speech.py", description="Trains a recurrent spiking network on spoken vowels.")
    parser.add_argument("--data", type=Path, help="an .npz with " + ", ".join(KEYS) + " (default sktime's recordings)")
    parser.add_argument(
        "--eval", type=Path, metavar="WEIGHTS", help="print the test accuracy of saved weights, and stop"
    )
    parser.add_argument(
        "--epochs", type=cli.number(int, 1, 10_000), default=60, help="passes over the training utterances"
    )
    parser.add_argument("--units", type=cli.number(int, 1, 10_000), default=128, help="hidden units")
    seed = cli.number(int, 0, cli.MAX_SEED)
    parser.add_argument("--seed", type=seed, default=0, help="seed for weights, order and noise")
    parser.add_argument("--out", type=Path, default=Path("out/train_speech"), help="folder to write to")
    args = parser.parse_args(arguments)
    try:
        data, test = with_differences(*load(args.data))
        n_classes = int(data.y.max()) + 1
        if args.eval is not None:
            network, params = load_weights(args.eval, n_classes, data)
            print(f"test accuracy {(predict(network, params, test) == test.y).mean():.2%}")
            return
    except (OSError, ValueError) as error:
        parser.error(str(error))
    parser.probe(args.out)
    network, started = Network(args.units, n_classes), time.perf_counter()
    params, history = train(args, network, data, test)
    seconds = time.perf_counter() - started
    draw(args.out / "speech.png", network, params, test, history)
    print(f"weights.npz and speech.png are in {args.out}")
    print(f"test accuracy {history[-1].test:.2%}, {args.epochs} epochs in {seconds:.1f} s")


if __name__ == "__main__":
    main()
