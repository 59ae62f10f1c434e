"""Surrogate gradients: they replace the derivative of the spike, which is zero almost everywhere.

A slope with respect to the *current* is d s'/d i, one with respect to the *voltage* is d z/d(u - thr).
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from slif._host import as_numbers, is_real, plain, shown, stored, transfers


def _sech(x: Array) -> Array:
    # cosh overflows in float32 from |x| = 89 on; this form only underflows, to 0.
    e = jnp.exp(-jnp.abs(x))
    return 2 * e / (1 + e * e)


@dataclass(frozen=True)
class _Secant:
    squared: bool = False
    scaled: bool = False

    def __call__(self, i: Array, c1: Array, c2: Array) -> Array:
        h = _sech(c2 * i)
        h = h * h if self.squared else h
        h = c2 * h * c1 if self.scaled else h  # c1 * c2 may overflow, and inf * 0 is NaN
        return jnp.where(i > 0, h, 0)


class Surrogate(struct.PyTreeNode):
    """The slope that replaces the derivative of the spike; build it with `secant`, `arctan`, ... or `custom`.

    Calling it evaluates the slope: `surrogate(x)`, where x is the current i or the distance u - thr to the threshold;
    integers and bools become floats. Its numbers are leaves: they can be annealed or swept without recompiling. The
    rest is static.

    Attributes:
        numbers: the numbers of the slope, by name.
        slope: a function of x and the numbers.
        wrt: what x is: "current" for i, "voltage" for u - thr.
        detach_reset: no gradient flows through the reset of v.
    """

    numbers: dict[str, ArrayLike] = field(default_factory=lambda: {"c1": 0.82, "c2": 0.08})
    slope: Callable[..., Array] = struct.field(pytree_node=False, default=_Secant())
    wrt: Literal["current", "voltage"] = struct.field(pytree_node=False, default="current")
    detach_reset: bool = struct.field(pytree_node=False, default=True)

    def __call__(self, x: ArrayLike) -> Array:
        x, own, arguments = _floating(x), has_bounds(self), dict(self.numbers)
        for name, number in arguments.items():
            if not isinstance(number, jax.Array):
                number = as_numbers(f"surrogate {name}", number)
                number = _on_device(stored(f"surrogate {name}", number, x.dtype, normal=own))
            if any(m != n and 1 not in (m, n) for m, n in zip(number.shape[::-1], x.shape[::-1], strict=False)):
                raise ValueError(f"surrogate {name}: expected a shape to go with x, {x.shape}, got {number.shape}")
            if 0 < number.ndim < x.ndim:
                number = number.reshape((1,) * (x.ndim - number.ndim) + number.shape)
            arguments[name] = number if number.dtype == x.dtype else number.astype(x.dtype)
        with transfers():
            h = jnp.asarray(self.slope(x, **arguments))
        if h.shape not in ((), x.shape):
            raise ValueError(f"fn: expected a slope for every element of x, {x.shape}, got shape {h.shape}")
        return h if own else jnp.broadcast_to(h, x.shape).astype(x.dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Surrogate):
            return NotImplemented
        if self._static != other._static or self.numbers.keys() != other.numbers.keys():
            return False
        return all(
            x is other.numbers[name] or np.array_equal(x, other.numbers[name]) for name, x in self.numbers.items()
        )

    def __hash__(self) -> int:
        """By value, so that it can be a static argument; numbers on a device are never read, so not hashed."""
        if any(isinstance(x, jax.Array) for x in self.numbers.values()):
            raise TypeError("unhashable Surrogate: its numbers are on a device; make it with Python or NumPy ones")
        numbers = ((name, np.asarray(x, np.float64)) for name, x in sorted(self.numbers.items()))
        return hash((self._static, *((name, x.shape, x.tobytes()) for name, x in numbers)))

    @property
    def _static(self) -> tuple[Any, ...]:
        return self.slope, self.wrt, self.detach_reset


def _floating(x: Any) -> Array:
    """x on the device; integers and bools as floats, so that the slope is not computed in integers."""
    if isinstance(x, jax.Array):
        if not (is_real(x.dtype) or x.dtype == bool):
            raise TypeError(f"x: expected real numbers, got dtype {x.dtype}")
    elif isinstance(x, bool | np.bool_) or (isinstance(x, np.ndarray) and x.dtype == bool):
        x = plain("x", np.asarray(x))
    else:
        x = as_numbers("x", x)
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
    dtype = jax.dtypes.canonicalize_dtype(x.dtype if wide else np.float64)
    if isinstance(x, jax.Array):
        return x if x.dtype == dtype else x.astype(dtype)
    with np.errstate(over="ignore"):
        return _on_device(x.astype(dtype))


def _on_device(array: np.ndarray) -> Array:
    with transfers():  # not `device_put`, which would become an operation of a traced program
        return jnp.asarray(array)


def _positive(given: dict[str, ArrayLike]) -> dict[str, ArrayLike]:
    """Checks the numbers and returns them as floats; those on a device are not read back."""
    checked: dict[str, ArrayLike] = {}
    for name, number in given.items():
        if isinstance(number, jax.Array):
            if not is_real(number.dtype):
                raise TypeError(f"{name}: expected a positive number, got dtype {number.dtype}")
            checked[name] = number
            continue
        value = as_numbers(name, number).astype(np.float64)
        if not (np.isfinite(value) & (value > 0)).all():
            raise ValueError(f"{name}: expected a positive, finite number, got {shown(number)}")
        checked[name] = float(value) if isinstance(number, int | float) else value
    return checked


def has_bounds(surrogate: Surrogate) -> bool:
    """Whether the slope is one of this module's, whose numbers must be positive."""
    return getattr(surrogate.slope, "__module__", None) == __name__


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")
    return bool(value)


