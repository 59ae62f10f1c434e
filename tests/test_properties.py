"""What holds for any input: splits, rows, masks, dtypes, buffers, compilations, records."""

import dataclasses
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BATCH,
    DT,
    FIELDS,
    MECHANISMS,
    N_STEPS,
    N_UNITS,
    RECORDS,
    assert_agree,
    assert_same,
    enable_x64,
    make_currents,
    make_params,
    make_state,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
from slif.hyperparameters import STATIC

# Few examples, with one shape and one record: each further shape or record is a compilation.
few = settings(max_examples=6, derandomize=True, deadline=None, database=None)
# test_golden.py compares every mechanism alone with the reference; here they are combined.
FEW = ("plain", "everything", "sparse_everything", "soft", "voltage")
few_mechanisms = pytest.mark.parametrize("mechanism", FEW)


def bell(x):
    return jnp.exp(-x * x)


SURROGATES = {
    "secant": slif.secant(squared=True, scaled=True),
    "fast_sigmoid": slif.fast_sigmoid(),
    "sigmoid": slif.sigmoid(),
    "arctan": slif.arctan(),
    "triangular": slif.triangular(),
    "boxcar": slif.boxcar(),
    "gaussian": slif.gaussian(),
    "straight_through": slif.straight_through(),
    "custom": slif.custom(bell),
}


def run(params, currents, state=None, dt=DT, record=("s",), **arguments):
    state = slif.init_state(params, currents.shape[1:-1]) if state is None else state
    # On the host, where slicing and comparing compile nothing.
    return jax.device_get(slif.simulate(params, state, currents, dt=dt, record=record, **arguments))


@functools.partial(jax.jit, static_argnames="record")
def simulate_each(params, states, currents, t0, valid, record=RECORDS):
    return {
        name: slif.simulate(params[name], states[name], currents, dt=DT, t0=t0, valid=valid, record=record)
        for name in params
    }


@jax.jit
def step_each(params, states, j, t):
    return {name: slif.step(params[name], states[name], j, t, DT) for name in params}


def run_each(params, currents, states=None, t0=0.0, valid=None, record=RECORDS):
    """`run` for several params by name, as one program, which XLA compiles in half the time."""
    states = states_of(params, currents.shape[1:-1]) if states is None else states
    return jax.device_get(simulate_each(params, states, currents, t0, valid, record))


def run_each_by_steps(params, currents, states=None, t0=0.0, valid=None):
    """What `simulate` should do, one `step` at a time: the final state and every record, of several params by name."""
    states = states_of(params, currents.shape[1:-1]) if states is None else states
    valid = np.ones(currents.shape[:-1], bool) if valid is None else valid
    states, trace = jax.device_get(states), []
    for k, j in enumerate(currents):
        new = jax.device_get(step_each(params, states, j, t0 + k * DT))
        states = jax.tree.map(lambda n, o, live=valid[k, ..., None]: np.where(live, n, o), new, states)
        trace.append(states)

    def records(name):
        out = {field: np.stack([getattr(states[name], field) for states in trace]) for field in FIELDS}
        out["s"] = np.where(valid[..., None], out["s"], 0)
        times = (t0 + DT * np.arange(len(currents))).reshape(-1, *(1,) * (currents.ndim - 1))
        return out | {
            "s_packed": np.packbits(out["s"].astype(bool), axis=-1, bitorder="little"),
            "spike_count": out["s"].sum(0),
            "first_spike_time": np.where(out["s"] > 0, times, np.inf).min(0),
        }

    return {name: (states[name], records(name)) for name in params}


def params_of(mechanisms):
    return {mechanism: make_params(mechanism) for mechanism in mechanisms}


def states_of(params, batch_shape=(BATCH,)):
    return {name: slif.init_state(p, batch_shape) for name, p in params.items()}


# --- simulate is a loop of step ---


