"""What holds for any input: splits, rows, masks, dtypes, buffers, compilations, records."""

import dataclasses
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
)
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
from slif.hyperparameters import STATIC

# Few examples, of one shape and with one record: another shape or record is another compilation.
few = settings(max_examples=6, derandomize=True, deadline=None, database=None)
mechanisms = pytest.mark.parametrize("mechanism", MECHANISMS)
few_mechanisms = pytest.mark.parametrize("mechanism", ["plain", "everything", "sparse_everything", "voltage"])
two_mechanisms = pytest.mark.parametrize("mechanism", ["everything", "voltage"])


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


def run(params, currents, state=None, dt=DT, record=RECORDS, **arguments):
    state = slif.init_state(params, currents.shape[1:-1]) if state is None else state
    # On the host, where slicing and comparing compile nothing.
    return jax.device_get(slif.simulate(params, state, currents, dt=dt, record=record, **arguments))


def run_by_steps(params, currents, state=None, t0=0.0, valid=None):
    """What `simulate` should do, one `step` at a time: its final state and every record."""
    state = slif.init_state(params, currents.shape[1:-1]) if state is None else state
    trace, spikes, count, first = [], [], np.zeros(state.v.shape), np.full(state.v.shape, np.inf)
    for k, j in enumerate(currents):
        live = np.ones(state.v.shape[:-1], bool) if valid is None else valid[k]
        new = slif.step(params, state, j, t0 + k * DT, DT)
        state = jax.tree.map(lambda n, o, live=live: np.where(live[..., None], n, o), new, state)
        s = np.where(live[..., None], state.s, 0)
        first = np.where((s > 0) & (first == np.inf), t0 + k * DT, first)
        count = count + s
        trace.append(vars(state))
        spikes.append(s)
    out = {name: np.stack([fields[name] for fields in trace]) for name in FIELDS} | {"s": np.stack(spikes)}
    packed = np.packbits(out["s"].astype(bool), axis=-1, bitorder="little")
    return state, out | {"s_packed": packed, "spike_count": count, "first_spike_time": first}


# --- simulate is a loop of step ---


@mechanisms
def test_simulate_is_a_loop_of_step(mechanism):
    params, currents = make_params(mechanism), make_currents()
    state, out = run(params, currents, t0=2.0)
    expected_state, expected = run_by_steps(params, currents, t0=2.0)
    assert 0.02 < out["s"].mean() < 0.98
    assert_agree(vars(state), vars(expected_state))
    assert_agree(out, expected)


def test_a_record_alone_is_the_same():
    """What is recorded decides what goes round the loop, and must not change anything else."""
    params, currents = make_params("gain"), make_currents()
    state, out = run_by_steps(params, currents)
    for record in ((), ("s",), ("v",), ("rfr",), ("s_packed",), ("first_spike_time",)):  # the rest under masks, below
        alone_state, alone = run(params, currents, record=record)
        assert_agree(vars(alone_state), vars(state))
        assert_agree(alone, {name: out[name] for name in record})


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, jnp.bfloat16, "float16"])
def test_spike_dtype(dtype):
    params, currents = make_params("sticky"), make_currents()
    state, out = run(params, currents, record=("s", "v"), spike_dtype=dtype)
    expected_state, expected = run(params, currents)
    assert out["s"].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(out["s"].astype(np.float32), expected["s"])
    assert_agree(vars(state), vars(expected_state))
    assert out["v"].dtype == np.float32


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
    state = run(params, make_currents())[0]
    assert state.s.any()
    silence = np.zeros((2, BATCH, N_UNITS), np.float32)
    out = run(params, silence, state, t0=10.0)[1]
    assert out["s"][0].any()
    np.testing.assert_array_equal(out["spike_count"], out["s"].sum(0))
    np.testing.assert_array_equal(out["first_spike_time"], np.where(out["s"][0] > 0, 10, np.inf))


def test_constants_round_like_arguments():
    """Params closed over by a compiled function, as most training steps have them."""
    numbers = {"tau_m": 17.3, "resist_m": 1.37, "refract_time": 1.0, "thr_gain": 0.013, "thr_leak": 0.0017}
    arrays = {name: np.float32(number) for name, number in numbers.items()}
    thr, currents = np.full(64, 0.4, np.float32), make_currents((300, 16, 64))

    def simulate(params, currents, dt):
        state = slif.init_state(params, 16)
        return slif.simulate(params, state, currents, dt=dt, record=FIELDS)

    expected = jax.jit(simulate)(slif.SLIFParams(thr=thr, **arrays), currents, np.float32(0.3))
    closed = jax.jit(lambda currents: simulate(slif.SLIFParams(thr=thr, **numbers), currents, 0.3))(currents)
    assert_same(closed, expected)