def secant(c1: ArrayLike = 0.82, c2: ArrayLike = 0.08, squared: bool = False, scaled: bool = False) -> Surrogate:
    """The secant estimator, with respect to the current; the default.

        d s'/d i = sech(c2 i) for i > 0, else 0            as the reference cell computes it
        squared: sech^2(c2 i);   scaled: times c1 c2       both: the derivative of max(0, c1 tanh(c2 i))

    It applies at every step, refractory or not; everything else that a spike changes counts as constant.

    Args:
        c1: height of the rate curve, positive; used only if `scaled`.
        c2: steepness of the rate curve, positive, per unit of current.
        squared: square the hyperbolic secant, as the paper does and the reference cell does not.
        scaled: multiply by c1 c2, as the paper does and the reference cell does not.

    Returns:
        The surrogate.

    Raises:
        TypeError: a number is not a real number, or a flag is not a bool.
        ValueError: c1 or c2 is not positive and finite.

    Source: Samadi, Lillicrap & Tweed (2017), Neural Computation 29(3); ngc-learn's `secant_lif_estimator`.

    Example:
        >>> round(float(secant()(0.5)), 6), float(secant()(-0.5))
        (0.999201, 0.0)
    """
    slope = _Secant(_flag("squared", squared), _flag("scaled", scaled))
    return Surrogate(_positive({"c1": c1, "c2": c2}), slope, "current")


def _voltage(fn: Callable[..., Array], detach_reset: bool, numbers: dict[str, ArrayLike]) -> Surrogate:
    return Surrogate(_positive(numbers), fn, "voltage", _flag("detach_reset", detach_reset))


def _fast_sigmoid(x: Array, slope: Array) -> Array:
    return (1 + slope * jnp.abs(x)) ** -2


def fast_sigmoid(slope: ArrayLike = 25.0, *, detach_reset: bool = True) -> Surrogate:
    """The derivative of the fast sigmoid, with respect to the voltage.

        d z/d x = 1 / (1 + slope |x|)^2,   x = u - thr

    Args:
        slope: steepness, positive, per unit of voltage.
        detach_reset: treat the reset as constant; if False, differentiate v' through z.

    Returns:
        The surrogate.

    Raises:
        TypeError: a number is not a real number, or a flag is not a bool.
        ValueError: `slope` is not positive and finite.

    Source: Zenke & Ganguli (2018), SuperSpike, Neural Computation 30(6).

    Example:
        >>> float(fast_sigmoid(slope=1.0)(1.0))
        0.25
    """
    return _voltage(_fast_sigmoid, detach_reset, {"slope": slope})


def _sigmoid(x: Array, slope: Array) -> Array:
    return slope * jax.nn.sigmoid(slope * x) * jax.nn.sigmoid(-slope * x)


def sigmoid(slope: ArrayLike = 25.0, *, detach_reset: bool = True) -> Surrogate:
    """The derivative of the logistic function, with respect to the voltage.

        d z/d x = slope p (1 - p),   p = 1 / (1 + exp(-slope x)),   x = u - thr

    Args:
        slope: steepness, positive, per unit of voltage.
        detach_reset: treat the reset as constant; if False, differentiate v' through z.

    Returns:
        The surrogate.

    Raises:
        TypeError: a number is not a real number, or a flag is not a bool.
        ValueError: `slope` is not positive and finite.

    Source: Neftci, Mostafa & Zenke (2019), IEEE Signal Processing Magazine 36(6).

    Example:
        >>> float(sigmoid(slope=4.0)(0.0))
        1.0
    """
    return _voltage(_sigmoid, detach_reset, {"slope": slope})


