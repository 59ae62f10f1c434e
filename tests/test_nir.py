"""NIR: a plain cell converts and comes back unchanged, nothing is lost silently, and others get the same spikes."""

import functools
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import N_UNITS, assert_same, enable_x64, make_params
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import slif
import slif.linen

nir = pytest.importorskip("nir")
from slif.nir import from_nir, to_nir  # noqa: E402

DT = 1.0
PLAIN = {"plain": {}, "short": {"refract_time": DT, "sticky_spikes": True}, "traced": {"thr_gain": np.float32(0)}}
LOST = {
    "refractory": ["refract_time > dt"],
    "sticky": ["refract_time > dt", "sticky_spikes"],
    "gain": ["thr_gain"],
    "leak": ["thr_leak"],
    "sparsity": ["rho_b"],
    "inhibition": ["resist_inh with inh_weights"],
    "everything": ["refract_time > dt", "sticky_spikes", "thr_gain", "thr_leak", "resist_inh with inh_weights"],
    "sparse_everything": ["refract_time > dt", "sticky_spikes", "rho_b", "resist_inh with inh_weights"],
    "voltage": ["refract_time > dt", "thr_gain"],
}


def through_a_file(node, path):
    nir.write(path, nir.NIRGraph.from_list(node))
    (node,) = (n for n in nir.read(path).nodes.values() if isinstance(n, nir.LIF))
    return node


# --- out and back ---


@pytest.mark.parametrize("arguments", PLAIN.values(), ids=PLAIN)
def test_a_plain_cell_is_a_lif_node(arguments, tmp_path):
    params = make_params(**arguments)
    node = to_nir(params, dt=DT)
    assert type(node) is nir.LIF
    assert node.metadata == {}
    np.testing.assert_allclose(node.tau, np.full(N_UNITS, 0.02), rtol=1e-12)
    np.testing.assert_array_equal(node.r, np.full(N_UNITS, 1.5))
    np.testing.assert_array_equal(node.v_threshold, params.thr)
    np.testing.assert_array_equal(node.v_leak, np.zeros(N_UNITS))
    np.testing.assert_array_equal(node.v_reset, np.zeros(N_UNITS))
    for back in (from_nir(node, dt=DT), from_nir(through_a_file(node, tmp_path / "a.nir"), dt=DT)):
        assert_same(back, make_params())


@given(tau=st.floats(2**-10, 1e6, width=32), r=st.floats(-1e6, 1e6, width=32), thr=st.floats(-1e3, 1e3, width=32))
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
def test_every_bit_of_float32_comes_back(tau, r, thr):
    numbers = {"tau_m": tau, "resist_m": r, "thr": thr}
    params = slif.SLIFParams(**{name: jnp.full(2, x, jnp.float32) for name, x in numbers.items()})
    back = from_nir(to_nir(params, dt=DT), dt=DT)
    for name in numbers:
        np.testing.assert_array_equal(np.broadcast_to(getattr(back, name), 2), getattr(params, name))


def test_numbers_of_each_unit():
    params = make_params(tau_m=np.linspace(5, 40, N_UNITS), resist_m=np.linspace(1, 2, N_UNITS))
    assert_same(from_nir(to_nir(params, dt=DT), dt=DT), params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes(dtype, tmp_path):
    """With a step that none of them holds exactly."""
    with enable_x64():
        params = make_params("everything", surrogate=slif.arctan())
        params = jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(dtype)), params)
        with pytest.warns(UserWarning, match="thr_gain"):
            node = to_nir(params, dt=0.1, strict=False)
        back = from_nir(through_a_file(node, tmp_path / "a.nir"), dt=0.1)
        wide = jnp.promote_types(dtype, jnp.float32)
        assert back.thr.dtype == wide
        rtol = 1e-15 if dtype == "float64" else 0
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.astype(wide), rtol=rtol), back, params)


# --- what NIR cannot express ---


@pytest.mark.parametrize("mechanism", LOST)
def test_strict_lists_all_that_would_be_lost(mechanism):
    with pytest.raises(ValueError, match="params: NIR has no") as raised:
        to_nir(make_params(mechanism), dt=0.25)
    told = str(raised.value).removeprefix("params: NIR has no ").split(";")[0]
    assert sorted(told.split(", no ")) == sorted(LOST[mechanism])


@pytest.mark.parametrize("mechanism", LOST)
@pytest.mark.parametrize("surrogate", [None, slif.gaussian(0.5, detach_reset=False)])
def test_what_is_lost_is_kept_in_the_metadata(mechanism, surrogate, tmp_path):
    overrides = {} if surrogate is None else {"surrogate": surrogate}
    params = make_params(mechanism, **overrides)
    with pytest.warns(UserWarning, match="without") as warned:
        node = to_nir(params, dt=0.25, strict=False)
    assert all(name in str(warned[0].message) for name in LOST[mechanism])
    assert warned[0].filename == __file__
    assert_same(from_nir(node, dt=0.25), params)
    node = through_a_file(node, tmp_path / "a.nir")
    assert_same(from_nir(node, dt=0.25), params)
    if set(LOST[mechanism]) - {"refract_time > dt", "sticky_spikes"}:
        with pytest.raises(ValueError, match=r"dt: expected 0\.25"):
            from_nir(node, dt=0.5)


def test_nothing_is_warned_about_where_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(from_nir(to_nir(make_params(), dt=DT, strict=False), dt=DT), make_params())


@pytest.mark.parametrize("make", [slif.arctan, slif.straight_through, lambda: slif.secant(c2=0.1, squared=True)])
def test_a_surrogate_comes_back(make, tmp_path):
    params = make_params(surrogate=make())
    node = to_nir(params, dt=DT)
    for back in (from_nir(node, dt=DT), from_nir(through_a_file(node, tmp_path / "a.nir"), dt=DT)):
        assert_same(back, params)


def test_a_surrogate_of_ones_own():
    params = make_params(surrogate=slif.custom(jnp.cos))
    with pytest.raises(ValueError, match="surrogate of your own"):
        to_nir(params, dt=DT)
    with pytest.warns(UserWarning, match="surrogate"):
        node = to_nir(params, dt=DT, strict=False)
    assert_same(from_nir(node, dt=DT), make_params())


def lif(n=2, **fields):
    default = {"tau": 0.02, "r": 1.0, "v_leak": 0.0, "v_threshold": 0.4, "v_reset": 0.0}
    metadata = fields.pop("metadata", {})
    fields = {name: np.broadcast_to(np.asarray(x, np.float32), n) for name, x in (default | fields).items()}
    return nir.LIF(**fields, metadata=metadata)


def kept(dt=DT, **params):
    return {"slif": {"params": params, "dt": dt}}


def kept_alpha(alpha):
    return {"slif": {"surrogate": {"kind": "arctan", "numbers": {"alpha": alpha}, "detach_reset": True}}}


def test_nodes_of_others():
    params = from_nir(lif((), metadata={"made by": "another"}), dt=DT, n_units=3)
    assert params.thr.shape == (3,)
    assert params.tau_m.shape == ()
    integers = {"r": 2, "v_leak": 0, "v_threshold": 1, "v_reset": 0}
    node = nir.LIF(tau=np.array([0.01, 0.02]), **{name: np.array([x, x]) for name, x in integers.items()})
    params = from_nir(node, dt=DT)
    assert params.thr.dtype == np.float32
    np.testing.assert_array_equal(params.tau_m, [10, 20])


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        (lif(v_leak=0.1), ValueError, "v_leak"),
        (lif(v_reset=[0.0, -0.1]), ValueError, "v_reset"),
        (lif((2, 3)), ValueError, "v_threshold"),
        (lif(()), ValueError, "n_units"),
        (lif(tau=0.0), ValueError, "tau_m"),
        (lif(tau=np.nan), ValueError, "tau_m"),
        (lif(r=np.inf), ValueError, "resist_m"),
        (lif(v_threshold=np.nan), ValueError, "thr"),
        (lif(v_threshold=-np.inf), ValueError, "thr"),
        (lif(v_leak=np.nan), ValueError, "v_leak"),
        (lif((0,)), ValueError, "v_threshold"),
        (lif(metadata=None), ValueError, "metadata"),
        (lif(metadata={"slif": {"params": 3}}), ValueError, "metadata"),
        (lif(metadata={"slif": {"params": {3: 3}}}), ValueError, "metadata"),
        (lif(metadata={"slif": {"surrogate": {"kind": "arctan", "numbers": 2}}}), ValueError, "metadata"),
        (lif(metadata={"slif": 3}), ValueError, "metadata"),
        (lif(metadata={"slif": {"params": {"more": 1}}}), ValueError, "metadata"),
        (lif(metadata={"slif": {"params": {"sticky_spikes": "no"}}}), TypeError, "sticky_spikes"),
        (lif(metadata={"slif": {"params": {"inh_weights": np.ones(3)}, "dt": DT}}), ValueError, "inh_weights"),
        (lif(metadata={"slif": {"surrogate": {"kind": "other"}}}), ValueError, "surrogate"),
        *(
            (lif(metadata=kept_alpha(x)), ValueError, "surrogate.alpha")
            for x in (0.0, -1.0, np.nan, jnp.float32(-1), 1e-50)
        ),
        *((lif(metadata=kept_alpha(x)), TypeError, "surrogate.alpha") for x in ("2", None)),
        (lif(metadata=kept_alpha([[1.0], [2.0, 3.0]])), ValueError, "surrogate.alpha"),
        *((lif(metadata=kept(refract_time=x)), ValueError, "refract_time") for x in (-1.0, np.nan, jnp.float32(-1))),
        *((lif(metadata=kept(rho_b=x)), ValueError, "rho_b") for x in (np.inf, np.ones(2), jnp.float32(jnp.nan))),
        *((lif(metadata=kept(thr_gain=x)), TypeError, "thr_gain") for x in ("1", None, 1j, np.timedelta64(1, "s"))),
        *((lif(metadata=kept(thr_gain=1.0, dt=x)), ValueError, "dt") for x in (None, "1", [1.0], np.ones(1), 10**400)),
        (nir.LI(*(np.ones(2) for _ in range(3))), TypeError, "node"),
        (nir.NIRGraph.from_list(lif()), TypeError, "node"),
        (None, TypeError, "node"),
    ],
)
def test_a_node_that_does_not_fit(node, error, message):
    with pytest.raises(error, match=f"^{message}: expected .+, got "):
        from_nir(node, dt=DT)