# --- shapes ---


@pytest.mark.parametrize(
    ("mechanism", "shape"),
    [
        ("plain", (0, BATCH, 4)),
        ("everything", (0, BATCH, 4)),
        ("everything", (1, BATCH, 4)),
        ("plain", (5, 4)),
        ("voltage", (5, 4)),
        ("everything", (5, 2, 3, 4)),
        ("voltage", (5, 0, 4)),
    ],
)
def test_shapes(mechanism, shape):
    params, currents = make_params(mechanism, n_units=4), make_currents(shape)
    before = slif.init_state(params, shape[1:-1])
    state, out = run(params, currents, before)
    assert all(leaf.shape == shape[1:] for leaf in jax.tree.leaves(state))
    assert {name: out[name].shape for name in FIELDS} == dict.fromkeys(FIELDS, shape)
    assert out["s_packed"].shape == (*shape[:-1], 1)
    if shape[0] == 0:
        assert_same(state, before)
        assert not out["spike_count"].any()
        assert np.isinf(out["first_spike_time"]).all()
    else:
        flat_state, flat = run(params, currents.reshape(shape[0], -1, 4))
        assert_agree(
            {name: leaf.reshape(-1, 4) for name, leaf in vars(state).items()},
            vars(flat_state),
        )
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
    """Thresholds [..., N], as a file of the reference may hold them, start each row with its own."""
    params = make_params("plain")
    thr = jnp.stack([params.thr, params.thr + 0.1, params.thr + 0.2])
    batched, currents = params.replace(thr=thr), make_currents()
    assert batched.n_units == N_UNITS
    state, out = run(batched, currents)
    for row in range(BATCH):
        row_state, row_out = run(params.replace(thr=thr[row]), currents[:, row])
        assert_agree({name: leaf[row] for name, leaf in vars(state).items()}, vars(row_state))
        np.testing.assert_array_equal(out["s"][:, row], row_out["s"])
    assert_same(slif.reset(batched, state), slif.init_state(batched, BATCH))


# --- time, rows, units ---


@pytest.mark.parametrize(
    ("mechanism", "cut"),
    [("plain", 0), ("sparse_everything", 1), ("everything", 13), ("voltage", N_STEPS // 2), ("everything", N_STEPS)],
)
def test_a_run_split_anywhere_is_the_whole_run(mechanism, cut):
    params, currents = make_params(mechanism), make_currents()
    state, whole = run(params, currents)
    middle, first = run(params, currents[:cut])
    end, second = run(params, currents[cut:], middle, t0=cut * DT)
    assert_agree(vars(end), vars(state))
    assert_agree({name: np.concatenate([first[name], second[name]]) for name in FIELDS}, {n: whole[n] for n in FIELDS})


@few_mechanisms
def test_vmap_is_the_batched_call(mechanism):
    params, currents = make_params(mechanism), make_currents()
    state = slif.init_state(params, BATCH)

    def row(state, currents):
        return slif.simulate(params, state, currents, dt=DT, record=FIELDS)

    mapped_state, mapped = jax.vmap(row, in_axes=(0, 1), out_axes=(0, 1))(state, currents)
    batched_state, batched = row(state, currents)
    assert_agree(vars(mapped_state), vars(batched_state))
    assert_agree(mapped, batched)


@few_mechanisms
def test_vmap_of_step_over_a_parameter(mechanism):
    params, j = make_params(mechanism), make_currents()[0]
    state = run(params, make_currents())[0]
    taus = jnp.array([5.0, 20.0])
    mapped = jax.vmap(lambda tau_m: slif.step(params.replace(tau_m=tau_m), state, j, 1.0, DT))(taus)
    for point, tau_m in enumerate(taus):
        expected = slif.step(params.replace(tau_m=tau_m), state, j, 1.0, DT)
        assert_agree({name: leaf[point] for name, leaf in vars(mapped).items()}, vars(expected))


@mechanisms
@few
@given(
    row=st.integers(0, BATCH - 1),
    bad=st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 0.0]),
    time=st.integers(0, N_STEPS - 1),
    whole_row=st.booleans(),
)
def test_a_row_does_not_touch_the_others(mechanism, row, bad, time, whole_row):
    params, currents = make_params(mechanism), make_currents()
    changed = currents.copy()
    changed[time, row, slice(None) if whole_row else 2] = bad
    others = np.arange(BATCH) != row
    state, out = run(params, currents)
    changed_state, changed_out = run(params, changed)
    assert_same(*(jax.tree.map(lambda leaf: leaf[others], state) for state in (state, changed_state)))
    for name in RECORDS:
        axis = 0 if out[name].ndim == 2 else 1
        assert_same(*(np.compress(others, np.asarray(x[name]), axis) for x in (out, changed_out)))


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
    state, out = run(make_params(**numbers, thr_jitter=0.0), currents, record=FIELDS)
    for n in range(N_UNITS):
        own = {name: np.asarray(x[n]) for name, x in numbers.items()}
        unit_state, unit = run(make_params(n_units=1, **own, thr_jitter=0.0), currents[..., n : n + 1], record=FIELDS)
        assert_agree({name: leaf[:, n : n + 1] for name, leaf in vars(state).items()}, vars(unit_state))
        assert_agree({name: out[name][..., n : n + 1] for name in FIELDS}, unit)


