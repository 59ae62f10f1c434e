"""The device that a program is for, as far as is known while tracing."""

from typing import Any

import jax


def default() -> Any:
    """The device of `jax.default_device`, else the first one of the default backend.

    A program runs elsewhere if its arrays are committed to other devices, singly or on a mesh, or if it is exported.
    That is known only when it is lowered, which is when `lax.platform_dependent` decides.
    """
    chosen = getattr(jax.config, "jax_default_device", None)
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen
