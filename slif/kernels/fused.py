"""All T steps as one kernel, forwards and backwards: what `simulate` calls."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from slif.kernels import interpret, loop, mosaic_gpu
from slif.raster import pack_spikes
from slif.request import Request
from slif.types import FIELDS, SLIFParams, SLIFState


def run(params: SLIFParams, state: SLIFState, currents: Array, request: Request) -> tuple[SLIFState, dict[str, Array]]:
    """What `loops.plain.run` gives; `valid` has to be None. With respect to the voltage, reverse mode only."""
    record, spike_dtype = request.record, request.spike_dtype
    shape, n = state.v.shape, state.v.size
    padding = max(mosaic_gpu.WARPGROUP - n, 0)
    voltage = params.surrogate.wrt == "voltage"

    def flat(x: Array) -> Array:
        """Every row's units side by side, [M]; one number stays one."""
        if x.size == 1 and n > 1:
            return x.reshape(1)
        return jnp.pad(jnp.broadcast_to(x, shape).reshape(n), (0, padding), mode="edge")

    fields = tuple(name for name in record if name in FIELDS)
    only_packed = "s_packed" in record and "s" not in record
    plan = loop.Plan(
        n_steps=len(currents),
        n_units=n + padding,
        width=mosaic_gpu.width(n + padding, voltage),
        record=(*fields, "s") if only_packed else fields,
        # Mosaic stores no bool: one more pass over a byte a spike, 7 bytes an update in place of 5.
        spike_dtype=jnp.dtype(jnp.uint8) if only_packed or spike_dtype == jnp.bool_ else spike_dtype,
        count="spike_count" in record,
        first="first_spike_time" in record,
        keep=False,
    )
    inputs = loop.Inputs(
        params=jax.tree.map(flat, params.replace(thr=None)),
        state={name: flat(getattr(state, name)) for name in loop.CARRIED},
        currents=jnp.pad(currents.reshape(len(currents), n), ((0, 0), (0, padding))),
        dt=request.dt.reshape(1),
        t0=request.t0.reshape(1),
    )
    outs: dict[str, Any] = (_differentiable if voltage else _forward)(plan, inputs)
    final = {name: x[:n].reshape(shape) for name, x in outs["final"].items()}
    out = {name: x[:, :n].reshape(len(currents), *shape) for name, x in outs["record"].items()}
    if "s_packed" in record:
        out["s_packed"] = pack_spikes(out["s"])
    if "s" in record:
        out["s"] = out["s"].astype(spike_dtype)
    return SLIFState(**{name: final.pop(name) for name in FIELDS}), {name: (final | out)[name] for name in record}


def _launch(body: Callable, plan: loop.Plan, inputs: Any, out_type: Any, name: str) -> Any:
    """The kernel on a GPU; elsewhere its body in the interpreter."""

    def with_(launch: Callable) -> Callable:
        return lambda inputs: launch(body, plan, inputs, out_type, name)

    return lax.platform_dependent(inputs, cuda=with_(mosaic_gpu.launch), default=with_(interpret.launch))


def _forward(plan: loop.Plan, inputs: loop.Inputs) -> dict[str, Any]:
    def array(dtype: Any, *lead: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, plan.n_units), dtype)

    summaries = [name for name, on in (("spike_count", plan.count), ("first_spike_time", plan.first)) if on]
    out_type = {
        "record": {name: array(plan.spike_dtype if name == "s" else jnp.float32, plan.n_steps) for name in plan.record},
        "final": {name: array(jnp.float32) for name in (*FIELDS, *summaries)},
        "kept": {name: array(jnp.float32, plan.n_blocks + 1) for name in loop.KEPT if plan.keep},
    }
    return _launch(loop.forward, plan, (inputs,), out_type, "slif_forward")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: loop.Plan, inputs: loop.Inputs) -> dict[str, Any]:
    return _forward(plan, inputs)


def _keep(plan: loop.Plan, inputs: loop.Inputs) -> tuple[dict[str, Any], tuple[loop.Inputs, dict[str, Array]]]:
    outs = _forward(dataclasses.replace(plan, keep=True), inputs)
    return outs | {"kept": {}}, (inputs, outs["kept"])


def _pull(plan: loop.Plan, residuals: Any, bars: dict[str, Any]) -> tuple[loop.Inputs]:
    inputs, kept = residuals
    trained = [name for name in loop.TRAINED if getattr(inputs.params, name) is not None]
    out_type = {
        "currents": jax.ShapeDtypeStruct(inputs.currents.shape, inputs.currents.dtype),
        "inputs": dict.fromkeys((*loop.MOVING, *trained, "dt"), jax.ShapeDtypeStruct((plan.n_units,), jnp.float32)),
    }
    given = loop.Bars(
        record={
            name: bar
            for name, bar in bars["record"].items()
            if name in loop.DIFFERENTIATED and jnp.issubdtype(bar.dtype, jnp.floating)
        },
        final={name: bars["final"][name] for name in loop.DIFFERENTIATED},
        spike_count=bars["final"].get("spike_count"),
    )
    outs = _launch(loop.reverse, plan, (inputs._replace(state=kept), given), out_type, "slif_reverse")

    def like(name: str, x: Array) -> Array:
        bar = outs["inputs"][name]
        return bar.sum(keepdims=True) if x.shape == (1,) else bar

    zeros = jax.tree.map(jnp.zeros_like, inputs._replace(currents=None))
    return (
        zeros._replace(
            params=zeros.params.replace(**{name: like(name, getattr(inputs.params, name)) for name in trained}),
            state=zeros.state | {name: like(name, inputs.state[name]) for name in loop.MOVING},
            currents=outs["currents"],
            dt=like("dt", inputs.dt),
        ),
    )


_differentiable.defvjp(_keep, _pull)