def _arctan(x: Array, alpha: Array) -> Array:
    # Past this bound the slope is all but 0, and the square would overflow in its derivative.
    bound = math.sqrt(float(jnp.finfo(x.dtype).max)) / 4
    y = jnp.clip(math.pi / 2 * (alpha * x), -bound, bound)
    return alpha / 2 / (1 + y * y)


def arctan(alpha: ArrayLike = 2.0, *, detach_reset: bool = True) -> Surrogate:
    """The derivative of the arc tangent, with respect to the voltage.

        d z/d x = (alpha / 2) / (1 + (pi alpha x / 2)^2),   x = u - thr

    Args:
        alpha: steepness, positive, per unit of voltage.
        detach_reset: treat the reset as constant; if False, differentiate v' through z.

    Returns:
        The surrogate.

    Raises:
        TypeError: a number is not a real number, or a flag is not a bool.
        ValueError: `alpha` is not positive and finite.

    Source: Fang et al. (2021), Incorporating learnable membrane time constant, ICCV.

    Example:
        >>> float(arctan()(0.0))
        1.0
    """
    return _voltage(_arctan, detach_reset, {"alpha": alpha})


def _triangular(x: Array, width: Array) -> Array:
    return jnp.maximum(0, 1 - jnp.abs(x) / width)


def triangular(width: ArrayLike = 1.0, *, detach_reset: bool = True) -> Surrogate:
    """A triangle of height 1, with respect to the voltage.

        d z/d x = max(0, 1 - |x| / width),   x = u - thr

    Args:
        width: half the base of the triangle, positive, in units of voltage.
        detach_reset: treat the reset as constant; if False, differentiate v' through z.

    Returns:
        The surrogate.

    Raises:
        TypeError: a number is not a real number, or a flag is not a bool.
        ValueError: `width` is not positive and finite.

    Source: Bellec et al. (2018), Long short-term memory and learning-to-learn in networks of spiking neurons, NeurIPS.

    Example:
        >>> float(triangular(width=2.0)(1.0))
        0.5
    """
    return _voltage(_triangular, detach_reset, {"width": width})


def _boxcar(x: Array, width: Array) -> Array:
    return jnp.where(jnp.abs(x) <= width, jnp.ones_like(x), 0)


def boxcar(width: ArrayLike = 1.0, *, detach_reset: bool = True) -> Surrogate:
    """A rectangle of height 1, with respect to the voltage.

        d z/d x = 1 where |x| <= width, else 0,   x = u - thr

    Args:
        width: half the base of the rectangle, positive, in units of voltage.
        detach_reset: treat the reset as constant; if False, differentiate v' through z.

    Returns:
        The surrogate.

    Raises:
        TypeError: a number is not a real number, or a flag is not a bool.
        ValueError: `width` is not positive and finite.

    Source: Wu et al. (2018), Spatio-temporal backpropagation, Frontiers in Neuroscience 12.

    Example:
        >>> float(boxcar()(1.0)), float(boxcar()(1.5))
        (1.0, 0.0)
    """
    return _voltage(_boxcar, detach_reset, {"width": width})


def _gaussian(x: Array, width: Array) -> Array:
    # The density underflows to 0 at 14 standard deviations in float32 and at 39 in float64, hence the bound.
    y = jnp.clip(x / width, -40, 40)
    return jnp.exp(-y * y / 2) / (width * math.sqrt(2 * math.pi))


def gaussian(width: ArrayLike = 1.0, *, detach_reset: bool = True) -> Surrogate:
    """The normal density, with respect to the voltage.

        d z/d x = exp(-x^2 / (2 width^2)) / (width sqrt(2 pi)),   x = u - thr

    Args:
        width: standard deviation, positive, in units of voltage.
        detach_reset: treat the reset as constant; if False, differentiate v' through z.

    Returns:
        The surrogate.

    Raises:
        TypeError: a number is not a real number, or a flag is not a bool.
        ValueError: `width` is not positive and finite.

    Source: Yin, Corradi & Bohte (2021), Nature Machine Intelligence 3.

    Example:
        >>> round(float(gaussian()(0.0)), 6)
        0.398942
    """
    return _voltage(_gaussian, detach_reset, {"width": width})


