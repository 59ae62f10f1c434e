"""The time loop of a tile of units, forwards and backwards, with the state in registers.

Both bodies are the same Python functions wherever they run; a launcher gives them references to whole arrays, the place
of their tile, and how to load it. They call the equations of `slif.cell` and JAX's derivative of them, and hold none.

Letters: T time steps, M units (every row of a batch counts), K steps a block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from slif.cell import advance as advance_cell
from slif.kernels.bare import bare
from slif.types import SLIFParams, SLIFState

CARRIED = ("v", "thr", "rfr", "tols")  # what a later step reads, and tols
KEPT = ("v", "thr", "rfr")  # what the reverse loop starts a block from
MOVING = ("v", "thr")  # fields that carry a gradient from step to step
DIFFERENTIATED = (*MOVING, "s", "j")  # fields that have one
TRAINED = ("tau_m", "resist_m", "thr_gain", "thr_leak")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    n_steps: int  # T
    n_units: int  # M
    width: int  # units of a tile, M or less
    record: tuple[str, ...]  # fields written at each step, [T, M]
    spike_dtype: Any
    count: bool  # of the output spikes, [M]
    first: bool  # time of the first output spike, [M]
    keep: bool  # the state before each block, [ceil(T / K), M], for the reverse loop

    block = 8  # K: steps whose currents are loaded ahead, and whose states the reverse loop holds in registers

    @property
    def n_tiles(self) -> int:
        return pl.cdiv(self.n_units, self.width)

    @property
    def n_blocks(self) -> int:
        """Whole blocks; what remains after them is 1 to K steps, so that the last step always stands apart."""
        return (self.n_steps - 1) // self.block


class Inputs(NamedTuple):
    """What both loops read; numbers are [1], what differs between units [M]."""

    params: SLIFParams
    state: dict[str, Array]  # CARRIED, [M]
    currents: Array  # [T, M]
    dt: Array
    t0: Array


class Tile(NamedTuple):
    """A launcher's way to the units of one tile."""

    units: Any  # their slice of M
    load: Callable[[Any], Array]  # reads a reference [width] into registers
    fill: Callable[[float], Array]  # a number in the same registers

    def read(self, ref: Any) -> Array:
        """A number, or the tile's share of an array [M]."""
        return ref[0] if ref.shape[-1] == 1 else self.load(ref.at[self.units])

    def row(self, ref: Any, k: Any) -> Array:
        """The tile's share of row k of an array [T, M]."""
        return self.load(ref.at[k, self.units])


def step(params: SLIFParams, fields: dict[str, Array], j: Array, t: Array, dt: Array) -> SLIFState:
    """One step of the cell, from the fields that go round the loop."""
    old = SLIFState(**dict.fromkeys(("j", "s", "surrogate")), **fields)
    return advance_cell(params, old, j, t, dt)


def forward(plan: Plan, tile: Tile, inputs: Inputs, outs: dict[str, Any]) -> None:
    """Runs all T steps of a tile."""
    params = jax.tree.map(tile.read, inputs.params)
    dt, t0 = tile.read(inputs.dt), tile.read(inputs.t0)

    def wanted(params, carry, j, t, dt):
        fields, summary = carry
        new = step(params, fields, j, t, dt)
        summary = dict(summary)
        if plan.count:
            summary["spike_count"] = summary["spike_count"] + new.s
        if plan.first:
            first = summary["first_spike_time"]
            summary["first_spike_time"] = jnp.where(new.s > 0, jnp.minimum(first, t), first)
        record = {name: getattr(new, name) for name in plan.record}
        return ({name: getattr(new, name) for name in CARRIED}, summary), record, new

    advance, finish = bare(lambda *args: wanted(*args)[:2]), bare(wanted)

    def write(k, record):
        for name, x in record.items():
            outs["record"][name][k, tile.units] = x.astype(plan.spike_dtype) if name == "s" else x

    def fetch(start, n):
        return [tile.row(inputs.currents, start + k) for k in range(n)]

    def block(b, carry):
        carry, currents = carry
        ahead = fetch(jnp.minimum(b + 1, plan.n_blocks - 1) * plan.block, plan.block)
        keep(b, carry)
        for n, j in enumerate(currents):
            k = b * plan.block + n
            carry, record = advance(params, carry, j, t0 + k.astype(t0.dtype) * dt, dt)
            write(k, record)
        return carry, ahead

    def keep(b, carry):
        if plan.keep:
            for name in KEPT:
                outs["kept"][name][b, tile.units] = carry[0][name]

    fields = {name: tile.read(inputs.state[name]) for name in CARRIED}
    summary = {}
    if plan.count:
        summary["spike_count"] = tile.fill(0)
    if plan.first:
        summary["first_spike_time"] = tile.fill(jnp.inf)
    carry = (fields, summary)
    if plan.n_blocks:
        carry, _ = lax.fori_loop(0, plan.n_blocks, block, (carry, fetch(0, plan.block)))
    keep(plan.n_blocks, carry)
    start = plan.n_blocks * plan.block
    *most, last = fetch(start, plan.n_steps - start)
    for n, j in enumerate(most):
        carry, record = advance(params, carry, j, t0 + (start + n) * dt, dt)
        write(start + n, record)
    end = plan.n_steps - 1
    carry, record, new = finish(params, carry, last, t0 + end * dt, dt)
    write(end, record)
    for name, x in (carry[1] | dict(new.__dict__)).items():
        outs["final"][name][tile.units] = x


