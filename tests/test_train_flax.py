"""The example that trains a Flax model, run in this process on a small setting."""

import importlib
from pathlib import Path

import numpy as np
import pytest

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
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["learning_curve.png"]
    assert (tmp_path / "out" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent.npz"], "absent.npz"),
        (["--data", "wrong.npz"], "no x_test, x_train, y_test, y_train"),
        (["--surrogate", "linear"], "linear"),
        (["--framework", "keras"], "keras"),
        (["--epochs", "0"], "positive int"),
        (["--lr", "nan"], "positive float"),
        (["--batch-size", "2000"], "--batch-size 2000 is more than the 1438 training images"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_bad_input_is_told_in_one_line(example, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    np.savez("wrong.npz", images=np.zeros(3))
    with pytest.raises(SystemExit) as exit_:
        example.main([*options, "--out", "out"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_out_that_cannot_be_made(example, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        example.main(["--out", str(tmp_path / "file")])
    assert exit_.value.code == 2
    assert "file" in capsys.readouterr().err
