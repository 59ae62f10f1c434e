"""The hyperparameters of the cell, in one table.

`describe`, the checks, the Flax layers, sweeps, the kernels and the files all read it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypedDict, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from slif.surrogate import Surrogate

P = ParamSpec("P")
R = TypeVar("R")
Numbers = ArrayLike | Sequence[float]  # one for all units, or one per unit
REQUIRED: Any = dataclasses.MISSING


class Hyperparameter(NamedTuple):
    """The properties of one hyperparameter."""

    description: str
    unit: str | None = None  # None for a pure number
    default: Any = REQUIRED  # a Python 0 leaves a mechanism out
    shape: Literal["scalar", "units", "thresholds", "matrix", "static"] = "units"  # "units" is a scalar or [N]
    low: float = -np.inf  # the lowest allowed value
    open: bool = False  # the lowest value itself is excluded
    infinite: bool = False  # infinity is allowed
    normal: bool = False  # positive subnormal values are not allowed, since XLA may treat them as 0
    positive: bool = False  # active only where positive
    choices: tuple[Any, ...] = ()  # the allowed values of a static one
    stored: Literal["logscale", "learned"] | None = None  # how layers that learn it store it; None if they cannot
    by_current: bool = False  # has a gradient under a surrogate with respect to the current too


ABOUT = {
    "tau_m": Hyperparameter("membrane time constant", "ms", low=0, open=True, normal=True, stored="logscale"),
    "resist_m": Hyperparameter("membrane resistance", "voltage / current", stored="logscale", by_current=True),
    "thr": Hyperparameter("base threshold", "voltage", shape="thresholds", infinite=True, stored="learned"),
    "refract_time": Hyperparameter("refractory period", "ms", 0.0, low=0),
    "thr_gain": Hyperparameter("added to a unit's threshold when it spikes", "voltage / spike", 0.0, stored="learned"),
    "thr_leak": Hyperparameter("fraction of the threshold lost at each step", "1 / step", 0.0, stored="learned"),
    "rho_b": Hyperparameter(
        "sparsity control of the thresholds; where positive, it replaces thr_gain and thr_leak",
        *("voltage / spike", 0.0, "scalar"),
        normal=True,
        positive=True,
        stored="logscale",
    ),
    "resist_inh": Hyperparameter(
        "resistance to lateral inhibition; active where positive",
        *("voltage / spike", 0.0),
        normal=True,
        positive=True,
        stored="logscale",
        by_current=True,
    ),
    "inh_weights": Hyperparameter(
        "lateral inhibition, from row to column", shape="matrix", default=None, stored="learned", by_current=True
    ),
    "sticky_spikes": Hyperparameter(
        "output stays 1 throughout the refractory period", default=False, shape="static", choices=(False, True)
    ),
    "thr_persist": Hyperparameter(
        "`slif.reset` leaves the thresholds alone", default=False, shape="static", choices=(False, True)
    ),
    "reset": Hyperparameter(
        "what a spike does to the potential: 'zero' sets it to 0, 'subtract' subtracts the threshold",
        default="zero",
        shape="static",
        choices=("zero", "subtract"),
    ),
}
NUMERIC = tuple(name for name, about in ABOUT.items() if about.shape != "static")  # the leaves of SLIFParams
STATIC = tuple(name for name, about in ABOUT.items() if about.shape == "static")
OPTIONAL = tuple(name for name in NUMERIC if ABOUT[name].default is not REQUIRED)  # the mechanisms that can be absent
# Arguments of `init_params` that are not fields of SLIFParams.
THR_JITTER = Hyperparameter(
    "half the range of the uniform jitter of the thresholds", "voltage", 0.05, shape="scalar", low=0
)
N_UNITS = Hyperparameter("number of units")


class Mechanisms(TypedDict, total=False):
    """Keyword arguments that `init_params` and the layers share, each with a default."""

    resist_inh: Numbers
    thr_persist: bool
    thr_gain: Numbers
    thr_leak: Numbers
    rho_b: ArrayLike
    refract_time: Numbers
    sticky_spikes: bool
    thr_jitter: ArrayLike
    surrogate: Surrogate | None
    dtype: DTypeLike
    reset: Literal["zero", "subtract"]


@dataclasses.dataclass(kw_only=True)
class MechanismFields:
    """The same as fields of a Linen module."""

    resist_inh: Numbers = ABOUT["resist_inh"].default
    thr_persist: bool = ABOUT["thr_persist"].default
    thr_gain: Numbers = ABOUT["thr_gain"].default
    thr_leak: Numbers = ABOUT["thr_leak"].default
    rho_b: ArrayLike = ABOUT["rho_b"].default
    refract_time: Numbers = ABOUT["refract_time"].default
    sticky_spikes: bool = ABOUT["sticky_spikes"].default
    thr_jitter: ArrayLike = THR_JITTER.default
    surrogate: Surrogate | None = None
    dtype: DTypeLike = jnp.float32
    reset: Literal["zero", "subtract"] = ABOUT["reset"].default


def with_defaults(function: Callable[P, R]) -> Callable[P, R]:
    """Fills in the defaults of **mechanisms, and lists them in the function's signature."""
    signature = inspect.signature(function)
    named = [x for x in signature.parameters.values() if x.kind is not inspect.Parameter.VAR_KEYWORD]
    mechanisms = [
        inspect.Parameter(x.name, inspect.Parameter.KEYWORD_ONLY, default=x.default, annotation=x.type)
        for x in dataclasses.fields(MechanismFields)
    ]
    signature = signature.replace(parameters=[*named, *mechanisms])

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(*bound.args, **bound.kwargs)

    wrapper.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper
