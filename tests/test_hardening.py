"""Whatever comes in, of any shape, dtype and value: what comes out is right, or the error is clear."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import DT, FIELDS, MECHANISMS, RECORDS, assert_same, enable_x64, make_params
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
from slif import checkpoint

# Each new shape, dtype or mechanism is a new compilation, which is what takes the time.
compiling = settings(max_examples=30, derandomize=True, deadline=None, database=None)
many = settings(max_examples=200, derandomize=True, deadline=None, database=None)

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, -3e38, 1e20, 1.0, 6.0, -2.5]
BATCHES = [(), (0,), (1,), (3,), (2, 0), (2, 1)]
batch_shapes = st.sampled_from(BATCHES)
dtypes = st.sampled_from(["float32", "float64", "float16", "bfloat16", "int32", "int8", "uint8", "uint32"])


def laid_out(array, layout):
    """The same numbers: on the device, or in host memory in another order."""
    match layout:
        case "jax":
            return jnp.asarray(array)
        case "reversed":
            return np.ascontiguousarray(array[::-1])[::-1]
        case "fortran":
            return np.asfortranarray(array)
        case "strided":
            return np.repeat(array, 2, axis=-1)[..., ::2]
        case "read-only":
            array = array.copy()
            array.flags.writeable = False
    return array


layouts = st.sampled_from(["numpy", "jax", "reversed", "fortran", "strided", "read-only"])


@st.composite
def raw_currents(draw):
    shape = (draw(st.sampled_from([0, 1, 2, 7])), *draw(batch_shapes), draw(st.sampled_from([1, 2, 5])))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = rng.normal(2, 4, shape)
    special = rng.random(shape) < draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    values = np.where(special, rng.choice(SPECIAL, shape), values)
    dtype = jnp.dtype(draw(dtypes))
    with np.errstate(all="ignore"):
        if not jnp.issubdtype(dtype, jnp.floating):
            values = np.clip(np.nan_to_num(values), 0, 100)
        return laid_out(values.astype(dtype), draw(layouts))


def expected_trace(params, currents, dt):
    """The oracle's equations on float32, so that they overflow where the cell does."""
    leaves = {
        name: getattr(params, name) for name in vars(oracle.Cell) | oracle.Cell.__annotations__ if name in vars(params)
    }
    numbers = {name: np.asarray(x) for name, x in leaves.items() if x is not None}
    cell = oracle.Cell(**numbers)
    currents = np.asarray(currents)
    if not currents.dtype == params.thr.dtype == np.float64:
        currents = currents.astype(np.float32)
        currents[np.abs(currents) < np.finfo(np.float32).tiny] = 0  # XLA flushes subnormal numbers
    currents = currents.astype(params.thr.dtype)
    state = {name: x.astype(params.thr.dtype) for name, x in oracle.rest(cell, currents.shape[1:]).items()}
    trace = []
    with np.errstate(all="ignore"):
        for k, j in enumerate(currents):
            state = oracle.step(cell, state, j, currents.dtype.type(k * dt), currents.dtype.type(dt))
            trace.append(state)
    shape = currents.shape
    return {name: np.array([state[name] for state in trace], currents.dtype).reshape(shape) for name in FIELDS}


