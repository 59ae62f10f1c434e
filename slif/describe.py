"""A description of the cell, as data."""

import dataclasses
from typing import Any

from slif.hyperparameters import ABOUT, N_UNITS, THR_JITTER


def describe() -> dict[str, Any]:
    """Describes the cell: its inputs, states, outputs, hyperparameters with units and defaults, and dynamics.

        tau_m * dv/dt = -v + j * resist_m

    Returns:
        A dict with "cell_type", "inputs", "states", "outputs", "hyperparameters" and "dynamics". Each hyperparameter
            is a dict with "description", "unit" (None for a pure number) and "default" (absent if it is required).

    Source: ngc-learn's `SLIFCell.help`.

    Example:
        >>> describe()["hyperparameters"]["refract_time"]["unit"]
        'ms'
    """
    hyperparameters = {}
    for name, about in ({"n_units": N_UNITS} | ABOUT | {"thr_jitter": THR_JITTER}).items():
        if name == "inh_weights":  # drawn, not an argument of `init_params`
            continue
        hyperparameters[name] = {"description": about.description, "unit": about.unit}
        if about.default is not dataclasses.MISSING:
            hyperparameters[name]["default"] = about.default
    return {
        "cell_type": "SLIFCell: simplified leaky integrate-and-fire cell",
        "inputs": {"j": "input current"},
        "states": {
            "v": "membrane potential, after the reset",
            "rfr": "time since the last raw spike, ms",
            "thr": "threshold after the step",
        },
        "outputs": {
            "s": "spikes, 0 or 1",
            "tols": "time of the last output spike, ms",
            "surrogate": "slope of the surrogate",
        },
        "hyperparameters": hyperparameters,
        "dynamics": "tau_m * dv/dt = -v + j * resist_m",
    }
