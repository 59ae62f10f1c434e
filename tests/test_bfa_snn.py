"""The example that trains by broadcast feedback alignment: its rule, what it writes, and how it reports bad input."""

import gzip
import importlib
import re
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from conftest import BAD_NUMBERS

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
bfa = importlib.import_module("bfa_snn")
cli = importlib.import_module("cli")
digits = importlib.import_module("digits")


@pytest.fixture(autouse=True)
def _rank_promotion():
    """Scripts add a bias [H] to [B, H], as their readers would."""
    with jax.numpy_rank_promotion("allow"):
        yield


def make_data(n_train=20, n_test=10, shape=(6, 5)):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (n_train, *shape), np.uint8),
        "y_train": rng.integers(0, 10, n_train, np.uint8),
        "x_test": rng.integers(0, 256, (n_test, *shape), np.uint8),
        "y_test": rng.integers(0, 10, n_test, np.uint8),
    }


def write_npz(path, **changes):
    arrays = {name: array for name, array in (make_data() | changes).items() if array is not None}
    np.savez(path, **arrays)
    return path


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, suffix="", plain=None, **changes):
    """The four files, gzipped by suffix, except the array called plain."""
    folder.mkdir()
    for name, key in zip(digits.IDX_FILES, digits.NPZ_KEYS, strict=True):
        content = changes.get(key, idx_bytes(make_data()[key]))
        ending = f"-idx{make_data()[key].ndim}-ubyte{suffix}"
        (folder / f"{name}{ending}").write_bytes(gzip.compress(content) if suffix and key != plain else content)
    return folder


def weight_arrays(n_inputs=64, n_hidden=7):
    weights = bfa.init_weights(jax.random.key(0), n_inputs, n_hidden)
    return {name: np.asarray(leaf) for name, leaf in weights._asdict().items()}


def train_by_numpy(weights, spikes, y, rate):
    """The network's equations in float64, given its input spikes [T, B, D]; returns the weights and the evidence."""
    W1, b1, W2, b2, E = (np.asarray(leaf, np.float64) for leaf in weights)
    cell1, cell2 = (
        oracle.Cell(tau_m=20.0, resist_m=1.0, thr=np.full(n, 0.4), refract_time=1.0, sticky_spikes=True)
        for n in (b1.size, b2.size)
    )
    state1 = oracle.rest(cell1, (len(y), b1.size))
    state2 = oracle.rest(cell2, (len(y), b2.size))
    current, spikes_after, all_spikes = np.zeros((3, *y.shape))
    for k, x in enumerate(spikes, 1):
        t = k * 0.25
        state1 = oracle.step(cell1, state1, x @ W1 + b1, t, 0.25)
        state2 = oracle.step(cell2, state2, state1["s"] @ W2 + b2, t, 0.25)
        e2 = y - state2["s"]
        d1 = (e2 @ E) * state1["surrogate"]
        if t > 20 * 0.25:
            W1, b1 = W1 + rate * (x.T @ d1) / len(W1), b1 + rate * d1.sum(0) / len(W1)
            W2, b2 = W2 + rate * (state1["s"].T @ e2) / len(W2), b2 + rate * e2.sum(0) / len(W2)
            current, spikes_after = current + state2["j"], spikes_after + state2["s"]
        all_spikes = all_spikes + state2["s"]
    return bfa.Weights(W1, b1, W2, b2, E), bfa.Evidence(current, spikes_after, all_spikes)


