"""The guide for users of other packages is right: its code makes their spikes and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import ROOT, run_code
from test_checkpoint import make_cell

GUIDE = ROOT / "examples" / "coming_from.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_code(GUIDE, tmp_path_factory.mktemp("guide"), monkeypatch)


def test_every_neuron_fires(names):
    for name in ("snntorch_run", "spikingjelly_run", "norse_box_run", "norse_lif_run", "jaxpike_run"):
        assert 0.01 < names[name](names["x"]).mean() < 0.9


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
    params = names["leaky"].replace(surrogate=ours)
    agree(lambda x: names["snntorch_run"](x, params), names["x"], lambda x: loop(cell, x / 10, cell.reset_mem()))


def test_snntorch_soft_and_recurrent(names):
    snntorch, surrogate = pytest.importorskip("snntorch"), pytest.importorskip("snntorch.surrogate").atan()
    cell = snntorch.Leaky(0.9, 0.5, surrogate, reset_mechanism="subtract", reset_delay=False)
    agree(lambda x: names["snntorch_run"](x, names["soft"]), names["x"], lambda x: loop(cell, x / 10, cell.reset_mem()))

    kind = {"all_to_all": False, "V": -0.3, "reset_mechanism": "zero", "reset_delay": False}
    cell = snntorch.RLeaky(0.9, threshold=0.5, spike_grad=surrogate, **kind)

    def theirs(x):
        torch, out = pytest.importorskip("torch"), []
        s, mem = cell.init_rleaky()
        for j in x:
            s, mem = cell(j / 10, s, mem)
            out.append(s)
        return torch.stack(out)

    agree(lambda x: names["snntorch_recurrent"](x, -0.3), names["x"], theirs)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("surrogate", ["Sigmoid", "ATan"])
def test_spikingjelly(names, surrogate, detach_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    make = getattr(pytest.importorskip("spikingjelly.activation_based.surrogate"), surrogate)
    cell = neuron.LIFNode(10.0, v_threshold=0.5, surrogate_function=make(), detach_reset=detach_reset, step_mode="m")
    slope = {"Sigmoid": names["slif"].sigmoid(4.0), "ATan": names["slif"].arctan()}[surrogate]
    params = names["node"].replace(surrogate=slope.replace(detach_reset=detach_reset))
    agree(lambda x: names["spikingjelly_run"](x, params), names["x"], cell)


@pytest.mark.parametrize("detach_reset", [False, True])
def test_spikingjelly_soft(names, detach_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    sigmoid = pytest.importorskip("spikingjelly.activation_based.surrogate").Sigmoid()
    options = {"v_threshold": 0.5, "v_reset": None, "decay_input": False, "detach_reset": detach_reset}
    cell = neuron.LIFNode(10.0, surrogate_function=sigmoid, step_mode="m", **options)
    params = names["spikingjelly_soft"].replace(surrogate=names["slif"].sigmoid(4.0, detach_reset=detach_reset))
    agree(lambda x: names["spikingjelly_run"](x, params), names["x"] / 10, cell)


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


def test_spyx(names):
    nn, axn, nnx = pytest.importorskip("spyx.nn"), pytest.importorskip("spyx.axn"), pytest.importorskip("flax.nnx")
    x, ours = names["x"], names["spyx_run"](names["x"])
    theirs, _ = nn.run(nn.LIF((names["N"],), 0.9, 0.5, rngs=nnx.Rngs(0)), x / 10)
    assert theirs.any((0,)).all()
    np.testing.assert_array_equal(ours["first_spike_time"] + 1, (theirs > 0).argmax(0))
    assert (np.asarray(ours["s"][:-1]) != theirs[1:]).any()  # from then on the resets differ

    slif, at = names["slif"], jnp.linspace(-1.05, 1.05, 36)  # not on an edge
    for fn, expected in {
        axn.superspike(9.0): slif.fast_sigmoid(9.0)(at),
        axn.triangular(2.0): slif.triangular(0.5)(at),
        axn.arctan(3.0): slif.arctan(6.0)(at) / (3 * np.pi),
        axn.tanh(3.0): slif.sigmoid(6.0)(at) * 2 / 3,
        axn.boxcar(1.0, 0.3): slif.boxcar(0.5)(at) * 0.3,
    }.items():
        np.testing.assert_allclose(jax.vmap(jax.grad(fn))(at), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("reset", "surrogate"), [("zero", "FastSigmoid"), ("zero", "ATan"), ("subtract", "ATan")])
def test_jaxpike(names, reset, surrogate):
    jaxpike, slif, x = pytest.importorskip("jaxpike"), names["slif"], names["x"]
    lif = jaxpike.LIF(10.0, threshold=0.5, reset=reset, surrogate=getattr(jaxpike, surrogate)())
    ours = {"FastSigmoid": slif.fast_sigmoid, "ATan": slif.arctan}[surrogate]
    params = names[{"zero": "pike", "subtract": "jaxpike_soft"}[reset]].replace(surrogate=ours(detach_reset=False))
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    spikes, vjp = jax.vjp(lambda x: names["jaxpike_run"](x, params), x)
    expected, expected_vjp = jax.vjp(lambda x: jaxpike.unroll(lif, x)[0], x)
    assert 0.01 < spikes.mean() < 0.9
    np.testing.assert_array_equal(spikes, expected)
    np.testing.assert_allclose(vjp(cotangent)[0], expected_vjp(cotangent)[0], rtol=1e-4, atol=1e-5)


def test_slopes_of_jaxpike(names):
    jaxpike, slif = pytest.importorskip("jaxpike"), names["slif"]
    at, width = jnp.linspace(-1.05, 1.05, 36), 0.5  # not on an edge
    for theirs, expected in (
        (jaxpike.Triangular(width), slif.triangular(width)(at) / width),
        (jaxpike.Boxcar(width), slif.boxcar(width / 2)(at) / width),
    ):
        np.testing.assert_allclose(jax.vmap(jax.grad(theirs))(at), expected, rtol=1e-4, atol=1e-6)
