"""The potential before the reset, units that never fire, and single points of a sweep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, DT, N_UNITS, assert_same, jit_quickly, make_currents, make_params

import slif

SURROGATES = ("secant", "fast_sigmoid", "sigmoid", "arctan", "triangular", "boxcar", "gaussian", "straight_through")


def run(params, currents, state=None, **options):
    state = slif.init_state(params, BATCH) if state is None else state
    return slif.simulate(params, state, currents, dt=DT, **options)


# --- record="u" ---


@pytest.mark.parametrize("mechanism", ["refractory", "sparsity", "everything", "soft", "voltage"])
def test_u_is_what_is_compared_and_reset(mechanism):
    params, currents = make_params(mechanism, sticky_spikes=False), make_currents()
    _, out = run(params, currents, record=("u", "v", "thr", "s"))
    before = np.concatenate([np.broadcast_to(params.thr, (1, BATCH, N_UNITS)), out["thr"][:-1]])
    fired = np.asarray(out["u"]) > before
    np.testing.assert_array_equal(fired, out["s"])
    spiked = out["u"] - before if params.reset == "subtract" else 0
    np.testing.assert_array_equal(np.where(fired, spiked, out["u"]), out["v"])
    assert (out["u"][fired] > 0).all()


def test_u_of_a_frozen_row_is_its_v():
    params, currents = make_params("sticky"), make_currents()
    valid = np.arange(len(currents))[:, None] < np.array([40, 17, 0])
    _, out = run(params, currents, record=("u", "v"), valid=valid)
    np.testing.assert_array_equal(out["u"][~valid], out["v"][~valid])


def test_u_has_the_gradient_of_the_potential():
    """For one step from rest: du/dj = resist_m / tau_m dt; none under the secant, as for v."""
    currents = jnp.ones((1, BATCH, N_UNITS))
    for surrogate, slope in ((slif.arctan(), 1.5 / 20 * DT), (slif.secant(), 0.0)):
        for mechanism in ("plain", "inhibition"):
            params = make_params(mechanism, surrogate=surrogate)
            gradient = jit_quickly(jax.grad(lambda x, p=params: run(p, x, record=("u",))[1]["u"].sum()))(currents)
            np.testing.assert_allclose(gradient, np.full(currents.shape, slope), rtol=1e-6)


def test_a_loss_on_u_reaches_back_in_time():
    params, currents = make_params("refractory", surrogate=slif.arctan()), jnp.full((6, BATCH, N_UNITS), 0.5)
    gradient = jit_quickly(jax.grad(lambda x: run(params, x, record=("u",))[1]["u"][-1].sum()))(currents)
    decay = 1 - DT / 20
    expected = 1.5 / 20 * DT * decay ** np.arange(5, -1, -1)
    np.testing.assert_allclose(gradient[:, 0, 0], expected, rtol=1e-5)


# --- thr=inf ---


@pytest.mark.parametrize("name", SURROGATES)
def test_a_unit_that_never_fires(name):
    params = make_params(thr=np.inf, surrogate=getattr(slif, name)(), refract_time=1.0, sticky_spikes=True)
    currents = make_currents()

    def loss(params, currents):
        state, out = run(params, currents, record=("s", "v", "surrogate"))
        return out["s"].sum() + (out["v"] ** 2).sum() + state.v.sum(), out

    gradients, out = jit_quickly(jax.grad(loss, (0, 1), has_aux=True))(params, currents)
    assert not np.any(out["s"])
    v, leak = np.zeros((BATCH, N_UNITS)), []
    for j in currents.astype(np.float64):
        v = v + (1.5 * j - v) / 20 * DT
        leak.append(v)
    np.testing.assert_allclose(out["v"], np.stack(leak), rtol=1e-4, atol=1e-5)
    assert np.isfinite(out["surrogate"]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert np.abs(gradients[1]).max() > 0


def test_some_units_that_never_fire():
    thr = np.where(np.arange(N_UNITS) % 2, np.inf, 0.4)
    params = make_params(thr=thr, thr_jitter=0.0)
    _, out = run(params, make_currents())
    assert out["s"][..., ::2].any()
    assert not out["s"][..., 1::2].any()
    with pytest.raises(ValueError, match=r"^thr: expected finite"):
        make_params(thr=-np.inf)
    with pytest.raises(ValueError, match=r"^thr: expected finite"):
        make_params(thr=1e39)  # in float32


# --- points of a sweep ---


def test_a_point_is_the_point():
    params, currents = make_params("refractory"), make_currents()
    over = slif.grid(tau_m=[5.0, 10.0, 20.0], thr=[0.3, 0.6])
    _, out = slif.sweep(params, currents, over=over, dt=DT)
    for k in (0, 3, jnp.argmax(out["s"].mean((1, 2, 3)))):
        assert_same(run(slif.point(params, over, k), currents)[1]["s"], out["s"][k])
    assert_same(slif.point(params, {"dt": [0.1, 0.2], "tau_m": [5.0, 6.0]}, 1), params.replace(tau_m=jnp.float32(6)))
    units = np.linspace(5, 20, 2 * N_UNITS).reshape(2, N_UNITS)
    assert_same(slif.point(params, {"tau_m": units}, 1).tau_m, units[1].astype(np.float32))
    for k, error in ((6, ValueError), (-1, ValueError), (1.0, TypeError), (jnp.arange(2), TypeError)):
        with pytest.raises(error, match=r"^k: expected"):
            slif.point(params, over, k)


def test_what_is_missing_or_given_twice_is_named():
    params, currents = make_params(), make_currents()
    with pytest.raises(ValueError, match=r"^dt: expected .*, got neither"):
        slif.sweep(params, currents, over={"tau_m": [5.0]})
    with pytest.raises(ValueError, match=r"^currents: expected .*, got neither"):
        slif.sweep(params, None, over={"tau_m": [5.0]}, dt=DT)
    with pytest.raises(ValueError, match=r"^dt: expected .*, got both"):
        slif.sweep(params, currents, over={"dt": [5.0]}, dt=DT)