@compiling
@given(
    currents=raw_currents(),
    mechanism=st.sampled_from([name for name in MECHANISMS if name != "voltage"]),
    x64=st.booleans(),
    params_dtype=st.sampled_from(["float32", "float32", float]),
)
def test_simulate_is_the_oracle_on_anything(currents, mechanism, x64, params_dtype):
    with enable_x64() if x64 else contextlib.nullcontext():
        params = make_params(mechanism, n_units=currents.shape[-1], dtype=params_dtype)
        state = slif.init_state(params, currents.shape[1:-1])
        final, out = slif.simulate(params, state, currents, dt=DT, record=RECORDS)
        expected = expected_trace(params, currents, DT)
        wide = params.thr.dtype == np.float64
        for name in FIELDS:
            assert out[name].dtype == params.thr.dtype
            np.testing.assert_allclose(
                out[name], expected[name], rtol=1e-9 if wide else 1e-5, atol=1e-12 if wide else 1e-5, err_msg=name
            )
        np.testing.assert_array_equal(out["s"], expected["s"])
        np.testing.assert_array_equal(out["spike_count"], expected["s"].sum(0))
        np.testing.assert_array_equal(slif.unpack_spikes(out["s_packed"], params.n_units), expected["s"] > 0)
        by_steps = state
        for k, j in enumerate(currents):
            by_steps = slif.step(params, by_steps, j, k * DT, DT)
        for name in FIELDS:
            np.testing.assert_allclose(getattr(final, name), getattr(by_steps, name), rtol=1e-6, atol=1e-6)
        rest = slif.reset(params, final)
        if not params.thr_persist:
            assert_same(rest, state)


@compiling
@given(
    batch=batch_shapes,
    n_steps=st.sampled_from([0, 1, 6]),
    n_units=st.sampled_from([1, 3]),
    mechanism=st.sampled_from([*MECHANISMS]),
    finite=st.booleans(),
)
def test_debug_nans(batch, n_steps, n_units, mechanism, finite):
    """No NaN arises on the way, forwards or backwards, unless a current brings it; then JAX says so."""
    params = make_params(mechanism, n_units=n_units)
    currents = np.random.default_rng(0).uniform(-5, 9, (n_steps, *batch, n_units)).astype(np.float32)
    if not finite:
        currents[:] = np.nan

    def loss(params, currents):
        state, out = slif.simulate(params, slif.init_state(params, batch), currents, dt=DT, record=RECORDS)
        return out["s"].sum() + out["v"].sum() + state.v.sum()

    expected = contextlib.nullcontext()
    if not finite and currents.size:
        expected = pytest.raises(FloatingPointError, match="nan")
    with jax.debug_nans(True), expected:
        jax.grad(loss, (0, 1))(params, currents)


@pytest.mark.filterwarnings("ignore:thr_jitter:UserWarning")
@many
@given(
    value=st.one_of(st.floats(), st.integers(-(10**400), 10**400)),
    name=st.sampled_from(
        ["tau_m", "resist_m", "thr", "refract_time", "thr_gain", "thr_leak", "rho_b", "resist_inh", "thr_jitter"]
    ),
)
def test_any_number_is_a_parameter_or_an_error(value, name):
    with np.errstate(over="ignore", under="ignore"):
        stored = np.float32(value if abs(value) < 1e300 else np.inf)
    normal = value <= 0 or stored >= np.finfo(np.float32).tiny
    allowed = {
        "tau_m": value > 0 and normal,
        "refract_time": stored >= 0,
        "rho_b": normal,
        "resist_inh": normal,
        "thr_jitter": 0 <= stored <= np.finfo(np.float32).max / 2,
    }.get(name, True)
    if name == "thr" and value == np.inf:  # a unit that never fires
        assert np.isposinf(make_params(n_units=2, thr=value).thr).all()
        return
    if not (allowed and np.isfinite(stored)):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            make_params(n_units=2, **{name: value})
        return
    leaf = getattr(make_params(n_units=2, **{name: value}), "thr" if name == "thr_jitter" else name)
    if leaf is None:
        assert value == 0
    elif name == "thr":
        np.testing.assert_allclose(leaf, stored, atol=0.0501)
    elif name != "thr_jitter":
        np.testing.assert_array_equal(leaf, stored)


