"""The Flax layers: run as a Flax user runs them, and compared with the plain functions bit for bit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_agree, assert_same, jit_quickly
from flax import linen as nn
from flax import nnx, serialization

import slif
import slif.linen
import slif.nnx

T, B, N, DT = 60, 4, 100, 0.3
# Not powers of two, with which a product in the wrong order would round the same.
HYPER = {"tau_m": 17.3, "resist_m": 1.7, "thr": 0.41}
LAYERS = {
    "plain": {},
    "everything": {
        "resist_inh": 0.013,
        "refract_time": 0.7,
        "sticky_spikes": True,
        "thr_gain": 0.013,
        "thr_leak": 0.007,
        "surrogate": slif.arctan(),
        "learn": ("tau_m", "resist_m", "thr", "thr_gain"),
    },
    "sparse": {
        "rho_b": 0.0013,
        "tau_m": np.linspace(5, 30, N),
        "thr_jitter": 0.0,
        "surrogate": slif.arctan(),
        "learn": ("tau_m", "rho_b"),
    },
}
LEARN_ALL = {
    **LAYERS["everything"],
    "rho_b": 0.0013,
    "learn": ("tau_m", "resist_m", "thr", "thr_gain", "thr_leak", "rho_b", "resist_inh", "inh_weights"),
}


CURRENT = slif.custom(jnp.ones_like, wrt="current")


def currents(*shape):
    return np.random.default_rng(0).uniform(-1, 5, shape or (T, B, N)).astype(np.float32)


class Layer(NamedTuple):
    """A module of either framework as pure functions of its variables."""

    variables: Any
    call: Any  # (variables, *args, **kwargs) -> what the module returns
    params: Any  # variables -> SLIFParams
    trained: Any  # variables -> the arrays that an optimiser would update, by name

    def __call__(self, *args, **kwargs):
        return jax.jit(lambda variables, args: self.call(variables, *args, **kwargs))(self.variables, args)


def make(framework, kind="SLIF", rnn=None, seed=0, **hyper):
    """The layer SLIF, or its cell within RNN(cell, **rnn)."""
    options = {"dt": DT, **HYPER, **hyper}
    if framework == "linen":
        module = slif.linen.SLIF(N, **options) if kind == "SLIF" else nn.RNN(slif.linen.SLIFCell(N, **options), **rnn)
        variables = module.init(jax.random.key(seed), jnp.zeros((1, 1, N)))

        def own(variables):
            return variables["params"] if kind == "SLIF" else variables["params"]["cell"]

        def params(variables):
            return (module if kind == "SLIF" else module.cell).apply({"params": own(variables)}, method="slif_params")

        def trained(variables):
            mask = slif.linen.trainable(variables["params"])
            return {name: x for name, x in own(variables).items() if (mask if kind == "SLIF" else mask["cell"])[name]}

        return Layer(variables, module.apply, params, trained)

    options["rngs"] = nnx.Rngs(seed)
    module = slif.nnx.SLIF(N, **options) if kind == "SLIF" else nnx.RNN(slif.nnx.SLIFCell(N, **options), **rnn)
    graph, variables = nnx.split(module)

    def merged(variables):
        module = nnx.merge(graph, variables)
        return module if kind == "SLIF" else module.cell

    return Layer(
        variables,
        lambda variables, *args, **kwargs: nnx.merge(graph, variables)(*args, **kwargs),
        lambda variables: merged(variables).slif_params(),
        lambda variables: nnx.to_pure_dict(nnx.state(merged(variables), nnx.Param)),
    )


def plain(params, x, state=None, **options):
    state = slif.init_state(params, x.shape[1:-1]) if state is None else state
    return slif.simulate(params, state, x, dt=DT, **options)


@pytest.fixture(params=["linen", "nnx"])
def framework(request):
    return request.param


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_cell_equal_the_plain_functions(framework, name):
    x = currents()
    layer = make(framework, **LAYERS[name])
    state, out = plain(layer.params(layer.variables), x, record=("s", "v", "tols"))
    assert 0.01 < out["s"].mean() < 0.9
    assert_same(layer(x, record=("s", "v", "tols"), return_state=True), (out, state))

    cell = make(framework, "SLIFCell", {"time_major": True, "return_carry": True}, **LAYERS[name])
    expected = plain(cell.params(cell.variables), x)
    (state, count), spikes = cell(x)
    assert_same((state, {"s": spikes}), expected)
    assert_same(count, np.full(B, T, np.int32))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_linen_equals_nnx(name):
    thr = np.random.default_rng(1).uniform(0.3, 0.5, N)
    hyper = {**LAYERS[name], "thr": thr, "thr_jitter": 0.0, "resist_inh": 0.0}
    x = currents()
    assert_same(*(make(framework, **hyper)(x, return_state=True) for framework in ("linen", "nnx")))


def test_call_without_jit_equals_the_compiled_one(framework):
    layer = make(framework, **LAYERS["everything"])
    x = currents()
    assert_same(layer.call(layer.variables, x), layer(x))


def test_one_key_draws_what_init_params_draws(framework):
    hyper = {"resist_inh": 0.1, "thr_jitter": 0.2}
    layer = make(framework, seed=3, **hyper)
    if framework == "linen":

        class Probe(nn.Module):
            @nn.compact
            def __call__(self):
                return self.make_rng("params")

        key = Probe().apply({}, rngs={"params": jax.random.key(3)})
    else:
        key = nnx.Rngs(3).params()
    assert_same(layer.params(layer.variables), slif.init_params(key, N, **HYPER, **hyper))


def test_two_layers_of_a_model_draw_differently():
    model = nn.Sequential([slif.linen.SLIF(N, dt=DT, **HYPER), slif.linen.SLIF(N, dt=DT, **HYPER)])
    params = model.init(jax.random.key(0), jnp.zeros((1, N)))["params"]
    assert not (params["layers_0"]["fixed_thr"] == params["layers_1"]["fixed_thr"]).any()


def test_batch_first(framework):
    x = currents()
    valid = np.random.default_rng(2).random((T, B)) < 0.7
    first, last = make(framework, **LAYERS["plain"]), make(framework, time_major=False, **LAYERS["plain"])
    record = ("s", "v", "spike_count")
    expected, state = first(x, record=record, valid=valid, return_state=True)
    out, same = last(x.swapaxes(0, 1), record=record, valid=valid.T, return_state=True)
    assert_same(same, state)
    assert_same(
        out,
        {"s": expected["s"].swapaxes(0, 1), "v": expected["v"].swapaxes(0, 1)}
        | {"spike_count": expected["spike_count"]},
    )
    assert not np.asarray(out["s"])[~valid.T].any()
    spikes = make(framework, "SLIFCell", {}, **LAYERS["plain"])(x.swapaxes(0, 1))
    assert spikes.shape == (B, T, N)


@pytest.mark.parametrize("shape", [(T, N), (T, 2, 3, N)])
def test_batch_dimensions(framework, shape):
    x = currents(*shape)
    layer = make(framework)
    assert_same(layer(x), plain(layer.params(layer.variables), x)[1]["s"])
    cell = make(framework, "SLIFCell", {"time_major": True})
    assert_same(cell(x), plain(cell.params(cell.variables), x)[1]["s"])


def test_sequence_lengths_and_a_carry_that_goes_on(framework):
    x, lengths = currents(), np.array([T, 1, 17, 40])
    cell = make(framework, "SLIFCell", {"time_major": True, "return_carry": True}, **LAYERS["everything"])
    params = cell.params(cell.variables)
    (state, count), spikes = cell(x, seq_lengths=lengths)
    valid = np.arange(T)[:, None] < lengths
    expected, out = plain(params, x, valid=valid)
    assert_same(count, lengths.astype(np.int32))
    assert_agree(vars(state), vars(expected))
    assert_same(jnp.where(valid[..., None], spikes, 0), out["s"])

    # Each row continues with its own clock.
    (state, count), _ = cell(x, initial_carry=(state, count))
    for row in (1, 2):
        expected, _ = plain(params, np.concatenate([x[: lengths[row]], x])[:, row])
        assert_agree({name: leaf[row] for name, leaf in vars(state).items()}, vars(expected))
    assert_same(count, lengths.astype(np.int32) + T)


def test_a_second_window_goes_on_with_the_clock(framework):
    layer, x = make(framework), currents()
    whole, last = layer.call(layer.variables, x, record=("s", "tols"), return_state=True)
    first, state = layer.call(layer.variables, x[:7], record=("s", "tols"), return_state=True)
    rest, end = layer.call(
        layer.variables, x[7:], record=("s", "tols"), return_state=True, initial_state=state, t0=7 * DT
    )
    assert_same(end.replace(tols=last.tols), last)
    assert_same(jnp.concatenate([first["s"], rest["s"]]), whole["s"])
    # t0 + k dt is one rounding from (7 + k) dt.
    np.testing.assert_allclose(jnp.concatenate([first["tols"], rest["tols"]]), whole["tols"], rtol=1e-6)
    assert end.tols.max() > 7 * DT


def test_the_options_of_simulate(framework):
    layer, x = make(framework, surrogate=slif.arctan()), currents()
    params = layer.params(layer.variables)
    spikes = layer.call(layer.variables, x, spike_dtype=bool, implementation="xla")
    assert spikes.dtype == bool
    assert_same(spikes, layer.call(layer.variables, x) > 0)

    def loss(call):
        return jit_quickly(jax.grad(lambda x: call(x).sum()))(x)

    expected = loss(lambda x: plain(params, x, checkpoint_every=4)[1]["s"])
    actual = loss(lambda x: layer.call(layer.variables, x, checkpoint_every=4))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^implementation: expected"):
        layer.call(layer.variables, x, implementation="cuda")


def test_initial_state(framework):
    x = currents()
    layer = make(framework)
    middle, _ = plain(layer.params(layer.variables), x[:20])
    expected = plain(layer.params(layer.variables), x[20:], middle)[1]["s"]
    assert_same(layer(x[20:], initial_state=middle), expected)


FIXED, ADAPTIVE = {}, {"thr_gain": 0.013}


@pytest.mark.parametrize(
    ("framework", "kind", "hyper"),
    [
        ("linen", "SLIF", FIXED),
        ("linen", "SLIFCell", ADAPTIVE),
        ("nnx", "SLIFCell", FIXED),
        ("nnx", "SLIF", ADAPTIVE),
    ],
)
def test_learned_thresholds_act_and_train_in_every_window(framework, kind, hyper):
    """A window that starts from a state uses the thresholds of params, unless they adapt: then those of the state."""
    x = currents(8, B, N)
    options = {"learn": ("thr",), "surrogate": slif.arctan(), **hyper}
    layer = make(framework, kind, {"time_major": True, "return_carry": True}, **options)
    params = layer.params(layer.variables)
    middle, _ = plain(params, x)
    old = middle.replace(thr=middle.thr + 0.03)

    def window(variables):
        if kind == "SLIF":
            s, state = layer.call(variables, x, initial_state=old, return_state=True)
        else:
            (state, _), s = layer.call(variables, x, initial_carry=(old, jnp.zeros(B, jnp.int32)))
        return s.sum(), (s, state)

    def expected_window(thr):
        state = old if hyper else slif.reset(params.replace(thr=thr), middle, fields=("thr",))
        state, out = plain(params.replace(thr=thr), x, state)
        return out["s"].sum(), (out["s"], state)

    gradient, actual = jax.jit(jax.grad(window, has_aux=True, allow_int=True))(layer.variables)
    wanted, expected = jax.jit(jax.grad(expected_window, has_aux=True))(params.thr)
    assert_same(actual, expected)
    (gradient,) = layer.trained(gradient).values()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert (np.abs(wanted).max() == 0) == bool(hyper)
    if not hyper:
        assert_same(actual[0], plain(params, x, middle)[1]["s"])  # as before the thresholds were put in


@pytest.mark.parametrize("shape", ["scalar", "per unit"])
def test_learning_starts_at_the_given_values(framework, shape):
    given = {"tau_m": 17.3, "resist_m": -1.7, "thr_gain": 0.013, "thr_leak": 0.007, "resist_inh": 0.1, "rho_b": 0.2}
    if shape == "per unit":
        given = {name: x if name == "rho_b" else x * np.linspace(1, 2, N) for name, x in given.items()}
    layer = make(framework, thr_jitter=0.0, surrogate=slif.arctan(), learn=(*given, "thr"), **given)
    params = layer.params(layer.variables)
    for name, value in given.items():
        assert_same(getattr(params, name), np.float32(value))
    assert_same(params.thr, np.full(N, np.float32(0.41)))
    trained = layer.trained(layer.variables)
    assert trained["logscale_tau_m"].shape == (() if shape == "scalar" else (N,))
    assert trained["learned_thr"].shape == (N,)


def test_learning_switches_a_mechanism_on(framework):
    layer = make(framework, surrogate=slif.arctan(), learn=("thr_gain", "thr_leak"))
    params = layer.params(layer.variables)
    assert_same((params.thr_gain, params.thr_leak), (np.float32(0), np.float32(0)))


def test_gradients_are_those_of_the_plain_functions(framework):
    x = currents()
    layer = make(framework, **LEARN_ALL | {"learn": tuple(n for n in LEARN_ALL["learn"] if n != "rho_b"), "rho_b": 0.0})
    weights = np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    gradients = jit_quickly(jax.grad(lambda variables: (layer.call(variables, x) * weights).sum()))(layer.variables)
    params = layer.params(layer.variables)
    expected = jit_quickly(jax.grad(lambda params: (plain(params, x)[1]["s"] * weights).sum()))(params)
    found = layer.trained(gradients)
    assert len(found) == 7
    for stored, gradient in found.items():
        kind, _, name = stored.partition("_")
        chain = getattr(params, name) if kind == "logscale" else 1
        wanted = getattr(expected, name) * chain
        assert np.abs(wanted).max() > 0, name
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_no_gradient_reaches_what_is_only_stored(framework):
    x = currents()
    layer = make(framework, resist_inh=0.1, surrogate=slif.arctan())

    def loss(variables):
        return layer.call(variables, x).sum()

    for leaf in jax.tree.leaves(jit_quickly(jax.grad(loss))(layer.variables)):
        assert_same(leaf, np.zeros_like(leaf))
    assert not layer.trained(layer.variables)


@pytest.mark.parametrize("step", [1e6, -1e6])
def test_huge_steps_of_an_optimiser_leave_valid_parameters(framework, step):
    layer = make(framework, **LEARN_ALL)

    def move(path, leaf):
        return leaf if "fixed" in jax.tree_util.keystr(path) else leaf + step

    variables = jax.tree_util.tree_map_with_path(move, layer.variables)
    params = layer.params(variables)
    for name in LEARN_ALL["learn"]:
        assert np.isfinite(getattr(params, name)).all(), name
    assert params.tau_m > 0
    assert params.resist_m > 0
    assert params.rho_b > 0
    assert (params.resist_inh > 0).all()
    assert not np.isnan(layer.call(variables, currents(5, B, N))).any()


@pytest.mark.parametrize("stored", [9.0, -40.0, 1e30])
def test_a_parameter_beyond_its_bound_comes_back(framework, stored):
    layer = make(framework, learn=("tau_m",), surrogate=slif.arctan())
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, stored) if "logscale" in jax.tree_util.keystr(path) else leaf,
        layer.variables,
    )
    gradient = jit_quickly(jax.grad(lambda variables: jnp.log(layer.params(variables).tau_m)))(variables)
    (slope,) = layer.trained(gradient).values()
    np.testing.assert_allclose(slope, 1, rtol=1e-5)
    np.testing.assert_allclose(
        layer.params(variables).tau_m, HYPER["tau_m"] * np.exp(np.clip(stored, -8, 8)), rtol=1e-6
    )


def test_a_cell_has_one_set_of_parameters_for_all_steps():
    rnn = nn.RNN(slif.linen.SLIFCell(N, dt=DT, **HYPER), variable_axes={"params": 0}, variable_broadcast=False)
    with pytest.raises(ValueError, match=r"^params: expected fixed_thr of shape \(100,\), .* all steps share"):
        rnn.init(jax.random.key(0), currents(2, 3, N))
    cell = slif.nnx.SLIFCell(N, dt=DT, **HYPER, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^carry_init: expected None"):
        cell.initialize_carry((2, N), carry_init=nnx.initializers.ones)


def test_weight_decay_leaves_stored_thresholds_alone(framework):
    x = currents()
    hyper = {"resist_inh": 0.013, "learn": ("resist_m",)}
    decay = 0.5
    if framework == "linen":
        module = slif.linen.SLIF(N, dt=DT, **HYPER, **hyper)
        params = module.init(jax.random.key(0), x)["params"]
        optimiser = optax.adamw(0.1, weight_decay=decay, mask=slif.linen.trainable)
        gradients = jax.grad(lambda params: module.apply({"params": params}, x).sum())(params)
        updates, _ = optimiser.update(gradients, optimiser.init(params), params)
        new = optax.apply_updates(params, updates)
        fixed = ("fixed_thr", "fixed_inh_weights")
        assert_same([new[name] for name in fixed], [params[name] for name in fixed])
        assert new["logscale_resist_m"] != params["logscale_resist_m"]
    else:
        module = slif.nnx.SLIF(N, dt=DT, **HYPER, **hyper, rngs=nnx.Rngs(0))
        before = module.slif_params()
        optimiser = nnx.Optimizer(module, optax.adamw(0.1, weight_decay=decay), wrt=nnx.Param)
        optimiser.update(module, nnx.grad(lambda module: module(x).sum())(module))
        after = module.slif_params()
        assert_same((after.thr, after.inh_weights), (before.thr, before.inh_weights))
        assert after.resist_m != before.resist_m


def test_checkpoint_by_bytes(framework):
    layer, other = (make(framework, seed=seed, **LAYERS["everything"]) for seed in (0, 1))
    pure = nnx.to_pure_dict if framework == "nnx" else lambda variables: variables
    restored = serialization.from_bytes(pure(other.variables), serialization.to_bytes(pure(layer.variables)))
    if framework == "nnx":
        nnx.replace_by_pure_dict(other.variables, restored)
        restored = other.variables
    assert_same(restored, layer.variables)


def test_checkpoint_by_orbax(framework, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    layer, other = (make(framework, seed=seed, **LAYERS["everything"]) for seed in (0, 1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", layer.variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "model", other.variables)
    assert_same(restored, layer.variables)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(framework, dtype):
    layer = make(framework, dtype=dtype, thr_jitter=0.0, learn=("resist_m",))
    params = layer.params(layer.variables)
    assert_same(params, slif.init_params(jax.random.key(0), N, **HYPER, dtype=dtype, thr_jitter=0.0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert layer.trained(layer.variables)["logscale_resist_m"].dtype == jnp.float32
    assert layer(currents()).dtype == dtype


def test_an_unbound_cell_has_no_stored_thresholds():
    cell = slif.linen.SLIFCell(N, dt=DT, **HYPER, thr_jitter=0.0)
    state, count = cell.initialize_carry(jax.random.key(0), (B, N))
    params = slif.init_params(jax.random.key(0), N, **HYPER, thr_jitter=0.0)
    assert_same((state, count), (slif.init_state(params, B), np.zeros(B, np.int32)))

    cell = slif.linen.SLIFCell(N, dt=DT, **HYPER)
    with pytest.raises(ValueError, match="unbound"):
        cell.initialize_carry(jax.random.key(0), (B, N))
    variables = cell.init(jax.random.key(0), None, (B, N), method="initialize_carry")
    state, _ = cell.apply(variables, None, (B, N), method="initialize_carry")
    assert_same(state.thr[1], variables["params"]["fixed_thr"])


@pytest.mark.parametrize(
    ("hyper", "error", "message"),
    [
        ({"learn": ("refract_time",)}, ValueError, "among tau_m, .*got refract_time"),
        ({"learn": ("tau_m", "tau")}, ValueError, "got tau\\b"),
        ({"learn": "tau_m"}, TypeError, "tuple of names"),
        ({"learn": ("inh_weights",)}, ValueError, "resist_inh"),
        ({"learn": ("rho_b",), "surrogate": slif.arctan()}, ValueError, "rho_b.*other than 0"),
        ({"learn": ("resist_m", "tau_m", "thr")}, ValueError, r"learn: .*slif\.arctan\(\).* train tau_m, thr, got"),
        ({"learn": ("thr_gain",), "surrogate": CURRENT}, ValueError, "learn: .*voltage.* train thr_gain, got"),
        ({"learn": ("resist_inh",)}, ValueError, "resist_inh.*other than 0"),
        ({"tau_m": -1.0}, ValueError, "tau_m.*> 0"),
        ({"tau_m": -1.0, "thr_jitter": 0.0}, ValueError, "tau_m.*> 0"),
        ({"dt": 0.0}, ValueError, "dt.*> 0"),
        ({"thr": np.ones(N + 1)}, ValueError, "thr.*shape"),
    ],
)
def test_bad_hyperparameters(framework, hyper, error, message):
    with pytest.raises(error, match=message):
        make(framework, **hyper)(currents())


def test_bad_inputs(framework):
    layer, cell = make(framework), make(framework, "SLIFCell", {"time_major": True})
    with pytest.raises(ValueError, match=f"^x: expected .*{N} features, got"):
        layer(currents(T, B, N + 1))
    with pytest.raises(ValueError, match="time axis"):
        layer(currents(N))
    with pytest.raises(ValueError, match=rf"^input_shape: expected \(\.\.\., {N}\), got"):
        cell(currents(T, B, N + 1))
    with pytest.raises(ValueError, match="record"):
        layer(currents(), record=("spikes",))
