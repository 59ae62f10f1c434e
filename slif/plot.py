"""Pictures of what `simulate` records, with Matplotlib. Extra: `plot`.

Only the Axes are changed: no style, no global setting, no window. Colours follow those of the Axes, light or dark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from slif import _check
from slif import surrogate as kinds
from slif.surrogate import Surrogate
from slif.types import SLIFParams

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("slif.plot needs Matplotlib: pip install matplotlib") from error

__all__ = ["raster", "surrogates", "traces"]

Recorded = Array | np.ndarray | Mapping[str, Array | np.ndarray]

# Beyond these, ticks run into each other and take seconds to draw; an image with bins of about a pixel does not.
MOST_UNITS, MOST_SPIKES = 150, 20_000
BINS = (600, 300)
MOST_PANELS = 20


def raster(
    recorded: Recorded,
    *,
    dt: float = 1.0,
    t0: float = 0.0,
    row: int | tuple[int, ...] | None = None,
    n_units: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws spikes over time, as ticks or, if there are too many to tell apart, as an image of their density.

        a mark at (t0 + k dt, n)   where s[k, n] != 0

    Args:
        recorded: spikes [T, N] of any dtype, or the records of `simulate`, with "s" or "s_packed" among them.
        dt: the length of a step, ms.
        t0: the time of the first step, ms.
        row: the batch index to draw, if there are batch dimensions [T, ..., N].
        n_units: the number of units, to unpack "s_packed"; None for all bits.
        ax: where to draw; None for a new figure.

    Returns:
        The Axes, with time in ms on the x axis and the index of the unit on the y axis.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are no spikes among the records, or their shape is not [T, N].

    Example:
        >>> raster(np.eye(5), dt=0.5).get_xlabel()
        'time, ms'
    """
    if isinstance(recorded, Mapping):
        spikes = recorded.get("s", recorded.get("s_packed"))
        if spikes is None:
            raise ValueError(f"recorded: expected 's' or 's_packed' among the records, got {', '.join(recorded)}")
        if "s" not in recorded:
            spikes = np.unpackbits(np.asarray(jax.device_get(spikes)), axis=-1, count=n_units, bitorder="little")
    else:
        spikes = recorded
    s = _series("recorded", spikes, row) != 0
    dt, t0 = _number("dt", dt), _number("t0", t0)
    n_steps, n = s.shape
    ax = _figure(1, (7, float(np.clip(n / 28, 3, 5))))[0] if ax is None else ax
    steps, units = np.nonzero(s)
    if n > MOST_UNITS or len(steps) > MOST_SPIKES:
        edges = (t0, t0 + max(n_steps, 1) * dt, -0.5, n - 0.5)
        image = _density(s, _ink(ax))
        # Scaled up by a small factor, an image is smoothed along both axes, which would smear a few steps together.
        image = np.repeat(image, -(-BINS[0] // max(image.shape[1], 1)), axis=1)
        ax.imshow(image, extent=edges, origin="lower", aspect="auto", interpolation="antialiased")
    else:
        times = t0 + steps * dt
        ticks = np.stack([np.stack([times, units - 0.4], -1), np.stack([times, units + 0.4], -1)], 1)
        width = float(np.clip(150 / max(n_steps, 1), 1, 4))  # points
        ax.add_collection(LineCollection(list(ticks), colors=[_ink(ax)], linewidths=width))
    ax.set(xlim=(t0, t0 + max(n_steps, 1) * dt), ylim=(-0.5, max(n, 1) - 0.5), xlabel="time, ms", ylabel="unit")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _bare(ax)
    return ax


def traces(
    recorded: Recorded,
    *,
    params: SLIFParams | None = None,
    units: int | Sequence[int] | None = None,
    dt: float = 1.0,
    t0: float = 0.0,
    row: int | tuple[int, ...] | None = None,
    ax: Any = None,
) -> np.ndarray:
    """Draws a few units over time: the currents in one panel, then one panel per unit.

        v as a line, thr dashed, s as ticks above thr, refractory steps shaded;
        u, if recorded, as a thin line, which shows the potential passing thr before the reset

    Args:
        recorded: the records of `simulate`, any of "j", "u", "v", "thr", "s" and "rfr"; an array [T, N] is v.
        params: the parameters, needed with "rfr" to shade refractory steps; None for no shading.
        units: the indices of the units, one or several; None for the first three.
        dt: the length of a step, ms.
        t0: the time of the first step, ms.
        row: the batch index to draw, if there are batch dimensions [T, ..., N].
        ax: the Axes to draw into, as many as there are panels; None for a new figure.

    Returns:
        An array of the Axes, from the top: the currents if "j" was recorded, then one per unit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing that can be drawn was recorded, a unit does not exist, or a shape does not fit.

    Example:
        >>> axes = traces({"v": np.zeros((9, 4)), "j": np.ones((9, 4))}, units=[0, 3])
        >>> [ax.get_ylabel() for ax in axes]
        ['current', 'unit 0', 'unit 3']
    """
    given = recorded if isinstance(recorded, Mapping) else {"v": recorded}
    known = {name: _series(name, x, row) for name, x in given.items() if name in ("j", "u", "v", "thr", "s", "rfr")}
    if not known:
        raise ValueError(f"recorded: expected some of j, u, v, thr, s, rfr, got {', '.join(given) or 'nothing'}")
    shapes = {x.shape for x in known.values()}
    if len(shapes) > 1:
        raise ValueError(f"recorded: expected one shape [T, N], got {', '.join(map(str, sorted(shapes)))}")
    ((n_steps, n),) = shapes
    chosen = _units(units, n)
    dt, t0 = _number("dt", dt), _number("t0", t0)
    t = t0 + np.arange(n_steps) * dt
    n_panels = len(chosen) + ("j" in known)
    axes = _figure(n_panels, (7, 1 + 1.1 * n_panels)) if ax is None else _panels(ax, n_panels)
    panels = list(axes)
    if "j" in known:
        top = panels.pop(0)
        for k, unit in enumerate(chosen):
            top.plot(t, known["j"][:, unit], color=_cycle(k), lw=1.2)
        top.set_ylabel("current")
    refractory = _refractory(params, known.get("rfr"))
    for k, (panel, unit) in enumerate(zip(panels, chosen, strict=True)):
        column = {name: x[:, unit] for name, x in known.items()}
        _draw_unit(panel, t, dt, column, None if refractory is None else refractory[:, unit], _cycle(k))
        panel.set_ylabel(f"unit {unit}")
    for panel in axes:
        panel.set_xlim(t0, t0 + max(n_steps, 1) * dt)
        panel.tick_params(labelbottom=panel is axes[-1])
        panel.yaxis.set_major_locator(MaxNLocator(3))
        _bare(panel)
    axes[-1].set_xlabel("time, ms")
    return np.array(axes)


def surrogates(
    which: Surrogate | Mapping[str, Surrogate] | None = None, *, x: Any = None, ax: Axes | None = None
) -> Axes:
    """Draws the slopes of surrogates.

        g(x)   over x = u - thr, with respect to the voltage, or x = i, with respect to the current

    Args:
        which: a surrogate, or a mapping from labels to surrogates; None for all of slif's, with their defaults.
        x: where to evaluate them; None for 1001 points from -1.5 to 1.5.
        ax: where to draw; None for a new figure.

    Returns:
        The Axes; slopes are on a logarithmic scale if their peaks differ by more than a factor of 4.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `x` is not finite.

    Source: see each surrogate.

    Example:
        >>> import slif
        >>> len(surrogates({"narrow": slif.arctan(8.0), "wide": slif.arctan(2.0)}).lines)
        2
    """
    if which is None:
        named = (kinds.secant, kinds.fast_sigmoid, kinds.sigmoid, kinds.arctan, kinds.triangular, kinds.boxcar)
        which = {make.__name__: make() for make in (*named, kinds.gaussian, kinds.straight_through)}
    several = which if isinstance(which, Mapping) else {"": which}
    for name, surrogate in several.items():
        if not isinstance(surrogate, Surrogate):
            raise TypeError(f"which: expected surrogates, got {surrogate!r} for {name!r}")
    points = np.linspace(-1.5, 1.5, 1001) if x is None else np.sort(np.ravel(_check.as_real("x", x)))
    ax = _figure(1, (7, 4))[0] if ax is None else ax
    styles, peaks = ("-", "--", ":", "-."), []
    for k, (name, surrogate) in enumerate(several.items()):
        label = f"{name} (current)" if surrogate.wrt == "current" and name else name or None
        slope = np.broadcast_to(np.asarray(surrogate(np.asarray(points, np.float32)), np.float64), points.shape)
        peaks.append(slope.max(initial=0))
        ax.plot(points, slope, styles[k % len(styles)], color=_cycle(k), lw=1.5, label=label)
    wrt = {surrogate.wrt for surrogate in several.values()}
    names = {"voltage": "u - thr", "current": "i"}
    ax.set(xlabel=", or ".join(names[kind] for kind in names if kind in wrt), ylabel="slope")
    if peaks and max(peaks) > 4 * min(peaks) > 0:  # else a tall one flattens the others
        ax.set(yscale="log", ylim=(min(peaks) / 100, 2 * max(peaks)))
    if any(several):
        ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    _bare(ax)
    return ax


def _draw_unit(
    ax: Axes, t: np.ndarray, dt: float, column: dict[str, np.ndarray], refractory: np.ndarray | None, color: Any
) -> None:
    ink = _ink(ax)
    if "u" in column:
        ax.plot(t, column["u"], color=color, lw=0.7, alpha=0.6)
    if "v" in column:
        ax.plot(t, column["v"], color=color, lw=1.2)
    if "thr" in column:
        ax.plot(t, column["thr"], "--", color=ink, lw=0.8, alpha=0.7)
    if "s" in column:
        spikes = column["s"] != 0
        finite = np.concatenate(
            [x[np.isfinite(x)] for x in (column.get("u"), column.get("v"), column.get("thr")) if x is not None] or [[]]
        )
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        room = (high - low) or 1.0
        ax.vlines(t[spikes], high + 0.1 * room, high + 0.35 * room, color=color, lw=1.2)
    if refractory is not None and refractory.any():
        edges = np.append(t, t[-1] + dt)
        shaded = np.append(refractory, refractory[-1])
        across = ax.get_xaxis_transform()
        ax.fill_between(edges, 0, 1, where=shaded, step="post", transform=across, color=ink, alpha=0.12, lw=0)


def _refractory(params: SLIFParams | None, rfr: np.ndarray | None) -> np.ndarray | None:
    """Whether a unit was refractory at each step, by the clock after the previous step."""
    if params is None or rfr is None or _check.as_device_params(params).refract_time is None:
        return None
    blocked = rfr < np.asarray(jax.device_get(params.refract_time), rfr.dtype)
    return np.concatenate([np.zeros_like(blocked[:1]), blocked[:-1]])


def _series(name: str, value: Any, row: int | tuple[int, ...] | None) -> np.ndarray:
    array = np.asarray(jax.device_get(value))
    if not (_check.is_real(array.dtype) or array.dtype == bool):
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    if row is not None:
        row = row if isinstance(row, tuple) else (row,)
        if array.ndim != 2 + len(row):
            raise ValueError(f"row: expected an index for each of {array.ndim - 2} batch dimensions, got {row}")
        try:
            array = array[(slice(None), *row)]
        except IndexError:
            raise ValueError(f"row: expected an index into {array.shape[1:-1]}, got {row}") from None
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape [T, N], got shape {array.shape}; `row` picks one of a batch")
    return array.astype(np.promote_types(array.dtype, np.float32)) if array.dtype != bool else array


def _units(units: int | Sequence[int] | None, n: int) -> list[int]:
    if units is None:
        return list(range(min(n, 3)))
    chosen = [_check.as_size("units", unit, 0) for unit in np.ravel(np.asarray(units))]
    if not chosen or len(chosen) > MOST_PANELS:
        raise ValueError(f"units: expected 1 to {MOST_PANELS} units, got {len(chosen)}; `raster` draws many")
    if max(chosen) >= n:
        raise ValueError(f"units: expected units below {n}, got {max(chosen)}")
    return chosen


def _number(name: str, value: float) -> float:
    array = np.asarray(jax.device_get(_check.as_real(name, value)))
    if array.ndim != 0:
        raise ValueError(f"{name}: expected a scalar, got shape {array.shape}")
    return float(array)


def _figure(n: int, size: tuple[float, float]) -> list[Axes]:
    figure = plt.figure(figsize=size, layout="constrained")
    return list(figure.subplots(n, 1, sharex=True, squeeze=False)[:, 0])


def _panels(given: Any, n: int) -> list[Axes]:
    axes = list(np.ravel(np.asarray(given, dtype=object)))
    if len(axes) != n or not all(isinstance(ax, Axes) for ax in axes):
        raise ValueError(f"ax: expected {n} Axes, one per panel, got {given!r}")
    return axes


def _density(s: np.ndarray, ink: Any) -> np.ndarray:
    """RGBA [bins of units, bins of time]: the ink, more opaque the larger the share of a bin's steps with a spike."""
    time, unit = (np.arange(n) * min(n, most) // max(n, 1) for n, most in zip(s.shape, BINS, strict=True))
    shape = tuple(int(index[-1]) + 1 if len(index) else 1 for index in (unit, time))
    counts = np.zeros(shape)
    steps, units = np.nonzero(s)
    np.add.at(counts, (unit[units], time[steps]), 1)
    sizes = np.outer(np.bincount(unit, minlength=shape[0]), np.bincount(time, minlength=shape[1]))
    share = counts / np.maximum(sizes, 1)
    # A few full bins must not make all others invisible.
    bright = np.quantile(share[share > 0], 0.95) if len(steps) else 1.0
    image = np.empty((*shape, 4))
    image[..., :3] = to_rgb(ink)
    image[..., 3] = np.minimum(share / bright, 1)
    return image


def _ink(ax: Axes) -> Any:
    return ax.xaxis.label.get_color()


def _cycle(k: int) -> str:
    return f"C{k % 10}"


def _bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