@many
@given(x=st.sampled_from([*SPECIAL, 0.5, -0.5, 88.0, -89.0, 1e3]), number=st.sampled_from([1e-6, 0.08, 1.0, 25.0, 1e6]))
def test_slopes_are_numbers_wherever_the_voltage_is(x, number):
    makes = {
        make: {argument: number}
        for make, argument in (
            (slif.fast_sigmoid, "slope"),
            (slif.sigmoid, "slope"),
            (slif.arctan, "alpha"),
            (slif.triangular, "width"),
            (slif.boxcar, "width"),
            (slif.gaussian, "width"),
            (slif.secant, "c2"),
            (slif.straight_through, None),
        )
    }
    for make, arguments in makes.items():
        surrogate = make(**{} if None in arguments else arguments)
        slope = float(surrogate(np.float32(x)))
        assert slope >= 0 or (np.isnan(x) and not np.isposinf(slope)), make
        peak = max(float(surrogate(np.float32(0))), float(surrogate(np.float32(1e-30))))
        assert not slope > peak * 1.00001, make


@compiling
@given(
    batch=batch_shapes,
    n_units=st.integers(1, 20),
    dtype=st.sampled_from(["bool", "float32", "uint8", "bfloat16"]),
    layout=layouts,
)
def test_packing_of_any_shape(batch, n_units, dtype, layout):
    raster = np.random.default_rng(0).random((*batch, n_units)) < 0.5
    packed = slif.pack_spikes(laid_out(raster.astype(jnp.dtype(dtype)), layout if batch else "numpy"))
    assert packed.shape == (*batch, -(-n_units // 8))
    np.testing.assert_array_equal(slif.unpack_spikes(packed, n_units), raster)


@settings(compiling, max_examples=20)
@given(
    batch=batch_shapes,
    n_steps=st.sampled_from([0, 1, 5]),
    n_points=st.integers(1, 4),
    batch_size=st.sampled_from([None, 1, 3, 10**9]),
)
def test_sweeps_of_any_shape(batch, n_steps, n_points, batch_size):
    params, currents = make_params("everything", n_units=2), np.full((n_steps, *batch, 2), 7, np.float16)
    over = slif.grid(tau_m=np.linspace(5, 20, n_points), dt=[0.25, 1])
    state, out = slif.sweep(params, currents, over=over, batch_size=batch_size, record=RECORDS)
    assert len(over["dt"]) == 2 * n_points
    for k in range(2 * n_points):
        alone = slif.simulate(
            params.replace(tau_m=over["tau_m"][k]),
            slif.init_state(params, batch),
            currents,
            dt=over["dt"][k],
            record=RECORDS,
        )
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-6, atol=1e-6), (state, out), alone)


@compiling
@given(
    batch=batch_shapes,
    n_units=st.integers(1, 9),
    mechanism=st.sampled_from([*MECHANISMS]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", float]),
    special=st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 1.5]),
    x64=st.booleans(),
)
def test_checkpoints_of_any_shape(tmp_path_factory, batch, n_units, mechanism, dtype, special, x64):
    path = tmp_path_factory.mktemp("any") / "cell.slif"
    with enable_x64() if x64 else contextlib.nullcontext():
        params = make_params(mechanism, n_units=n_units, dtype=dtype)
        state = slif.init_state(params, batch)
        state = state.replace(v=jnp.full_like(state.v, special))
        checkpoint.save(path, params, state)
        loaded = checkpoint.load(path)
        assert jax.tree.structure(loaded) == jax.tree.structure((params, state))
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves((params, state)), strict=True):
            assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


def test_files_and_nodes_transfer_nothing_by_accident(tmp_path):
    params = make_params("everything", n_units=3)
    state = slif.init_state(params, 2)
    with jax.transfer_guard("disallow"):
        checkpoint.save(tmp_path / "cell.slif", params, state)
        params, state = checkpoint.load(tmp_path / "cell.slif")
        checkpoint.save_ngclearn(tmp_path, "z1", params, state)
        checkpoint.load_ngclearn(tmp_path, "z1", params, state)
        nir = pytest.importorskip("slif.nir", exc_type=ImportError)
        with pytest.warns(UserWarning, match="without"):
            node = nir.to_nir(params, dt=DT, strict=False)
        nir.from_nir(node, dt=DT)
