"""Builds the API reference from the docstrings, and fails on any warning: python docs/build.py [FOLDER]"""

import os
import sys
import typing
import warnings
from pathlib import Path

import jax

MODULES = ("slif", "slif.linen", "slif.nnx", "slif.checkpoint", "slif.nir", "slif.plot")


def name_types() -> None:
    """Has signatures tell the types of JAX by the names that the source uses, not by what they stand for."""
    jax.Array.__module__, jax.Array.__qualname__ = "jax", "Array"
    for name in ("ArrayLike", "DTypeLike"):
        alias = typing.NewType(name, object)
        alias.__module__ = "jax.typing"
        setattr(jax.typing, name, alias)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/api")
    # Importing nir asks the system for its name, by a process that pdoc would keep from running.
    os.environ["PDOC_ALLOW_EXEC"] = "1"
    warnings.simplefilter("error")
    name_types()
    import pdoc

    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(folder / "slif.html")


if __name__ == "__main__":
    main()
