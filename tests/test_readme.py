"""The code of README and the guides runs unchanged, each section by itself, and prints what README shows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from conftest import assert_same
from pages import ROOT, recipes, run_blocks, run_code

import slif

GUIDES = ROOT / "examples" / "guides.md"


def test_readme(tmp_path, monkeypatch, capsys):
    page = ROOT / "README.md"
    names = run_code(page, tmp_path, monkeypatch)
    shown = re.search(r"print\(.* Hz.*  # (.*)\n", page.read_text())[1]
    assert capsys.readouterr().out == f"{names['accuracy']!s}\n{shown}\n"
    assert names["gradient"].shape == names["out"]["v"].shape == (400, 8, 100)
    assert names["gradient"].any()
    assert names["accuracy"] > 0.95


def test_training(tmp_path, monkeypatch):
    names = run_code(ROOT / "examples" / "training.md", tmp_path, monkeypatch)
    assert len(names["losses"]) == 2
    assert max(names["losses"]) < jnp.log(10)  # both recipes learn beyond chance


def test_guides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks, names = recipes(GUIDES), {}
    head = run_blocks(blocks.pop(None), GUIDES)
    for section in blocks.values():  # each by itself
        names |= {k: x for k, x in run_blocks(section, GUIDES, dict(head)).items() if head.get(k) is not x}
    names = head | names
    params, currents, dt = names["params"], names["currents"], names["dt"]

    def simulate(params, currents, state=None, **arguments):
        state = slif.init_state(params, 8) if state is None else state
        return slif.simulate(params, state, currents, dt=dt, **arguments)

    whole, out = simulate(params, currents)
    assert_same(names["end"], whole)
    assert_same(np.concatenate([names["first"]["s"], names["second"]["s"]]), out["s"])
    assert_same(names["sharded_spikes"], out["s"])
    assert names["counts"].shape == (32, 8, 32)
    mean = [simulate(params.replace(tau_m=jnp.float32(tau_m)), currents)[1]["s"].sum(0).mean() for tau_m in (5, 20)]
    assert mean[0] > mean[1]
    assert names["slopes"].shape == (2,)
    assert np.sign(names["slopes"]).tolist() == np.sign([20 - m for m in mean]).tolist()

    # Truncated: the sum over windows of the gradients of each, from the state that the previous ones left.
    expected, state = 0, None
    for x in np.split(currents, 4):

        def cost(weight, x=x, state=state):
            after, out = simulate(params, x @ weight, state)
            return jnp.square(out["s"].mean(0) - 0.1).sum(), after

        gradient, state = jax.grad(cost, has_aux=True)(names["weight"])
        expected = expected + gradient
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(names["gradient"], expected, rtol=1e-3, atol=1e-4)
    assert_same(names["last"], simulate(params, currents @ names["weight"])[0])  # the clock included

    np.testing.assert_array_equal(names["rates"][3], 0)
    np.testing.assert_allclose(names["rates"][0], 10 * simulate(params, currents)[1]["s"][:, 0].sum(0), rtol=1e-6)
    assert_same(names["streamed"], simulate(params, currents[:50])[0])
    np.testing.assert_array_equal(slif.unpack_spikes(names["packed"]["s_packed"], 32), names["raster"]["s"])
    assert names["gradient_of_half"].dtype == jnp.bfloat16
    assert np.abs(names["gradient_of_half"].astype(np.float32)).max() > 0
    rates = [1000 / dt * simulate(slif.point(params, names["over"], k), currents)[1]["s"].mean() for k in range(12)]
    np.testing.assert_allclose(names["hertz"], rates, rtol=1e-5)
    assert_same(names["tuned"], slif.point(params, names["over"], int(np.abs(np.array(rates) - 50).argmin())))
    assert_same(names["restored"], names["tree"])
    np.testing.assert_array_equal(names["exported_spikes"], simulate(params, currents)[1]["s"][:300, :5])
    np.testing.assert_array_equal(names["same"], names["net"].apply(names["variables"], currents))
    assert 0.01 < names["same"].mean() < 0.9
    np.testing.assert_array_equal(names["last_spike"], simulate(params, currents)[0].tols)
    for picture in ("raster", "traces", "surrogates"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
