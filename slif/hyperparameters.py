"""The hyperparameters of the cell: what there is to know of each stands here, once.

`describe`, the checks, the Flax layers, sweeps, the kernels and the files read it from this table.
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
Numbers = ArrayLike | Sequence[float]  # one for all units, or one each
REQUIRED: Any = dataclasses.MISSING


class Hyperparameter(NamedTuple):
    """What there is to know of one."""

    description: str
    unit: str | None = None  # None for a pure number
    default: Any = REQUIRED  # a Python 0 leaves a mechanism out
    shape: Literal["scalar", "units", "thresholds", "matrix", "static"] = "units"  # "units" is a scalar or [N]
    low: float = -np.inf  # the lowest value
    open: bool = False  # the lowest value itself is not allowed
    infinite: bool = False  # infinity is allowed
    normal: bool = False  # positive values below the normal numbers, which XLA may take for 0, are not allowed
    positive: bool = False  # it acts where it is positive, and not where it is 0 or below
    choices: tuple[Any, ...] = ()  # the values of a static one
    stored: Literal["logscale", "learned"] | None = None  # how a layer that learns it stores it; None: it cannot
    by_current: bool = False  # a surrogate with respect to the current gives it a gradient too


ABOUT = {
    "tau_m": Hyperparameter("membrane time constant", "ms", low=0, open=True, normal=True, stored="logscale"),
    "resist_m": Hyperparameter("membrane resistance", "voltage / current", stored="logscale", by_current=True),
    "thr": Hyperparameter("base threshold", "voltage", shape="thresholds", infinite=True, stored="learned"),
    "refract_time": Hyperparameter("refractory period", "ms", 0.0, low=0),
    "thr_gain": Hyperparameter("what a unit's spike adds to its threshold", "voltage / spike", 0.0, stored="learned"),
    "thr_leak": Hyperparameter(
        "share of its threshold that a unit loses at each step", "1 / step", 0.0, stored="learned"
    ),
    "rho_b": Hyperparameter(
        "sparsity control of the thresholds; where positive, it replaces gain and leak",
        *("voltage / spike", 0.0, "scalar"),
        normal=True,
        positive=True,
        stored="logscale",
    ),
    "resist_inh": Hyperparameter(
        "resistance to lateral inhibition; acts where positive",
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
        "thresholds stay through `slif.reset`", default=False, shape="static", choices=(False, True)
    ),
    "reset": Hyperparameter(
        "what a spike does to the potential: 'zero', or 'subtract' the threshold",
        default="zero",
        shape="static",
        choices=("zero", "subtract"),
    ),
}
NUMERIC = tuple(name for name, about in ABOUT.items() if about.shape != "static")  # the leaves of SLIFParams
STATIC = tuple(name for name, about in ABOUT.items() if about.shape == "static")
OPTIONAL = tuple(name for name in NUMERIC if ABOUT[name].default is not REQUIRED)  # the mechanisms that can be absent
# Arguments of `init_params` that are no fields of SLIFParams.
THR_JITTER = Hyperparameter(
    "half the range of the uniform jitter of the thresholds", "voltage", 0.05, shape="scalar", low=0
)
N_UNITS = Hyperparameter("number of units")


class Mechanisms(TypedDict, total=False):
    """The keyword arguments that `init_params` and the layers have in common, each with a default."""

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
    """A function of **mechanisms that is given all of them, and whose signature shows them one by one."""
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