class Bars(NamedTuple):
    """Cotangents of what the forward loop gave; None stands for zero."""

    record: dict[str, Array]  # [T, M]
    final: dict[str, Array]  # DIFFERENTIATED, [M]
    spike_count: Array | None  # [M]


def reverse(plan: Plan, tile: Tile, inputs: Inputs, bars: Bars, outs: dict[str, Any]) -> None:
    """Runs all T steps of a tile backwards; each block runs forwards first, from the state that was kept."""
    params = jax.tree.map(tile.read, inputs.params)
    zero = tile.fill(0)  # added to a number, it makes one a unit: their cotangents are summed outside
    trained = {name: x + zero for name in TRAINED if (x := getattr(params, name)) is not None}
    dt = tile.read(inputs.dt) + zero

    def advance(trained, fields, j, dt):
        new = step(params.replace(**trained), fields | {"tols": fields["v"]}, j, dt, dt)
        return {name: getattr(new, name) for name in KEPT}

    def pull(trained, fields, j, dt, bar):
        def outputs(trained, moving, j, dt):
            new = step(params.replace(**trained), fields | moving | {"tols": fields["v"]}, j, dt, dt)
            return {name: getattr(new, name) for name in DIFFERENTIATED}

        moving = {name: fields[name] for name in MOVING}
        return jax.vjp(outputs, trained, moving, j, dt)[1](bar)

    advance, pull = bare(advance), bare(pull)
    count = None if bars.spike_count is None else tile.load(bars.spike_count.at[tile.units])

    def block(start, n, fields, carry, last=None):
        """Steps start to start + n, whose first begins with `fields`."""
        bar, total = carry
        currents = [tile.row(inputs.currents, start + k) for k in range(n)]
        rows = [{name: tile.row(x, start + k) for name, x in bars.record.items()} for k in range(n)]
        states = [fields]
        for j in currents[:-1]:
            states.append(advance(trained, states[-1], j, dt))
        for k in reversed(range(n)):
            full = {"s": zero, "j": zero} | bar
            extra = [rows[k], {} if count is None else {"s": count}, (last or {}) if k == n - 1 else {}]
            for name, x in ((name, x) for part in extra for name, x in part.items()):
                full[name] = full[name] + x.astype(full[name].dtype)
            d_trained, bar, d_j, d_dt = pull(trained, states[k], currents[k], dt, full)
            total = jax.tree.map(jnp.add, total, (d_trained, d_dt))
            outs["currents"][start + k, tile.units] = d_j
        return bar, total

    def kept(b):
        return {name: tile.row(inputs.state[name], b) for name in KEPT}

    final = {name: tile.load(x.at[tile.units]) for name, x in bars.final.items()}
    carry = ({name: final[name] for name in MOVING}, jax.tree.map(lambda _: zero, (trained, dt)))
    start = plan.n_blocks * plan.block
    last = {name: x for name, x in final.items() if name not in MOVING}
    carry = block(start, plan.n_steps - start, kept(plan.n_blocks), carry, last)

    def body(n, carry):
        b = plan.n_blocks - 1 - n
        return block(b * plan.block, plan.block, kept(b), carry)

    if plan.n_blocks:
        carry = lax.fori_loop(0, plan.n_blocks, body, carry)
    bar, (d_trained, d_dt) = carry
    for name, x in (bar | d_trained | {"dt": d_dt}).items():
        outs["inputs"][name][tile.units] = x
