"""All T steps as one kernel, forwards and backwards."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from slif._mesh import broadcast_like, varying
from slif.cell import adapts, drive
from slif.init import at_rest
from slif.kernels import fallback, interpret, loop, mosaic_gpu
from slif.kernels.partition import partition, units_shape
from slif.raster import pack_spikes
from slif.request import SUMMARIES, Request
from slif.rounding import reciprocal
from slif.types import FIELDS, SLIFParams, SLIFState


def run(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, *, by_name: bool
) -> tuple[SLIFState, dict[str, Array]]:
    """The same as `loops.plain.run`; with a voltage surrogate, reverse mode only.

    If the program turns out not to be for an NVIDIA GPU, the interpreter runs the kernels if they were requested
    explicitly, else a scan replaces them.
    """
    record = request.record
    rows = [name for name in record if name not in (*SUMMARIES, "s_packed")]
    only_packed = "s_packed" in record and "s" not in record
    plan = loop.Plan(
        n_steps=len(currents),
        request=request.replace(dt=None, t0=None, valid=None),
        record=(*rows, "s") if only_packed else tuple(rows),
        # Mosaic stores predicates as single bits, unlike any array; so spikes are written as bytes, then made bool.
        spike_dtype=jnp.dtype(jnp.uint8) if only_packed or request.spike_dtype == jnp.bool_ else request.spike_dtype,
        masked=request.valid is not None,
        slope_carried=params.surrogate.wrt == "voltage" or "surrogate" in record,
    )
    ones = (1,) * state.v.ndim
    if request.at_rest:  # all rows are alike, so one is enough
        n_units = params.n_units
        state = at_rest(params.replace(thr=jnp.zeros(n_units, jnp.float32)), (*ones[1:], n_units))
    params = jax.tree.map(lambda x: x.reshape(ones[x.ndim :] + x.shape), params)
    numbers = params.replace(thr=None)
    if request.at_rest or not adapts(params):
        state = state.replace(thr=params.thr)
    inputs = loop.Inputs(
        params=numbers,
        state={name: getattr(state, name) for name in plan.carried},
        currents=currents,
        valid_bits=None if request.valid is None else jnp.packbits(request.valid, axis=0, bitorder="little"),
        dt=request.dt.reshape(ones),
        t0=request.t0.reshape(ones),
        inverse_tau=lax.stop_gradient(reciprocal(numbers.tau_m)),
    )
    outs: dict[str, Any] = (_differentiable if params.surrogate.wrt == "voltage" else _forward)(plan, by_name, inputs)
    final = dict(outs["final"])
    # `simulate` computes a slope that is left out.
    state = SLIFState(**{name: final.pop(name, None) for name in FIELDS})
    out = final | outs["record"]
    if "s_packed" in record:
        out["s_packed"] = pack_spikes(out["s"])
    if "s" in record:
        out["s"] = out["s"].astype(request.spike_dtype)
    return state, {name: out[name] for name in record}


class Kernel(NamedTuple):
    name: str
    body: Callable
    out_type: Callable  # a function of the plan, the arguments, and the shape of the units
    fallback: Callable  # does the same on other platforms


def _launch(kernel: Kernel, plan: loop.Plan, by_name: bool, args: Any) -> Any:
    rank = args[0].dt.ndim
    out_type = functools.partial(kernel.out_type, plan, args)

    def by(launch: Callable) -> Callable:
        return lambda args: partition(functools.partial(_flat, kernel, plan, launch), out_type, rank, args)

    # Pallas' interpreter does not support the types of `jax.shard_map`'s check_vma; its code for GPUs does.
    interpreted = by_name and not any(varying(x) for x in jax.tree.leaves(args))
    scan = functools.partial(kernel.fallback, plan)
    if interpreted:
        cpu, default = by(interpret.launch), lambda args: jax.tree.map(refused_p.bind, scan(args))
        return lax.platform_dependent(args, cuda=by(mosaic_gpu.launch), cpu=cpu, default=default)
    return lax.platform_dependent(args, cuda=by(mosaic_gpu.launch), default=scan)


def _refuse(context: Any, *_: Any) -> NoReturn:
    """A program's platform is certain only when it is lowered."""
    (platform,) = context.platforms or context.module_context.platforms
    raise NotImplementedError(
        f"implementation: expected an NVIDIA GPU for 'pallas', got platform {platform}; use None or 'xla'"
    )


refused_p = Primitive("slif_refused")
refused_p.def_abstract_eval(lambda x: x)
batching.defvectorized(refused_p)
mlir.register_lowering(refused_p, _refuse)


def _flat(kernel: Kernel, plan: loop.Plan, launch: Callable, rank: int, args: Any) -> Any:
    """Launches the kernel with all units along one axis."""
    shape = units_shape(rank, args)
    n = math.prod(shape)
    padded = max(n, mosaic_gpu.WARPGROUP)
    width = mosaic_gpu.width(padded, len(plan.record), kernel is REVERSE)

    def flat(x: Array) -> Array:
        """[..., M]; what all units share stays [..., 1], and what all rows share [..., N] if whole tiles fit a row."""
        steps = x.shape[: x.ndim - rank]
        if n > 1 and x.size == math.prod(steps):
            return x.reshape(*steps, 1)
        if x.size == math.prod(steps) * x.shape[-1] and x.shape[-1] % width == 0:
            return x.reshape(*steps, x.shape[-1])
        x = jnp.broadcast_to(x, (*steps, *shape)).reshape(*steps, n)
        return jnp.pad(x, [(0, 0)] * len(steps) + [(0, padded - n)], mode="edge")

    plan = dataclasses.replace(plan, n_units=padded, width=width)
    outs = launch(kernel.body, plan, jax.tree.map(flat, args), kernel.out_type(plan, args, (padded,)), kernel.name)
    return jax.tree.map(lambda x: x[..., :n].reshape(*x.shape[:-1], *shape), outs)


