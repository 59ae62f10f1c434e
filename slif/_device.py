"""The device that a program is for, as far as that is known while it is traced."""

from typing import Any

import jax


def default() -> Any:
    """That of `jax.default_device`, else the first one of the default backend.

    A program runs elsewhere where its arrays are committed to other devices, by themselves or on a mesh, or where it is
    exported; that is known once it is lowered, and `lax.platform_dependent` asks then.
    """
    chosen = getattr(jax.config, "jax_default_device", None)
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen
