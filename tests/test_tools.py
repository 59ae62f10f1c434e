"""JAX's and Flax's own tools: export, static arguments, symbolic shapes, restoring, tables, fields of `reset`."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, DT, N_STEPS, N_UNITS, assert_same, jit_quickly, make_currents, make_params
from flax import nnx
from jax import export

import slif
import slif.linen
import slif.nnx

SURROGATES = {"secant": slif.secant, "arctan": slif.arctan, "boxcar": slif.boxcar}
CELL = {"dt": DT, "tau_m": 5.0, "resist_m": 1.5, "thr": 0.4}


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def run(params, state, currents):
    return slif.simulate(params, state, currents, dt=DT, record=("s", "v", "spike_count"))


# --- surrogates by value ---


@pytest.mark.parametrize("make", SURROGATES.values())
def test_surrogates_are_equal_and_hash_by_value(make):
    name = next(iter(make().numbers))
    same = [make(), make(**{name: float(make().numbers[name])}), make(**{name: np.float64(make().numbers[name])})]
    assert len(set(same)) == 1
    assert all(x == same[0] for x in same)
    assert make(**{name: 3.0}) != make()
    assert len({make(**{name: 3.0}), make()}) == 2
    assert make(**{name: np.ones(3)}) == make(**{name: np.ones(3)})
    with pytest.raises(TypeError, match="on a device"):
        hash(make(**{name: jnp.float32(1)}))


def test_surrogates_of_a_kind_differ_by_what_is_static():
    assert slif.arctan() != slif.arctan(detach_reset=False)
    assert slif.secant() != slif.secant(squared=True)
    assert slif.arctan() != 2.0


@pytest.mark.parametrize("surrogate", [None, slif.arctan()])
def test_a_layer_as_a_static_argument(surrogate, compilations):
    x = jnp.asarray(make_currents())
    apply = jax.jit(lambda layer, variables, x: layer.apply(variables, x), static_argnums=0)
    layers = [slif.linen.SLIF(N_UNITS, surrogate=surrogate, **CELL) for _ in range(2)]
    variables = layers[0].init(jax.random.key(0), x)
    expected = apply(layers[0], variables, x)
    compilations()
    assert_same(apply(layers[1], variables, x), expected)
    assert compilations() == 0


# --- export ---


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_an_exported_function_takes_params_and_state(surrogate):
    pytest.importorskip("flatbuffers")
    params = make_params("everything", surrogate=SURROGATES[surrogate]())
    arguments = (params, slif.init_state(params, BATCH), jnp.asarray(make_currents()))
    exported = export.export(jax.jit(run))(*arguments)
    loaded = export.deserialize(exported.serialize())
    assert loaded.in_tree == exported.in_tree
    assert_same(loaded.call(*arguments), jax.jit(run)(*arguments))


def test_a_custom_surrogate_is_no_argument_of_a_file():
    pytest.importorskip("flatbuffers")
    params = make_params(surrogate=slif.custom(jnp.cos))
    arguments = (params, slif.init_state(params, BATCH), jnp.asarray(make_currents()))
    with pytest.raises(ValueError, match=r"^surrogate: expected one of"):
        export.export(jax.jit(run))(*arguments).serialize()


@pytest.mark.parametrize("surrogate", ["secant", "arctan"])
def test_symbolic_shapes(surrogate):
    n_steps, batch = export.symbolic_shape("T, B")
    params = make_params("everything", surrogate=SURROGATES[surrogate]())
    layer = slif.linen.SLIF(N_UNITS, surrogate=SURROGATES[surrogate](), **CELL)
    module = slif.nnx.SLIF(N_UNITS, surrogate=SURROGATES[surrogate](), rngs=nnx.Rngs(0), **CELL)
    x = make_currents()
    variables, mask = layer.init(jax.random.key(0), x), np.arange(N_STEPS)[:, None] < np.array([40, 17, 0])

    def plain(x, mask):
        state = slif.init_state(params, x.shape[1])
        return slif.simulate(params, state, x, dt=DT, record=("s", "v", "tols"), valid=mask)

    def gradient(x, mask):
        return jax.grad(lambda x: plain(x, mask)[1]["s"].sum())(x)

    def layers(x, mask):
        return layer.apply(variables, x, valid=mask), module(x, valid=mask)

    given = (jax.ShapeDtypeStruct((n_steps, batch, N_UNITS), x.dtype), jax.ShapeDtypeStruct((n_steps, batch), bool))

    def all_three(x, mask):
        return plain(x, mask), gradient(x, mask), layers(x, mask)

    exported = jit_quickly(export.export(jax.jit(all_three))(*given).call)
    for length, rows in ((N_STEPS, BATCH), (11, 2)):
        cut = x[:length, :rows], mask[:length, :rows]
        actual, expected = exported(*cut), jit_quickly(all_three)(*cut)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), actual, expected)


# --- Flax ---


class Network(nnx.Module):
    def __init__(self, rngs):
        cells = {**CELL, "surrogate": slif.arctan(), "resist_inh": 0.01, "rngs": rngs}
        self.first = slif.nnx.SLIF(N_UNITS, learn=("tau_m", "thr"), **cells)
        self.second = nnx.RNN(slif.nnx.SLIFCell(N_UNITS, **cells), time_major=True)

    def __call__(self, x):
        return self.second(9 * self.first(x))


def test_a_module_is_restored(tmp_path):
    """From a pure dict, from one saved by Orbax, and from `nnx.split`."""
    ocp = pytest.importorskip("orbax.checkpoint")
    x, network = jnp.asarray(make_currents()), Network(nnx.Rngs(0))
    expected = network(x)
    graph, state = nnx.split(network)
    assert_same(nnx.merge(graph, state)(x), expected)
    pure = nnx.to_pure_dict(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "network", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "network")
    for values in (pure, restored):
        graph, other = nnx.split(Network(nnx.Rngs(1)))
        assert not np.array_equal(nnx.merge(graph, other)(x), expected)
        nnx.replace_by_pure_dict(other, values)
        assert_same(nnx.merge(graph, other)(x), expected)


def test_no_variable_is_none():
    state = nnx.state(Network(nnx.Rngs(0)))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state, is_leaf=lambda x: x is None))
    assert len(jax.tree.leaves(state)) == len(nnx.to_flat_state(state))


def test_tables_show_the_layers():
    x = jnp.ones((10, 2, 8))
    network = nn.Sequential([nn.Dense(16), slif.linen.SLIF(16, learn=("tau_m",), surrogate=slif.arctan(), **CELL)])
    table = network.tabulate(
        jax.random.key(0), x, console_kwargs={"width": 200, "no_color": True, "force_terminal": False}
    )
    row = next(line for line in table.splitlines() if "layers_1" in line)
    assert row.count("float32[10,2,16]") == 2
    assert "_hyper" not in table
    assert "slif_params" not in table
    module = slif.nnx.SLIF(16, rngs=nnx.Rngs(0), **CELL)
    table = nnx.tabulate(module, jnp.ones((10, 2, 16)), console_kwargs={"width": 200})
    table = re.sub(r"\x1b\[[0-9;]*m", "", table)
    assert "slif_params" not in table
    assert "float32[10,2,16]" in table


def test_params_by_an_ordinary_method():
    layer = slif.linen.SLIF(N_UNITS, **CELL)
    variables = layer.init(jax.random.key(0), jnp.asarray(make_currents()))
    assert_same(layer.apply(variables, method="slif_params"), layer.bind(variables).slif_params())


# --- reset of some fields ---


def test_reset_of_fields():
    params = make_params("sticky")
    state = slif.simulate(params, slif.init_state(params, BATCH), make_currents(), dt=DT)[0]
    new = params.replace(thr=params.thr + 1, refract_time=params.refract_time * 2)
    reset = slif.reset(new, state, fields=("thr", "rfr"))
    rest = slif.init_state(new, BATCH)
    for name, x in vars(reset).items():
        assert_same(x, getattr(rest if name in ("thr", "rfr") else state, name))
    where = np.array([True, False, True])
    some = slif.reset(new, state, where=where, fields=["v"])
    assert_same(some.v, np.where(where[:, None], 0, state.v))
    assert_same(some.replace(v=state.v), state)
    kept = slif.reset(new.replace(thr_persist=True), state, fields=("thr",))
    assert_same(kept.thr, rest.thr)  # requested explicitly
    with pytest.raises(ValueError, match=r"^fields: expected names among j, v, s, thr, rfr, tols, surrogate, got w"):
        slif.reset(params, state, fields=("w",))
    with pytest.raises(TypeError, match=r"^fields: expected a tuple of names"):
        slif.reset(params, state, fields="thr")


def test_the_mistake_of_a_forgotten_batch_is_named():
    params = make_params()
    with pytest.raises(ValueError, match=r"expected shape \(T, 11\), got shape \(40, 3, 11\); .* batch_shape \(3,\)"):
        slif.simulate(params, slif.init_state(params), make_currents(), dt=DT)


def test_bool_spikes_are_currents():
    params = make_params()
    spikes = make_currents() > 6
    state = slif.init_state(params, BATCH)
    simulate = functools.partial(slif.simulate, params, state, dt=DT)
    assert_same(simulate(spikes), simulate(spikes.astype(np.float32)))
    step = functools.partial(slif.step, params, state, t=0.0, dt=DT)
    assert_same(step(spikes[0]), step(spikes[0].astype(np.float32)))
