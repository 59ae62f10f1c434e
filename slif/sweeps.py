"""Many settings of the cell at once: one compiled program, mapped over the points of a sweep."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from slif import _check, _warn
from slif._check import SURROGATE
from slif._host import shown
from slif.hyperparameters import ABOUT, NUMERIC, Numbers
from slif.request import RECORDS, Records
from slif.simulation import simulate
from slif.surrogate import BUILT_IN
from slif.types import SLIFParams, SLIFState

# What can be swept, besides the currents and the surrogate's numbers, and in which shapes.
SHAPES = {name: ABOUT[name].shape for name in NUMERIC} | {"dt": "scalar", "feedback": "matrix"}
SPELT = {"scalar": "[P]", "units": "[P] or [P, N]", "thresholds": "[P] or [P, N]", "matrix": "[P, N, N]"}
SLOPES = {SURROGATE + name for surrogate in BUILT_IN.values() for name in surrogate.numbers}  # all positive
ARGUMENTS = ("dt", "currents", "feedback")  # of `simulate`, not fields of params
Over = Mapping[str, Numbers | Sequence[Sequence[float]]]
WORST = {"tau_m": np.min, "refract_time": np.max}  # the value that dt is checked against


def grid(**axes: Numbers | range) -> dict[str, Array]:
    """Makes the points of a sweep: every combination of the values on its axes.

        points in the order of itertools.product: the last axis varies fastest

    Args:
        **axes: the values along each axis, a sequence or an array [n]; `**{"surrogate.slope": [1.0, 2.0]}` for a
            number of the surrogate.

    Returns:
        A dict of name -> [P], with P the product of the lengths. Integers that no dtype of JAX holds become floats.

    Raises:
        TypeError: an axis does not hold real numbers.
        ValueError: there is no axis, or one is empty or not one-dimensional.

    Source: the Cartesian product, in the order of `itertools.product`.

    Example:
        >>> grid(tau_m=[10.0, 20.0], thr=[0.4, 0.5])
        {'tau_m': Array([10., 10., 20., 20.], dtype=float32), 'thr': Array([0.4, 0.5, 0.4, 0.5], dtype=float32)}
    """
    if not axes:
        raise ValueError("axes: expected one axis or more, got none")
    about = dict.fromkeys(SLOPES, _check.SLOPE)
    values = {
        name: _check.as_real(name, list(x) if isinstance(x, range) else x, about=about.get(name))
        for name, x in axes.items()
    }
    for name, x in values.items():
        if x.ndim != 1 or x.size == 0:
            raise ValueError(f"{name}: expected shape [n], n >= 1, got shape {x.shape}")
    _check.check_countable("axes", *(x.size for x in values.values()))
    arrays = {name: _put(name, x) for name, x in values.items()}
    with _check.transfers():
        points = jnp.meshgrid(*arrays.values(), indexing="ij")
        points = {name: x.reshape(-1) for name, x in zip(values, points, strict=True)}
    if not any(isinstance(x, Array) for x in values.values()):
        known = dict(zip(values, np.meshgrid(*values.values(), indexing="ij", copy=False), strict=True))
        for name in {"tau_m", "dt", "refract_time"} & known.keys():
            _warn.made(points[name], known[name].reshape(-1))
    return points


def _put(name: str, axis: Array | np.ndarray) -> Array:
    """The axis on the device; integers that JAX would truncate become floats."""
    dtype = jax.dtypes.canonicalize_dtype(axis.dtype)
    if isinstance(axis, Array):
        return axis
    if jnp.issubdtype(dtype, jnp.integer):
        if (axis.astype(dtype) == axis).all():
            return _check.put(axis, dtype)
        dtype = jax.dtypes.canonicalize_dtype(np.float64)
    return _check.put(_check.as_real(name, axis, dtype), dtype)


def sweep(
    params: SLIFParams,
    currents: Array | None,
    *,
    over: Over,
    dt: ArrayLike | None = None,
    state: SLIFState | None = None,
    t0: ArrayLike = 0.0,
    record: Records = ("s",),
    batch_size: int | None = None,
    spike_dtype: DTypeLike | None = None,
    valid: Array | np.ndarray | None = None,
    implementation: Literal["xla", "pallas"] | None = None,
    progress: Callable[[int, int], Any] | None = None,
    feedback: ArrayLike | None = None,
) -> tuple[SLIFState, dict[str, Array]]:
    """Runs the cell at every point of a sweep, in one program that is compiled once, whatever the values.

        simulate(params with over[...][p], state, currents, dt=dt, ...)   for p = 0 .. P - 1

    Args:
        params: the parameters shared by all points.
        currents: input currents [T, ..., N] shared by all points, or None if they are swept.
        over: name -> [P] or, with one number per unit, [P, N]: numeric fields of `SLIFParams` (rho_b [P] only,
            inh_weights [P, N, N]), "dt" [P], "currents" [P, T, ..., N], "feedback" [P, N, N], or a number of the
            surrogate, as "surrogate.slope". A [P] value of thr replaces the thresholds, jitter included. A mechanism
            absent from params is switched on; inhibition needs both resist_inh and inh_weights.
        dt: the length of a step, ms, positive; None if it is swept. Above 2 tau_m forward Euler diverges, with a
            UserWarning if both come from Python or NumPy values, or from a `grid` of these.
        state: the state before the first step: one for all points, [..., N], or one per point, [P, ..., N]; None for
            rest, with the batch shape of the currents. From a given state, a sweep over thr has an effect only if
            nothing adapts the thresholds, and in one over refract_time units start refractory if the period is longer
            than the state's clock `rfr`, which in a state at rest is the period it was made with.
        t0: the time of the first step, ms.
        record: what to return, as in `simulate`. At 1000 points x 500 steps x 100 units the default takes 200 MB,
            "spike_count" 0.4 MB.
        batch_size: how many points to run side by side; None for all. This bounds the memory, also in the backward
            pass, which runs each batch again. If points are sharded over devices, use it inside shard_map.
        spike_dtype: dtype of the recorded "s", as in `simulate`.
        valid: boolean [T, ...], over steps and batch, as in `simulate`, for all points.
        implementation: as in `simulate`.
        progress: called as progress(points done, P) after every batch; needs `batch_size`, and works only outside jit.
        feedback: recurrent weights [N, N], as in `simulate`, for all points.

    Returns:
        The final states, fields [P, ..., N], and a dict of the records, each with a leading axis P.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name is unknown, a shape does not match, or a Python or NumPy value is out of range.

    Source: `simulate`, mapped.

    Example:
        >>> from slif import init_params
        >>> params = init_params(jax.random.key(0), 1, tau_m=20.0, resist_m=1.0, thr=0.4, thr_jitter=0.0)
        >>> over = grid(tau_m=[5.0, 10.0, 20.0])
        >>> _, out = sweep(params, jnp.full((100, 1), 1.0), over=over, dt=1.0, record=("spike_count",))
        >>> out["spike_count"].ravel()
        Array([33., 20., 10.], dtype=float32)
    """
    given, params = params, _check.as_device_params(params)
    points = _check_over(over, params)
    n_points = next(iter(points.values())).shape[0]
    for name, value, kind in (("currents", currents, "an array"), ("dt", dt, "a number")):
        if (name in points) == (value is not None):
            got = "both" if value is not None else "neither"
            raise ValueError(f"{name}: expected {kind} or a sweep over it, and not both, got {got}")
    dtype = params.thr.dtype
    if currents is not None:
        currents = _check.as_currents("currents", currents, dtype)
    shape = points["currents"].shape[1:] if currents is None else currents.shape
    if len(shape) < 2 or shape[-1] != params.n_units:
        raise ValueError(f"currents: expected shape (T, ..., {params.n_units}), got shape {shape}")
    shared: dict[str, Any] = {"params": params, "t0": _check.as_scalar("t0", t0, dtype)}
    if currents is not None:
        _check.check_currents("currents", currents, (None, *shape[1:]))
        shared["currents"] = _check.put(currents, currents.dtype)
    if dt is not None:
        shared["dt"] = _check.as_scalar("dt", dt, dtype)
    if feedback is not None:
        if "feedback" in points:
            raise ValueError("feedback: expected an array or a sweep over it, and not both, got both")
        feedback = _check.as_real("feedback", feedback, dtype)
        _check.check_shape("feedback", feedback.shape, params.n_units, "matrix")
        shared["feedback"] = _check.put(feedback, dtype)
    _watch(given, dt, over, dtype)
    if valid is not None:
        _check.check_mask("valid", _check.check_array("valid", valid, "a boolean array"), shape[:-1])
        shared["valid"] = _check.put(valid, bool)
    states = None
    if state is not None:
        state = _check.as_device_state(params, state)
        if state.v.shape == (n_points, *shape[1:]):
            states = state
        elif state.v.shape == shape[1:]:
            shared["state"] = state
        else:
            expected = f"{shape[1:]} or {(n_points, *shape[1:])}"
            raise ValueError(f"state: expected fields of shape {expected}, got shape {state.v.shape}")
    if batch_size is not None:
        batch_size = min(_check.as_size("batch_size", batch_size, 1), n_points)
    _check.check_implementation(implementation)
    options = {
        "record": _check.as_names("record", record, RECORDS),
        "spike_dtype": _check.as_spike_dtype(spike_dtype, dtype),
        "implementation": implementation,
    }
    side_by_side = None if 0 in shape else batch_size  # lax.map divides by the size of its result
    run = functools.partial(_sweep, shared=shared, batch_size=side_by_side, options=tuple(options.items()))
    if progress is None:
        return run((points, states))
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((points, states, shared))):
        raise ValueError("progress: expected a call outside of jit, vmap and grad, got traced arguments")
    return _in_chunks(run, (points, states), n_points, batch_size, progress)


def point(params: SLIFParams, over: Over, k: int | Array) -> SLIFParams:
    """Returns the parameters of one point of a sweep, such as the best.

        params with over[...][k]

    Args:
        params: the parameters shared by all points.
        over: what was swept, as in `sweep`; "dt", "currents" and "feedback" are not parameters and are left out.
        k: the index of the point, from 0: an int, or a scalar on the device, such as the result of `argmax`. The latter
            is not checked: as in JAX indexing, an index past the end means the last point, as does -1.

    Returns:
        The parameters of the point.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name is unknown, a shape does not match, or there is no such point.

    Source: `sweep`.

    Example:
        >>> from slif import init_params
        >>> params = init_params(jax.random.key(0), 1, tau_m=20.0, resist_m=1.0, thr=0.4)
        >>> float(point(params, grid(tau_m=[5.0, 10.0], dt=[0.5, 1.0]), 2).tau_m)
        10.0
    """
    params = _check.as_device_params(params)
    points = _check_over(over, params)
    n_points = next(iter(points.values())).shape[0]
    if not isinstance(k, Array):
        k = _check.as_size("k", k, 0)
        if k >= n_points:
            raise ValueError(f"k: expected the number of a point, below {n_points}, got {k}")
    elif k.ndim != 0 or not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"k: expected one integer, got dtype {k.dtype} and shape {k.shape}")
    with _check.transfers():
        return _at(params, {name: x[k] for name, x in points.items()})


def _at(params: SLIFParams, values: Mapping[str, Array]) -> SLIFParams:
    """The parameters, with the values of one point put in."""
    numbers = {name.removeprefix(SURROGATE): x for name, x in values.items() if name.startswith(SURROGATE)}
    surrogate = params.surrogate.replace(numbers={**params.surrogate.numbers, **numbers})
    leaves = {name: x for name, x in values.items() if name in NUMERIC}
    if "thr" in leaves:
        leaves["thr"] = jnp.broadcast_to(leaves["thr"], (params.n_units,))
    return params.replace(**leaves, surrogate=surrogate)


@functools.partial(jax.jit, static_argnames=("batch_size", "options"))
def _sweep(
    points: tuple[dict[str, Array], SLIFState | None],
    *,
    shared: dict[str, Any],
    batch_size: int | None,
    options: tuple[tuple[str, Any], ...],
) -> tuple[SLIFState, dict[str, Array]]:
    def one(point):
        values, state = point
        arguments = {"state": state} | shared | {name: values[name] for name in ARGUMENTS if name in values}
        arguments["params"] = _at(shared["params"], values)
        return simulate(**arguments, **dict(options))

    if batch_size is None:
        return jax.vmap(one)(points)
    # The backward pass would otherwise keep the steps of every point.
    return lax.map(jax.checkpoint(one, prevent_cse=False), points, batch_size=batch_size)


def _in_chunks(run: Callable, points: Any, n_points: int, batch_size: int | None, progress: Callable) -> Any:
    """The same, driven from the host chunk by chunk; the last one is padded, so that one program serves all."""
    if not callable(progress):
        raise TypeError(f"progress: expected a function of (points done, P), got {shown(progress)}")
    if batch_size is None:
        raise ValueError("progress: expected a batch_size too, got None")
    chunks = []
    for start in range(0, n_points, batch_size):
        index = _check.put(np.minimum(np.arange(start, start + batch_size), n_points - 1), np.int32)
        result = jax.block_until_ready(run(_take(points, index)))
        done = min(start + batch_size, n_points)
        chunks.append(jax.tree.map(lambda x, kept=done - start: lax.slice_in_dim(x, 0, kept), result))
        progress(done, n_points)
    with _check.transfers():
        return jax.tree.map(lambda *x: jnp.concatenate(x), *chunks)


@jax.jit
def _take(points: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: x[index], points)


def _watch(params: SLIFParams, dt: Any, over: Over, dtype: Any) -> None:
    """Warns of points whose dt is too long for the fastest unit, or too short for the longest refractory period."""
    dt = _warn.known(over.get("dt", dt))
    if dt is None:
        return
    dt = np.asarray(dt, np.float64)
    fastest, longest = (_worst(name, getattr(params, name), over, f) for name, f in WORST.items())
    if fastest is not None:
        _warn.euler(fastest, dt)
    if longest is not None:
        _warn.clock(longest, dt, dtype)


def _worst(name: str, value: Any, over: Over, worst: Callable) -> Any:
    """The worst value of the units, one per point if it is swept; None if it is not known."""
    value = _warn.known(over.get(name, value))
    if value is None or (value := np.asarray(value)).size == 0:
        return None
    return worst(value.reshape(len(value), -1), 1) if name in over else worst(value)


def _check_over(over: Any, params: SLIFParams) -> dict[str, Array]:
    """The points, each value checked and on the device, but not yet broadcast."""
    if not isinstance(over, Mapping) or not all(isinstance(name, str) for name in over):
        raise TypeError(f"over: expected a dict of name -> [P, ...], got {shown(over)}")
    slopes = dict.fromkeys((SURROGATE + name for name in params.surrogate.numbers), "units")
    shapes, known = SHAPES | slopes, (*SHAPES, "currents", *slopes)
    unknown = sorted(set(over).difference(known))
    if unknown or not over:
        raise ValueError(f"over: expected names among {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    for name, other in (("resist_inh", "inh_weights"), ("inh_weights", "resist_inh")):
        if name in over and other not in over and getattr(params, other) is None:
            raise ValueError(f"over: expected params with {other} for a sweep over {name}, got None")
    points = {}
    for name, value in over.items():
        if name == "currents":
            value = _check.as_currents("currents", value, params.thr.dtype)
            _check.check_currents("currents", value, (None,) * max(value.ndim, 1))
            points[name] = _check.put(value, value.dtype)
            continue
        about = _check.about_slope(params.surrogate) if name in slopes else None
        array, n_units = _check.as_real(name, value, params.thr.dtype, about), params.n_units
        spelt = SPELT[shapes[name]]
        if array.shape[1:] not in [(n_units,) * shape.count("N") for shape in spelt.split(" or ")] or array.ndim == 0:
            raise ValueError(f"{name}: expected shape {spelt} with N = {n_units}, got shape {array.shape}")
        points[name] = _check.put(array, params.thr.dtype).astype(params.thr.dtype)
    lengths_of = {name: x.shape[0] for name, x in points.items()}
    if len(set(lengths_of.values())) != 1 or 0 in lengths_of.values():
        raise ValueError(f"over: expected the same number of points P >= 1 everywhere, got {lengths_of}")
    return points
