"""Every way of calling gives the same spikes: bit for bit those of the live reference, whatever is a literal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_reference import Reference

import slif
import slif.linen
import slif.nnx

pytestmark = pytest.mark.usefixtures("ngclearn")

T, B, N, SEED = 50, 3, 64, 3
TOLD = ("s", "v", "thr", "rfr")
MECHANISMS = {
    "plain": {},
    "sticky": {"refract_time": 2.0, "sticky_spikes": True},
    "adaptive": {"thr_gain": 0.02, "thr_leak": 0.01},
    "rho_b": {"rho_b": 0.003},
}
# Factors of 1, powers of two, and fractions that no float holds: (dt, resist_m), each a compilation of every way.
CHOSEN = {
    "plain": ((0.3, 1.3), (1.0, 1.3)),
    "sticky": ((0.3, 1.3), (1.0, 1.0)),
    "adaptive": ((1.0, 1.3), (0.25, 1.3)),
    "rho_b": ((0.5, 1.3), (2.0, 1.0)),
}
DTS = (0.25, 0.3, 0.5, 1.0, 2.0)
CURRENTS = np.random.default_rng(0).uniform(-0.3, 1.5, (T, B, N)).astype(np.float32)


def hyper(mechanism, resist_m):
    return {"tau_m": 20.0, "resist_m": resist_m, "thr": 0.4, **MECHANISMS[mechanism]}


def make(mechanism, resist_m):
    return slif.init_params(jax.random.PRNGKey(SEED), N, **hyper(mechanism, resist_m))


@functools.cache
def reference(mechanism, resist_m):
    """What the reference does at every dt, by dt."""
    cell = Reference(f"ways_{mechanism}_{resist_m}", N, B, SEED, **hyper(mechanism, resist_m))
    rest, traces = cell.state, {}
    for dt in DTS:
        cell.state = rest
        out = cell.run(CURRENTS, np.arange(T, dtype=np.float32) * np.float32(dt), dt)
        traces[dt] = {name: np.asarray(out[name]) for name in TOLD}
    return traces


def told(state):
    return {name: getattr(state, name) for name in TOLD}


def run(p, s, x, dt):
    return slif.simulate(p, s, x, dt=dt, record=TOLD)[1]


def run_steps(p, s, x, dt):
    def body(s, a):
        s = slif.step(p, s, a[0], a[1], dt)
        return s, told(s)

    return lax.scan(body, s, (x, jnp.arange(T) * dt))[1]


def by_steps(p, s, x, dt):
    trace = []
    for k in range(T):
        s = slif.step(p, s, x[k], k * dt, dt)
        trace.append(told(s))
    return {name: np.stack([row[name] for row in trace]) for name in TOLD}


def with_vjp(p, s, x, dt):
    out, pull = jax.vjp(lambda x: run(p, s, x, dt), x)
    return out, pull(jax.tree.map(jnp.ones_like, out))


def voltage(p):
    return p.replace(surrogate=slif.arctan())


def sharded(p, s, x, dt):
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows = P(None, "rows")
    body = jax.shard_map(lambda p, s, x: run(p, s, x, dt), mesh=mesh, in_specs=(P(), P("rows"), rows), out_specs=rows)
    return jax.jit(body)(p, s, x)


def swept(jit, over):
    def way(p, s, x, dt):
        points, options = over(p, dt)

        def call(p, s, x):
            return slif.sweep(p, x, state=s, over=points, record=TOLD, **options)[1]

        return jax.tree.map(lambda y: y[1], (jax.jit(call) if jit else call)(p, s, x))

    return way


def over_dt(p, dt):
    return {"dt": [0.1, dt]}, {}


def over_resist_m(p, dt):
    return {"resist_m": [0.7, float(p.resist_m)]}, {"dt": dt}


class LinenCell(slif.linen.SLIFCell):
    def __call__(self, carry, inputs):
        carry, _ = super().__call__(carry, inputs)
        return carry, told(carry[0])


class NNXCell(slif.nnx.SLIFCell):
    def __call__(self, carry, inputs):
        carry, _ = super().__call__(carry, inputs)
        return carry, told(carry[0])


def linen_layer(p, s, x, dt, arguments):
    layer = slif.linen.SLIF(N, dt=dt, **arguments)
    return jax.jit(lambda x: layer.apply({"params": {"fixed_thr": p.thr}}, x, record=TOLD))(x)


def linen_rnn(p, s, x, dt, arguments):
    rnn = nn.RNN(LinenCell(N, dt=dt, **arguments), time_major=True)
    return jax.jit(lambda x: rnn.apply({"params": {"cell": {"fixed_thr": p.thr}}}, x))(x)


def with_thresholds(module, p):
    module.fixed_thr = slif.nnx.Fixed(p.thr)
    return module


def nnx_layer(p, s, x, dt, arguments, jit=nnx.jit):
    layer = with_thresholds(slif.nnx.SLIF(N, dt=dt, **arguments, rngs=nnx.Rngs(0)), p)
    return jit(lambda layer, x: layer(x, record=TOLD))(layer, x)


def nnx_closed(p, s, x, dt, arguments):
    return nnx_layer(p, s, x, dt, arguments, jit=lambda call: lambda layer, x: jax.jit(lambda x: call(layer, x))(x))


def nnx_rnn(p, s, x, dt, arguments):
    rnn = nnx.RNN(with_thresholds(NNXCell(N, dt=dt, **arguments, rngs=nnx.Rngs(0)), p), time_major=True)
    return nnx.jit(lambda rnn, x: rnn(x))(rnn, x)


WAYS = {
    "steps outside jit": by_steps,
    "outside jit": run,
    "everything traced": lambda p, s, x, dt: jax.jit(run)(p, s, x, jnp.float32(dt)),
    "dt literal": lambda p, s, x, dt: jax.jit(lambda p, s, x: run(p, s, x, dt))(p, s, x),
    "params closed over": lambda p, s, x, dt: jax.jit(lambda s, x, dt: run(p, s, x, dt))(s, x, jnp.float32(dt)),
    "everything closed over": lambda p, s, x, dt: jax.jit(lambda: run(p, s, x, dt))(),
    "scan over step": lambda p, s, x, dt: jax.jit(lambda p, s, x: run_steps(p, s, x, dt))(p, s, x),
    "scan over step, closed over": lambda p, s, x, dt: jax.jit(lambda: run_steps(p, s, x, dt))(),
    "vmap": lambda p, s, x, dt: jax.jit(jax.vmap(lambda s, x: run(p, s, x, dt), (0, 1), 1))(s, x),
    "checkpoint": lambda p, s, x, dt: jax.jit(jax.checkpoint(lambda p, s, x: run(p, s, x, dt)))(p, s, x),
    "vjp": lambda p, s, x, dt: jax.jit(lambda p, s, x: with_vjp(p, s, x, dt))(p, s, x)[0],
    "vjp by the voltage": lambda p, s, x, dt: jax.jit(lambda p, s, x: with_vjp(p, s, x, dt))(voltage(p), s, x)[0],
    "shard_map": sharded,
    "sweep over dt": swept(False, over_dt),
    "sweep with dt fixed": swept(False, over_resist_m),
    "sweep with dt fixed, in jit": swept(True, over_resist_m),
}
LAYERS = {
    "linen.SLIF": linen_layer,
    "linen.SLIFCell in nn.RNN": linen_rnn,
    "nnx.SLIF": nnx_layer,
    "nnx.SLIF closed over": nnx_closed,
    "nnx.SLIFCell in nnx.RNN": nnx_rnn,
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", [*WAYS, *LAYERS])
def test_every_way_is_the_reference(name, mechanism):
    for dt, resist_m in CHOSEN[mechanism][: None if name in WAYS else 1]:  # test_layers.py has more of the layers
        params, expected = make(mechanism, resist_m), reference(mechanism, resist_m)[dt]
        state, currents = slif.init_state(params, B), jnp.asarray(CURRENTS)
        if name in WAYS:
            out = WAYS[name](params, state, currents, dt)
        else:
            out = LAYERS[name](params, state, currents, dt, hyper(mechanism, resist_m))
        for field in TOLD:
            message = f"{field} with dt={dt}, resist_m={resist_m}"
            np.testing.assert_array_equal(out[field], expected[field], err_msg=message)


def test_the_reference_is_not_silent():
    for mechanism in MECHANISMS:
        for dt, trace in reference(mechanism, 1.3).items():
            assert 0.003 < trace["s"].mean() < 0.7, (mechanism, dt)
