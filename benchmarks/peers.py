"""Other packages' cells, if installed: functions of currents [T, B, N] that return the raster.

Most have the same equations: forward Euler, a spike above a fixed threshold, reset to 0, the arc tangent as surrogate,
no gradient through the reset. The differences:

    ngclearn           can have a refractory period and adaptation, unlike the others
    norse              a synapse also filters the current, and the surrogate is a different one
    spyx               subtracts the threshold, one step after the spike; its arc tangent is 1 / pi of the others'
    snntorch, jaxpike  have a gradient through the reset
    sparx              also spikes at the threshold itself

Recurrent layers, for bench_network.py, have further differences:

    spyx               feeds back, like its reset, one step after the spike
    jaxpike            is a graph with a cycle, run step by step, with the product in its second node
    snntorch           computes the product twice per step, the second time to determine the reset
    spikingjelly       multiplies the currents too, by a matrix in front of its layer, here the identity; so does norse
    norse              also reads its output through a synapse

JAX packages are timed in one jit. spyx, jaxpike and sparx each scan over time. jaxpike's default of 8 steps per
iteration of the loop is for GPUs and takes 2 to 4 times longer on a CPU, so here it runs one, like the others.
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np

LEAK = cases.DT / cases.TAU_M
PACKAGES = {"sparx": "sparxml, Python 3.12 or later"}  # where the name on PyPI differs
TITLES = {
    "ngclearn": "ngc-learn",
    "spyx": "Spyx",
    "snntorch": "snnTorch",
    "spikingjelly": "SpikingJelly",
    "norse": "Norse",
}
SAME_SPIKES = ("snntorch", "spikingjelly", "jaxpike", "sparx")
THROUGH_RESET = ("snntorch", "jaxpike")  # the ones among these whose gradient also flows through the reset


def installed(names: list[str]) -> list[str]:
    """The installed ones among the names; prints a line for each of the others."""
    found = [name for name in names if importlib.util.find_spec(name)]
    for name in names:
        if name not in found:
            print(f"{name}: skipped, not installed (pip install {PACKAGES.get(name, name)})")
    return found


def snntorch_raster() -> Callable:
    torch, snntorch = importlib.import_module("torch"), importlib.import_module("snntorch")
    surrogate = importlib.import_module("snntorch.surrogate")
    cell = snntorch.Leaky(
        beta=1 - LEAK,
        threshold=cases.THR,
        spike_grad=surrogate.atan(),
        reset_mechanism="zero",
        reset_delay=False,
    )

    def run(currents):
        membrane, raster = cell.reset_mem(), []
        for j in currents * LEAK:
            s, membrane = cell(j, membrane)
            raster.append(s)
        return torch.stack(raster)

    return run


def spikingjelly_raster() -> Callable:
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    surrogate = importlib.import_module("spikingjelly.activation_based.surrogate")
    cell = neuron.LIFNode(
        tau=cases.TAU_M / cases.DT,
        v_threshold=cases.THR,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        step_mode="m",
    )

    def run(currents):
        cell.reset()
        return cell(currents)

    return run


def norse_loop(cell: Any, currents: Any) -> Any:
    torch = importlib.import_module("torch")
    state, raster = None, []
    for j in currents * 0.2:
        s, state = cell(j, state)
        raster.append(s)
    return torch.stack(raster)


def norse_raster() -> Callable:
    """Its cell in a loop, since the backward pass of its own loop allocates a whole sequence at each step."""
    torch, norse = importlib.import_module("torch"), importlib.import_module("norse.torch")
    cell = norse.LIFCell(
        norse.LIFParameters(tau_mem_inv=torch.tensor(1000 / cases.TAU_M), v_th=torch.tensor(cases.THR))
    )

    return functools.partial(norse_loop, cell)


TORCH = {"snntorch": snntorch_raster, "spikingjelly": spikingjelly_raster, "norse": norse_raster}


def snntorch_recurrent(weights: Any) -> tuple[Callable, Any]:
    torch, snntorch = importlib.import_module("torch"), importlib.import_module("snntorch")
    surrogate = importlib.import_module("snntorch.surrogate")
    cell = snntorch.RLeaky(
        beta=1 - LEAK,
        linear_features=len(weights),
        threshold=cases.THR,
        spike_grad=surrogate.atan(),
        reset_mechanism="zero",
        reset_delay=False,
    )
    cell.recurrent.bias = None
    cell.recurrent.weight.data = LEAK * weights.T

    def run(currents):
        (s, membrane), raster = cell.reset_mem(), []
        for j in currents * LEAK:
            s, membrane = cell(j, s, membrane)
            raster.append(s)
        return torch.stack(raster)

    return run, cell.recurrent.weight


def spikingjelly_recurrent(weights: Any) -> tuple[Callable, Any]:
    torch, n_units = importlib.import_module("torch"), len(weights)
    base = "spikingjelly.activation_based."
    functional, layer, neuron, surrogate = (
        importlib.import_module(base + name) for name in ("functional", "layer", "neuron", "surrogate")
    )
    node = neuron.LIFNode(
        tau=cases.TAU_M / cases.DT, v_threshold=cases.THR, surrogate_function=surrogate.ATan(), detach_reset=True
    )
    container = layer.LinearRecurrentContainer(node, n_units, n_units, bias=False, step_mode="m")
    container.rc.weight.data = torch.hstack([torch.eye(n_units), weights.T])

    def run(currents):
        functional.reset_net(container)
        return container(currents)

    return run, container.rc.weight


def norse_recurrent(weights: Any) -> tuple[Callable, Any]:
    torch, norse = importlib.import_module("torch"), importlib.import_module("norse.torch")
    own = torch.nn.Parameter(0.2 * weights.T)
    cell = norse.LIFRecurrentCell(
        *(len(weights), len(weights)),
        norse.LIFParameters(tau_mem_inv=torch.tensor(1000 / cases.TAU_M), v_th=torch.tensor(cases.THR)),
        input_weights=torch.eye(len(weights)),
        recurrent_weights=own,
        autapses=True,
    )

    return functools.partial(norse_loop, cell), own


# Functions of the recurrent matrix [N, N], from row to column, that return a function of the currents and the parameter
# [N, ..., N] whose last N columns are that matrix, transposed.
TORCH_RECURRENT: dict[str, Callable[[Any], tuple[Callable, Any]]] = {
    "snntorch": snntorch_recurrent,
    "spikingjelly": spikingjelly_recurrent,
    "norse": norse_recurrent,
}


def torch_integrator(name: str) -> Callable:
    """A layer of leaky integrators: a function of currents that returns potentials."""
    torch = importlib.import_module("torch")
    if name == "spikingjelly":
        neuron = importlib.import_module("spikingjelly.activation_based.neuron")
        layer = neuron.NonSpikingLIFNode(cases.TAU_M / cases.DT)
        return lambda currents: torch.stack(layer(currents))
    if name == "norse":
        norse = importlib.import_module("norse.torch")
        layer = norse.LI(norse.LIParameters(tau_mem_inv=torch.tensor(1000 / cases.TAU_M)))
        return lambda currents: layer(currents * 0.2)[0]
    cell = importlib.import_module("snntorch").Leaky(beta=1 - LEAK, reset_mechanism="none")

    def run(currents):
        v, potentials = cell.reset_mem(), []
        for j in currents * LEAK:
            v = cell(j, v)[1]
            potentials.append(v)
        return torch.stack(potentials)

    return run


def torch_forward(name: str, shape: tuple[int, ...]) -> Callable:
    """A function that returns the raster, without a gradient."""
    torch = importlib.import_module("torch")
    raster, constant = TORCH[name](), torch.from_numpy(cases.make_currents(shape))

    def forward():
        with torch.no_grad():
            return raster(constant)

    return forward


def torch_both(name: str, shape: tuple[int, ...]) -> Callable:
    """A function that returns the raster and the gradient of the currents."""
    torch = importlib.import_module("torch")
    raster, constant, bar = TORCH[name](), torch.from_numpy(cases.make_currents(shape)), cases.make_bar(shape)
    cotangent = torch.from_numpy(bar)

    def forward_and_backward():
        x = constant.clone().requires_grad_()
        s = raster(x)
        s.backward(cotangent)
        return s.detach(), x.grad

    return forward_and_backward


def spyx_run(n_units: int) -> Callable:
    nnx, nn, axn = map(importlib.import_module, ("flax.nnx", "spyx.nn", "spyx.axn"))
    cell = nn.LIF((n_units,), 1 - LEAK, cases.THR, axn.arctan(1.0), rngs=nnx.Rngs(0))
    return lambda currents: nn.run(cell, currents * LEAK)


def jaxpike_run(n_units: int, scan_unroll: int | None = 1) -> Callable:
    jaxpike = importlib.import_module("jaxpike")
    # Its decay is exp(-dt / tau).
    tau = -cases.DT / math.log(1 - LEAK)
    cell = jaxpike.LIF(tau, threshold=cases.THR, dt=cases.DT, reset="zero", surrogate=jaxpike.ATan())
    return lambda currents: jaxpike.unroll(cell, currents, scan_unroll=scan_unroll)


def sparx_run(n_units: int) -> Callable:
    """The function that its layers run, without the spike time within a step that they also return."""
    dynamics, surrogate = importlib.import_module("sparx.dynamics"), importlib.import_module("sparx.surrogate")
    cell = dynamics.LIFCell(1 - LEAK, cases.THR, "zero", surrogate.ATan(), True)

    def run(currents):
        out, state = dynamics.run(cell, currents * LEAK)
        return out.value, state

    return run


# Functions of the number of units, which return functions of the currents: the raster and the final state.
JAX: dict[str, Callable[[int], Callable]] = {"spyx": spyx_run, "jaxpike": jaxpike_run, "sparx": sparx_run}


def spyx_recurrent(currents: Any, weights: Any) -> Any:
    nnx, nn, axn = map(importlib.import_module, ("flax.nnx", "spyx.nn", "spyx.axn"))
    cell = nn.RLIF((len(weights),), 1 - LEAK, cases.THR, axn.arctan(1.0), rngs=nnx.Rngs(0))
    cell.recurrent_w = nnx.Param(LEAK * weights)
    return nn.run(cell, currents * LEAK)[0]


def jaxpike_recurrent(currents: Any, weights: Any) -> Any:
    jaxpike, eqx = importlib.import_module("jaxpike"), importlib.import_module("equinox")
    tau = -cases.DT / math.log(1 - LEAK)
    with jax.ensure_compile_time_eval():  # it reads the value of tau
        cell = jaxpike.LIF(tau, threshold=cases.THR, dt=cases.DT, reset="zero", surrogate=jaxpike.ATan())
    dense = jaxpike.Dense(len(weights), len(weights), key=jax.random.key(0), use_bias=False)
    dense = eqx.tree_at(lambda dense: dense.weight, dense, weights.T)
    edges = [("input", "cell"), ("cell", "dense"), ("dense", "cell")]
    return jaxpike.unroll(jaxpike.Graph({"cell": cell, "dense": dense}, edges, "cell"), currents, scan_unroll=1)[0]


# Functions of the currents and the recurrent matrix [N, N], from row to column, that return the raster.
JAX_RECURRENT: dict[str, Callable[[Any, Any], Any]] = {
    "spyx": spyx_recurrent,
    "jaxpike": jaxpike_recurrent,
}


def jax_integrator(name: str, currents: Any) -> Any:
    """The potentials of a layer of leaky integrators."""
    if name == "spyx":
        nnx, nn = importlib.import_module("flax.nnx"), importlib.import_module("spyx.nn")
        return nn.run(nn.LI(currents.shape[-1:], 1 - LEAK, rngs=nnx.Rngs(0)), currents * LEAK)[0]
    jaxpike = importlib.import_module("jaxpike")
    with jax.ensure_compile_time_eval():
        layer = jaxpike.LeakyIntegrator(-cases.DT / math.log(1 - LEAK), dt=cases.DT)
    return jaxpike.unroll(layer, currents, scan_unroll=1)[0]


def jax_forward(name: str, currents: np.ndarray, state_too: bool = True) -> Callable:
    """A function that returns the raster, compiled with or without the final state as an output."""
    run = JAX[name](currents.shape[-1])
    compiled = jax.jit(run if state_too else lambda x: run(x)[:1])
    forward = functools.partial(compiled, jnp.asarray(currents))
    return lambda: forward()[0]


def jax_both(name: str, currents: np.ndarray, bar: np.ndarray, state_too: bool = True) -> Callable:
    """A function that returns the raster, the gradient of the currents and, optionally, the final state."""
    run = JAX[name](currents.shape[-1])

    @jax.jit
    def forward_and_backward(x, bar):
        s, pull, state = jax.vjp(run, x, has_aux=True)
        return (s, pull(bar)[0], state) if state_too else (s, pull(bar)[0])

    return functools.partial(forward_and_backward, jnp.asarray(currents), jnp.asarray(bar))


def ngclearn_forward(currents: np.ndarray, state_too: bool = True, **mechanism: Any) -> Callable:
    """Its own step in one jitted scan that carries its state: faster than its processes, which compile single steps."""
    ngclearn: Any = importlib.import_module("ngclearn")
    components: Any = importlib.import_module("ngclearn.components")
    manager: Any = importlib.import_module("ngcsimlib.global_state").stateManager
    n_steps, batch, n_units = currents.shape
    with ngclearn.Context(f"bench{len(manager.state)}") as context:
        cell = components.SLIFCell(
            "cell",
            n_units,
            cases.TAU_M,
            resist_m=1.0,
            thr=cases.THR,
            thr_jitter=0.0,
            batch_size=batch,
            key=jax.random.PRNGKey(0),
            **mechanism,
        )
        advance = ngclearn.MethodProcess("advance") >> cell.advance_state
    names = {field: getattr(cell, field).target for field in ("j", "s", "thr")}
    state = {key: x for key, x in manager.state.items() if key.startswith(f"{context.name}:")}
    state[names["thr"]] = jnp.broadcast_to(state[names["thr"]], (batch, n_units))

    @jax.jit
    def run(state, currents):
        def body(state, x):
            j, t = x
            keywords = advance.pack_keywords(t=t, dt=cases.DT)
            state, _ = advance.run.compiled(state | {names["j"]: j}, keywords)
            return state, state[names["s"]]

        return jax.lax.scan(body, state, (currents, jnp.arange(n_steps, dtype=jnp.float32)))

    chosen = run if state_too else jax.jit(lambda *arguments: (None, run(*arguments)[1]))
    forward = functools.partial(chosen, state, jnp.asarray(currents))
    return lambda: forward()[1]