@pytest.mark.parametrize("name", ["tau", "r", "v_leak", "v_threshold", "v_reset"])
def test_a_field_that_is_no_array_of_numbers(name):
    for value in (
        None,
        "0.1",
        object(),
        [[1.0], [2.0, 3.0]],
        np.ones(2, complex),
        np.ones(2, "m8[s]"),
        jax.random.key(0),
    ):
        node = lif()
        setattr(node, name, value)
        with pytest.raises(TypeError, match=f"^{name}: expected an array of real numbers, got "):
            from_nir(node, dt=DT)


def test_bad_arguments():
    params, scalar = make_params(), lif(())
    cases = [
        *(("params", TypeError, lambda x=x: to_nir(x, dt=DT)) for x in (None, lif(), {}, 3)),
        *(("strict", TypeError, lambda x=x: to_nir(params, dt=DT, strict=x)) for x in (None, "no", 1)),
        *(("node", TypeError, lambda x=x: from_nir(x, dt=DT)) for x in (None, params, "a.nir")),
    ]
    for error, values in {
        TypeError: (None, "1", 1j, True, object(), np.timedelta64(1, "s")),
        ValueError: (
            [[1.0], [2.0, 3.0]],
            10**400,
            0,
            -1.0,
            np.nan,
            np.inf,
            np.ones(2),
            jnp.ones(1),
            jnp.float32(-1),
            jnp.float32(jnp.nan),
        ),
    }.items():
        cases += [("dt", error, lambda x=x: to_nir(params, dt=x)) for x in values]
        cases += [("dt", error, lambda x=x: from_nir(lif(), dt=x)) for x in values]
    for node in (lif(), scalar):
        types = ("3", 2.0, True, [3], np.ones(1), np.timedelta64(3, "s"))
        cases += [("n_units", TypeError, lambda x=x, node=node: from_nir(node, dt=DT, n_units=x)) for x in types]
        cases += [("n_units", ValueError, lambda x=x, node=node: from_nir(node, dt=DT, n_units=x)) for x in (0, -1)]
    cases += [("n_units", ValueError, lambda x=x: from_nir(scalar, dt=DT, n_units=x)) for x in (None, 2**40, 10**400)]
    cases += [("v_threshold", ValueError, lambda: from_nir(lif(), dt=DT, n_units=3))]
    for name, value in (("thr", jnp.ones((3, N_UNITS))), ("tau_m", jnp.float32(-1)), ("resist_m", jnp.float32(np.nan))):
        cases += [(name, ValueError, functools.partial(to_nir, params.replace(**{name: value}), dt=DT))]
    slope = params.replace(surrogate=slif.arctan(jnp.float32(-2)))
    cases += [("surrogate.alpha", ValueError, lambda: to_nir(slope, dt=DT))]
    for name, error, call in cases:
        with pytest.raises(error, match=f"^{name}: expected .+, got "):
            call()


def test_a_unit_that_never_fires(tmp_path):
    params = make_params().replace(thr=jnp.full(N_UNITS, jnp.inf))
    assert_same(from_nir(through_a_file(to_nir(params, dt=DT), tmp_path / "a.nir"), dt=DT), params)


# --- a Flax model as a graph, as in the guides ---

CELLS = {"dt": DT, "tau_m": 8.0, "resist_m": 1.3, "thr": 0.4}


