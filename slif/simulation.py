"""Runs the cell over a whole sequence."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from slif import _check, _warn
from slif._mesh import match_varying_axes, reshard_like_currents
from slif.cell import adapts, take_thresholds
from slif.current_gradient import attach_gradient
from slif.init import at_rest
from slif.loops.choose import choose
from slif.request import RECORDS, Records, Request
from slif.rounding import as_runtime_values
from slif.types import SLIFParams, SLIFState


def simulate(
    params: SLIFParams,
    state: SLIFState | None,
    currents: Array,
    *,
    dt: ArrayLike,
    t0: ArrayLike = 0.0,
    record: Records = ("s",),
    spike_dtype: DTypeLike | None = None,
    valid: Array | np.ndarray | None = None,
    checkpoint_every: int | None = None,
    implementation: Literal["xla", "pallas"] | None = None,
    feedback: ArrayLike | None = None,
) -> tuple[SLIFState, dict[str, Array]]:
    """Runs the cell over a sequence of currents, by forward Euler.

        state = step(params, state, currents[k] [+ state.s @ feedback], t0 + k dt, dt)   for k = 0 .. T - 1

    Args:
        params: the parameters.
        state: the state before the first step, fields [..., N]; None for a cell at rest, with the batch shape of the
            currents.
        currents: input currents [T, ..., N], time first; cast to the dtype of params inside the loop, or before it if
            they come from NumPy in 64 bits that JAX does not have.
        dt: the length of a step, ms, positive. Above 2 tau_m forward Euler diverges, with a UserWarning if both come
            from Python or NumPy values.
        t0: the time of the first step, ms.
        record: what to return. For every step: any field of `SLIFState` or "u" (the potential before the reset, with a
            gradient where v has one), [T, ..., N], and "s_packed" (8 spikes per byte), [T, ..., ceil(N / 8)]. For the
            whole run, [..., N]: "spike_count" and "first_spike_time" (ms, inf if there is none), whose memory does not
            grow with T. Both count the spikes in "s", including a sticky spike carried in by the state.
        spike_dtype: dtype of the recorded "s"; None for the dtype of params. bool and integers carry no gradient.
        valid: boolean [T, ...], over steps and batch. Where False, the row's state is frozen and its "s" is 0; the
            time t runs on.
        checkpoint_every: in the backward pass of a voltage surrogate, keep the state only once every so many steps and
            recompute the steps in between. A number down to half as large is used if it divides T where this one does
            not. About sqrt(T) saves the most memory.
        implementation: "xla"; "pallas", one fused kernel for NVIDIA GPUs of compute capability 8.0 or later (9.0 with
            jax 0.10), run by Pallas' slow interpreter where there is no GPU; or None to choose by platform and
            arguments. The kernel's gradients for a voltage surrogate are reverse mode only.
        feedback: recurrent weights [N, N], from row to column: s @ feedback, with s the spikes of the previous step
            (those in `state` at the first), is added to the currents before resist_m is applied.

    Returns:
        The state after the last step, and a dict of the records.

    Raises:
        TypeError: an argument has the wrong type, or its dtype is not that of params.
        ValueError: a shape does not match, a name is unknown, or a Python or NumPy value is out of range.
        NotImplementedError: the requested implementation does not support this run.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); ngc-learn's `SLIFCell.advance_state`.

    Example:
        >>> from slif import init_params
        >>> params = init_params(jax.random.key(0), 1, tau_m=16.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> state, out = simulate(params, None, jnp.full((4, 1), 4.0), dt=1.0, record=("s", "v"))
        >>> out["s"].ravel(), out["v"].ravel()
        (Array([0., 1., 0., 1.], dtype=float32), Array([0.25, 0.  , 0.25, 0.  ], dtype=float32))
    """
    params, state = _check.as_params(params), None if state is None else _check.as_state(state)
    dtype = params.thr.dtype
    if valid is not None:
        _check.check_array("valid", valid, "a boolean array")
    _check.check_implementation(implementation)
    request = Request(
        dt=_check.as_number("dt", dt, dtype),
        t0=_check.as_number("t0", t0, dtype),
        valid=valid,
        feedback=None if feedback is None else _check.as_real("feedback", feedback, dtype),
        record=_check.as_names("record", record, RECORDS),
        spike_dtype=_check.as_spike_dtype(spike_dtype, dtype),
        checkpoint_every=None if checkpoint_every is None else _check.as_size("checkpoint_every", checkpoint_every, 1),
        at_rest=state is None,
    )
    _warn.euler(params.tau_m, request.dt)
    _warn.clock(params.refract_time, request.dt, dtype)
    currents = _check.as_currents("currents", currents, dtype)
    with _check.transfers():
        return _simulate(params, state, currents, request, implementation)


@functools.partial(jax.jit, static_argnames="implementation")
def _simulate(
    params: SLIFParams, state: SLIFState | None, currents: Array, request: Request, implementation: str | None
) -> tuple[SLIFState, dict[str, Array]]:
    before = _check_shapes(params, state, currents, request)
    shared, before, currents, valid = reshard_like_currents((params, request.feedback), before, currents, request.valid)
    params, dt, t0 = as_runtime_values(shared[0], before.v.ndim, request.dt, request.t0)
    feedback = None if shared[1] is None else shared[1].astype(params.thr.dtype)
    request = request.replace(dt=dt, t0=t0, valid=None if valid is None else valid[..., None], feedback=feedback)
    if currents.shape[0] == 0:
        return choose(implementation, params, currents, request, constant=False)(params, before, currents, request)
    start = take_thresholds(params, before)
    params, start, before, currents, request = match_varying_axes((params, start, before, currents, request))
    final, out = _run(params, start, currents, request, implementation)
    if params.surrogate.wrt == "current":
        # A function of j: with masks, a loop that carries it as well takes 1.6 times as long on a CPU.
        h = params.surrogate(final.j)
        h = h if request.valid is None else jnp.where(request.valid.any(0), h, before.surrogate)
        final = final.replace(surrogate=lax.stop_gradient(h))
    if valid is not None and not adapts(params):  # until its first valid step a row keeps the thresholds it was given
        given = lax.stop_gradient(before.thr) if params.surrogate.wrt == "current" else before.thr
        begun = lax.cummax(valid.astype(jnp.int8))[..., None] > 0
        final = final.replace(thr=jnp.where(begun[-1], final.thr, given))
        out |= {"thr": jnp.where(begun, out["thr"], given)} if "thr" in out else {}
    return final, out


def _check_shapes(params: SLIFParams, state: SLIFState | None, currents: Array, request: Request) -> SLIFState:
    """Checks all shapes and dtypes; returns the state, at rest if none is given."""
    if state is None:
        _check.check_signature(params)
        _check.check_currents("currents", currents, (None, *currents.shape[1:-1], params.n_units))
        if not _check.broadcasts(params.thr.shape, currents.shape[1:]):
            shape = currents.shape[1:]
            raise ValueError(f"thr: expected a shape that broadcasts to currents {shape}, got shape {params.thr.shape}")
        state = at_rest(params, currents.shape[1:])
    else:
        _check.check_signature(params, state)
        _check.check_currents("currents", currents, (None, *state.v.shape))
    _check.check_scalars(dt=request.dt, t0=request.t0)
    if request.valid is not None:
        _check.check_mask("valid", request.valid, currents.shape[:-1])
    if request.feedback is not None:
        feedback = _check.as_real("feedback", request.feedback)
        _check.check_shape("feedback", feedback.shape, params.n_units, "matrix")
    return state


def _run(
    params: SLIFParams, state: SLIFState, currents: Array, request: Request, implementation: str | None
) -> tuple[SLIFState, dict[str, Array]]:
    by_current = params.surrogate.wrt == "current"
    constant = by_current and params.resist_inh is None and request.feedback is None
    # A frozen row copies its state, and would pass on gradients of fields that have none.
    differentiated = ("s", "j") if by_current else ("s", "j", "v", "thr")
    state = lax.stop_gradient(state).replace(**{name: getattr(state, name) for name in differentiated})
    if request.checkpoint_every is not None and not constant and not isinstance(currents.shape[0], int):
        raise ValueError(f"checkpoint_every: expected None, or currents of a known length, got T = {currents.shape[0]}")
    loop = choose(implementation, params, currents, request, constant=constant)
    if not constant:
        return loop(params, state, currents, request)
    request = request.replace(checkpoint_every=None)
    final, out = loop(*lax.stop_gradient((params, state, currents, request)))
    return attach_gradient(params, state, currents, request.valid, final, out)
