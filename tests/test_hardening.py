"""Whatever the shape, dtype and value of an input, the result is right, or the error is clear."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import DT, FIELDS, MECHANISMS, RECORDS, assert_agree, assert_same, enable_x64, make_params
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
import slif.linen
import slif.nnx
from slif import checkpoint

# Each new shape, dtype or mechanism is a new compilation, which takes most of the time.
compiling = settings(max_examples=20, derandomize=True, deadline=None, database=None)
many = settings(max_examples=200, derandomize=True, deadline=None, database=None)

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, -3e38, 1e20, 1.0, 6.0, -2.5]
BATCHES = [(), (0,), (1,), (3,), (2, 0), (2, 1)]
batch_shapes = st.sampled_from(BATCHES)


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


def make_raw(shape, dtype, seed, special, layout):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(shape) < special, rng.choice(SPECIAL, shape), rng.normal(2, 4, shape))
    dtype = jnp.dtype(dtype)
    with np.errstate(all="ignore"):
        if not jnp.issubdtype(dtype, jnp.floating):
            values = np.clip(np.nan_to_num(values), 0, 100)
        return laid_out(values.astype(dtype), layout)


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


# Any values in programs of a few shapes and dtypes.
@pytest.mark.parametrize(
    ("mechanism", "shape", "dtype", "params_dtype", "x64"),
    [
        ("plain", (7, 3, 5), "float32", "float32", False),
        ("sticky", (7, 1), "float64", float, True),
        ("gain", (7, 1, 2), "float16", "float32", False),
        ("leak", (1, 2, 1, 5), "uint32", "float32", False),
        ("sparsity", (7, 5), "bfloat16", "float32", True),
        ("plain", (2, 3, 5), "float64", float, False),
        ("everything", (7, 2, 1, 2), "float64", "float32", True),
        ("sparse_everything", (7, 3, 1), "int32", float, True),
        ("soft", (7, 3, 2), "int8", "float32", False),
        ("plain", (0, 1, 2), "uint8", "float32", False),
        ("inhibition", (2, 2, 0, 1), "float32", float, True),
    ],
)
@settings(compiling, max_examples=10)
@given(seed=st.integers(0, 2**16), special=st.sampled_from([0.0, 0.1, 1.0]), layout=layouts)
def test_simulate_is_the_oracle_on_anything(mechanism, shape, dtype, params_dtype, x64, seed, special, layout):
    with enable_x64() if x64 else contextlib.nullcontext():
        currents = make_raw(shape, dtype, seed, special, layout)
        params = make_params(mechanism, n_units=shape[-1], dtype=params_dtype)
        state = slif.init_state(params, currents.shape[1:-1])
        record = (*FIELDS, "s_packed", "spike_count")
        final, out = jax.device_get(slif.simulate(params, state, currents, dt=DT, record=record))
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
        last = {name: out[name][-1] for name in FIELDS} if len(currents) else jax.device_get(vars(state))
        assert_agree(vars(final), last)
        rest = slif.reset(params, final)
        if not params.thr_persist:
            assert_same(rest, state)


@pytest.mark.parametrize(
    ("mechanisms", "batch", "n_steps", "finite"),
    [
        (("everything", "sparse_everything", "soft", "voltage"), (3,), 6, True),
        (("plain",), (2, 0), 6, False),
        (("voltage",), (3,), 0, False),
        (("plain",), (3,), 6, False),
        (("voltage",), (), 1, False),
    ],
)
def test_debug_nans(mechanisms, batch, n_steps, finite):
    """No NaN arises on the way, forwards or backwards, unless a current brings it; then JAX says so."""
    n_units = 3
    params = {name: make_params(name, n_units=n_units) for name in mechanisms}
    currents = np.random.default_rng(0).uniform(-5, 9, (n_steps, *batch, n_units)).astype(np.float32)
    if not finite:
        currents[:] = np.nan

    record = RECORDS if finite else ("s", "v")

    @jax.jit
    def simulate_each(params, currents):
        return [slif.simulate(p, slif.init_state(p, batch), currents, dt=DT, record=record) for p in params.values()]

    def loss(params, currents):
        return sum(out["s"].sum() + out["v"].sum() + state.v.sum() for state, out in simulate_each(params, currents))

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
@given(
    x=st.sampled_from([*SPECIAL, 0.5, -0.5, 88.0, -89.0, 1e3]),
    number=st.sampled_from([1.2e-38, 1e-6, 0.08, 1.0, 25.0, 1e6, 3.4e38]),
)
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
        peak = max(float(surrogate(np.float32(0))), float(surrogate(np.float32(1.2e-38))))
        assert np.isfinite(peak)
        assert not slope > peak * 1.00001, make


@compiling
@given(
    batch=batch_shapes,
    n_units=st.sampled_from([1, 7, 8, 20]),
    dtype=st.sampled_from(["bool", "float32", "uint8", "bfloat16"]),
    layout=layouts,
)
def test_packing_of_any_shape(batch, n_units, dtype, layout):
    raster = np.random.default_rng(0).random((*batch, n_units)) < 0.5
    packed = slif.pack_spikes(laid_out(raster.astype(jnp.dtype(dtype)), layout if batch else "numpy"))
    assert packed.shape == (*batch, -(-n_units // 8))
    np.testing.assert_array_equal(slif.unpack_spikes(packed, n_units), raster)


@pytest.mark.parametrize(
    ("batch", "n_steps", "n_points", "batch_size"),
    [((), 5, 1, None), ((3,), 0, 2, 1), ((2, 0), 5, 2, 3), ((2, 1), 1, 2, 10**9), ((1,), 5, 2, 3), ((0,), 1, 1, 1)],
)
def test_sweeps_of_any_shape(batch, n_steps, n_points, batch_size):
    params, currents = make_params(n_units=2), np.full((n_steps, *batch, 2), 7, np.float16)
    record = ("s", "s_packed", "first_spike_time")
    over = slif.grid(tau_m=np.linspace(5, 20, n_points), dt=[0.25, 1])
    state, out = jax.device_get(slif.sweep(params, currents, over=over, batch_size=batch_size, record=record))
    assert len(over["dt"]) == 2 * n_points
    for k in range(2 * n_points):
        alone = slif.simulate(
            params.replace(tau_m=over["tau_m"][k]),
            slif.init_state(params, batch),
            currents,
            dt=over["dt"][k],
            record=record,
        )
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-6, atol=1e-6), (state, out), alone)


@settings(compiling, max_examples=12)
@given(
    batch=batch_shapes,
    n_units=st.sampled_from([1, 9]),
    mechanism=st.sampled_from([*MECHANISMS]),
    dtype=st.sampled_from(["float32", "bfloat16", float]),
    special=st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 1.5]),
    x64=st.booleans(),
)
def test_checkpoints_of_any_shape(tmp_path_factory, batch, n_units, mechanism, dtype, special, x64):
    path = tmp_path_factory.mktemp("any") / "cell.slif"
    with enable_x64() if x64 else contextlib.nullcontext():
        params = make_params(mechanism, n_units=n_units, dtype=dtype)
        state = slif.init_state(params, batch)
        state = state.replace(v=jnp.asarray(np.full(state.v.shape, special, state.v.dtype)))
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


CELL = slif.init_params(jax.random.key(0), 2, tau_m=20.0, resist_m=1.5, thr=0.4, thr_jitter=0.0)
REST = slif.init_state(CELL, 3)
HYPER = {"dt": DT, "tau_m": 20.0, "resist_m": 1.5, "thr": 0.4, "thr_jitter": 0.0}
LAYER = slif.nnx.SLIF(2, **HYPER, rngs=nnx.Rngs(0))
CURRENT_CALLS = {
    "step": lambda x: slif.step(CELL, REST, x[1], 1.0, DT),
    "simulate": lambda x: slif.simulate(CELL, REST, x, dt=DT, record=("j", "v", "s")),
    "simulate, bfloat16": lambda x: slif.simulate(HALF, slif.init_state(HALF, 3), x, dt=DT, record=("j",)),
    "sweep": lambda x: slif.sweep(CELL, x, over={"tau_m": [9.0]}, dt=DT),
    "sweep over": lambda x: slif.sweep(CELL, None, over={"currents": x[None]}, dt=DT),
    "linen": lambda x: slif.linen.SLIF(2, **HYPER).apply({}, x, record=("j", "s")),
    "nnx": lambda x: LAYER(x, record=("j", "s")),
    "linen cell": lambda x: slif.linen.SLIFCell(2, **HYPER).apply({}, (REST, COUNT), x[1]),
}
HALF = slif.init_params(jax.random.key(0), 2, tau_m=20.0, resist_m=1.5, thr=0.4, dtype="bfloat16")
COUNT = jnp.zeros(3, jnp.int32)


@pytest.mark.parametrize("name", CURRENT_CALLS)
def test_64_bits_from_the_host_are_the_numbers_that_they_are(name, compilations):
    """JAX wraps such integers; such floats become infinite, without a warning from NumPy."""
    call = CURRENT_CALLS[name]
    values = {
        np.int64: [2**40, -(2**40), 2**31, 2**32, -1, 7],
        np.uint64: [2**40, 2**64 - 1, 2**31, 2**32, 1, 7],
        **({np.uint32: [2**32 - 1, 2**31, 2**31 + 1, 0, 1, 7]} if name == "step" else {}),
        np.float64: [1e300, -1e300, 1e40, 2**31, -1, 7],
    }
    for dtype, numbers in values.items():
        x = np.tile(np.array(numbers, dtype).reshape(3, 2), (4, 1, 1))
        with np.errstate(over="ignore"):
            expected = call(jnp.asarray(x.astype(np.float32)))
        assert_same(*(jax.tree.map(np.float32, result) for result in (call(x), expected)))
    compilations()
    call(np.ones((4, 3, 2), np.int64)), call(np.ones((4, 3, 2), np.uint64)), call(np.ones((4, 3, 2)))
    assert compilations() == 0


def test_wide_integers_are_numbers_of_the_cell():
    wide = [2**32 + 1, 2**40]
    floats = np.array(wide, np.float32)
    assert_same(slif.grid(thr=wide, dt=[1, 2])["thr"], np.repeat(floats, 2))
    assert slif.grid(thr=np.array([1, 2]))["thr"].dtype == np.int32  # what JAX can store stays as it is
    assert_same(slif.point(CELL, {"tau_m": np.array(wide)}, 1).tau_m, floats[1])
    for number in (2**40, 2**70, np.int64(2**40), np.uint64(2**63), [2**70, 1]):
        params = CELL.replace(resist_m=number)
        expected = np.array(number, np.float64).astype(np.float32)
        assert_same(slif.step(params, REST, np.ones((3, 2)), 0, 1).j, np.zeros((3, 2), np.float32) + expected)
        assert_same(slif.init_params(jax.random.key(0), 2, tau_m=1, resist_m=number, thr=1).resist_m, expected)
    for t in (2**31, 2**40, np.int64(2**40), np.uint64(2**63), 2**70):
        state = slif.step(CELL, REST, np.full((3, 2), 1e3), t, 1)
        assert_same(state.tols, np.full((3, 2), t, np.float64).astype(np.float32))
        out = slif.simulate(CELL, REST, np.full((1, 3, 2), 1e3), dt=1, t0=t, record=("first_spike_time",))[1]
        assert_same(out["first_spike_time"], state.tols)


def test_arrays_from_the_device_in_a_list_stay_there():
    tau_m = [jnp.float32(9), 20.0]
    with jax.transfer_guard_device_to_host("disallow"):
        _, out = slif.sweep(CELL, np.full((9, 2), 7), over={"tau_m": tau_m}, dt=DT, record=("v",))
        run = functools.partial(slif.sweep, currents=np.full((9, 2), 7), dt=DT)
        jax.jit(lambda cell, x: run(cell, over={"tau_m": [x, 20.0]}))(CELL, tau_m[0])
    assert_same(out["v"], slif.sweep(CELL, np.full((9, 2), 7), over={"tau_m": [9, 20]}, dt=DT, record=("v",))[1]["v"])
    with pytest.raises(ValueError, match=r"^tau_m: expected values of one shape, got shapes"):
        slif.sweep(CELL, np.full((9, 2), 7), over={"tau_m": [jnp.ones(2), 20.0]}, dt=DT)


def test_packing_of_64_bits():
    for spikes in (np.full((1, 9), 2**32), np.full((1, 9), 1e-300), np.full((1, 9), np.nan)):
        np.testing.assert_array_equal(slif.pack_spikes(spikes), [[255, 1]])


SLOPES = {
    "secant": (slif.secant(), lambda x: (x > 0) / np.cosh(0.08 * x)),
    "fast_sigmoid": (slif.fast_sigmoid(2), lambda x: (1 + 2 * abs(x)) ** -2),
    "sigmoid": (slif.sigmoid(1), lambda x: 1 / (2 + np.exp(x) + np.exp(-x))),
    "arctan": (slif.arctan(1), lambda x: 0.5 / (1 + (np.pi * x / 2) ** 2)),
    "triangular": (slif.triangular(4), lambda x: np.maximum(0, 1 - abs(x) / 4)),
    "boxcar": (slif.boxcar(1), lambda x: abs(x) <= 1),
    "gaussian": (slif.gaussian(0.5), lambda x: np.exp(-2 * x * x) / (0.5 * np.sqrt(2 * np.pi))),
    "straight_through": (slif.straight_through(), np.ones_like),
    "custom": (slif.custom(lambda x: 1 / (1 + x * x)), lambda x: 1 / (1 + x * x)),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_of_integers_are_those_of_the_same_floats(name):
    surrogate, slope = SLOPES[name]
    four = np.arange(-1, 3)
    for x in (3, True, np.int64(2), four, four.astype(np.uint8) // 9, [0, 1, 2, 3], four > 0, jnp.array(four)):
        h = surrogate(x)
        assert h.dtype == np.float32
        np.testing.assert_allclose(h, slope(np.asarray(x, np.float64)), rtol=1e-5, atol=1e-30)
    assert surrogate(jnp.ones(4, jnp.bfloat16)).dtype == surrogate(np.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.isfinite(surrogate(2**40))
    if surrogate.numbers:  # one per unit
        (number, *_), (name, *_) = surrogate.numbers.values(), surrogate.numbers
        each = surrogate.replace(numbers=surrogate.numbers | {name: np.full(3, number)})
        assert_same(each(np.ones((1, 3))), surrogate(np.ones((1, 3))))
        with pytest.raises(ValueError, match=f"^surrogate {name}: expected a shape to go with x"):
            each(np.ones(4))


def test_numbers_of_a_slope_are_held_against_the_dtype_in_which_they_are_used():
    assert slif.fast_sigmoid(2**40)(0.0) == 1.0
    for surrogate in (slif.gaussian(1e-40), slif.arctan(1e39)):
        for call in (surrogate, lambda x, surrogate=surrogate: make_params(n_units=2, surrogate=surrogate)):
            with pytest.raises(ValueError, match=r"^surrogate (width|alpha): expected .* in float32, got"):
                call(1.0)
        with enable_x64():
            assert surrogate(np.float64(0)) > 1e38
    assert slif.secant(c1=1e30, c2=1e30, scaled=True)(np.float32(1)) == 0.0


def test_an_index_from_the_device_is_one_of_jax():
    over = {"tau_m": [5.0, 9.0]}
    ks = {0: 5.0, 1: 9.0, 2: 9.0, 10**6: 9.0, -1: 9.0}
    assert {k: float(slif.point(CELL, over, jnp.int32(k)).tau_m) for k in ks} == ks


def guarded_calls():
    """Every public function, with numbers from Python, NumPy and the device: a name, and a call."""
    key, raw = jax.random.key(0), np.asarray(jax.random.PRNGKey(0))
    x, valid, one = np.full((4, 3, 2), 7), np.ones((4, 3), bool), jnp.int32(1)
    more = {"resist_inh": 0.3, "refract_time": np.float32(1), "thr_gain": [0.1, 0.2], "thr_leak": np.array(0.1)}
    given = {name: number for name, number in HYPER.items() if name != "dt"} | more | {"thr_jitter": 0.1}
    params = slif.init_params(raw, 2, **given)
    p, s = jax.tree.map(np.asarray, (params, slif.init_state(params, 3)))
    yield "init_params", lambda: slif.init_params(raw, 2, **given)
    yield "init_params, typed key", lambda: slif.init_params(key, 2, **given | {"thr": [1, 2], "rho_b": 0.1})
    yield "init_state", lambda: slif.init_state(p, (3,))
    yield "step", lambda: slif.step(p, s, x[0], 1, np.float64(DT))
    yield "reset", lambda: slif.reset(p, s, where=np.array([True, False, True]), fields=("v",))
    yield "detach", lambda: slif.detach(s)
    yield "simulate", lambda: slif.simulate(p, s, x, dt=DT, t0=3, valid=valid)
    over = {"tau_m": [5.0, 9.0], "thr": np.ones((2, 2)), "surrogate.c2": [0.1, 0.2], "resist_inh": range(1, 3)}
    over = {name: list(numbers) for name, numbers in over.items()}
    options = {"over": over, "dt": DT, "batch_size": 1, "state": s, "valid": valid}
    yield "sweep", lambda: slif.sweep(p, x, **options, progress=lambda *_: None)
    yield "sweep over currents", lambda: slif.sweep(p, None, over={"currents": np.stack([x, x]), "dt": [1, 2]})
    yield "point", lambda: slif.point(p, over, 1)
    yield "point by the device", lambda: slif.point(p, over, one)
    yield "grid", lambda: slif.grid(tau_m=[5.0, 9], dt=range(1, 3), thr=np.arange(2), thr_gain=[2**40])
    yield "pack_spikes", lambda: slif.pack_spikes(x)
    yield "unpack_spikes", lambda: slif.unpack_spikes(np.ones((2, 2), np.uint8), 9)
    yield "unpack_spikes, none", lambda: slif.unpack_spikes(np.ones((0, 2), np.uint8), 9)
    for name, (surrogate, _) in SLOPES.items():
        yield name, lambda surrogate=surrogate: surrogate(np.arange(4))
    yield "a slope of one number", lambda: slif.secant()(0.5)
    hyper = HYPER | more | {"thr_jitter": 0.1}
    layer, cell = (kind(2, **hyper, rngs=nnx.Rngs(0)) for kind in (slif.nnx.SLIF, slif.nnx.SLIFCell))
    carry = jax.tree.map(np.asarray, cell.initialize_carry((3, 2)))
    rngs = nnx.Rngs(0)
    yield "nnx", lambda: slif.nnx.SLIF(2, **hyper, rngs=rngs)
    yield "nnx call", lambda: layer(x, initial_state=s, valid=valid, return_state=True)
    yield "nnx params", lambda: layer.slif_params()
    yield "nnx carry", lambda: cell.initialize_carry((3, 2))
    yield "nnx cell", lambda: cell(carry, x[0])
    hyper |= {"surrogate": slif.arctan(), "learn": ("tau_m", "thr", "resist_inh", "inh_weights")}
    of_linen, cell_of_linen = slif.linen.SLIF(2, **hyper), slif.linen.SLIFCell(2, **hyper)
    learned = of_linen.init(key, x)
    yield "linen", lambda: slif.linen.SLIF(2, **hyper)
    yield "linen init", lambda: of_linen.init(key, x)
    yield "linen apply", lambda: of_linen.apply(learned, x, initial_state=s, valid=valid)
    yield "linen params", lambda: of_linen.apply(learned, method="slif_params")
    yield "linen carry", lambda: cell_of_linen.apply(learned, None, (3, 2), method="initialize_carry")
    yield "linen cell", lambda: cell_of_linen.apply(learned, carry, x[0])


def test_numbers_from_the_host_go_to_the_device_explicitly():
    for name, call in guarded_calls():
        try:
            with jax.transfer_guard("disallow"):
                call()
        except Exception as error:
            raise AssertionError(name) from error