class Network(nn.Module):
    def setup(self):
        self.dense = nn.Dense(9)
        self.slif = slif.linen.SLIF(9, learn=("resist_m",), **CELLS)

    def __call__(self, x):
        return self.slif(self.dense(x))

    def nodes(self):
        dense = self.dense.variables["params"]
        return nir.Affine(np.asarray(dense["kernel"]).T, np.asarray(dense["bias"])), to_nir(
            self.slif.slif_params(), dt=DT
        )


def test_a_flax_model_goes_out_and_comes_back(tmp_path):
    net, x = Network(), jax.random.normal(jax.random.key(0), (50, 4, 6)) * 3
    variables = net.init(jax.random.key(1), x)
    variables["params"]["slif"]["logscale_resist_m"] = jnp.float32(0.3)
    nir.write(tmp_path / "a.nir", nir.NIRGraph.from_list(*net.apply(variables, method="nodes")))

    graph = nir.read(tmp_path / "a.nir")
    affine, params = graph.nodes["affine"], from_nir(graph.nodes["lif"], dt=DT)
    numbers = {name: getattr(params, name) for name in ("tau_m", "resist_m", "thr")}
    model = nn.Sequential([nn.Dense(9), slif.linen.SLIF(9, dt=DT, thr_jitter=0.0, **numbers)])
    dense = {"kernel": affine.weight.T, "bias": affine.bias}
    expected = net.apply(variables, x)
    assert 0.02 < expected.mean() < 0.9
    np.testing.assert_array_equal(model.apply({"params": {"layers_0": dense}}, x), expected)


# --- replayed by others, which import the graph and take Euler steps of the same length ---


def run(params, currents, dt, margin=1e-5):
    """The spikes, and which units never come so near their threshold that rounding decides."""
    _, out = slif.simulate(params, slif.init_state(params, currents.shape[1]), currents, dt=dt, record=("s", "v"))
    v = np.asarray(out["v"])
    before = np.concatenate([np.zeros_like(v[:1]), v[:-1]])
    u = before + (currents * np.asarray(params.resist_m) - before) / np.asarray(params.tau_m) * dt
    return np.asarray(out["s"]), (np.abs(u - np.asarray(params.thr)) > margin).all(0)


@pytest.fixture
def example():
    """Weights, currents and the spikes that a Dense + SLIF pair makes of random input."""

    def make(params, dt):
        rng = np.random.default_rng(0)
        x = rng.normal(0, 3, (200, 4, 6)).astype(np.float32)
        shapes, scale = ((params.n_units, 6), params.n_units), 0.4 / dt  # short steps need more to fire
        weight, bias = (rng.normal(0, scale, shape).astype(np.float32) for shape in shapes)
        currents = x @ weight.T + bias
        spikes, clear = run(params, currents, dt)
        assert 0.01 < spikes.mean() < 0.5
        assert clear.mean() > 0.9
        return SimpleNamespace(x=x, weight=weight, bias=bias, spikes=spikes, clear=clear)

    return make


@pytest.mark.filterwarnings("ignore:nirtorch.load:DeprecationWarning")  # Norse's own call
@pytest.mark.parametrize("dt", [1.0, 0.25])
def test_replay_by_norse(dt, example):
    """Norse takes dt and a threshold for each unit; it ignores r, which the weights must absorb."""
    torch, norse = pytest.importorskip("torch"), pytest.importorskip("norse.torch")
    params = make_params(n_units=30, tau_m=np.linspace(5, 30, 30))
    case = example(params, dt)
    node = to_nir(params, dt=dt)
    affine = nir.Affine(case.weight * node.r[:, None], case.bias * node.r)
    model = norse.from_nir(nir.NIRGraph.from_list(affine, node), dt=dt / 1000, ignore_warnings=True)
    state, spikes = None, []
    for x in torch.from_numpy(case.x):
        z, state = model(x, state)
        spikes.append(z.detach().numpy())
    np.testing.assert_array_equal(np.stack(spikes)[:, case.clear], case.spikes[:, case.clear])


def test_replay_by_snntorch(example):
    """snnTorch runs every graph at 0.1 ms, with one threshold for all units, which it divides by r dt / tau."""
    torch, snntorch = pytest.importorskip("torch"), pytest.importorskip("snntorch.import_nir")
    dt = 0.1
    params = make_params(n_units=30, thr_jitter=0.0)
    case = example(params, dt)
    graph = nir.NIRGraph.from_list(nir.Affine(case.weight, case.bias), to_nir(params, dt=dt))
    model = snntorch.import_from_nir(graph)
    spikes = [model(x)[0].detach().numpy() for x in torch.from_numpy(case.x)]
    np.testing.assert_array_equal(np.stack(spikes)[:, case.clear], case.spikes[:, case.clear])