@few_mechanisms
def test_a_traced_zero_is_an_absent_mechanism(mechanism):
    currents, arguments = make_currents(), MECHANISMS[mechanism]
    off = {name: jnp.zeros(()) for name in ("thr_gain", "thr_leak", "rho_b", "resist_inh") if name not in arguments}
    params, traced = make_params(mechanism), make_params(mechanism, **off)
    for name in off:
        assert getattr(params, name) is None
        assert getattr(traced, name) is not None
    assert (params.inh_weights is None) == (params.resist_inh is None)
    assert_same(traced.thr, params.thr)
    state, out = run(params, currents)
    traced_state, traced_out = run(traced, currents)
    assert_agree(vars(traced_state), vars(state))
    assert_agree(traced_out, out)


def test_gain_and_leak_are_ignored_where_sparsity_rules():
    currents = make_currents()
    alone = run(make_params(rho_b=0.01), currents)
    among = run(make_params(rho_b=0.01, thr_gain=0.3, thr_leak=0.2), currents)
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


@few_mechanisms
@few
@given(
    seed=st.integers(0, 2**16),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    filler=st.sampled_from([0.0, np.nan, np.inf]),
)
def test_frozen_rows(mechanism, seed, share, filler):
    params, before = make_params(mechanism), slif.init_state(make_params(mechanism), BATCH)
    valid = np.random.default_rng(seed).random((N_STEPS, BATCH)) < share
    padded = np.where(valid[..., None], make_currents(), np.float32(filler))
    state, out = run(params, padded, before, t0=1.0, valid=valid)
    expected_state, expected = run_by_steps(params, padded, before, t0=1.0, valid=valid)
    assert_agree(vars(state), vars(expected_state))
    assert_agree(out, expected)

    # Frozen means to the bit, and silent.
    previous = {name: np.concatenate([getattr(before, name)[None], out[name][:-1]]) for name in FIELDS if name != "s"}
    for name, x in previous.items():
        assert_same(out[name][~valid], x[~valid])
    assert not out["s"][~valid].any()
    assert not out["s_packed"][~valid].any()
    if share == 0:
        assert_same(state, before)
        assert not out["spike_count"].any()
        assert np.isinf(out["first_spike_time"]).all()


def test_frozen_rows_by_a_record_alone():
    params, currents = make_params("sticky"), make_currents()
    valid = np.arange(N_STEPS)[:, None] < np.array([N_STEPS, 17, 0])
    expected_state, expected = run_by_steps(params, currents, valid=valid)
    for name in ("s", "j", "thr", "tols", "surrogate", "spike_count"):
        state, out = run(params, currents, record=(name,), valid=valid)
        assert_agree(vars(state), vars(expected_state))
        assert_agree(out, {name: expected[name]})


