"""Every way of calling gives the same spikes: bit for bit those of the live reference, literals or not."""

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
# Factors of 1, powers of two, and fractions that no float holds exactly: (dt, resist_m) of each mechanism.
CASES = (
    {"plain": (0.3, 1.3), "sticky": (0.3, 1.3), "adaptive": (1.0, 1.3), "rho_b": (0.5, 1.3)},
    {"plain": (1.0, 1.3), "sticky": (1.0, 1.0), "adaptive": (0.25, 1.3), "rho_b": (2.0, 1.0)},
)
CURRENTS = np.random.default_rng(0).uniform(-0.3, 1.5, (T, B, N)).astype(np.float32)


def hyper(mechanism, resist_m):
    return {"tau_m": 20.0, "resist_m": resist_m, "thr": 0.4, **MECHANISMS[mechanism]}


@functools.cache
def cell_of_the_reference(mechanism, resist_m):
    cell = Reference(f"ways_{mechanism}_{resist_m}", N, B, SEED, **hyper(mechanism, resist_m))
    return cell, cell.state


@functools.cache
def reference(mechanism, dt, resist_m):
    """The results of the reference."""
    cell, cell.state = cell_of_the_reference(mechanism, resist_m)
    out = cell.run(CURRENTS, np.arange(T, dtype=np.float32) * np.float32(dt), dt)
    return {name: np.asarray(out[name]) for name in TOLD}


def told(state):
    return {name: getattr(state, name) for name in TOLD}


# Params p, states s and dt are by mechanism: all mechanisms are one program, which XLA compiles faster.


def run(p, s, x, dt):
    return {m: slif.simulate(p[m], s[m], x, dt=dt[m], record=TOLD)[1] for m in p}


def step(p, s, j, k, dt):
    return {m: slif.step(p[m], s[m], j, k * dt[m], dt[m]) for m in p}


def run_steps(p, s, x, dt):
    def body(s, a):
        s = step(p, s, *a, dt)
        return s, {m: told(state) for m, state in s.items()}

    return lax.scan(body, s, (x, jnp.arange(T)))[1]


def by_steps(p, s, x, dt):
    trace = []
    for k in range(T):
        s = step(p, s, x[k], k, dt)
        trace.append(jax.device_get({m: told(state) for m, state in s.items()}))
    return jax.tree.map(lambda *rows: np.stack(rows), *trace)


def with_vjp(p, s, x, dt):
    out, pull = jax.vjp(lambda x: run(p, s, x, dt), x)
    return out, pull(jax.tree.map(jnp.ones_like, out))


def voltage(p):
    return {m: params.replace(surrogate=slif.arctan()) for m, params in p.items()}


def sharded(p, s, x, dt):
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows = P(None, "rows")
    body = jax.shard_map(lambda p, s, x: run(p, s, x, dt), mesh=mesh, in_specs=(P(), P("rows"), rows), out_specs=rows)
    return jax.jit(body)(p, s, x)


def over_dt(p, dt):
    return {"over": {"dt": [0.1, dt]}}


def over_resist_m(p, dt):
    return {"over": {"resist_m": [0.7, float(p.resist_m)]}, "dt": dt}


def swept(jit, over):
    def way(p, s, x, dt):
        options = {m: over(p[m], dt[m]) for m in p}

        def call(p, s, x):
            return {m: slif.sweep(p[m], x, state=s[m], record=TOLD, **options[m])[1] for m in p}

        return jax.tree.map(lambda y: y[1], (jax.jit(call) if jit else call)(p, s, x))

    return way


class LinenCell(slif.linen.SLIFCell):
    def __call__(self, carry, inputs):
        carry, _ = super().__call__(carry, inputs)
        return carry, told(carry[0])


class NNXCell(slif.nnx.SLIFCell):
    def __call__(self, carry, inputs):
        carry, _ = super().__call__(carry, inputs)
        return carry, told(carry[0])


def arguments(p, dt):
    return {m: hyper(m, float(params.resist_m)) | {"dt": dt[m]} for m, params in p.items()}


def linen_layers(p, s, x, dt):
    layers = {m: slif.linen.SLIF(N, **given) for m, given in arguments(p, dt).items()}

    def call(layer, params):
        return layer.apply({"params": {"fixed_thr": params.thr}}, x, record=TOLD)

    return jax.jit(lambda p, x: {m: call(layers[m], p[m]) for m in p})(p, x)