def test_a_window_is_the_published_rule():
    n_batch, n_inputs, n_hidden, rate = 5, 150, 12, 3.0
    rng = np.random.default_rng(1)
    images = 0.25 * rng.random((n_batch, n_inputs), np.float32)
    images[:, rng.permutation(n_inputs)[:100]] = 0
    classes = rng.integers(0, 10, n_batch)
    y = np.eye(10)[classes]
    key, weights = jax.random.key(3), bfa.init_weights(jax.random.key(2), n_inputs, n_hidden)

    pixels = bfa.pixels_in_use(images)
    assert len(pixels) == 64
    assert set(np.flatnonzero(images.any(0))) <= set(pixels)
    threshold = bfa.spike_threshold(images[:, pixels])
    spikes = np.zeros((99, n_batch, n_inputs))
    spikes[:, :, pixels] = [bfa.bernoulli(jax.random.fold_in(key, k), threshold) for k in range(1, 100)]
    expected, evidence = train_by_numpy(weights, spikes, y, rate)
    assert np.abs(expected.W1 - weights.W1).max() > 0.01

    cells = bfa.init_cells(n_hidden)
    learned, correct = bfa.train_batch(
        cells, jax.tree.map(np.copy, weights), key, images, pixels, classes, np.float32(rate)
    )
    for name, leaf, other in zip(bfa.Weights._fields, learned, expected, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5, err_msg=name)
    assert correct == (evidence.current.argmax(-1) == classes).sum()

    # Untrained weights leave the output silent, and then the kinds of evidence do not differ.
    strong = weights._replace(W1=30 * weights.W1, W2=60 * weights.W2)
    told = bfa.predict(cells, strong, key, images, pixels)
    _, evidence = train_by_numpy(strong, spikes, y, 0.0)
    for name, classes in told._asdict().items():
        np.testing.assert_array_equal(classes, getattr(evidence, name).argmax(-1), err_msg=name)
    assert (told.current != told.spikes).any()
    assert (evidence.all_spikes != evidence.spikes).any()