def test_simulate_is_a_loop_of_step():
    params, currents = params_of(FEW), make_currents()
    runs, expected = run_each(params, currents, t0=2.0), run_each_by_steps(params, currents, t0=2.0)
    for mechanism, (state, out) in runs.items():
        assert 0.02 < out["s"].mean() < 0.98
        assert_agree(vars(state), vars(expected[mechanism][0]), mechanism)
        assert_agree(out, expected[mechanism][1], mechanism)


def test_a_record_alone_is_the_same():
    """The records decide what the loop carries, and must not change anything else."""
    params, currents = make_params("sticky", thr_gain=0.05), make_currents()
    padded = np.arange(N_STEPS)[:, None] < np.array((N_STEPS, 17, 0))
    masks = {"": np.ones_like(padded), "padded": padded}
    chosen = dict(zip(RECORDS, [*masks] * 5, strict=True))
    expected = {name: run_each_by_steps({"": params}, currents, valid=valid)[""] for name, valid in masks.items()}

    @jax.jit
    def alone(params, currents):
        def simulate(record, valid):
            return slif.simulate(params, None, currents, dt=DT, valid=padded if valid else None, record=record)

        states = {valid: simulate((), valid)[0] for valid in masks}
        return states, {name: simulate((name,), valid)[1] for name, valid in chosen.items()}

    states, outs = alone(params, currents)
    for valid, state in states.items():
        assert_agree(vars(state), vars(expected[valid][0]), valid)
    for name, valid in chosen.items():
        assert_agree(outs[name], {name: expected[valid][1][name]}, valid)


def test_spike_dtype():
    params, currents, dtypes = make_params("sticky"), make_currents(), ("bool", "uint8", "int32", "bfloat16", "float16")

    @jax.jit
    def in_each(params, currents):
        options = {"dt": DT, "record": ("s", "v")}
        return [slif.simulate(params, None, currents, spike_dtype=dtype, **options)[1] for dtype in (None, *dtypes)]

    expected, *others = in_each(params, currents)
    assert expected["s"].any()
    for dtype, out in zip(dtypes, others, strict=True):
        assert out["s"].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(out["s"], np.float32), expected["s"])
        assert_same(out["v"], expected["v"])


