"""The example that trains a recurrent network on utterances of different lengths, run on a few synthetic ones."""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import BAD_NUMBERS, assert_same

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
speech = importlib.import_module("train_speech")

CLASSES, CHANNELS, FRAMES = 3, 4, 9
SMALL = ("--units", "12", "--epochs", "20")  # one setting for all, compiled once


@pytest.fixture(autouse=True)
def _rank_promotion():
    """Scripts add a bias [H] to [B, H], as their readers would."""
    with jax.numpy_rank_promotion("allow"):
        yield


def make_data():
    """Utterances about a mean of their class in each channel, with NaN-free rubbish where they are padded."""
    rng = np.random.default_rng(0)
    means, arrays = 2 * np.eye(CLASSES, CHANNELS), {}
    for part, rows in (("train", 60), ("test", 24)):
        y = np.arange(rows) % CLASSES
        x = means[y][:, None] + 0.3 * rng.normal(size=(rows, FRAMES, CHANNELS))
        n = rng.integers(2, FRAMES + 1, rows)
        x[np.arange(FRAMES) >= n[:, None]] = 1e3
        arrays |= {f"x_{part}": x.astype(np.float32), f"n_{part}": n, f"y_{part}": y}
    return arrays


def write(path, **changes):
    np.savez(path, **{name: array for name, array in (make_data() | changes).items() if array is not None})
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data.npz and the results written for it."""
    folder = tmp_path_factory.mktemp("speech")
    with jax.numpy_rank_promotion("allow"):
        speech.main(["--data", str(write(folder / "data.npz")), *SMALL, "--out", f"{folder}/out"])
    return folder


def test_it_learns_and_evaluates_to_the_same(trained, tmp_path, capsys):
    folder = tmp_path / "out"
    speech.main(["--data", f"{trained}/data.npz", *SMALL, "--seed", "1", "--out", str(folder)])
    figure = capsys.readouterr().out.splitlines()[-1].split(",")[0]
    assert float(figure.removeprefix("test accuracy ").rstrip("%")) > 90
    assert sorted(path.name for path in folder.iterdir()) == ["speech.png", "weights.npz"]
    assert (folder / "speech.png").read_bytes().startswith(b"\x89PNG")
    speech.main(["--data", f"{trained}/data.npz", "--eval", f"{folder}/weights.npz", "--out", f"{tmp_path}/unused"])
    assert capsys.readouterr().out == f"{figure}\n"
    assert not (tmp_path / "unused").exists()


def test_padding_changes_nothing(trained):
    """Neither its values, NaN included, nor its length."""
    data, test = speech.with_differences(*speech.load(trained / "data.npz"))
    network, params = speech.load_weights(trained / "out" / "weights.npz", CLASSES, data)
    logits, spikes = speech.run(network, params, test.x, test.n)
    steps = spikes.shape[0]
    padding = np.arange(FRAMES) >= test.n[:, None]
    assert padding.any()
    rubbish = np.where(padding[..., None], np.nan, test.x)
    assert_same(speech.run(network, params, rubbish, test.n), (logits, spikes))

    longer = np.pad(rubbish, ((0, 0), (0, 5), (0, 0)), constant_values=7)
    more_logits, more_spikes = speech.run(network, params, longer, test.n)
    assert_same(more_spikes[:steps], spikes)
    assert not more_spikes[steps:].any()
    np.testing.assert_allclose(more_logits, logits, rtol=1e-5, atol=1e-5)


def test_channels_are_standardised_over_the_frames_that_are_there():
    arrays = make_data()
    data, test = speech.with_differences(
        *(speech.Utterances(*(arrays[f"{name}_{part}"] for name in "xny")) for part in ("train", "test"))
    )
    frames = [x[:n] for x, n in zip(data.x, data.n, strict=True)]
    values = np.concatenate(frames)[:, :CHANNELS]
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-5)
    for x in frames:
        assert not x[0, CHANNELS:].any()
        np.testing.assert_allclose(x[1:, CHANNELS:], 2 * (x[1:, :CHANNELS] - x[:-1, :CHANNELS]), atol=1e-4)
    # The test utterances are moved and scaled as the others are.
    scale = (arrays["x_train"][0, 0] - arrays["x_train"][1, 0]) / (data.x[0, 0] - data.x[1, 0])[:CHANNELS]
    np.testing.assert_allclose(
        arrays["x_test"][0, 0] - arrays["x_train"][0, 0], scale * (test.x[0, 0] - data.x[0, 0])[:CHANNELS], atol=1e-4
    )


def test_the_seed_tells_the_weights(trained, tmp_path):
    def weights(folder):
        with np.load(folder / "weights.npz") as file:
            return dict(file)

    def run(seed):
        options = ("--data", f"{trained}/data.npz", *SMALL, "--out", f"{tmp_path}/{seed}")
        speech.main([*options, "--seed", str(seed)])
        return weights(tmp_path / str(seed))

    first, again, other = weights(trained / "out"), run(0), run(2)
    assert_same(again, first)
    assert all((other[name] != first[name]).any() for name in first)


def test_the_weights_of_finished_epochs_outlive_an_interrupt(tmp_path, monkeypatch, capsys):
    seen, predict = [], speech.predict

    def interrupted(*arguments):
        if seen:
            raise KeyboardInterrupt
        seen.append(predict(*arguments))
        return seen[0]

    data, out = str(write(tmp_path / "data.npz")), tmp_path / "out"
    monkeypatch.setattr(speech, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speech.main(["--data", data, *SMALL, "--out", str(out)])
    monkeypatch.undo()
    assert [path.name for path in out.iterdir()] == ["weights.npz"]
    capsys.readouterr()
    speech.main(["--data", data, "--eval", str(out / "weights.npz")])
    assert capsys.readouterr().out == f"test accuracy {(seen[0] == make_data()['y_test']).mean():.2%}\n"


GOOD = make_data()
BAD_DATA = {
    "absent": (None, "No such file"),
    "a key is missing": ({"n_test": None}, "no n_test among its keys"),
    "lengths in another shape": ({"n_train": GOOD["n_train"][:-1]}, "expected x [n, F, C], n [n] and y [n], got"),
    "no channels": ({"x_test": GOOD["x_test"][..., 0]}, "expected x [n, F, C]"),
    "nothing to test": ({name: GOOD[name][:0] for name in ("x_test", "n_test", "y_test")}, "expected x [n, F, C]"),
    "lengths of floats": ({"n_train": GOOD["n_train"] * 1.0}, "n and y of integers, got float32, float64, int64"),
    "words": ({"x_train": GOOD["x_train"].astype(str)}, "expected x of numbers"),
    "no frame": ({"n_test": 0 * GOOD["n_test"]}, "expected lengths of 1 to 9 frames, got 0 to 0"),
    "more frames than there are": ({"n_test": 1 + GOOD["n_test"]}, "expected lengths of 1 to 9 frames, got"),
    "NaN": ({"x_train": GOOD["x_train"] * np.float32("nan")}, "expected finite numbers"),
    "a class left out": ({"y_train": 2 * GOOD["y_train"]}, "classes 0 .. K - 1, each with training utterances, got"),
    "an unknown class": ({"y_test": 1 + GOOD["y_test"]}, "expected classes 0 .. K - 1"),
    "other channels": ({"x_test": GOOD["x_test"][..., :2]}, "4 channels to train on, but 2 to test"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_told_in_one_line(case, tmp_path, refused):
    changes, message = BAD_DATA[case]
    path = tmp_path / "absent.npz" if changes is None else write(tmp_path / "data.npz", **changes)
    assert message in refused(speech.main, ["--data", path, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_told_in_one_line(trained, tmp_path, refused):
    with np.load(trained / "out" / "weights.npz") as file:
        right = dict(file)
    path = tmp_path / "weights.npz"

    def told(**arrays):
        np.savez(path, **arrays)
        return refused(speech.main, ["--data", trained / "data.npz", "--eval", path])

    assert "No such file" in refused(speech.main, ["--data", trained / "data.npz", "--eval", path])
    assert "no recurrent_kernel among its keys" in told(**dict(list(right.items())[:4]))
    assert "expected kernel1 float32[8, 12]" in told(**right | {"kernel1": np.zeros((24, 12), np.float32)})
    assert "expected recurrent_kernel float32[12, 12]" in told(**right | {"recurrent_kernel": np.zeros((12, 12))})
    assert "expected bias1 float32[1]" in told(**right | {"bias1": np.zeros(0, np.float32)})


@pytest.mark.parametrize("flag", ["--epochs", "--units", "--seed"])
def test_numbers_have_bounds(flag, refused):
    for text in BAD_NUMBERS:
        assert f"argument {flag}: expected a" in refused(speech.main, [flag, text])


def test_a_folder_to_write_to_is_tried_before_the_work(bad_folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(speech, "train", None)
    options = ["--data", write(tmp_path / "data.npz"), "--out", bad_folder]
    assert f"--out: cannot write to {bad_folder}: " in refused(speech.main, options)


def test_without_sktime_the_line_tells_what_to_do(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "sktime", None)
    monkeypatch.delitem(sys.modules, "sktime.datasets", raising=False)
    message = refused(speech.main, [])
    assert 'pip install ".[speech]"' in message
    assert "--data" in message


@pytest.mark.parametrize(
    "script", sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())
)
def test_a_missing_package_is_told_in_one_line(script):
    code = f"import runpy, sys; sys.modules['jax'] = None; sys.argv = [{script!r}]; runpy.run_path({script!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (1, "", 1), run.stderr
    assert run.stderr.startswith(f"{script}: error: ")
    assert run.stderr.endswith('; install it with pip install ".[examples,speech]"\n')


def test_the_bundled_utterances(monkeypatch):
    pytest.importorskip("sktime")
    monkeypatch.setattr("socket.socket.connect", None)  # distributed with the package
    train, test = speech.load(None)
    assert (train.x.shape, test.x.shape) == ((270, 26, 12), (370, 29, 12))
    assert np.bincount(train.y).tolist() == [30] * 9
    assert np.bincount(test.y).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    for part in (train, test):
        assert part.n.min() == 7
        assert part.n.max() == part.x.shape[1]
        assert not part.x[np.arange(part.x.shape[1]) >= part.n[:, None]].any()
        assert part.x[np.arange(len(part.n)), part.n - 1].all()
    np.testing.assert_allclose(train.x[0, 0, :3], [1.860936, -0.207383, 0.261557], rtol=1e-6)