@pytest.mark.parametrize("thr_persist", [False, True])
def test_reset(thr_persist):
    params = make_params("everything", thr_persist=thr_persist)
    state = run(params, make_currents())[0]
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
    state = run(make_params("everything"), make_currents())[0]
    assert_same(slif.detach(state), state)
    gradient = jax.grad(lambda state: sum(leaf.sum() for leaf in jax.tree.leaves(slif.detach(state))))(state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# --- dtypes ---


@pytest.mark.parametrize(
    ("mechanism", "dtype"),
    [
        ("everything", jnp.bfloat16),
        ("voltage", jnp.bfloat16),
        ("everything", np.float64),
        ("sparse_everything", np.float64),
    ],
)
def test_every_leaf_keeps_its_dtype(mechanism, dtype):
    with enable_x64():
        params = make_params(mechanism, dtype=dtype)
        state = slif.init_state(params, BATCH)
        currents = make_currents((3, BATCH, N_UNITS)).astype(dtype)
        final, out = run(params, currents, state, record=FIELDS)
        stepped = slif.step(params, state, currents[0], 0.0, DT)
        some = slif.reset(params, final, where=np.array([True, False, True]))
        for tree in (params, state, final, out, stepped, some, slif.detach(state)):
            assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
        jitted = jax.eval_shape(slif.step, params, state, currents[0], 0.0, DT)
        assert {leaf.dtype for leaf in jax.tree.leaves(jitted)} == {jnp.dtype(dtype)}


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


@two_mechanisms
def test_bfloat16_currents_into_float32_params(mechanism):
    params, currents = make_params(mechanism), make_currents().astype(jnp.bfloat16)
    state, out = run(params, currents, record=FIELDS)
    assert {leaf.dtype for leaf in jax.tree.leaves((state, out))} == {jnp.dtype(np.float32)}
    expected_state, expected = run(params, currents.astype(np.float32), record=FIELDS)
    assert_agree(vars(state), vars(expected_state))
    assert_agree(out, expected)
    stepped = slif.step(params, slif.init_state(params, BATCH), currents[0], 0.0, DT)
    assert_agree(vars(stepped), {name: out[name][0] for name in FIELDS})


def test_integer_currents():
    params, currents = make_params(), make_currents().round()
    expected = run(params, currents)[1]
    assert_same(run(params, currents.astype(np.int8))[1], expected)


# --- pytrees and buffers ---


def buffers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@mechanisms
@pytest.mark.parametrize(
    ("n_units", "batch_shape"), [(N_UNITS, ()), (N_UNITS, (1,)), (1, ()), (1, 1), (N_UNITS, BATCH)]
)
def test_a_fresh_state_shares_no_buffer(mechanism, n_units, batch_shape):
    params = make_params(mechanism, n_units, refract_time=np.full(n_units, 0.5), tau_m=np.full(n_units, 20.0))
    state = slif.init_state(params, batch_shape)
    assert len(set(buffers(state))) == len(FIELDS)
    assert not set(buffers(state)) & set(buffers(params))


@pytest.mark.parametrize("batch_shape", [(), (BATCH,)])
def test_a_fresh_state_can_be_donated(batch_shape):
    params = make_params("everything", refract_time=np.full(N_UNITS, 0.5), thr_persist=False)
    kept, currents = jax.tree.map(np.array, params), make_currents((N_STEPS, *batch_shape, N_UNITS))
    advance = jax.jit(lambda state, j: slif.simulate(params, state, j, dt=DT)[0], donate_argnums=0)
    expected = run(params, currents)[0]
    state = slif.init_state(params, batch_shape)
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
    """Nothing looks at a value, so abstract params, state and currents do."""
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


@few_mechanisms
def test_a_new_value_never_recompiles(mechanism, compilations):
    params, currents = make_params(mechanism), make_currents()
    state = slif.init_state(params, BATCH)
    others = variations(params)
    run(params, currents, state)
    slif.step(params, state, currents[0], 0.0, DT)
    slif.reset(params, state)
    compilations()
    for other in (params, *others):
        for dt in (1, 0.3, np.float32(0.3), np.float64(0.3), np.array(0.3), np.int64(1)):
            run(other, currents, state, dt=dt, t0=dt)
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
        run(params, currents)
        compilations()
        run(make_params(surrogate=maker()), currents)
        assert compilations() == 0
    run(make_params(surrogate=slif.arctan(alpha=1.0)), currents)
    compilations()
    run(make_params(surrogate=slif.arctan(alpha=7.0)), currents)
    assert compilations() == 0


@two_mechanisms
def test_one_trace_under_jit(mechanism):
    params, currents = make_params(mechanism), make_currents()
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
    params, currents = make_params("everything"), make_currents()
    expected = run(params, currents, dt=1, t0=2)
    forms = (float, np.int32, np.float32, np.float64, np.array, jnp.int32, jnp.bfloat16)
    for form in forms:
        assert_same(run(params, currents, dt=form(1), t0=form(2)), expected)
    state = slif.init_state(params, BATCH)
    expected = slif.step(params, state, currents[0], 2, 1)
    for form in forms:
        assert_same(slif.step(params, state, currents[0], form(2), form(1)), expected)


@few_mechanisms
def test_no_implicit_transfer(mechanism):
    params, currents = make_params(mechanism), jax.device_put(make_currents())
    state, j = slif.init_state(params, BATCH), jax.device_put(make_currents()[0])
    where = jax.device_put(np.array([True, False, True]))
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed"):
            currents + np.ones((N_STEPS, BATCH, N_UNITS), np.float32)
        run(params, currents, state, dt=0.5, t0=np.float32(3))
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
