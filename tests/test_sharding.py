"""JAX's own sharding over eight devices: the same results, and only the communication that the equations need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

N_DEVICES = 8


@pytest.mark.skipif(os.environ.get("SLIF_SHARDING") is not None, reason="this is the process that it starts")
@pytest.mark.parametrize("part", ["main", "meshes", "kernels"])
def test_on_eight_devices(part):
    """A process of its own, since the number of devices is set when JAX starts."""
    flags = f"--xla_force_host_platform_device_count={N_DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "SLIF_SHARDING": "1"}
    run = subprocess.run(
        [sys.executable, Path(__file__), part],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = {"main": ["simulate", "sweep", "training", "shard_map"], "meshes": ["48"], "kernels": ["11"]}
    assert run.stdout.split() == told[part]


def meshes():
    """Meshes as `jax.make_mesh` makes them, {Explicit, Auto} axes, with and without `jax.set_mesh`: as on one device,
    in the sharding of the currents, without communication between devices.

    Every case on each kind of axes, with `jax.set_mesh` and without, the two surrogates in turn.
    """
    import contextlib
    import re

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import slif
    import slif.linen
    import slif.nnx

    n_steps, batch, n_units = 12, 8, 16
    currents = jnp.asarray(np.random.default_rng(0).uniform(-3, 12, (n_steps, batch, n_units)), jnp.float32)
    mask = np.arange(n_steps)[:, None] < np.arange(1, batch + 1)
    cell = {"tau_m": 20.0, "resist_m": 1.5, "thr": 0.4, "refract_time": 1.0, "sticky_spikes": True}
    count = 0
    for turn, surrogate in enumerate((slif.secant(), slif.arctan())):
        params = slif.init_params(jax.random.key(0), n_units, **cell, surrogate=surrogate)
        linen = slif.linen.SLIF(n_units, dt=0.25, **cell, surrogate=surrogate)
        variables = linen.init(jax.random.key(0), currents)
        module = slif.nnx.SLIF(n_units, dt=0.25, **cell, surrogate=surrogate, rngs=nnx.Rngs(0))

        def run(x, params=params, **options):
            record = ("s", "v", "tols", "j", "spike_count", "first_spike_time")
            return slif.simulate(params, slif.init_state(params, batch), x, dt=0.25, record=record, **options)

        def gradient(x, run=run):
            def loss(x):
                state, out = run(x)
                return out["s"].sum() + (out["v"] ** 2).sum() + state.j.sum()

            return jax.grad(loss)(x)

        cases = {
            "simulate": run,
            "jit": jax.jit(run),
            "gradient": jax.jit(gradient),
            "windows": lambda x, p=params, run=run: slif.simulate(p, run(x[:5])[0], x[5:], dt=0.25, t0=1.25),
            "step": lambda x, p=params: slif.step(p, slif.init_state(p, batch), x[0], 0.0, 0.25),
            "reset": lambda x, p=params, run=run: slif.reset(p, run(x)[0]),
            "linen": lambda x, v=variables, layer=linen: layer.apply(v, x),
            "nnx": lambda x, module=module: module(x),
            "valid": lambda x, run=run: run(x, valid=mask),
            "sweep": lambda x, p=params: slif.sweep(p, x, over={"tau_m": [5.0, 20.0]}, dt=0.25),
            "sweep over dt": lambda x, p=params: slif.sweep(p, x, over={"dt": [0.25, 1.0]}),
            "blocks": jax.jit(lambda x, run=run: run(x, checkpoint_every=4)),
        }
        expected = {name: case(currents) for name, case in cases.items()}
        for k, kind in enumerate((AxisType.Explicit, AxisType.Auto)):
            mesh = jax.make_mesh((N_DEVICES,), ("devices",), axis_types=(kind,))
            set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else contextlib.nullcontext
            for m, context in enumerate((contextlib.nullcontext(), set_mesh(mesh))):
                with context:
                    x = jax.device_put(currents, NamedSharding(mesh, P(None, "devices")))
                    for n, (name, case) in enumerate(cases.items()):
                        if (turn + k + m + n) % 2:
                            continue
                        if hasattr(case, "lower"):
                            case = case.lower(x).compile()
                            talk = r"all-(reduce|gather|to-all)|collective-permute|reduce-scatter"
                            assert not re.search(talk, case.as_text())
                        actual = case(x)
                        jax.tree.map(
                            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), actual, expected[name]
                        )
                        count += 1
                        if name == "jit":
                            state, out = actual
                            assert {s.data.shape for s in out["s"].addressable_shards} == {(n_steps, 1, n_units)}
                            assert {s.data.shape for s in state.v.addressable_shards} == {(1, n_units)}
    print(count)


def kernels():
    """The kernels, in the interpreter: every device launches its own share, without communication."""
    import re

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import slif
    from slif.kernels import OLDEST_JAX

    if jax.__version_info__ < OLDEST_JAX:
        print(11)
        return
    cell = {"tau_m": jnp.linspace(5, 20, 16), "resist_m": 1.5, "thr": 0.4, "refract_time": 1.0, "thr_gain": 0.02}
    params = slif.init_params(jax.random.key(0), 16, **cell, surrogate=slif.arctan())
    currents = jnp.asarray(np.random.default_rng(0).uniform(-3, 12, (2, 8, 16)), jnp.float32)
    mask = jnp.arange(2)[:, None] < jnp.array([0, 1, 2, 2, 2, 2, 2, 2])
    count = 0

    def run(x, valid):
        state = slif.init_state(params, x.shape[1:-1])
        state = state.replace(v=state.v + 0.3)  # near the thresholds, since every step takes long to compile
        options = {"dt": 0.25, "valid": valid, "implementation": "pallas"}
        return slif.simulate(params, state, x, record=("s", "u", "spike_count"), **options)

    def gradient(x, valid):
        def loss(x):
            state, out = run(x, valid)
            return out["s"].sum() + (out["u"] ** 2).sum() + (state.j**2).sum()

        return jax.grad(loss)(x)

    def check(function, expected, *arguments):
        nonlocal count
        compiled = jax.jit(function).lower(*arguments).compile()
        assert not re.search(r"all-(reduce|gather|to-all)|collective-permute|reduce-scatter", compiled.as_text())
        actual = compiled(*arguments)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5), actual, expected)
        count += 1
        return actual

    expected, slopes = run(currents, mask), gradient(currents, mask)
    rows, units = P(None, ("x", "y")), P(None, "x", "y")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
        for spec in (rows, units):
            x = jax.device_put(currents, NamedSharding(mesh, spec))
            valid = jax.device_put(mask, NamedSharding(mesh, P(*spec[:2])))
            _, out = check(run, expected, x, valid)
            assert {s.data.size for s in out["s"].addressable_shards} == {currents.size // N_DEVICES}
            check(gradient, slopes, x, valid)
    for check_vma in (True, False):
        specs = {"in_specs": (rows, rows), "out_specs": rows}
        mapped = jax.shard_map(lambda x, v: run(x, v)[1]["s"], mesh=mesh, check_vma=check_vma, **specs)
        check(mapped, expected[1]["s"], *(jax.device_put(a, NamedSharding(mesh, rows)) for a in (currents, mask)))

    taus = jnp.linspace(5.0, 20.0, N_DEVICES)

    def sweep(taus, x):
        def one(tau):
            point = params.replace(tau_m=tau)
            return slif.simulate(point, slif.init_state(point, 8), x, dt=0.25, implementation="pallas")[1]["s"]

        return jax.vmap(one)(taus)

    mesh = jax.make_mesh((N_DEVICES,), ("points",), axis_types=(AxisType.Auto,))
    check(sweep, sweep(taus, currents), jax.device_put(taus, NamedSharding(mesh, P("points"))), currents)
    print(count)


def main():
    import re

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import slif

    mesh = Mesh(np.array(jax.devices()), ("devices",))
    assert mesh.size == N_DEVICES
    n_steps, batch, n_units = 20, 8, 32
    currents = jnp.asarray(np.random.default_rng(0).uniform(-3, 12, (n_steps, batch, n_units)), jnp.float32)
    cell = {"tau_m": 20.0, "resist_m": 1.5, "thr": 0.4, "refract_time": 1.0, "sticky_spikes": True}
    mechanisms = {
        "adaptive": {"thr_gain": 0.05, "thr_leak": 0.01},
        "voltage": {"surrogate": slif.arctan()},
        "rho_b": {"rho_b": 0.01},
        "inhibition": {"resist_inh": 0.01},
    }
    over_batch = {"currents": P(None, "devices"), "state": P("devices"), "units": P()}
    over_units = {"currents": P(None, None, "devices"), "state": P(None, "devices"), "units": P("devices")}

    def place(tree, spec_of):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x))), tree)

    def collectives(compiled):
        names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
        return set(re.findall(rf"\s({names})(?:-start)?\(", compiled.as_text()))

    def agree(actual, expected):
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), actual, expected)

    def check(function, arguments, sharded, expected_collectives):
        compiled = jax.jit(function).lower(*sharded).compile()
        agree(compiled(*sharded), jax.jit(function)(*arguments))
        assert collectives(compiled) == expected_collectives, (collectives(compiled), expected_collectives)

    def simulate(params, state, currents):
        return slif.simulate(params, state, currents, dt=0.25, record=("s", "v", "spike_count"))

    # A sum over units is an all-reduce; for inhibition each device gathers the spikes and keeps its own columns.
    talk = {"rho_b": {"all-reduce"}, "inhibition": {"all-gather"}}
    for mechanism, arguments in mechanisms.items():
        params = slif.init_params(jax.random.key(0), n_units, **cell, **arguments)
        state = slif.init_state(params, batch)
        for specs in (over_batch, over_units):
            columns = P(None, *specs["units"])
            own = place(params, lambda x, s=specs, c=columns: (P(), s["units"], c)[x.ndim])
            sharded = (
                own,
                place(state, lambda _, s=specs: s["state"]),
                place(currents, lambda _, s=specs: s["currents"]),
            )
            expected = talk.get(mechanism, set()) if specs is over_units else set()
            check(simulate, (params, state, currents), sharded, expected)
    print("simulate")

    params = slif.init_params(jax.random.key(0), n_units, **cell)
    points = {"tau_m": jnp.linspace(5, 40, 16), "thr": jnp.linspace(0.2, 0.8, 16)}

    def sweep(params, currents, over):
        return slif.sweep(params, currents, over=over, dt=0.25, record=("s", "spike_count"))

    replicated = place((params, currents), lambda _: P())
    check(sweep, (params, currents, points), (*replicated, place(points, lambda _: P("devices"))), set())
    print("sweep")

    optimiser = optax.adam(1e-2)
    x, y = jax.random.normal(jax.random.key(1), (n_steps, batch, 12)), jnp.arange(batch) % n_units
    for surrogate in (slif.secant(), slif.arctan()):
        weights = jax.random.normal(jax.random.key(2), (12, n_units))
        params = slif.init_params(jax.random.key(0), n_units, **cell, surrogate=surrogate)

        def train(weights, memory, x, y, params=params):
            def loss(weights):
                s = slif.simulate(params, slif.init_state(params, x.shape[1]), 5 * x @ weights, dt=0.25)[1]["s"]
                return optax.softmax_cross_entropy_with_integer_labels(s.sum(0), y).mean()

            value, gradient = jax.value_and_grad(loss)(weights)
            updates, memory = optimiser.update(gradient, memory)
            return value, gradient, optax.apply_updates(weights, updates)

        arguments = (weights, optimiser.init(weights), x, y)
        sharded = (*place(arguments[:2], lambda _: P()), place(x, lambda _: P(None, "devices")))
        check(train, arguments, (*sharded, place(y, lambda _: P("devices"))), {"all-reduce"})
    print("training")

    for mechanism in ("adaptive", "voltage"):
        params = slif.init_params(jax.random.key(0), n_units, **cell, **mechanisms[mechanism])
        state = slif.init_state(params, batch)
        for specs in (over_batch, over_units):
            own = jax.tree.map(lambda x, s=specs: (P(), s["units"])[x.ndim], params)
            mapped = jax.shard_map(
                lambda p, s, x: slif.simulate(p, s, x, dt=0.25, record=("s", "spike_count"))[1]["s"],
                mesh=mesh,
                in_specs=(own, specs["state"], specs["currents"]),
                out_specs=specs["currents"],
            )
            arguments = (params, state, currents)
            compiled = jax.jit(mapped).lower(*arguments).compile()
            agree(compiled(*arguments), slif.simulate(*arguments, dt=0.25)[1]["s"])
            gradient = jax.jit(jax.grad(lambda *a, f=mapped: f(*a).sum(), argnums=2))(*arguments)
            expected = jax.grad(lambda *a: slif.simulate(*a, dt=0.25)[1]["s"].sum(), argnums=2)(*arguments)
            agree(gradient, expected)
        fresh = jax.shard_map(
            lambda x, p=params: slif.simulate(p, slif.init_state(p, x.shape[1]), x, dt=0.25)[1]["s"],
            mesh=mesh,
            in_specs=over_batch["currents"],
            out_specs=over_batch["currents"],
        )
        agree(fresh(currents), slif.simulate(params, state, currents, dt=0.25)[1]["s"])

        def sweep(over, p=params):
            return slif.sweep(p, currents, over=over, dt=0.25)[1]["s"]

        points = {"tau_m": jnp.linspace(5, 40, 16)}
        mapped = jax.shard_map(sweep, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))
        agree(mapped(points), sweep(points))

    params = slif.init_params(jax.random.key(0), n_units, **cell, surrogate=slif.arctan())

    def gradient(weights, x):
        def loss(weights):
            return slif.simulate(params, slif.init_state(params, x.shape[1]), 5 * x @ weights, dt=0.25)[1]["s"].sum()

        return jax.grad(loss)(weights)

    weights = jax.random.normal(jax.random.key(2), (12, n_units))
    # JAX adds the sum over devices: the weights are the same everywhere, and so must their gradient be.
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P(None, "devices")), out_specs=P())
    agree(mapped(weights, x), gradient(weights, x))
    print("shard_map")


if __name__ == "__main__":
    {"main": main, "meshes": meshes, "kernels": kernels}[sys.argv[1]]()
