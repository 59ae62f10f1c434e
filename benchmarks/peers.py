"""Rasters of other packages' cells, for those that are installed: functions of currents [T, B, N].

All but two run the same equations: forward Euler, spike above a fixed threshold, reset to 0. Norse's synapse filters
the current once more, and spyx subtracts the threshold, a step after the spike. None but ngc-learn's cell has a
refractory period or adapts.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np


def snntorch_raster() -> Callable:
    torch, snntorch = importlib.import_module("torch"), importlib.import_module("snntorch")
    surrogate = importlib.import_module("snntorch.surrogate")
    cell = snntorch.Leaky(
        beta=1 - cases.DT / cases.TAU_M,
        threshold=cases.THR,
        spike_grad=surrogate.atan(),
        reset_mechanism="zero",
        reset_delay=False,
    )

    def run(currents):
        membrane, raster = cell.reset_mem(), []
        for j in currents * (cases.DT / cases.TAU_M):
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


def norse_raster() -> Callable:
    torch, norse = importlib.import_module("torch"), importlib.import_module("norse.torch")
    layer = norse.LIF(norse.LIFParameters(tau_mem_inv=torch.tensor(1000 / cases.TAU_M), v_th=torch.tensor(cases.THR)))
    return lambda currents: layer(currents * 0.2)[0]


TORCH = {"snntorch": snntorch_raster, "spikingjelly": spikingjelly_raster, "norse": norse_raster}


def installed(names: list[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name)]


def torch_forward(name: str, currents: np.ndarray) -> Callable:
    """A call that gives the raster, without a gradient."""
    torch = importlib.import_module("torch")
    raster, constant = TORCH[name](), torch.from_numpy(currents)

    def forward():
        with torch.no_grad():
            return raster(constant)

    return forward


def torch_both(name: str, currents: np.ndarray, bar: np.ndarray) -> Callable:
    """A call that gives the raster and the gradient of the currents."""
    torch = importlib.import_module("torch")
    raster, constant, cotangent = TORCH[name](), torch.from_numpy(currents), torch.from_numpy(bar)

    def forward_and_backward():
        x = constant.clone().requires_grad_()
        s = raster(x)
        s.backward(cotangent)
        return s.detach(), x.grad

    return forward_and_backward


def ngclearn_forward(currents: np.ndarray, state_too: bool = True, **mechanism: Any) -> Callable:
    """Its own step under one jitted scan, state in and out: faster than its processes, which compile a step each."""
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

    wanted = run if state_too else jax.jit(lambda *arguments: (None, run(*arguments)[1]))
    forward = functools.partial(wanted, state, jnp.asarray(currents))
    return lambda: forward()[1]


def spyx_forward(currents: np.ndarray, state_too: bool = True) -> Callable:
    """Its own scan over its cell, which carries the voltage alone, under one jit."""
    nnx, nn = importlib.import_module("flax.nnx"), importlib.import_module("spyx.nn")
    cell = nn.LIF(currents.shape[2:], 1 - cases.DT / cases.TAU_M, cases.THR, rngs=nnx.Rngs(0))
    graph, values = nnx.split(cell)

    @jax.jit
    def run(values, currents):
        return nn.run(nnx.merge(graph, values), currents * (cases.DT / cases.TAU_M))

    wanted = run if state_too else jax.jit(lambda *arguments: run(*arguments)[:1])
    forward = functools.partial(wanted, values, jnp.asarray(currents))
    return lambda: forward()[0]