@pytest.mark.parametrize("n_units", [1, 7, 8, 9, 64])
def test_packing(n_units):
    s = np.random.default_rng(0).random((5, 2, n_units)) < 0.4
    packed = slif.pack_spikes(s.astype(np.float32))
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, np.packbits(s, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(slif.unpack_spikes(packed, n_units), s)
    assert_same(jax.jit(slif.pack_spikes)(s), packed)


def test_a_sticky_spike_carried_in_counts():
    params = make_params("sticky")
    state = make_state(params)
    silence = np.zeros((2, BATCH, N_UNITS), np.float32)
    out = run(params, silence, state, t0=10.0, record=("s", "spike_count", "first_spike_time"))[1]
    assert out["s"][0].any()
    np.testing.assert_array_equal(out["spike_count"], out["s"].sum(0))
    np.testing.assert_array_equal(out["first_spike_time"], np.where(out["s"][0] > 0, 10, np.inf))


def test_constants_round_like_arguments():
    """Params closed over by a compiled function, as most training steps have them."""
    numbers = {"tau_m": 17.3, "resist_m": 1.37, "refract_time": 1.0, "thr_gain": 0.013, "thr_leak": 0.0017}
    arrays = {name: np.float32(number) for name, number in numbers.items()}
    thr, currents = np.full(64, 0.4, np.float32), make_currents((300, 16, 64))

    def simulate(params, currents, dt):
        return slif.simulate(params, None, currents, dt=dt, record=("s", "v", "thr", "rfr"))[1]

    expected = jax.jit(simulate)(slif.SLIFParams(thr=thr, **arrays), currents, np.float32(0.3))
    closed = jax.jit(lambda currents: simulate(slif.SLIFParams(thr=thr, **numbers), currents, 0.3))(currents)
    assert_same(closed, expected)


# --- shapes ---


@pytest.mark.parametrize("shape", [(0, BATCH, 4), (1, BATCH, 4), (5, 4), (5, 2, 3, 4), (5, 0, 4)])
@few_mechanisms
def test_shapes(mechanism, shape):
    params = jax.eval_shape(lambda: make_params(mechanism, n_units=4))
    before = jax.eval_shape(lambda params: slif.init_state(params, shape[1:-1]), params)
    currents = jax.ShapeDtypeStruct(shape, jnp.float32)
    state, out = jax.eval_shape(lambda *x: slif.simulate(*x, dt=DT, record=RECORDS), params, before, currents)
    assert all(leaf.shape == shape[1:] for leaf in jax.tree.leaves(state))
    assert {name: out[name].shape for name in FIELDS} == dict.fromkeys(FIELDS, shape)
    assert out["s_packed"].shape == (*shape[:-1], 1)


def test_an_empty_sequence_leaves_the_state():
    params = make_params("everything")
    before = make_state(params)
    state, out = run(params, make_currents((0, BATCH, N_UNITS)), before, record=RECORDS)
    assert_same(state, before)
    assert not out["spike_count"].any()
    assert np.isinf(out["first_spike_time"]).all()


def test_an_empty_batch():
    state, out = run(make_params("voltage"), make_currents((5, 0, N_UNITS)))
    assert (state.v.shape, out["s"].shape) == ((0, N_UNITS), (5, 0, N_UNITS))
    _, in_blocks = run(make_params("voltage"), make_currents((5, 0, N_UNITS)), checkpoint_every=2)
    assert in_blocks["s"].shape == (5, 0, N_UNITS)


def test_a_batch_of_any_shape_is_one_of_rows():
    params, currents = make_params("everything"), make_currents((5, 2, 3, N_UNITS))
    (state, out), (flat_state, flat) = run(params, currents), run(params, currents.reshape(5, 6, N_UNITS))
    assert_agree({name: leaf.reshape(6, N_UNITS) for name, leaf in vars(state).items()}, vars(flat_state))
    np.testing.assert_array_equal(out["s"].reshape(flat["s"].shape), flat["s"])


@pytest.mark.parametrize("batch_shape", [(), 2, (2,), [2], (2, 3), 0])
def test_batch_shape(batch_shape):
    shape = (batch_shape,) if isinstance(batch_shape, int) else tuple(batch_shape)
    state = slif.init_state(make_params(refract_time=0.5), batch_shape)
    assert all(leaf.shape == (*shape, N_UNITS) for leaf in jax.tree.leaves(state))


def test_state_at_rest():
    params = make_params("everything")
    state = slif.init_state(params, BATCH)
    for name in ("j", "v", "s", "tols"):
        assert not getattr(state, name).any()
    np.testing.assert_array_equal(state.rfr, np.full((BATCH, N_UNITS), 0.75))
    np.testing.assert_array_equal(state.thr, np.tile(params.thr, (BATCH, 1)))
    np.testing.assert_array_equal(state.surrogate, np.ones((BATCH, N_UNITS)))


def test_batched_thresholds():
    """Thresholds [..., N], as a file of the reference may hold them, give each row its own at the start."""
    params = make_params("plain")
    thr = jnp.stack([params.thr, params.thr + 0.1, params.thr + 0.2])
    batched, currents = params.replace(thr=thr), make_currents()
    assert batched.n_units == N_UNITS
    state, out = run(batched, currents)
    for row in range(BATCH):
        alike_state, alike = run(params.replace(thr=thr[row]), currents)
        assert_agree(*({name: leaf[row] for name, leaf in vars(x).items()} for x in (state, alike_state)))
        np.testing.assert_array_equal(out["s"][:, row], alike["s"][:, row])
    assert_same(slif.reset(batched, state), slif.init_state(batched, BATCH))


# --- time, rows, units ---


@pytest.mark.parametrize(
    ("cut", "mechanisms"),
    [(0, FEW), (1, ("sparse_everything",)), (N_STEPS // 2, ("everything", "voltage")), (N_STEPS, FEW)],
)
def test_a_run_split_anywhere_is_the_whole_run(cut, mechanisms):
    params, currents = params_of(mechanisms), make_currents()
    record = RECORDS if cut in (0, N_STEPS) else ("s",)  # by the program of the whole run, or by a small one
    wholes, firsts = run_each(params_of(FEW), currents), run_each(params, currents[:cut], record=record)
    middle = {name: state for name, (state, _) in firsts.items()}
    for mechanism, (end, second) in run_each(params, currents[cut:], middle, t0=cut * DT, record=record).items():
        state, whole = wholes[mechanism]
        first = firsts[mechanism][1]
        assert_agree(vars(end), vars(state), mechanism)
        if cut:
            before = {name: whole[name][cut - 1] for name in FIELDS}
            assert_agree(vars(middle[mechanism]), before, mechanism)
        np.testing.assert_array_equal(np.concatenate([first["s"], second["s"]]), whole["s"], mechanism)


def test_vmap_is_the_batched_call():
    params, currents = params_of(("sparse_everything", "voltage")), make_currents()
    over_rows = jax.vmap(simulate_each, in_axes=(None, 0, 1, None, None), out_axes=0)
    mapped = jax.device_get(over_rows(params, states_of(params), currents, 0.0, None))
    runs = run_each(params_of(FEW), currents)
    for mechanism, (mapped_state, mapped_out) in mapped.items():
        state, out = runs[mechanism]
        assert_agree(vars(mapped_state), vars(state), mechanism)
        rows_second = {name: np.moveaxis(x, 0, x.ndim - 2) for name, x in mapped_out.items()}
        assert_agree(rows_second, out, mechanism)


def test_vmap_of_step_over_a_parameter():
    params, j, taus = params_of(FEW), make_currents()[0], np.float32([5, 20])
    states = {name: make_state(p) for name, p in params.items()}

    def step(tau_m):
        return step_each({name: p.replace(tau_m=tau_m) for name, p in params.items()}, states, j, 1.0)

    mapped = jax.device_get(jax.vmap(step)(taus))
    for point, tau_m in enumerate(taus):
        for mechanism, expected in step(tau_m).items():
            assert_agree({name: leaf[point] for name, leaf in vars(mapped[mechanism]).items()}, vars(expected))


@few
@given(
    row=st.integers(0, BATCH - 1),
    bad=st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 0.0]),
    time=st.integers(0, N_STEPS - 1),
    whole_row=st.booleans(),
)
def test_a_row_does_not_touch_the_others(row, bad, time, whole_row):
    params, currents = params_of(FEW), make_currents()
    changed = currents.copy()
    changed[time, row, slice(None) if whole_row else 2] = bad
    others = np.arange(BATCH) != row

    def of_the_others(currents):
        """[B, N] for what is returned once, [T, B, N] for the rest."""
        return jax.tree.map(lambda x: np.compress(others, x, axis=x.ndim - 2), run_each(params, currents))

    assert_same(of_the_others(changed), of_the_others(currents))


def test_units_with_their_own_parameters_are_separate_runs():
    rng, currents = np.random.default_rng(3), make_currents()
    numbers = {
        "tau_m": rng.uniform(5, 40, N_UNITS),
        "resist_m": rng.uniform(0.5, 2, N_UNITS),
        "refract_time": rng.choice([0, 0.5, 1.25], N_UNITS),
        "thr": rng.uniform(0.1, 0.6, N_UNITS),
        "thr_gain": rng.uniform(0, 0.1, N_UNITS),
        "thr_leak": rng.uniform(0, 0.02, N_UNITS),
    }
    state, out = run(make_params(**numbers, thr_jitter=0.0), currents)
    for n in range(N_UNITS):
        own = {name: np.asarray(x[n]) for name, x in numbers.items()}
        unit_state, unit = run(make_params(n_units=1, **own, thr_jitter=0.0), currents[..., n : n + 1])
        assert_agree({name: leaf[:, n : n + 1] for name, leaf in vars(state).items()}, vars(unit_state))
        assert_agree({"s": out["s"][..., n : n + 1]}, unit)


def test_a_traced_zero_is_an_absent_mechanism():
    params, traced, currents = params_of(FEW), {}, make_currents()
    for mechanism in ("plain", "everything", "voltage"):
        names = [n for n in ("thr_gain", "thr_leak", "rho_b", "resist_inh") if n not in MECHANISMS[mechanism]]
        traced[mechanism] = make_params(mechanism, **{name: jnp.zeros(()) for name in names})
        for name in names:
            assert getattr(params[mechanism], name) is None
            assert getattr(traced[mechanism], name) is not None
        assert (params[mechanism].inh_weights is None) == (params[mechanism].resist_inh is None)
        assert_same(traced[mechanism].thr, params[mechanism].thr)
    expected = run_each(params, currents)
    for mechanism, (state, out) in run_each(traced, currents, record=("s",)).items():
        assert_agree(vars(state), vars(expected[mechanism][0]), mechanism)
        np.testing.assert_array_equal(out["s"], expected[mechanism][1]["s"], mechanism)


def test_gain_and_leak_are_ignored_where_sparsity_rules():
    currents = make_currents()
    alone = run(make_params(rho_b=0.01), currents)
    among = run(make_params(rho_b=0.01, thr_gain=0.3, thr_leak=0.2), currents)
    assert_agree(vars(among[0]), vars(alone[0]))
    assert_agree(among[1], alone[1])


def test_a_unit_does_not_inhibit_itself():
    params, currents = make_params("everything"), make_currents()
    with_diagonal = params.replace(inh_weights=params.inh_weights + 5 * jnp.eye(N_UNITS))
    assert_same(
        run(with_diagonal, currents),
        run(params, currents),
    )
    state = slif.init_state(params, BATCH).replace(s=jnp.ones((BATCH, N_UNITS)))
    assert_same(*(slif.step(p, state, currents[0], 0.0, DT) for p in (params, with_diagonal)))


# --- valid and reset ---


@few
@given(
    seed=st.integers(0, 2**16),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    filler=st.sampled_from([0.0, np.nan, np.inf]),
)
def test_frozen_rows(seed, share, filler):
    params = params_of(("plain", "everything", "voltage"))
    before = jax.device_get(states_of(params))
    valid = np.random.default_rng(seed).random((N_STEPS, BATCH)) < share
    padded = np.where(valid[..., None], make_currents(), np.float32(filler))
    runs = run_each(params, padded, before, t0=1.0, valid=valid)
    expected = run_each_by_steps(params, padded, before, t0=1.0, valid=valid)
    for mechanism, (state, out) in runs.items():
        assert_agree(vars(state), vars(expected[mechanism][0]), mechanism)
        assert_agree(out, expected[mechanism][1], mechanism)

        # Frozen means bit for bit, and silent.
        for name, start in vars(before[mechanism]).items():
            if name != "s":
                previous = np.concatenate([start[None], out[name][:-1]])
                assert_same(out[name][~valid], previous[~valid])
        assert not out["s"][~valid].any()
        assert not out["s_packed"][~valid].any()
        if share == 0:
            assert_same(state, before[mechanism])
            assert not out["spike_count"].any()
            assert np.isinf(out["first_spike_time"]).all()


@pytest.mark.parametrize("thr_persist", [False, True])
def test_reset(thr_persist):
    params = make_params("everything", thr_persist=thr_persist)
    state = make_state(params)
    assert not np.array_equal(state.thr[1], params.thr)
    rest = slif.init_state(params, BATCH)
    rest = rest.replace(thr=state.thr) if thr_persist else rest
    assert_same(slif.reset(params, state), rest)

    where = np.array([True, False, True])
    some = slif.reset(params, state, where=where)
    assert_same(*(jax.tree.map(lambda leaf: leaf[where], x) for x in (some, rest)))
    assert_same(*(jax.tree.map(lambda leaf: leaf[~where], x) for x in (some, state)))
    assert_same(jax.jit(slif.reset)(params, state, where=where), some)


def test_detach_keeps_the_values():
    state = make_state(make_params("everything"))
    assert_same(slif.detach(state), state)
    gradient = jax.grad(lambda state: sum(leaf.sum() for leaf in jax.tree.leaves(slif.detach(state))))(state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# --- dtypes ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
@pytest.mark.parametrize("mechanism", ["everything", "voltage"])
def test_every_leaf_keeps_its_dtype(mechanism, dtype):
    with enable_x64():
        params = make_params(mechanism, dtype=dtype, rho_b=0.005)
        state = slif.init_state(params, BATCH)
        currents = make_currents((3, BATCH, N_UNITS)).astype(dtype)

        def traced(params, state, currents):
            some = slif.reset(params, state, where=np.array([True, False, True]))
            run = slif.simulate(params, state, currents, dt=DT, record=FIELDS)
            return some, run, slif.step(params, state, currents[0], 0.0, DT), slif.detach(state)

        for tree in (params, state, jax.eval_shape(traced, params, state, currents)):
            assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}


def test_draws_do_not_depend_on_the_dtype():
    with enable_x64():
        dtypes = (np.float32, jnp.bfloat16, np.float64)
        single, half, double = (make_params("everything", n_units=64, thr=0.33, dtype=dtype) for dtype in dtypes)
    np.testing.assert_array_equal(double.inh_weights, single.inh_weights)
    np.testing.assert_array_equal(half.inh_weights, single.inh_weights.astype(jnp.bfloat16))
    np.testing.assert_array_equal(half.thr, single.thr.astype(jnp.bfloat16))
    np.testing.assert_allclose(double.thr, single.thr, rtol=1e-7)


def test_thresholds_do_not_depend_on_whether_inhibition_is_drawn():
    assert_same(make_params("inhibition").thr, make_params("plain").thr)


def test_summaries_count_beyond_the_integers_of_bfloat16():
    params = make_params(thr=-1.0, thr_jitter=0.0, dtype=jnp.bfloat16)
    out = run(params, np.zeros((300, 1, N_UNITS), np.float32), record=RECORDS[-2:])[1]
    assert out["spike_count"].dtype == out["first_spike_time"].dtype == np.float32
    assert (out["spike_count"] == 300).all()


def test_bfloat16_currents_into_float32_params():
    params, currents = params_of(("everything",)), make_currents().astype(jnp.bfloat16)
    state, out = run_each(params, currents)["everything"]
    expected_state, expected = run_each(params_of(FEW), currents.astype(np.float32))["everything"]
    stepped = step_each(params, states_of(params), currents[0], 0.0)["everything"]
    fields = {name: out[name] for name in FIELDS}
    assert {leaf.dtype for leaf in jax.tree.leaves((state, fields))} == {np.dtype(np.float32)}
    assert_agree(vars(state), vars(expected_state))
    assert_agree(out, expected)
    assert_agree(vars(stepped), {name: x[0] for name, x in fields.items()})


def test_integer_currents():
    params, currents = make_params(), make_currents().round()
    expected = run(params, currents)[1]
    assert_same(run(params, currents.astype(np.int8))[1], expected)


# --- pytrees and buffers ---


def buffers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@few_mechanisms
@pytest.mark.parametrize(
    ("n_units", "batch_shape"), [(N_UNITS, ()), (N_UNITS, (1,)), (1, ()), (1, 1), (N_UNITS, BATCH)]
)
def test_a_fresh_state_shares_no_buffer(mechanism, n_units, batch_shape):
    params = make_params(mechanism, n_units, refract_time=np.full(n_units, 0.5), tau_m=np.full(n_units, 20.0))
    state = slif.init_state(params, batch_shape)
    assert len(set(buffers(state))) == len(FIELDS)
    assert not set(buffers(state)) & set(buffers(params))


def test_a_fresh_state_can_be_donated():
    """Without a batch, where the fields of the state have the shape of params."""
    params = make_params("everything", refract_time=np.full(N_UNITS, 0.5), thr_persist=False)
    kept, currents = jax.tree.map(np.array, params), make_currents((N_STEPS, N_UNITS))
    advance = jax.jit(lambda state, j: slif.simulate(params, state, j, dt=DT)[0], donate_argnums=0)
    expected = run(params, currents, record=())[0]
    state = slif.init_state(params)
    final = advance(state, currents)
    assert all(getattr(state, name).is_deleted() for name in ("v", "s", "thr", "rfr", "tols"))  # what a step reads
    assert_agree(vars(final), vars(expected))
    again = advance(slif.reset(params, final), currents)
    assert_agree(vars(again), vars(expected))
    assert_same(params, kept)


@few_mechanisms
def test_params_and_state_are_pytrees(mechanism):
    params = make_params(mechanism)
    state = slif.init_state(params, BATCH)
    for tree in (params, state):
        leaves, structure = jax.tree.flatten(tree)
        assert_same(jax.tree.unflatten(structure, leaves), tree)
        assert_same(jax.jit(lambda tree: tree)(tree), tree)
        assert_same(jax.tree.map(lambda leaf: leaf + 0, tree), tree)
        thawed = pickle.loads(pickle.dumps(tree))
        assert jax.tree.structure(thawed) == structure
        assert_same(thawed, tree)
        shapes = jax.eval_shape(lambda tree: tree, tree)
        assert jax.tree.structure(shapes) == structure
    with pytest.raises(AttributeError):
        params.tau_m = 1.0
    with pytest.raises(AttributeError):
        state.v = 1.0


def test_every_number_of_params_is_a_leaf():
    params = make_params("everything", rho_b=np.zeros(()), surrogate=slif.secant())
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    static = {"surrogate", *STATIC}
    numbers = {f".{field.name}" for field in dataclasses.fields(params) if field.name not in static}
    assert paths == numbers | {".surrogate.numbers['c1']", ".surrogate.numbers['c2']"}


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_are_pytrees(name):
    surrogate, x = SURROGATES[name], np.linspace(-2, 2, 9, dtype=np.float32)
    leaves, structure = jax.tree.flatten(surrogate)
    for other in (
        jax.tree.unflatten(structure, leaves),
        pickle.loads(pickle.dumps(surrogate)),
        jax.jit(lambda s: s)(surrogate),
    ):
        assert jax.tree.structure(other) == structure
        assert_same(other(x), surrogate(x))


def test_eval_shape():
    """Nothing reads a value, so abstract params, state and currents are enough."""
    params = jax.eval_shape(lambda key: slif.init_params(key, 4, tau_m=20.0, resist_m=1.0, thr=0.4), jax.random.key(0))
    state = jax.eval_shape(lambda params: slif.init_state(params, (2,)), params)
    currents = jax.ShapeDtypeStruct((6, 2, 4), jnp.float32)
    final, out = jax.eval_shape(lambda *x: slif.simulate(*x, dt=DT, record=RECORDS), params, state, currents)
    assert final == state
    assert out["s_packed"] == jax.ShapeDtypeStruct((6, 2, 1), jnp.uint8)
    assert jax.eval_shape(slif.reset, params, state) == state


# --- compilations and transfers ---


def variations(params):
    """Params that differ from these in every number."""
    return [jax.tree.map(lambda leaf, x=x: leaf * x, params) for x in (1.1, 0.7)]


@pytest.mark.parametrize("mechanism", ["everything", "sparse_everything"])
def test_a_new_value_never_recompiles(mechanism, compilations):
    params, currents = make_params(mechanism), make_currents()
    state = slif.init_state(params, BATCH)
    others = variations(params)
    run(params, currents, state, record=("s",))
    slif.step(params, state, currents[0], 0.0, DT)
    slif.reset(params, state)
    compilations()
    for other in (params, *others):
        for dt in (1, 0.3, np.float32(0.3), np.float64(0.3), np.array(0.3), np.int64(1)):
            run(other, currents, state, dt=dt, t0=dt, record=("s",))
            slif.step(other, state, currents[0], dt, dt)
        slif.init_state(other, BATCH)
        slif.reset(other, state)
    assert compilations() == 0


def test_the_compilation_count_counts(compilations):
    compilations()
    jax.jit(lambda x: x + 1)(1)
    assert compilations() == 1


def test_an_equal_surrogate_never_recompiles(compilations):
    currents = make_currents()
    makers = [lambda: slif.secant(c2=0.1), lambda: slif.arctan(alpha=3.0), lambda: slif.custom(bell)]
    for maker in makers:
        params = make_params(surrogate=maker())
        run(params, currents, record=("s",))
        compilations()
        run(make_params(surrogate=maker()), currents, record=("s",))
        assert compilations() == 0
    run(make_params(surrogate=slif.arctan(alpha=1.0)), currents, record=("s",))
    compilations()
    run(make_params(surrogate=slif.arctan(alpha=7.0)), currents, record=("s",))
    assert compilations() == 0


def test_one_trace_under_jit():
    params, currents = make_params("everything"), make_currents()
    state = slif.init_state(params, BATCH)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def advance(params, state, currents, dt, t0):
        state, out = slif.simulate(params, state, currents, dt=dt, t0=t0)
        return slif.step(params, state, currents[0], t0, dt), out

    for other in (params, *variations(params)):
        for dt in (DT, 1.5):
            advance(other, state, currents, dt, 3 * dt)


def test_dt_in_any_form_is_the_same():
    params, currents = make_params("refractory"), make_currents()
    expected = run(params, currents, dt=1, t0=2, record=("v", "tols"))
    forms = (float, np.int32, np.float32, np.float64, np.array, jnp.int32, jnp.bfloat16)
    for form in forms:
        assert_same(run(params, currents, dt=form(1), t0=form(2), record=("v", "tols")), expected)
    state = slif.init_state(params, BATCH)
    expected = slif.step(params, state, currents[0], 2, 1)
    for form in forms:
        assert_same(slif.step(params, state, currents[0], form(2), form(1)), expected)


@pytest.mark.parametrize("mechanism", ["everything", "voltage"])
def test_no_implicit_transfer(mechanism):
    params, currents = make_params(mechanism), jax.device_put(make_currents())
    state, j = slif.init_state(params, BATCH), jax.device_put(make_currents()[0])
    where = jax.device_put(np.array([True, False, True]))
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed"):
            currents + np.ones((N_STEPS, BATCH, N_UNITS), np.float32)
        run(params, currents, state, dt=0.5, t0=np.float32(3), record=("s",))
        slif.step(params, state, j, 1, 0.5)
        slif.init_state(params, BATCH)
        slif.reset(params, state)
        slif.reset(params, state, where=where)


def test_packing_transfers_nothing():
    s = jax.device_put(make_currents()[0])
    with jax.transfer_guard("disallow"):
        slif.unpack_spikes(slif.pack_spikes(s), N_UNITS)


def test_rank_promotion_is_an_error_here():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