def straight_through(*, detach_reset: bool = True) -> Surrogate:
    """The straight-through estimator, with respect to the voltage: the spike passes its gradient on unchanged.

        d z/d x = 1,   x = u - thr

    Args:
        detach_reset: treat the reset as constant; if False, differentiate v' through z.

    Returns:
        The surrogate.

    Raises:
        TypeError: `detach_reset` is not a bool.

    Source: Bengio, Leonard & Courville (2013), arXiv:1308.3432.

    Example:
        >>> float(straight_through()(-3.0))
        1.0
    """
    return _voltage(jnp.ones_like, detach_reset, {})


def custom(
    fn: Callable[..., Array],
    wrt: Literal["current", "voltage"] = "voltage",
    *,
    detach_reset: bool = True,
    **numbers: ArrayLike,
) -> Surrogate:
    """Makes a surrogate from a slope of your own.

        d z/d x = fn(x, **numbers), x = u - thr   for wrt="voltage"
        d s'/d i = fn(i, **numbers)               for wrt="current"

    Args:
        fn: the slope, elementwise and traceable. Two surrogates are equal only if `fn` is the same object, so define
            it once, outside the training loop: each new one means another compilation.
        wrt: "voltage" or "current".
        detach_reset: treat the reset as constant; if False, differentiate v' through z.
        **numbers: numbers of the slope, scalars or [N], which can be annealed or swept (as "surrogate.name") without
            recompiling.

    Returns:
        The surrogate.

    Raises:
        TypeError: `fn` is not a function of x and the numbers, `detach_reset` is not a bool, or a number is not real.
        ValueError: `wrt` is neither "voltage" nor "current", or a number is not finite.

    Source: see `secant` and `fast_sigmoid` for the meaning of each kind.

    Example:
        >>> lorentzian = custom(lambda x, width: 1 / (1 + (x / width) ** 2), width=0.5)
        >>> float(lorentzian(0.5))
        0.5
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a function of one array, got {shown(fn)}")
    if not isinstance(wrt, str) or wrt not in ("current", "voltage"):
        raise ValueError(f"wrt: expected 'current' or 'voltage', got {shown(wrt)}")
    for name, number in numbers.items():
        if not isinstance(number, jax.Array):
            value = stored(name, as_numbers(name, number), np.float64)
            numbers[name] = number if isinstance(number, int | float) else value  # a list is one leaf, as an array is
    with contextlib.suppress(ValueError):  # some callables have no signature
        signature = inspect.signature(fn)
        try:
            signature.bind(0.0, **numbers)
        except TypeError as error:
            raise TypeError(f"fn: expected a function of {', '.join(('x', *numbers))}, got {error}") from None
    return Surrogate(numbers, fn, wrt, _flag("detach_reset", detach_reset))


# The package's own surrogates, under the names that files use.
BUILT_IN = {
    **{
        f"secant{'_squared' * q}{'_scaled' * c}": secant(squared=q, scaled=c)
        for q in (False, True)
        for c in (False, True)
    },
    **{
        make.__name__: make()
        for make in (fast_sigmoid, sigmoid, arctan, triangular, boxcar, gaussian, straight_through)
    },
}


def kind_of(surrogate: Surrogate) -> str:
    """The name in `BUILT_IN` from which `named` rebuilds this surrogate."""
    return kind_by(surrogate.slope, surrogate.wrt, surrogate.numbers)


def kind_by(slope: Callable[..., Array], wrt: str, numbers: Iterable[str] | None = None) -> str:
    """The same from the static fields, when the names of the numbers are not known."""
    for kind, known in BUILT_IN.items():
        if (known.slope, known.wrt) == (slope, wrt) and (numbers is None or known.numbers.keys() == set(numbers)):
            return kind
    raise ValueError(f"surrogate: expected one of {', '.join(BUILT_IN)}; got a custom one, which cannot be saved")


def named(kind: Any, numbers: dict[str, Any], detach_reset: Any) -> Surrogate:
    if not isinstance(kind, str) or kind not in BUILT_IN or numbers.keys() != BUILT_IN[kind].numbers.keys():
        raise ValueError(f"surrogate: expected one of {', '.join(BUILT_IN)}, got {kind!r} with numbers {[*numbers]}")
    return BUILT_IN[kind].replace(numbers=numbers, detach_reset=_flag("detach_reset", detach_reset))
