"""Sweeps are separate runs, point for point, in one program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, DT, N_UNITS, assert_agree, assert_same, make_currents, make_params

import slif

CURRENTS = make_currents((24, N_UNITS))
SCALARS = {
    "tau_m": [5.0, 20.0, 80.0],
    "resist_m": [-1.0, 0.0, 2.0],
    "thr": [0.1, 0.4, -0.2],
    "refract_time": [0.0, 0.25, 3.0],
    "thr_gain": [0.0, 0.1, -0.1],
    "thr_leak": [0.0, 0.01, 0.5],
    "rho_b": [-0.1, 0.0, 0.02],
    "resist_inh": [-0.5, 0.0, 0.5],
    "dt": [0.1, 0.25, 1.0],
}


def separate(params, over, currents=CURRENTS, state=None, dt=DT, stack=np.stack, **options):
    """One run of `simulate` per point."""
    results = []
    for k in range(len(next(iter(over.values())))):
        values = {name: x[k] for name, x in over.items()}
        step, j = values.pop("dt", dt), values.pop("currents", currents)
        leaves = {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
        if "thr" in leaves:
            leaves["thr"] = jnp.broadcast_to(leaves["thr"], params.thr.shape)
        own = params.replace(**leaves)
        start = slif.init_state(own, j.shape[1:-1]) if state is None else state(k)
        start = slif.reset(own, start, fields=("thr",)) if "thr" in leaves else start
        results.append(slif.simulate(own, start, j, dt=step, **options))
    return jax.tree.map(lambda *x: stack(x), *results)


def assert_points(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert_agree(a if isinstance(a, dict) else vars(a), e if isinstance(e, dict) else vars(e))


def test_grid_is_the_product():
    axes = {"thr": np.array([0.4, 0.5]), "tau_m": [10.0, 20.0, 30.0], "dt": (0.1, 1)}
    points = slif.grid(**axes)
    assert list(points) == list(axes)
    expected = np.array(list(itertools.product(*axes.values())), np.float32)
    np.testing.assert_array_equal(np.stack(list(points.values()), -1), expected)


@pytest.mark.parametrize(
    "names", [("tau_m", "thr_gain", "dt"), ("resist_m", "refract_time", "rho_b"), ("thr", "thr_leak"), ("resist_inh",)]
)
def test_one_number_a_point(names):
    params = make_params("inhibition" if names == ("resist_inh",) else "sticky")
    over = {name: SCALARS[name] for name in names}
    actual = slif.sweep(params, CURRENTS, over=over, dt=None if "dt" in names else DT, record=("s", "tols"))
    assert_points(actual, separate(params, over, record=("s", "tols")))


@pytest.mark.parametrize("names", [("tau_m", "thr_gain"), ("thr", "refract_time")])
def test_one_number_a_unit(names):
    rng = np.random.default_rng(0)
    over = {name: rng.uniform(0.2, 2, (3, N_UNITS)) for name in names}
    params = make_params("sticky")
    assert_points(slif.sweep(params, CURRENTS, over=over, dt=DT), separate(params, over))


def test_one_inhibition_a_point():
    over = {"inh_weights": np.random.default_rng(0).uniform(0, 0.1, (3, N_UNITS, N_UNITS))}
    params = make_params("inhibition")
    assert_points(slif.sweep(params, CURRENTS, over=over, dt=DT), separate(params, over))
    bare, both = make_params("sticky"), over | {"resist_inh": [0.1, 0.2, 0.3]}
    swept, alone = slif.sweep(bare, CURRENTS, over=both, dt=DT), separate(bare, both)
    assert_points(swept, alone)


@pytest.mark.parametrize("mechanism", ["everything", "sparse_everything", "soft", "voltage"])
def test_mechanisms_under_a_grid(mechanism):
    over = slif.grid(tau_m=[10.0, 30.0], refract_time=[0.0, 1.0], dt=[0.2, 0.5])
    params, currents = make_params(mechanism), make_currents((24, BATCH, N_UNITS))
    assert_points(slif.sweep(params, currents, over=over, t0=3.0), separate(params, over, currents, t0=3.0))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_chunks_are_the_whole(batch_size):
    over, params = {"tau_m": np.linspace(5, 30, 5)}, make_params("refractory")
    options = {"over": over, "dt": DT, "record": ("s", "s_packed", "spike_count")}
    whole = slif.sweep(params, CURRENTS, **options)
    assert_points(slif.sweep(params, CURRENTS, **options, batch_size=batch_size), whole)
    told = []
    options |= {"batch_size": batch_size, "progress": lambda done, n: told.append((done, n))}
    assert_points(slif.sweep(params, CURRENTS, **options), whole)
    assert told == [(min(k, 5), 5) for k in range(batch_size, 5 + batch_size, batch_size)]


def test_currents_and_states_of_their_own():
    params, currents = make_params("sticky"), make_currents((3, 24, 2, N_UNITS))
    over = {"currents": currents, "thr": [0.2, 0.4, 0.6]}
    assert_points(slif.sweep(params, None, over=over, dt=DT), separate(params, over))
    shared = slif.init_state(params, 2).replace(v=jnp.full((2, N_UNITS), 0.3))
    each = jax.tree.map(lambda x: jnp.stack([x, x + 0.1, x - 0.1]), shared)
    for state, of in ((shared, lambda k: shared), (each, lambda k: jax.tree.map(lambda x: x[k], each))):
        actual = slif.sweep(params, None, over=over, dt=DT, state=state)
        assert_points(actual, separate(params, over, state=of))


def test_a_masked_sweep():
    params, currents = make_params("sticky"), make_currents((24, 2, N_UNITS))
    valid = np.random.default_rng(0).random((24, 2)) < 0.7
    over = {"tau_m": [5.0, 20.0]}
    options = {"valid": valid, "spike_dtype": bool}
    assert_points(
        slif.sweep(params, currents, over=over, dt=DT, **options), separate(params, over, currents, **options)
    )


def test_one_compilation_whatever_the_values(compilations):
    params = make_params()

    def run(scale):
        over = {"tau_m": np.array([5.0, 9.0]) * scale, "dt": np.array([0.1, 0.2]) * scale}
        return slif.sweep(params, CURRENTS, over=over, t0=scale, batch_size=1)

    run(1.0)
    compilations()
    run(2.0)
    assert compilations() == 0


@pytest.mark.parametrize(("surrogate", "batch_size"), [("secant", None), ("arctan", 2)])
def test_gradients_are_those_of_separate_runs(surrogate, batch_size):
    params = make_params("plain", surrogate=getattr(slif, surrogate)())
    bars = np.random.default_rng(1).normal(size=(3, *CURRENTS.shape)).astype(np.float32)

    def loss(run, resist_m, tau_m, currents):
        out = run({"resist_m": resist_m, "tau_m": tau_m}, currents)[1]
        return jnp.vdot(out["s"], bars) + jnp.vdot(out["spike_count"], bars[:, 0])

    points = (jnp.array([1.0, 1.5, 2.0]), jnp.array([10.0, 20.0, 40.0]), jnp.asarray(CURRENTS))
    options = {"dt": DT, "record": ("s", "spike_count")}
    runs = (
        lambda over, j: slif.sweep(params, j, over=over, batch_size=batch_size, **options),
        lambda over, j: separate(params, over, j, stack=jnp.stack, **options),
    )
    swept, alone = (jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(run, *points) for run in runs)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-5), swept, alone)


def test_numbers_of_the_surrogate():
    """One per unit, in value and gradient; spikes that all points share have a derivative for each."""
    params, record = make_params("voltage"), ("s", "spike_count", "surrogate")
    alpha = np.random.default_rng(0).uniform(0.1, 9, (2, N_UNITS)).astype(np.float32)

    def swept(currents):
        _, out = slif.sweep(params, currents, over={"surrogate.alpha": alpha}, dt=DT, record=record)
        return (out["s"] * jnp.cos(currents)).sum() + out["spike_count"].sum(), out

    def alone(currents):
        owns = [params.replace(surrogate=slif.arctan(alpha=jnp.asarray(x))) for x in alpha]
        runs = [slif.simulate(own, slif.init_state(own), currents, dt=DT, record=record)[1] for own in owns]
        out = jax.tree.map(lambda *x: jnp.stack(x), *runs)
        return (out["s"] * jnp.cos(currents)).sum() + out["spike_count"].sum(), out

    with jax.numpy_rank_promotion("allow"):
        gradient, out = jax.jit(jax.grad(swept, has_aux=True))(CURRENTS)
        expected, separate_out = jax.jit(jax.grad(alone, has_aux=True))(CURRENTS)
    assert_agree(out, separate_out)
    assert np.abs(out["surrogate"][0] - out["surrogate"][1]).max() > 0.1
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)

    over = slif.grid(**{"tau_m": [5.0, 20.0], "surrogate.alpha": [0.5, 8.0]})
    own = slif.point(params, over, 1)
    assert_same((own.tau_m, own.surrogate.numbers), (np.float32(5), {"alpha": np.float32(8)}))
    with pytest.raises(ValueError, match=r"^over: expected names among .*, surrogate\.alpha, got surrogate\.slope$"):
        slif.point(params, {"surrogate.slope": [1.0]}, 0)


def test_shared_arrays_are_not_copied():
    """No temporary as large as P times the currents, if only counts are requested."""
    params, n_points = make_params("plain", n_units=100), 64
    currents = jax.ShapeDtypeStruct((200, 100), jnp.float32)
    taus = jax.ShapeDtypeStruct((n_points,), jnp.float32)

    def run(taus, currents):
        return slif.sweep(params, currents, over={"tau_m": taus}, dt=DT, record=("spike_count",), implementation="xla")[
            1
        ]

    memory = jax.jit(run).lower(taus, currents).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n_points * 200 * 100


def test_batch_size_bounds_the_backward_pass():
    params = make_params("plain", n_units=100, surrogate=slif.arctan())
    currents = jax.ShapeDtypeStruct((200, 100), jnp.float32)

    def loss(taus, currents):
        options = {"dt": DT, "record": ("spike_count",), "batch_size": 8}
        return slif.sweep(params, currents, over={"tau_m": taus}, **options)[1]["spike_count"].sum()

    def memory(n_points):
        taus = jax.ShapeDtypeStruct((n_points,), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(taus, currents).compile().memory_analysis().temp_size_in_bytes

    assert memory(256) < 1.5 * memory(32)


def test_no_implicit_transfer():
    params, over = make_params(), {"tau_m": [5.0, 9.0, 20.0]}
    expected = slif.sweep(params, CURRENTS, over=over, dt=DT)
    with jax.transfer_guard("disallow"):
        for options in ({}, {"batch_size": 2}, {"batch_size": 2, "progress": lambda *_: None}):
            assert_points(
                jax.device_get(slif.sweep(params, CURRENTS, over=over, dt=DT, **options)), jax.device_get(expected)
            )


def test_inside_jit_and_vmap():
    params, over = make_params(), {"tau_m": jnp.array([5.0, 20.0])}
    expected = slif.sweep(params, CURRENTS, over=over, dt=DT)
    assert_same(jax.jit(lambda p, o, j: slif.sweep(p, j, over=o, dt=DT))(params, over, CURRENTS), expected)
    with pytest.raises(ValueError, match="progress: expected a call outside"):
        jax.jit(lambda o: slif.sweep(params, CURRENTS, over=o, dt=DT, batch_size=1, progress=print))(over)


ONE = {"tau_m": [5.0, 9.0]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"over": [1]}, TypeError, "over: expected a dict"),
        ({"over": {}}, ValueError, "over: expected names"),
        ({"over": {"tau": [1.0]}}, ValueError, "tau_m, .*got tau"),
        ({"over": {"tau_m": 1.0}}, ValueError, r"tau_m: expected shape \[P\] or \[P, N\]"),
        ({"over": {"tau_m": [[1.0]]}}, ValueError, "tau_m: expected shape"),
        ({"over": {"tau_m": []}}, ValueError, "P >= 1"),
        ({"over": {"tau_m": [0.0]}}, ValueError, "tau_m: expected values > 0"),
        ({"over": {"tau_m": [np.nan]}}, ValueError, "tau_m: expected finite"),
        ({"over": {"tau_m": ["a"]}}, TypeError, "tau_m: expected a real"),
        ({"over": {"surrogate.c2": [1.0, 0.0]}}, ValueError, r"surrogate\.c2: expected values > 0"),
        ({"over": {"surrogate.c2": np.ones((2, 2))}}, ValueError, r"surrogate\.c2: expected shape \[P\] or \[P, N\]"),
        ({"over": {"surrogate.alpha": [1.0]}}, ValueError, r"surrogate\.c1, surrogate\.c2, got surrogate\.alpha"),
        ({"over": {"rho_b": np.ones((2, N_UNITS))}}, ValueError, r"rho_b: expected shape \[P\]"),
        ({"over": {"tau_m": [1.0, 2.0], "thr": [1.0]}}, ValueError, "the same number of points"),
        ({"over": {"resist_inh": [1.0]}}, ValueError, "inh_weights"),
        ({"over": {"inh_weights": np.ones((1, N_UNITS, N_UNITS))}}, ValueError, "resist_inh"),
        ({"over": {"inh_weights": np.ones((1, N_UNITS))}}, ValueError, "resist_inh"),
        ({"over": {"dt": [1.0]}}, ValueError, "dt: expected a number or a sweep"),
        ({"over": {"dt": [-1.0]}, "dt": None}, ValueError, "dt: expected values > 0"),
        ({"dt": None}, ValueError, "dt: expected a number or a sweep"),
        ({"currents": None}, ValueError, "currents: expected an array or a sweep"),
        ({"over": {"currents": np.ones((2, 5, N_UNITS))}}, ValueError, "currents: expected an array or a sweep"),
        ({"over": {"currents": 1.0}, "currents": None}, TypeError, "currents: expected an array"),
        ({"over": {"currents": np.ones(3)}, "currents": None}, ValueError, "currents: expected shape"),
        ({"over": {"currents": np.array(1.0)}, "currents": None}, ValueError, "currents"),
        ({"currents": CURRENTS[0]}, ValueError, "currents: expected shape"),
        ({"currents": CURRENTS[:, :3]}, ValueError, "currents: expected shape"),
        ({"currents": "a"}, TypeError, "currents: expected an array"),
        ({"state": 1}, TypeError, "state: expected SLIFState"),
        ({"state": slif.init_state(make_params(), 3)}, ValueError, "state: expected fields of shape"),
        ({"t0": np.inf}, ValueError, "t0: expected finite"),
        ({"record": ("spikes",)}, ValueError, "record: expected names"),
        ({"record": "s"}, TypeError, "record: expected a tuple"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an int >= 1"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected an int"),
        ({"spike_dtype": "spikes"}, TypeError, "spike_dtype"),
        ({"valid": np.ones(3)}, TypeError, "valid: expected a boolean"),
        ({"valid": np.ones(3, bool)}, ValueError, "valid: expected shape"),
        ({"implementation": "cuda"}, ValueError, "implementation"),
        ({"progress": 1, "batch_size": 1}, TypeError, "progress: expected a function"),
        ({"progress": print}, ValueError, "progress: expected a batch_size"),
        ({"params": 1}, TypeError, "params: expected SLIFParams"),
    ],
)
def test_bad_input(arguments, error, message):
    arguments = {"params": make_params("sticky"), "currents": CURRENTS, "over": ONE, "dt": DT} | arguments
    with pytest.raises(error, match=message):
        slif.sweep(arguments.pop("params"), arguments.pop("currents"), **arguments)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({}, ValueError, "axes: expected one axis"),
        ({"a": 1.0}, ValueError, r"a: expected shape \[n\]"),
        ({"a": []}, ValueError, r"a: expected shape \[n\]"),
        ({"a": [[1.0]]}, ValueError, r"a: expected shape \[n\]"),
        ({"a": ["x"]}, TypeError, "a: expected a real"),
        ({"dt": [0.0]}, ValueError, "dt: expected values > 0"),
        ({"surrogate.slope": [-1.0]}, ValueError, r"surrogate\.slope: expected values > 0"),
    ],
)
def test_bad_axes(axes, error, message):
    with pytest.raises(error, match=message):
        slif.grid(**axes)
