"""The example that trains a Flax model, run in this process on a small setting."""

import argparse
import importlib
from pathlib import Path

import numpy as np
import pytest
from conftest import BAD_NUMBERS

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    return importlib.import_module("train_flax")


@pytest.mark.parametrize(("framework", "surrogate"), [("linen", "secant"), ("nnx", "arctan")])
def test_it_learns(example, tmp_path, capsys, framework, surrogate):
    options = ["--framework", framework, "--surrogate", surrogate, "--out", str(tmp_path / "out")]
    example.main([*options, "--epochs", "20"])
    figures = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert float(figures["test accuracy"].strip().rstrip("%")) > 93
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["learning_curve.png", "weights.npz"]
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")

    for other in ("linen", "nnx"):
        example.main(["--eval", str(out / "weights.npz"), "--framework", other, "--out", str(tmp_path / "unused")])
        assert capsys.readouterr().out == f"test accuracy  {figures['test accuracy']}\n"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent.npz"], "absent.npz"),
        (["--data", "wrong.npz"], "no x_test, x_train, y_test, y_train"),
        (["--surrogate", "linear"], "linear"),
        (["--framework", "keras"], "keras"),
        (["--lr", "0"], "--lr: expected a number"),
        (["--batch-size", "2000"], "--batch-size 2000 is more than the 1438 training images"),
    ],
)
def test_bad_input_is_told_in_one_line(example, tmp_path, monkeypatch, refused, options, message):
    monkeypatch.chdir(tmp_path)
    np.savez("wrong.npz", images=np.zeros(3))
    assert message in refused(example.main, [*options, "--out", "out"])
    assert not Path("out").exists()


@pytest.mark.parametrize("flag", ["--epochs", "--hidden", "--batch-size", "--lr", "--seed"])
def test_numbers_have_bounds(example, flag, refused):
    for text in BAD_NUMBERS:
        assert f"argument {flag}: expected a" in refused(example.main, [flag, text])


def test_files_that_are_not_its_weights(example, tmp_path, refused):
    shapes = {"bias1": (7,), "kernel1": (64, 7), "bias2": (10,), "kernel2": (7, 10), "thr1": (7,), "thr2": (10,)}
    right = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    path = tmp_path / "weights.npz"

    def told(**arrays):
        np.savez(path, **arrays)
        return refused(example.main, ["--eval", path])

    assert "No such file" in refused(example.main, ["--eval", path])
    assert "no thr1, thr2 among its keys" in told(**dict(list(right.items())[:4]))
    assert "expected kernel1 float32[64, 7]" in told(**right | {"kernel1": np.zeros((784, 7), np.float32)})
    assert "expected bias1 float32[1]" in told(**right | {"bias1": np.zeros(0, np.float32)})
    assert "expected thr2 float32[10]" in told(**right | {"thr2": np.zeros(10)})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "not an .npz" in refused(example.main, ["--eval", path])


def test_a_folder_to_write_to_is_tried_before_the_work(example, bad_folder, monkeypatch, refused):
    monkeypatch.setattr(example, "train", None)
    assert f"--out: cannot write to {bad_folder}: " in refused(example.main, ["--out", bad_folder])


def test_the_weights_of_finished_epochs_outlive_an_interrupt(example, tmp_path, monkeypatch, capsys):
    save = example.save_weights

    def interrupted(path, params):
        if path.exists():
            raise KeyboardInterrupt
        save(path, params)

    monkeypatch.setattr(example, "save_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        example.main(["--epochs", "3", "--hidden", "8", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]
    example.main(["--eval", str(tmp_path / "weights.npz")])
    assert capsys.readouterr().out.startswith("test accuracy")


def test_the_curves_of_a_single_epoch_are_labelled_so(example, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda figure: None)
    args = argparse.Namespace(hidden=8, surrogate="secant")
    with open(tmp_path / "file", "wb") as file:
        example.plot(args, [{"epoch": 1, "loss": 1.9, "train": 0.4, "test": 0.5}], file)
    figure = plt.gcf()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [x for x in axes.get_xticks() if low <= x <= high] == [1]
        assert len(axes.get_yticks()) > 2
    monkeypatch.undo()
    plt.close(figure)
