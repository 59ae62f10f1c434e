"""`simulate` inside `jax.shard_map`, whichever of its arguments vary between devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BATCH, DT, FIELDS, N_UNITS, make_currents, make_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import slif

# One device and tracing are enough: types show what varies, and a wrong type is wrong on one device as on many. Values
# are compared for some, and over eight devices in test_sharding.py.
MESH = Mesh(np.array(jax.devices()[:1]), ("devices",))
SURROGATES = {"secant": slif.secant, "arctan": slif.arctan}
# If nothing mixes units, the secant's loop runs on constants.
CELLS = (("sticky", "secant"), ("everything", "secant"), ("everything", "arctan"))
STATE = ("v", "s", "thr", "rfr", "tols")
PARAMS = ("tau_m", "resist_m", "thr")
VARIES = ("currents", "state", *(f"state.{name}" for name in STATE), *PARAMS, "surrogate", "dt", "t0", "valid")
COMPARED = {
    ("currents", "sticky", "secant"),
    ("currents", "everything", "arctan"),
    ("state.v", "everything", "secant"),
    ("tau_m", "everything", "arctan"),
    ("dt", "sticky", "secant"),
}


def loss(currents, arguments):
    own = {**arguments, "currents": currents}
    state, out = slif.simulate(
        own.pop("params"), own.pop("state"), own.pop("currents"), **own, record=(*FIELDS, "spike_count")
    )
    return out["s"].sum() + (out["v"] ** 2).sum() + state.j.sum(), (vars(state), out)


def both(arguments):
    (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(arguments["currents"], arguments)
    return aux, gradient


def inputs(mechanism, surrogate, masked):
    params = make_params(mechanism, surrogate=SURROGATES[surrogate]())
    return {
        "params": params,
        "state": slif.init_state(params, BATCH),
        "currents": jnp.asarray(make_currents((6, BATCH, N_UNITS))),
        "dt": jnp.float32(DT),
        "t0": jnp.float32(0),
        "valid": jnp.asarray(np.arange(6)[:, None] < np.array([6, 4, 0])) if masked else None,
    }


@functools.cache
def expected_of(*case):
    return jax.jit(both)(inputs(*case))


@pytest.mark.parametrize("varies", VARIES)
@pytest.mark.parametrize(("mechanism", "surrogate"), CELLS)
def test_whatever_varies(varies, mechanism, surrogate):
    case = (mechanism, surrogate, varies == "valid")
    arguments = inputs(*case)
    path = varies if varies in arguments or varies.startswith("state.") else f"params.{varies}"

    def spec(at, _):
        return P("devices") if jax.tree_util.keystr(at, simple=True, separator=".").startswith(path) else P()

    def lift(x, s):
        return x[None] if s == P("devices") else x

    specs = jax.tree_util.tree_map_with_path(spec, arguments)
    assert P("devices") in jax.tree.leaves(specs)

    def on_device(arguments):
        own = jax.tree.map(lambda x, s: x[0] if s == P("devices") else x, arguments, specs)
        aux, gradient = both(own)
        return jax.tree.map(lambda x: x[None], aux), gradient[None] if varies == "currents" else gradient

    gradient_spec = P("devices") if varies == "currents" else P()
    mapped = jax.shard_map(on_device, mesh=MESH, in_specs=(specs,), out_specs=(P("devices"), gradient_spec))
    lifted = jax.tree.map(lift, arguments, specs)
    if (varies, mechanism, surrogate) not in COMPARED:
        jax.eval_shape(mapped, lifted)
        return
    (actual, gradient), (expected, expected_gradient) = jax.jit(mapped)(lifted), expected_of(*case)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a[0], e, rtol=1e-6, atol=1e-6), actual, expected)
    gradient = gradient[0] if varies == "currents" else gradient
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