def _forward_type(plan: loop.Plan, args: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    def array(dtype: Any, *steps: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*steps, *shape), dtype)

    params = args[0].params
    return {
        "record": {name: array(plan.spike_dtype if name == "s" else jnp.float32, plan.n_steps) for name in plan.record},
        "final": {name: array(jnp.float32) for name in (*plan.final(params), *plan.summaries)},
        "kept": {name: array(jnp.float32, plan.n_blocks + 1) for name in loop.kept(params) if plan.keep},
    }


def _reverse_type(plan: loop.Plan, args: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    inputs, _ = args
    number = jax.ShapeDtypeStruct(shape, jnp.float32)
    currents = jax.ShapeDtypeStruct((plan.n_steps, *shape), inputs.currents.dtype)
    return {"numbers": {name: number for name in plan.wanted if name != "currents"}} | (
        {"currents": currents} if "currents" in plan.wanted else {}
    )


FORWARD = Kernel("slif_forward", loop.forward, _forward_type, fallback.forward)
REVERSE = Kernel("slif_reverse", loop.reverse, _reverse_type, fallback.reverse)


def _forward(plan: loop.Plan, by_name: bool, inputs: loop.Inputs) -> dict[str, Any]:
    outs = _launch(FORWARD, plan, by_name, (inputs,))
    # What follows from the last step is computed here, where it costs nothing if it is not used.
    follows: dict[str, Any] = {}
    if not plan.masked:
        last = inputs.currents[-1].astype(jnp.float32)
        follows = {"thr": broadcast_like(inputs.state["thr"], last), "j": drive(inputs.params, last, last)}
        if "s" in plan.record:
            follows["s"] = outs["record"]["s"][-1].astype(jnp.float32)
    return outs | {"final": follows | outs["final"]}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(plan: loop.Plan, by_name: bool, inputs: loop.Inputs) -> dict[str, Any]:
    return _forward(plan, by_name, inputs)


class Residuals(struct.PyTreeNode):
    inputs: loop.Inputs
    kept: dict[str, Array]
    wanted: tuple[str, ...] = struct.field(pytree_node=False)


def _keep(plan: loop.Plan, by_name: bool, given: loop.Inputs) -> tuple[dict[str, Any], Residuals]:
    def is_leaf(x: Any) -> bool:
        return hasattr(x, "perturbed")

    inputs = jax.tree.map(lambda x: x.value, given, is_leaf=is_leaf)
    perturbed = jax.tree.map(lambda x: x.perturbed, given, is_leaf=is_leaf)
    outs = _forward(dataclasses.replace(plan, keep=True), by_name, inputs)
    candidates = {"currents": perturbed.currents, "dt": perturbed.dt} | {
        name: getattr(perturbed.params, name) for name in loop.trained(inputs.params)
    }
    candidates |= {name: perturbed.state[name] for name in loop.DIFFERENTIATED if name in plan.carried}
    wanted = tuple(name for name, so in candidates.items() if so)
    return outs | {"kept": {}}, Residuals(inputs, outs["kept"], wanted)


def _pull(plan: loop.Plan, by_name: bool, residuals: Residuals, cotangents: dict[str, Any]) -> tuple[loop.Inputs]:
    inputs, kept, wanted = residuals.inputs, residuals.kept, residuals.wanted
    plan = dataclasses.replace(plan, wanted=wanted)
    # A threshold that is constant, and whose gradient is not wanted, needs no cotangent.
    names = {*plan.differentiated(inputs.params), "s", "j", "u", "spike_count"}
    of_record, of_final = (
        {
            name: bar
            for name, bar in cotangents[part].items()
            if name in names and not isinstance(bar, SymbolicZero) and jnp.issubdtype(bar.dtype, jnp.floating)
        }
        for part in ("record", "final")
    )
    given = loop.Cotangents(record=of_record, spike_count=of_final.pop("spike_count", None), final=of_final)
    constant = {} if adapts(inputs.params) else {"thr": inputs.state["thr"]}
    outs = _launch(REVERSE, plan, by_name, (inputs._replace(state=kept | constant), given))

    def like(x: Array, name: str) -> Array:
        bar = outs["numbers"][name]
        return bar.sum([n for n, size in enumerate(x.shape) if size == 1], keepdims=True)

    def gradients(numbers: dict[str, Array]) -> dict[str, Any]:
        return {name: like(x, name) if name in wanted else None for name, x in numbers.items()}

    params = gradients({name: getattr(inputs.params, name) for name in loop.trained(inputs.params)})
    none = jax.tree.map(lambda _: None, inputs)
    return (
        none._replace(
            params=none.params.replace(**params),
            state=gradients(inputs.state),
            currents=outs.get("currents"),
            **gradients({"dt": inputs.dt}),
        ),
    )


_differentiable.defvjp(_keep, _pull, symbolic_zeros=True)
