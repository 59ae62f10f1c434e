"""A spiking network learns handwritten digits by broadcast feedback alignment, without back-propagation.

    python examples/bfa_snn.py                                 scikit-learn's bundled 8x8 digits, no download
    python examples/bfa_snn.py --data mnist.npz                MNIST, or a folder of its IDX files
    python examples/bfa_snn.py --eval out/bfa_snn/weights.npz  test accuracy of weights saved before

The image x, its pixels from 0 to 1, drives a hidden and an output layer of sLIF cells for 99 steps of 0.25 ms. At each
step

    x_t ~ Bernoulli(gain x)
    s1 = cell 1 (x_t W1 + b1)          s2 = cell 2 (s1 W2 + b2)
    e2 = y - s2                        d1 = (e2 E) * surrogate of cell 1

and, once the burn-in is over, still within the window:

    W1 += rate x_t^T d1 / D            b1 += rate sum d1 / D
    W2 += rate s1^T e2 / H             b2 += rate sum e2 / H

with sums over the batch and E random but fixed. The class is read out in three ways: by "current", the unit of cell 2
with the largest summed current after the burn-in; by "spikes", the one that spiked most often after the burn-in; and by
"all spikes", which includes those during the burn-in, as the published figures do.

`--validation 0.1` is the published protocol: a tenth of the training images is held out, and the weights kept are those
of the epoch that did best on them by all spikes. Without it, those of the last epoch are kept.

Source: Samadi, Lillicrap & Tweed (2017), Deep learning with dynamic spiking neurons and fixed feedback weights, Neural
Computation 29(3).
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cli
import jax
import jax.numpy as jnp
import numpy as np
from digits import N_CLASSES, Digits, load
from jax import Array, lax
from jax.typing import ArrayLike
from tqdm import tqdm

import slif

DT = 0.25  # ms
N_STEPS, BURN_IN = 99, 20
WEIGHT_STD = 0.055
CELL: dict[str, Any] = {
    "tau_m": 20.0,
    "resist_m": 1.0,
    "thr": 0.4,
    "thr_jitter": 0.0,
    "refract_time": 1.0,
    "sticky_spikes": True,
}
# The published settings are for MNIST. There are 40 times fewer bundled digits: larger updates learn them in seconds,
# and decay so that the weights settle. They have a twelfth of the pixels: at a gain of 0.25 the noise of so few input
# spikes keeps the network below 95 %, even on the images it learns from.
MNIST = {"epochs": 30, "hidden": 1000, "batch_size": 250, "rate": 1.0, "decay": 1.0, "gain": 0.25}
BUNDLED = {"epochs": 8, "hidden": 500, "batch_size": 50, "rate": 16.0, "decay": 0.7, "gain": 1.0}

EVAL_BATCH = 250
EVAL_SEED = 0  # fixed, so that saved weights reproduce the accuracy that was printed

Rates = tuple[ArrayLike, ArrayLike]


class Weights(NamedTuple):
    W1: Array  # [D, H]
    b1: Array  # [H]
    W2: Array  # [H, C]
    b2: Array  # [C]
    E: Array  # [C, H] feedback, fixed


class Cells(NamedTuple):
    hidden: slif.SLIFParams
    output: slif.SLIFParams


class Evidence(NamedTuple):
    """Evidence for each class, summed over steps, [B, C]; or the accuracy by each of the three."""

    current: Any  # of the output layer, after the burn-in
    spikes: Any  # after the burn-in
    all_spikes: Any  # including the burn-in


def init_weights(key: Array, n_inputs: int, n_hidden: int) -> Weights:
    def normal(key: Array, *shape: int) -> Array:
        return WEIGHT_STD * jax.random.normal(key, shape)

    k1, k2, k3 = jax.random.split(key, 3)
    return Weights(
        W1=normal(k1, n_inputs, n_hidden),
        b1=jnp.zeros(n_hidden),
        W2=normal(k2, n_hidden, N_CLASSES),
        b2=jnp.zeros(N_CLASSES),
        E=normal(k3, N_CLASSES, n_hidden),
    )


def init_cells(n_hidden: int) -> Cells:
    key = jax.random.key(0)  # without jitter and inhibition nothing depends on it
    return Cells(slif.init_params(key, n_hidden, **CELL), slif.init_params(key, N_CLASSES, **CELL))


def spike_threshold(images: Array) -> Array:
    """The probability that each pixel spikes at a step, times 2^16."""
    return jnp.round(2**16 * images).astype(jnp.uint32)


def bernoulli(key: Array, threshold: Array) -> Array:
    """Spikes [B, D] with probability threshold / 2^16.

    Each random word serves two pixels: for a window of 250 images of 784 pixels this takes 45 ms,
    `jax.random.bernoulli` 80 ms, and keys of the kinds "rbg" and "unsafe_rbg" 360 ms (on an x86 server); the rest of
    such a window takes 450 ms.
    """
    n, d = threshold.shape
    words = jax.random.bits(key, (n, (d + 1) // 2), jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=1)[:, :d]
    return (halves < threshold).astype(jnp.float32)


def update(
    weights: Weights, rates: Rates, y: Array, x: Array, hidden: slif.SLIFState, output: slif.SLIFState
) -> Weights:
    rate1, rate2 = rates
    e2 = y - output.s
    d1 = (e2 @ weights.E) * hidden.surrogate
    return weights._replace(
        W1=weights.W1 + x.T @ (rate1 * d1),
        b1=weights.b1 + rate1 * d1.sum(0),
        W2=weights.W2 + hidden.s.T @ (rate2 * e2),
        b2=weights.b2 + rate2 * e2.sum(0),
    )


def window(
    cells: Cells, weights: Weights, key: Array, images: Array, y: Array | None = None, rates: Rates | None = None
) -> tuple[Weights, Evidence, Array]:
    """Shows a batch to the network, which learns if y and rates are given.

    Args:
        cells: parameters of the two layers.
        weights: weights before the window.
        key: a PRNG key, for the input spikes.
        images: [B, D], the probability that each pixel spikes at a step.
        y: one-hot classes [B, C].
        rates: rate / D and rate / H.

    Returns:
        The weights after the window, the evidence from the output layer, and the spikes of the hidden layer [T, B, H].
    """
    threshold = spike_threshold(images)

    def body(carry, k):
        weights, hidden, output, evidence = carry
        x = bernoulli(jax.random.fold_in(key, k), threshold)
        hidden = slif.step(cells.hidden, hidden, x @ weights.W1 + weights.b1, k * DT, DT)
        output = slif.step(cells.output, output, hidden.s @ weights.W2 + weights.b2, k * DT, DT)
        after = k > BURN_IN
        if y is not None and rates is not None:
            learn = functools.partial(update, rates=rates, y=y, x=x, hidden=hidden, output=output)
            weights = lax.cond(after, learn, lambda weights: weights, weights)
        seen = Evidence(jnp.where(after, output.j, 0), jnp.where(after, output.s, 0), output.s)
        evidence = jax.tree.map(jnp.add, evidence, seen)
        return (weights, hidden, output, evidence), hidden.s

    n = images.shape[0]
    rest = slif.init_state(cells.hidden, n), slif.init_state(cells.output, n)
    nothing = jnp.zeros((n, N_CLASSES))
    start = (weights, *rest, Evidence(nothing, nothing, nothing))
    (weights, _, _, evidence), spikes = lax.scan(body, start, jnp.arange(1, N_STEPS + 1))
    return weights, evidence, spikes


def pixels_in_use(images: np.ndarray) -> np.ndarray:
    """Indices of the pixels that are above 0 in some image, filled up with others to a multiple of 64.

    A pixel that is 0 never spikes, so its row of W1 neither acts nor learns. 250 images of MNIST use about 560 of 784
    pixels; without the others, a training batch takes 380 ms, not 510. Each size is compiled anew, hence the multiples.
    """
    used = images.any(0)
    n = 64 * max(1, -(-used.sum() // 64))
    return np.argsort(~used, kind="stable")[:n]


@functools.partial(jax.jit, donate_argnames="weights")
def train_batch(
    cells: Cells, weights: Weights, key: Array, images: Array, pixels: Array, classes: Array, rate: ArrayLike
) -> tuple[Weights, Array]:
    """Learns a batch; returns the weights, and how many images were classified correctly in the process."""
    n_inputs, n_hidden = weights.W1.shape
    y = jax.nn.one_hot(classes, N_CLASSES)
    used = weights._replace(W1=weights.W1[pixels])
    learned, evidence, _ = window(cells, used, key, images[:, pixels], y, (rate / n_inputs, rate / n_hidden))
    weights = learned._replace(W1=weights.W1.at[pixels].set(learned.W1))
    return weights, (evidence.current.argmax(-1) == classes).sum()


@jax.jit
def predict(cells: Cells, weights: Weights, key: Array, images: Array, pixels: Array) -> Evidence:
    """The class of each image, [B], by each kind of evidence."""
    _, evidence, _ = window(cells, weights._replace(W1=weights.W1[pixels]), key, images[:, pixels])
    return Evidence(*(x.argmax(-1) for x in evidence))


@jax.jit
def hidden_spikes(cells: Cells, weights: Weights, key: Array, images: Array) -> Array:
    return window(cells, weights, key, images)[2]


def accuracy(cells: Cells, weights: Weights, images: np.ndarray, classes: np.ndarray) -> Evidence:
    """The share of the images that the network classifies correctly, by each kind of evidence."""
    key, correct = jax.random.key(EVAL_SEED), np.zeros(len(Evidence._fields), int)
    for start in range(0, len(images), EVAL_BATCH):
        # The last batch is padded to the size of the others, so that nothing recompiles; the padding is not counted.
        batch = np.zeros((EVAL_BATCH, images.shape[1]), np.float32)
        rows = slice(start, start + EVAL_BATCH)
        n = len(images[rows])
        batch[:n] = images[rows]
        predicted = predict(cells, weights, jax.random.fold_in(key, start), batch, pixels_in_use(batch))
        correct += (np.asarray(predicted)[:, :n] == classes[rows]).sum(1)
    return Evidence(*(correct / len(images)).tolist())


class Epoch(NamedTuple):
    learning: float  # accuracy on the training images in the windows that teach them, so higher than afterwards
    validation: Evidence | None
    test: Evidence
    seconds: float  # of training, which in the first epoch includes compilation


def hold_out(digits: Digits, share: float, seed: int) -> tuple[Digits, np.ndarray, np.ndarray]:
    """The digits without that share of the training images, drawn at random; and the images and classes held out."""
    order = np.random.default_rng([seed, 1]).permutation(len(digits.x_train))
    held, kept = np.split(order, [round(share * len(order))])
    rest = digits._replace(x_train=digits.x_train[kept], y_train=digits.y_train[kept])
    return rest, digits.x_train[held], digits.y_train[held]


def best_epoch(history: list[Epoch]) -> int:
    """Index of the epoch whose weights are kept: the best on validation images by all spikes, if any, else the last."""
    counts = [epoch.validation.all_spikes if epoch.validation else n for n, epoch in enumerate(history)]
    return int(np.argmax(counts))


def train(options: Any, digits: Digits, x_held: np.ndarray, y_held: np.ndarray) -> tuple[Weights, list[Epoch]]:
    """Trains on the digits; returns the weights kept, which are also saved, and the epochs."""
    cells = init_cells(options.hidden)
    init_key, run_key = jax.random.split(jax.random.key(options.seed))
    weights = init_weights(init_key, digits.x_train.shape[1], options.hidden)
    shuffle = np.random.default_rng(options.seed)
    n_batches = len(digits.x_train) // options.batch_size
    history: list[Epoch] = []
    kept = weights
    for epoch in range(options.epochs):
        rate = np.float32(options.rate * options.decay**epoch)
        epoch_key, correct, start = jax.random.fold_in(run_key, epoch), 0, time.perf_counter()
        # Images that do not fill a batch wait for the next shuffle.
        batches = shuffle.permutation(len(digits.x_train))[: n_batches * options.batch_size].reshape(n_batches, -1)
        with tqdm(batches, desc=f"epoch {epoch + 1}/{options.epochs}", unit="batch", dynamic_ncols=True) as progress:
            for k, rows in enumerate(progress):
                key = jax.random.fold_in(epoch_key, k)
                images, classes = digits.x_train[rows], digits.y_train[rows]
                weights, n = train_batch(cells, weights, key, images, pixels_in_use(images), classes, rate)
                correct += int(n)
                progress.set_postfix(accuracy=f"{correct / ((k + 1) * options.batch_size):.2%}")
        seconds = time.perf_counter() - start
        validation = accuracy(cells, weights, x_held, y_held) if len(x_held) else None
        test = accuracy(cells, weights, digits.x_test, digits.y_test)
        history.append(Epoch(correct / batches.size, validation, test, seconds))
        if best_epoch(history) == epoch:
            kept = jax.tree.map(np.array, weights)  # a copy, since the next epoch writes over them
            save_weights(options.out / "weights.npz", kept)
    return kept, history


def save_weights(path: Path, weights: Weights) -> None:
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in weights._asdict().items()}
    with cli.saved(path) as file:
        np.savez(file, **arrays)


def load_weights(path: Path, n_inputs: int) -> Weights:
    arrays = cli.read_npz(path, Weights._fields)
    n_hidden = arrays["b1"].size
    expected = jax.eval_shape(lambda: init_weights(jax.random.key(0), n_inputs, n_hidden))
    cli.check_weights(path, arrays, expected._asdict(), f"images of {n_inputs} pixels")
    leaves: dict[str, Any] = arrays
    return Weights(**leaves)


def draw(path: Path, weights: Weights, digits: Digits, history: list[Epoch]) -> None:
    """Saves a PNG of the learning curve, the hidden spikes for one test image, and the filters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    n_inputs, n_hidden = weights.W1.shape
    figure.suptitle(
        f"{n_inputs} inputs, {n_hidden} hidden and {N_CLASSES} output units, trained by broadcast feedback alignment"
    )
    panels: Any = figure.subfigures(1, 3, width_ratios=(1, 1.25, 1))
    left, middle, right = panels

    axes = left.subplots()
    epochs = np.arange(1, len(history) + 1)
    kept = best_epoch(history)
    axes.plot(epochs, [100 * epoch.learning for epoch in history], "o-", color="0.6", label="while learning")
    styles = {"current": "o-C0", "spikes": "s--C1", "all_spikes": "v:C2"}
    for name, style in styles.items():
        test = np.array([getattr(epoch.test, name) for epoch in history])
        label = f"test by {name.replace('_', ' ')}, {test[kept]:.1%} after epoch {kept + 1}"
        axes.plot(epochs, 100 * test, style, ms=4, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy", xlim=(0.5, len(history) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False, fontsize=8)  # clear of the curves

    cells, n_shown = init_cells(weights.b1.size), min(weights.b1.size, 100)
    spikes = hidden_spikes(cells, weights, jax.random.key(EVAL_SEED), digits.x_test[:1])[:, 0, :n_shown]
    axes = middle.subplots()
    extent = (0, N_STEPS * DT, n_shown, 0)
    axes.imshow(
        np.asarray(spikes).T, cmap="binary", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent
    )
    axes.axvline(BURN_IN * DT, color="C1", linestyle="--")
    axes.text(BURN_IN * DT, -1, "burn-in ends", color="C1", ha="center", va="bottom", fontsize=8)
    axes.set(xlabel="time (ms)", ylabel="hidden unit")
    axes.set_title(f"Hidden spikes for a test image of a {digits.y_test[0]}", pad=18)

    right.suptitle("Filters of the largest weights")
    strongest = np.argsort(-np.linalg.norm(weights.W1, axis=0))[:16]
    for axes, filter in zip(right.subplots(4, 4).flat, np.asarray(weights.W1).T[strongest], strict=False):
        bound = np.abs(filter).max()
        axes.imshow(filter.reshape(digits.image_shape), cmap="RdBu_r", vmin=-bound, vmax=bound)
    for axes in right.axes:
        axes.set_axis_off()

    with cli.saved(path) as file:
        figure.savefig(file, format="png", dpi=120)


def parse_options(arguments: Sequence[str] | None) -> tuple[cli.Parser, Any]:
    parser = cli.Parser(prog="bfa_snn.py", description="Trains a spiking network by broadcast feedback alignment.")

    def add(name: str, kind: Any, text: str) -> None:
        key = name[2:].replace("-", "_")
        parser.add_argument(name, type=kind, help=f"{text} (default {BUNDLED[key]}, with --data {MNIST[key]})")

    parser.add_argument(
        "--data",
        type=Path,
        help="an .npz with MNIST's keys, or a folder of its IDX files (default scikit-learn's 8x8 digits)",
    )
    parser.add_argument(
        "--eval", type=Path, metavar="WEIGHTS", help="print the test accuracy of saved weights, and stop"
    )
    add("--epochs", cli.number(int, 1, 10_000), "passes over the training images")
    add("--hidden", cli.number(int, 1, 100_000), "hidden units")
    add("--batch-size", cli.number(int, 1, 1_000_000), "images per batch")
    add("--rate", cli.number(float, 1e-6, 1e6), "learning rate, the factor on all updates")
    add("--decay", cli.number(float, 1e-6, 1), "factor on the rate after each epoch")
    add("--gain", cli.number(float, 1e-6, 1), "probability that a white pixel spikes at a step")
    seed = cli.number(int, 0, cli.MAX_SEED)
    parser.add_argument("--seed", type=seed, default=0, help="seed for weights, order and input spikes")
    parser.add_argument("--out", type=Path, default=Path("out/bfa_snn"), help="folder to write to")
    parser.add_argument(
        "--validation",
        type=cli.number(float, 0, 0.9),
        default=0.0,
        metavar="SHARE",
        help="share of the training images to hold out; the weights of the epoch that does best on them are kept, "
        "with 0 those of the last epoch",
    )
    options = parser.parse_args(arguments)
    for key, value in (BUNDLED if options.data is None else MNIST).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return parser, options


def percentages(accuracy: Evidence) -> str:
    return ", ".join(f"{share:.2%} by {name.replace('_', ' ')}" for name, share in accuracy._asdict().items())


def table(history: list[Epoch]) -> str:
    """One line per epoch: accuracy on the training images while learning, then on held-out and test images."""
    lines = [
        f"{'epoch':>5}{'learning':>10}{'validation':>12}{'test: current':>15}{'spikes':>10}{'all':>10}{'seconds':>10}"
    ]
    for n, epoch in enumerate(history, 1):
        held = f"{epoch.validation.all_spikes:.2%}" if epoch.validation else "-"
        current, spikes, all_spikes = epoch.test
        lines.append(
            f"{n:>5}{epoch.learning:>10.2%}{held:>12}{current:>15.2%}{spikes:>10.2%}{all_spikes:>10.2%}{epoch.seconds:>10.2f}"
        )
    return "\n".join(lines)


def comparison(options: Any, digits: Digits) -> str:
    """A figure to compare the accuracy with."""
    if options.data is not None:
        return "96.28% on MNIST published for this network, by all spikes, for the best epoch on validation images"
    from sklearn.linear_model import LogisticRegression

    line = LogisticRegression(max_iter=1000).fit(digits.x_train, digits.y_train)
    return f"{line.score(digits.x_test, digits.y_test):.2%} by logistic regression on the pixels themselves"


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = parse_options(arguments)
    try:
        digits = load(options.data)
        digits = digits._replace(x_train=options.gain * digits.x_train, x_test=options.gain * digits.x_test)
        n_train, n_inputs = digits.x_train.shape
        if options.eval is not None:
            weights = load_weights(options.eval, n_inputs)
            test = accuracy(init_cells(weights.b1.size), weights, digits.x_test, digits.y_test)
            print(f"test accuracy {percentages(test)}")
            return
        n_held = round(options.validation * n_train)
        if options.batch_size > n_train - n_held:
            raise ValueError(
                f"--batch-size: expected at most {n_train - n_held} (training images), got {options.batch_size}"
            )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    parser.probe(options.out)

    digits, x_held, y_held = hold_out(digits, options.validation, options.seed)
    weights, history = train(options, digits, x_held, y_held)
    draw(options.out / "bfa_snn.png", weights, digits, history)
    print(table(history))
    kept = best_epoch(history)
    trained = accuracy(init_cells(options.hidden), weights, digits.x_train, digits.y_train)
    print(f"kept the weights of epoch {kept + 1}")
    print(f"train accuracy {percentages(trained)}")
    if (validation := history[kept].validation) is not None:
        print(f"validation accuracy {percentages(validation)}")
    print(f"test accuracy {percentages(history[kept].test)}")
    print(f"for comparison: {comparison(options, digits)}")
    print(f"weights.npz and bfa_snn.png are in {options.out}")


if __name__ == "__main__":
    main()