def test_the_best_epoch_on_images_that_nothing_learns_from_is_kept(tmp_path, monkeypatch, capsys):
    data, shares = digits.load(), iter([0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr(bfa, "load", lambda path: data)
    learned, weights = [], []

    def train_batch(cells, before, key, images, *rest):
        learned.append(images)
        weights.append(jax.tree.map(lambda leaf: leaf + 1, before))
        return weights[-1], 0

    def accuracy(cells, weights, images, classes):
        if len(images) == held:
            seen.append(images)
            return bfa.Evidence(0.0, 0.0, next(shares))
        return bfa.Evidence(0.0, 0.0, 0.0)

    held, seen = round(0.25 * len(data.x_train)), []
    monkeypatch.setattr(bfa, "train_batch", train_batch)
    monkeypatch.setattr(bfa, "accuracy", accuracy)
    monkeypatch.setattr(bfa, "draw", lambda *arguments: None)
    options = ["--validation", "0.25", "--epochs", "4", "--hidden", "8", "--batch-size", "1000", "--out", str(tmp_path)]
    bfa.main(options)
    assert "weights of epoch 2\n" in capsys.readouterr().out
    for kept, expected in zip(bfa.load_weights(tmp_path / "weights.npz", 64), weights[1], strict=True):
        np.testing.assert_array_equal(kept, expected)
    rows = {image.tobytes() for image in seen[0]}
    assert all((images == seen[0]).all() for images in seen)
    known = [image.tobytes() for image in data.x_train]
    twice = {image for image in known if known.count(image) > 1}
    assert not rows & {image.tobytes() for images in learned for image in images} - twice


def test_input_spikes_have_their_probability():
    images = np.tile(np.float32([0, 0.05, 0.125, 0.25, 0.25]), (20_000, 1))
    x = np.asarray(bfa.bernoulli(jax.random.key(0), bfa.spike_threshold(images)))
    np.testing.assert_allclose(x.mean(0), images[0], atol=4 * np.sqrt(0.25 * 0.75 / len(x)))
    assert not x[:, 0].any()
    assert abs(np.corrcoef(x[:, 1:].T) - np.eye(4)).max() < 4 / np.sqrt(len(x))


def test_evaluation_counts_every_image_once():
    data, cells = digits.load(), bfa.init_cells(8)
    weights, images = bfa.init_weights(jax.random.key(0), 64, 8), data.x_test[:3]
    batch = np.zeros((bfa.EVAL_BATCH, 64), np.float32)
    batch[:3] = images
    key = jax.random.fold_in(jax.random.key(bfa.EVAL_SEED), 0)
    told = bfa.predict(cells, weights, key, batch, bfa.pixels_in_use(batch))
    for name, classes in zip(told._fields, np.asarray(told)[:, :3], strict=True):

        def share(images, classes, name=name):
            return getattr(bfa.accuracy(cells, weights, images, classes), name)

        assert share(images, classes) == 1
        assert share(images, np.append(classes[:2], (classes[2] + 1) % 10)) == 2 / 3
        # More than a batch, all wrong but the last.
        many = np.concatenate([np.zeros((bfa.EVAL_BATCH, 64), np.float32), images[:1]])
        one = [share(many, np.append(np.full(bfa.EVAL_BATCH, -1), c)) for c in range(10)]
        assert sum(one) == pytest.approx(1 / len(many))


def test_it_learns_and_evaluates_to_the_same(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    bfa.main(["--epochs", "3", "--hidden", "64", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["bfa_snn.png", "weights.npz"]
    assert (out / "bfa_snn.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    told, *shares = re.search(
        r"(test accuracy (.*)% by current, (.*)% by spikes, (.*)% by all spikes\n)", printed
    ).groups()
    assert min(map(float, shares)) > 40

    bfa.main(["--eval", str(out / "weights.npz"), "--out", str(tmp_path / "unused")])
    assert capsys.readouterr().out == told
    assert not (tmp_path / "unused").exists()


def test_the_seed_tells_the_weights(tmp_path):
    data = write_npz(tmp_path / "data.npz")
    saved = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        arguments = ["--data", data, "--epochs", 1, "--hidden", 8, "--batch-size", 10, "--seed", seed, "--out", out]
        bfa.main([str(argument) for argument in arguments])
        with np.load(out / "weights.npz") as file:
            saved.append(dict(file))
    assert saved[0].keys() == {"W1", "b1", "W2", "b2", "E"}
    assert all((saved[0][name] == saved[1][name]).all() for name in saved[0])
    assert (saved[0]["W1"] != saved[2]["W1"]).any()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_like_an_npz(suffix, tmp_path):
    expected = digits.load(write_npz(tmp_path / "data.npz"))
    got = digits.load(write_idx(tmp_path / "folder", suffix))
    assert got.image_shape == expected.image_shape == (6, 5)
    assert got.x_train.dtype == np.float32
    assert 0.9 < got.x_train.max() <= 1
    for a, b in zip(got[:4], expected[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(got.x_test * 255, make_data()["x_test"].reshape(10, 30), rtol=1e-6)


def test_bundled_digits_are_split_once_and_for_all():
    data = digits.load()
    assert (len(data.x_train), len(data.x_test), data.image_shape) == (1438, 359, (8, 8))
    assert data.x_train.max() == data.x_test.max() == 1
    np.testing.assert_array_equal(np.bincount(data.y_test), np.bincount(digits.load().y_test))


X = make_data()
BAD_DATA = {
    "missing": (lambda path: path, "No such file"),
    "text": (lambda path: path.write_text("0 1 2") and path, "not an .npz"),
    "empty": (lambda path: path.touch() or path, "not an .npz"),
    "npy": (lambda path: np.save(path.with_suffix(".npy"), X["x_test"]) or path.with_suffix(".npy"), "not an .npz"),
    "keys": (lambda path: write_npz(path, y_test=None), "no y_test"),
    "rank": (lambda path: write_npz(path, x_train=X["x_train"][0]), r"train images \[n, h, w\]"),
    "length": (lambda path: write_npz(path, y_train=X["y_train"][1:]), "train images"),
    "sizes": (lambda path: write_npz(path, x_test=X["x_test"][:, 1:]), "but test images"),
    "classes": (lambda path: write_npz(path, y_train=X["y_train"] + np.uint8(1)), "classes 0"),
    "range": (lambda path: write_npz(path, x_test=X["x_test"].astype(np.float32)), "from 0 to 1"),
    "nan": (lambda path: write_npz(path, x_test=X["x_test"] * np.float32("nan")), "from 0 to 1"),
    "dtype": (lambda path: write_npz(path, y_test=X["y_test"].astype(str)), "classes of integers"),
    "objects": (lambda path: write_npz(path, y_test=X["y_test"].astype(object)), "not an .npz"),
    "folder": (lambda path: path.mkdir() or path, "no file train-images"),
    "magic": (lambda path: write_idx(path, y_test=b"\1\2\3\4\5\6\7\x08"), "not an IDX file"),
    "short": (lambda path: write_idx(path, y_test=b"\0\0\x08\1\0"), "not an IDX file"),
    "cut": (lambda path: write_idx(path, x_test=idx_bytes(X["x_test"])[:-1]), "values, got"),
    "gzip": (lambda path: write_idx(path, ".gz", plain="y_test"), "not a gzip"),
}
BAD_WEIGHTS = {
    "missing": (lambda path: path, "No such file"),
    "keys": (lambda path: write_npz(path), "no E, W1, W2, b1, b2"),
    "inputs": (lambda path: np.savez(path, **weight_arrays(n_inputs=65)) or path, r"expected W1 float32\[64, 7\]"),
    "hidden": (lambda path: np.savez(path, **weight_arrays() | {"b1": np.zeros(8, np.float32)}) or path, "expected W1"),
    "dtype": (lambda path: np.savez(path, **weight_arrays() | {"E": np.zeros((10, 7), int)}) or path, "expected E"),
}
BAD_OPTIONS = {
    "--batch-size 1439": "--batch-size: expected at most 1438",
    "--epochs 2.5": "--epochs: expected a whole number",
    "--rate 0": "--rate: expected a number",
    "--decay 1.5": "--decay: expected a number from 1e-06 to 1,",
    "--unknown": "--unknown",
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_told_in_one_line(case, tmp_path, refused):
    make, message = BAD_DATA[case]
    path = make(tmp_path / "data.npz")
    assert re.search(message, refused(bfa.main, ["--data", path, "--out", tmp_path / "out"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_told_in_one_line(case, tmp_path, refused):
    make, message = BAD_WEIGHTS[case]
    path = make(tmp_path / "weights.npz")
    assert re.search(message, refused(bfa.main, ["--eval", path, "--out", tmp_path / "out"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_told_in_one_line(options, tmp_path, refused):
    assert BAD_OPTIONS[options] in refused(bfa.main, [*options.split(), "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--epochs", "--hidden", "--batch-size", "--rate", "--decay", "--seed"])
def test_numbers_have_bounds(flag, tmp_path, refused):
    for text in BAD_NUMBERS:
        assert f"argument {flag}: expected a" in refused(bfa.main, [flag, text, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_a_number_may_lie_on_either_bound():
    whole, real = cli.number(int, 0, cli.MAX_SEED), cli.number(float, 0.5, 2)
    assert (whole("0"), whole(f"{cli.MAX_SEED}"), real("0.5"), real("2")) == (0, cli.MAX_SEED, 0.5, 2)
    assert jax.random.key(cli.MAX_SEED).shape == ()


def test_a_folder_to_write_to_is_tried_before_the_work(bad_folder, monkeypatch, refused):
    monkeypatch.setattr(bfa, "train", None)
    assert f"--out: cannot write to {bad_folder}: " in refused(bfa.main, ["--out", bad_folder])


def test_the_weights_of_finished_epochs_outlive_an_interrupt(tmp_path, monkeypatch, capsys):
    seen, accuracy = [], bfa.accuracy

    def interrupted(*arguments):
        if seen:
            raise KeyboardInterrupt
        seen.append(accuracy(*arguments))
        return seen[0]

    monkeypatch.setattr(bfa, "accuracy", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bfa.main(["--epochs", "3", "--hidden", "8", "--batch-size", "500", "--out", str(out)])
    monkeypatch.undo()
    assert [path.name for path in out.iterdir()] == ["weights.npz"]
    bfa.main(["--eval", str(out / "weights.npz")])
    assert capsys.readouterr().out == f"test accuracy {bfa.percentages(*seen)}\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted():
        with cli.saved(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    with cli.saved(path) as file:
        file.write(b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]
