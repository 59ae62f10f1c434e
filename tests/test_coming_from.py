"""The guide from other packages says the truth: its code makes the spikes and gradients that they make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import ROOT, run_code
from test_checkpoint import make_cell

GUIDE = ROOT / "examples" / "coming_from.md"


@pytest.fixture
def names(tmp_path, monkeypatch):
    return run_code(GUIDE, tmp_path, monkeypatch)


def agree(run, x, theirs):
    torch = pytest.importorskip("torch")
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    spikes, vjp = jax.vjp(run, x)
    constant = torch.from_numpy(np.array(x)).requires_grad_()
    expected = theirs(constant)
    expected.backward(torch.from_numpy(cotangent))
    assert 0.01 < spikes.mean() < 0.9
    np.testing.assert_array_equal(spikes, expected.detach().numpy())
    gradient = constant.grad.numpy()
    np.testing.assert_allclose(vjp(jnp.asarray(cotangent))[0], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


def loop(cell, x, state):
    torch, out = pytest.importorskip("torch"), []
    for j in x:
        s, state = cell(j, state)
        out.append(s)
    return torch.stack(out)


@pytest.mark.usefixtures("ngclearn")
def test_ngclearn(names):
    arguments = {"refract_time": 1.0, "thr_gain": 0.02}
    cell, advance = make_cell("guide", batch_size=names["B"], n_units=names["N"], seed=7, **arguments)
    for k, j in enumerate(4 * names["x"]):
        cell.j.set(j)
        advance.run(t=k * 0.25, dt=0.25)
        np.testing.assert_array_equal(cell.s.get(), names["ngclearn_spikes"][k])


@pytest.mark.parametrize("surrogate", ["atan", "fast_sigmoid", "sigmoid"])
def test_snntorch(names, surrogate):
    snntorch = pytest.importorskip("snntorch")
    make = getattr(pytest.importorskip("snntorch.surrogate"), surrogate)
    cell = snntorch.Leaky(0.9, 0.5, make(), reset_mechanism="zero", reset_delay=False)
    ours = getattr(names["slif"], surrogate.replace("atan", "arctan"))(detach_reset=False)
    names["leaky"] = names["leaky"].replace(surrogate=ours)
    agree(names["snntorch_run"], names["x"], lambda x: loop(cell, x / 10, cell.reset_mem()))


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("surrogate", ["Sigmoid", "ATan"])
def test_spikingjelly(names, surrogate, detach_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    make = getattr(pytest.importorskip("spikingjelly.activation_based.surrogate"), surrogate)
    cell = neuron.LIFNode(10.0, v_threshold=0.5, surrogate_function=make(), detach_reset=detach_reset, step_mode="m")
    slope = {"Sigmoid": names["slif"].sigmoid(4.0), "ATan": names["slif"].arctan()}[surrogate]
    names["node"] = names["node"].replace(surrogate=slope.replace(detach_reset=detach_reset))
    agree(names["spikingjelly_run"], names["x"], cell)


@pytest.mark.parametrize("alpha", [1.0, 100.0])
def test_norse_box(names, alpha):
    norse, torch = pytest.importorskip("norse.torch"), pytest.importorskip("torch")
    numbers = {"tau_mem_inv": 100.0, "v_th": 0.5, "alpha": alpha}
    cell = norse.LIFBoxCell(norse.LIFBoxParameters(**{name: torch.tensor(x) for name, x in numbers.items()}), dt=1e-3)
    agree(names["norse_box_run"], names["x"], lambda x: loop(cell, x, None))


def test_norse_lif(names):
    norse, torch = pytest.importorskip("norse.torch"), pytest.importorskip("torch")
    numbers = {"tau_mem_inv": 100.0, "tau_syn_inv": 200.0, "v_th": 0.5}
    layer = norse.LIF(norse.LIFParameters(**{name: torch.tensor(x) for name, x in numbers.items()}))
    agree(names["norse_lif_run"], names["x"], lambda x: layer(x)[0])