def linen_rnns(p, s, x, dt):
    rnns = {m: nn.RNN(LinenCell(N, **given), time_major=True) for m, given in arguments(p, dt).items()}

    def call(rnn, params):
        return rnn.apply({"params": {"cell": {"fixed_thr": params.thr}}}, x)

    return jax.jit(lambda p, x: {m: call(rnns[m], p[m]) for m in p})(p, x)


def nnx_modules(kind, p, dt):
    modules = {m: kind(N, **given, rngs=nnx.Rngs(0)) for m, given in arguments(p, dt).items()}
    for m, module in modules.items():
        module.fixed_thr = slif.nnx.Fixed(p[m].thr)
    return modules


def call_layers(layers, x):
    return {m: layer(x, record=TOLD) for m, layer in layers.items()}


def nnx_closed(p, s, x, dt):
    layers = nnx_modules(slif.nnx.SLIF, p, dt)
    return jax.jit(lambda x: call_layers(layers, x))(x)


def nnx_rnns(p, s, x, dt):
    rnns = {m: nnx.RNN(cell, time_major=True) for m, cell in nnx_modules(NNXCell, p, dt).items()}
    return nnx.jit(lambda rnns, x: {m: rnn(x) for m, rnn in rnns.items()})(rnns, x)


LITERAL = {
    "dt literal": lambda p, s, x, dt: jax.jit(lambda p, s, x: run(p, s, x, dt))(p, s, x),
    "params closed over": lambda p, s, x, dt: jax.jit(lambda s, x, dt: run(p, s, x, dt))(s, x, dt),
    "everything closed over": lambda p, s, x, dt: jax.jit(lambda: run(p, s, x, dt))(),
    "scan over step, closed over": lambda p, s, x, dt: jax.jit(lambda: run_steps(p, s, x, dt))(),
}
WAYS = {
    "steps outside jit": by_steps,
    "outside jit": run,
    "everything traced": jax.jit(run),
    "scan over step": lambda p, s, x, dt: jax.jit(lambda p, s, x: run_steps(p, s, x, dt))(p, s, x),
    "vmap": lambda p, s, x, dt: jax.jit(jax.vmap(lambda s, x: run(p, s, x, dt), (0, 1), 1))(s, x),
    "checkpoint": lambda p, s, x, dt: jax.jit(jax.checkpoint(lambda p, s, x: run(p, s, x, dt)))(p, s, x),
    "vjp": lambda p, s, x, dt: jax.jit(lambda p, s, x: with_vjp(p, s, x, dt))(p, s, x)[0],
    "vjp by the voltage": lambda p, s, x, dt: jax.jit(lambda p, s, x: with_vjp(p, s, x, dt))(voltage(p), s, x)[0],
    "shard_map": sharded,
    "sweep over dt": swept(False, over_dt),
    "sweep with dt fixed": swept(False, over_resist_m),
    "sweep with dt fixed, in jit": swept(True, over_resist_m),
    "linen.SLIF": linen_layers,
    "linen.SLIFCell in nn.RNN": linen_rnns,
    "nnx.SLIF": lambda p, s, x, dt: nnx.jit(call_layers)(nnx_modules(slif.nnx.SLIF, p, dt), x),
    "nnx.SLIF closed over": nnx_closed,
    "nnx.SLIFCell in nnx.RNN": nnx_rnns,
}
# Each literal makes another program; of the others, every second one takes the second case.
CHOSEN = [(name, case) for name in LITERAL for case in (0, 1)]
CHOSEN += [(name, n % 2) for n, name in enumerate(WAYS)]


@pytest.mark.parametrize(("name", "case"), CHOSEN)
def test_every_way_is_the_reference(name, case):
    chosen = CASES[case]
    p = {m: slif.init_params(jax.random.PRNGKey(SEED), N, **hyper(m, resist_m)) for m, (_, resist_m) in chosen.items()}
    s = {m: slif.init_state(params, B) for m, params in p.items()}
    out = (LITERAL | WAYS)[name](p, s, jnp.asarray(CURRENTS), {m: dt for m, (dt, _) in chosen.items()})
    for mechanism, (dt, resist_m) in chosen.items():
        for field, expected in reference(mechanism, dt, resist_m).items():
            message = f"{field} of {mechanism} with dt={dt}, resist_m={resist_m}"
            np.testing.assert_array_equal(out[mechanism][field], expected, err_msg=message)


@pytest.mark.parametrize("case", [0, 1])
def test_the_reference_is_not_silent(case):
    for mechanism, chosen in CASES[case].items():
        assert 0.003 < reference(mechanism, *chosen)["s"].mean() < 0.7, (mechanism, *chosen)
