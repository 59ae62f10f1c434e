"""Which thresholds a step compares with: those of params if nothing adapts them, else those of the state."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, DT, N_UNITS, assert_same, jit_quickly, make_currents, make_params
from flax import nnx

import slif
import slif.linen
import slif.nnx
from slif.request import Request

CELL = {"tau_m": 20.0, "resist_m": 1.5, "thr": 0.4, "thr_jitter": 0.0, "surrogate": slif.arctan(), "dt": DT}
OTHER = np.linspace(0.1, 2.0, N_UNITS).astype(np.float32)


def scanned(params, state, currents):
    """The loop that a user writes around `step`."""

    def body(state, j):
        state = slif.step(params, state, j, 0.0, DT)
        return state, state.s

    return jax.lax.scan(body, state, currents)


def simulated(params, state, currents):
    final, out = slif.simulate(params, state, currents, dt=DT)
    return final.replace(tols=jnp.zeros_like(final.tols)), out["s"]


@pytest.mark.parametrize("run", [scanned, simulated])
@pytest.mark.parametrize("thr", [OTHER, np.stack([OTHER, 2 * OTHER, 3 * OTHER])], ids=["[N]", "[B, N]"])
def test_new_thresholds_of_params_act_on_any_state(run, thr):
    params, currents = make_params("refractory"), jnp.asarray(make_currents())
    new = params.replace(thr=jnp.asarray(thr))
    middle, _ = run(params, slif.init_state(params, BATCH), currents[:9])
    put_in = middle.replace(thr=jnp.broadcast_to(new.thr, middle.thr.shape))
    expected = run(new, put_in, currents[9:])
    assert_same(run(new, middle, currents[9:]), expected)
    assert_same(expected[0].thr, put_in.thr)
    assert (expected[1] != run(params, middle, currents[9:])[1]).any()


@pytest.mark.parametrize("mechanism", ["gain", "leak", "sparsity"])
def test_thresholds_that_adapt_are_those_of_the_state(mechanism):
    params, currents = make_params(mechanism), make_currents()
    state, _ = slif.simulate(params, slif.init_state(params, BATCH), currents[:9], dt=DT)
    new = params.replace(thr=jnp.asarray(OTHER))
    assert_same(slif.step(new, state, currents[9], 0, DT), slif.step(params, state, currents[9], 0, DT))


def test_an_adaptation_of_nothing_leaves_the_state_its_thresholds():
    params, currents = make_params(thr_gain=np.float32(0)), make_currents()
    state = slif.init_state(params, BATCH).replace(thr=jnp.broadcast_to(OTHER, (BATCH, N_UNITS)))
    plain = make_params().replace(thr=jnp.asarray(OTHER))
    assert_same(slif.simulate(params, state, currents, dt=DT), slif.simulate(plain, state, currents, dt=DT))


def test_learned_thresholds_have_a_gradient_wherever_the_state_was_made():
    params, currents = make_params("refractory", surrogate=slif.arctan(), thr_jitter=0.0), make_currents()
    rest = slif.init_state(params, BATCH)

    def loss(thr, inside):
        new = params.replace(thr=thr)
        state = slif.init_state(new, BATCH) if inside else rest
        return (slif.simulate(new, state, currents, dt=DT)[1]["s"] ** 2).sum()

    inside, outside = jit_quickly(lambda thr: [jax.grad(loss)(thr, where) for where in (True, False)])(params.thr)
    np.testing.assert_allclose(outside, inside, rtol=1e-6)
    assert (np.abs(outside) > 1e-3).all()


def test_learned_thresholds_act_in_every_window_of_a_layer():
    x = jnp.asarray(make_currents())
    layer = slif.linen.SLIF(N_UNITS, learn=("thr",), **CELL)
    cell = nn.RNN(slif.linen.SLIFCell(N_UNITS, learn=("thr",), **CELL), time_major=True, return_carry=True)
    variables = {"params": {"learned_thr": jnp.asarray(OTHER)}}
    module = slif.nnx.SLIF(N_UNITS, learn=("thr",), **CELL, rngs=nnx.Rngs(0))
    start = slif.init_state(
        slif.init_params(jax.random.key(0), N_UNITS, **{k: v for k, v in CELL.items() if k != "dt"}), BATCH
    )
    module.learned_thr[...] = jnp.asarray(OTHER)
    by_layer = layer.apply(variables, x, initial_state=start)
    assert_same(module(x, initial_state=start), by_layer)
    carry = start, jnp.zeros(BATCH, jnp.int32)
    assert_same(cell.apply({"params": {"cell": variables["params"]}}, x, initial_carry=carry)[1], by_layer)
    assert_same(by_layer, layer.apply(variables, x))


def test_swept_thresholds_act_on_a_given_state():
    params, currents = make_params("refractory"), make_currents()
    state, _ = slif.simulate(params, slif.init_state(params, BATCH), currents[:9], dt=DT)
    thr = np.array([0.2, 0.5, 0.9], np.float32)
    _, out = slif.sweep(params, currents, over={"thr": thr}, dt=DT, state=state)
    for k, value in enumerate(thr):
        own = params.replace(thr=jnp.full(N_UNITS, value))
        assert_same(out["s"][k], slif.simulate(own, state, currents, dt=DT)[1]["s"])
    assert out["s"][0].sum() > out["s"][2].sum()


def test_a_sweep_over_periods_starts_from_rest():
    """A given state at rest has the clock of its own period, with which units are refractory under a longer one."""
    params = make_params("plain", n_units=1, thr_jitter=0.0)
    over, currents = {"refract_time": np.array([1.0, 4.0, 9.0])}, np.full((12, 1), 1e3, np.float32)
    first = [
        slif.sweep(params, currents, over=over, dt=1.0, state=state, record=("first_spike_time",))[1][
            "first_spike_time"
        ]
        for state in (None, slif.init_state(params))
    ]
    np.testing.assert_array_equal(np.ravel(first[0]), [0, 0, 0])
    np.testing.assert_array_equal(np.ravel(first[1]), [1, 4, 9])


def test_a_frozen_row_holds_the_thresholds_that_it_was_given():
    params, currents = make_params("refractory"), make_currents()
    start = slif.init_state(params, BATCH).replace(thr=jnp.full((BATCH, N_UNITS), 7.0))
    begins = np.array([0, 5, len(currents)])
    valid = np.arange(len(currents))[:, None] >= begins
    final, out = slif.simulate(params, start, currents, dt=DT, record=("thr",), valid=valid)
    expected = np.where(valid[..., None], np.asarray(params.thr), np.float32(7))
    np.testing.assert_array_equal(out["thr"], expected)
    np.testing.assert_array_equal(final.thr, expected[-1])
    assert_same(slif.simulate(params, start, currents[:0], dt=DT)[0], start)


def test_thresholds_that_fit_no_batch_are_refused():
    params = make_params().replace(thr=jnp.ones((2, N_UNITS)))
    state = slif.init_state(params, 2)
    with pytest.raises(
        ValueError, match=r"^thr: expected a shape that broadcasts to state.v \(11,\), got shape \(2, 11\)"
    ):
        slif.step(params, jax.tree.map(lambda x: x[0], state), np.ones(N_UNITS, np.float32), 0, DT)


@pytest.mark.parametrize("surrogate", [slif.secant(), slif.arctan(), slif.triangular()], ids=lambda s: s.wrt)
def test_an_endless_threshold_stays_endless_under_every_rule(surrogate):
    thr = np.where(np.arange(N_UNITS) % 2, np.inf, 0.4)
    currents = jnp.asarray(make_currents((12, BATCH, N_UNITS)))

    @functools.partial(jit_quickly, static_argnums=2)
    def gradients_of(numbers, currents, mechanism):
        return jax.grad(run, (0, 1), has_aux=True)(numbers, currents, mechanism)

    def run(numbers, currents, mechanism):
        params = make_params(thr=thr, thr_jitter=0.0, resist_inh=0.3, surrogate=surrogate)
        params = params.replace(**{name: numbers[name] for name in mechanism})
        final, out = slif.simulate(params, slif.init_state(params, BATCH), currents, dt=DT, record=("s", "v"))
        return (out["s"] ** 2).sum() + (out["v"] ** 2).sum() + final.thr[:, ::2].sum(), (final, out["s"])

    numbers = {"thr_gain": jnp.float32(0.1), "thr_leak": jnp.float32(0.05), "rho_b": jnp.float32(0.01)}
    for mechanism in (("thr_gain", "thr_leak"), ("rho_b", "thr_leak")):
        gradients, (final, s) = jax.tree.map(np.asarray, gradients_of(numbers, currents, mechanism))
        assert (final.thr[:, 1::2] == np.inf).all()
        assert np.isfinite(final.thr[:, ::2]).all()
        assert s[..., ::2].any()
        assert not s[..., 1::2].any()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        assert np.abs(gradients[1]).max() > 0


def test_counts_go_on_beyond_what_float32_can_count():
    request = Request(dt=jnp.float32(1), t0=jnp.float32(0), record=("spike_count",))
    summaries = request.start_summaries(lambda value, dtype: jnp.full(3, value, dtype))
    summaries["spike_count"] += 2**24
    for _ in range(3):
        summaries = request.summarise(summaries, jnp.array([1.0, 0.0, 1.0]), 0.0)
    np.testing.assert_array_equal(
        request.finish_summaries(summaries)["spike_count"], np.float32([2**24 + 3, 2**24, 2**24 + 3])
    )
    assert np.float32(2**24 + 3) > 2**24


@pytest.mark.parametrize("name", ["arctan", "fast_sigmoid", "sigmoid", "triangular", "gaussian"])
def test_an_endless_threshold_leaves_other_units_their_second_derivatives(name):
    surrogate = getattr(slif, name)(jnp.float32(2))
    params = make_params(n_units=3, tau_m=4.0, resist_m=1.0, thr=np.array([0.4, 0.5, np.inf]), surrogate=surrogate)
    others = params.replace(thr=params.thr[:2])
    x = make_currents((4, BATCH, 3))

    def norm(params, x):
        gradient = jax.grad(lambda x: slif.simulate(params, None, x, dt=1.0)[1]["s"].sum())(x)
        return jnp.square(gradient).sum()

    of_all, of_others = (
        jit_quickly(jax.grad(norm))(p, x[..., : p.n_units]).surrogate.numbers for p in (params, others)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), of_all, of_others)
    assert all(map(np.any, of_all.values()))


def test_thresholds_that_frozen_rows_hold_have_no_gradient_by_the_current():
    params, valid = make_params(n_units=3), np.ones((4, BATCH), bool)
    valid[:, 0] = False

    def loss(params, thr):
        state = slif.init_state(params, BATCH).replace(thr=thr)
        final, out = slif.simulate(params, state, make_currents((4, BATCH, 3)), dt=1.0, valid=valid, record=("thr",))
        return final.thr.sum() + out["thr"].sum()

    of_params, of_state = jit_quickly(jax.grad(loss, argnums=(0, 1)))(params, jnp.full((BATCH, 3), 0.5))
    assert not np.any(of_params.thr)
    assert not np.any(of_state)
