"""The scan that replaces the kernels in a program for any platform other than an NVIDIA GPU.

On a machine with a GPU, a program's platform is known only once it is lowered.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from slif._mesh import broadcast_like, match_varying_axes
from slif.kernels.loop import Cotangents, Inputs, Plan, kept, trained
from slif.loops import plain
from slif.types import FIELDS, SLIFState


def forward(plan: Plan, args: tuple[Inputs]) -> dict[str, Any]:
    """The same as the kernel, but in place of the states that it keeps, the first one, from which they follow."""
    (inputs,) = match_varying_axes(args)
    final, record, start = _run(plan, inputs)
    return {
        "record": record,
        "final": {name: final[name] for name in (*plan.final(inputs.params), *plan.summaries)},
        "kept": {
            name: jnp.broadcast_to(start[name], (plan.n_blocks + 1, *start[name].shape))
            for name in kept(inputs.params)
            if plan.keep
        },
    }


def _run(plan: Plan, inputs: Inputs) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """The final state with the summaries, the records, and the state before the first step."""
    units = inputs.currents[0]
    zeros = broadcast_like(0 * inputs.dt, units)  # varying between devices as the others do
    request = plan.request.replace(
        dt=inputs.dt.reshape(()),
        t0=inputs.t0.reshape(()),
        valid=None if inputs.valid_bits is None else _valid(inputs.valid_bits, plan.n_steps),
        record=(*plan.record, *plan.summaries),
        spike_dtype=plan.spike_dtype,
    )
    start = dict.fromkeys(FIELDS, zeros) | {name: broadcast_like(x, units) for name, x in inputs.state.items()}
    final, out = plain.run(inputs.params, SLIFState(**start), inputs.currents, request)
    return vars(final) | {name: out.pop(name) for name in plan.summaries}, out, start


def _valid(bits: Array, n_steps: int) -> Array:
    return jnp.unpackbits(bits, axis=0, count=n_steps, bitorder="little").astype(bool)


def reverse(plan: Plan, args: tuple[Inputs, Cotangents]) -> dict[str, Any]:
    """The derivative of `forward`, which is run again for it."""
    inputs, cotangents = match_varying_axes(args)
    units = inputs.currents[0]
    zeros = broadcast_like(0 * inputs.dt, units)
    blocks = kept(inputs.params)
    start = {name: x[0] if name in blocks else broadcast_like(x, units) for name, x in inputs.state.items()}
    first = dict.fromkeys(plan.carried, zeros) | start
    # One number per unit, as in the kernel: their cotangents are summed outside.
    numbers = {
        name: broadcast_like(getattr(inputs.params, name), units)
        for name in trained(inputs.params)
        if name in plan.wanted
    }

    def outputs(numbers, differentiated, currents, dt):
        params, state = inputs.params.replace(**numbers), first | differentiated
        given = inputs._replace(params=params, state=state, currents=currents, dt=dt)
        final, record, _ = _run(plan, given)
        return Cotangents(
            record={name: record[name] for name in cotangents.record},
            final={name: final[name] for name in cotangents.final},
            spike_count=None if cotangents.spike_count is None else final["spike_count"],
        )

    differentiated = {name: first[name] for name in plan.differentiated(inputs.params)}
    pull = jax.vjp(outputs, numbers, differentiated, inputs.currents, inputs.dt)[1]
    d_numbers, d_state, d_currents, d_dt = pull(cotangents)
    first_unit = broadcast_like(jnp.zeros(units.shape, bool).at[(0,) * units.ndim].set(True), units)
    d_dt = jnp.where(first_unit, d_dt.sum(), zeros)
    found = d_state | d_numbers | {"dt": d_dt}
    outs = {"numbers": {name: x for name, x in found.items() if name in plan.wanted}}
    return outs | ({"currents": d_currents} if "currents" in plan.wanted else {})
