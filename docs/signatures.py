"""What Griffe, which reads the source for the API reference, cannot find there."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import griffe

LAYERS = ("SLIF", "SLIFCell", "LeakyIntegrator")


class RuntimeSignatures(griffe.Extension):
    """Takes parameters and defaults of `init_params` and the layers from run time, annotations from the source.

    In the source, the defaults of the hyperparameters are in a table, from which the signatures are made.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:  # Griffe shows only a section called Examples as code
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        mechanisms = {key: field.annotation for key, field in pkg["hyperparameters.Mechanisms"].members.items()}
        function = pkg["init.init_params"]
        source = mechanisms | {given.name: given.annotation for given in function.parameters}
        function.parameters = parameters(importlib.import_module("slif").init_params, source)
        for framework in ("linen", "nnx"):
            module = importlib.import_module(f"slif.{framework}")
            for name in LAYERS:
                layer = pkg[f"{framework}.{name}"]
                fields = {key: member.annotation for key, member in layer.all_members.items() if member.is_attribute}
                source = mechanisms | fields
                if "__init__" in layer.all_members:
                    source |= {given.name: given.annotation for given in layer.all_members["__init__"].parameters}
                init = griffe.Function("__init__", parameters=parameters(getattr(module, name).__init__, source))
                layer.set_member("__init__", init)


def parameters(found: Callable[..., Any], annotations: dict[str, Any]) -> griffe.Parameters:
    """The parameters of the function, required keywords first: a dataclass has them in the order of its bases."""
    given = [p for p in inspect.signature(found).parameters.values() if p.name not in ("parent", "name")]  # Flax's own
    return griffe.Parameters(
        *(
            griffe.Parameter(
                parameter.name,
                annotation=annotations.get(parameter.name),
                kind=getattr(griffe.ParameterKind, parameter.kind.name.lower()),
                default=None if parameter.default is parameter.empty else shown(parameter.default),
            )
            for parameter in sorted(given, key=lambda p: (p.kind, p.default is not p.empty))
        )
    )


def shown(default: Any) -> str:
    if isinstance(default, type):
        return default.__name__
    return default.__qualname__.partition(".")[0] + "()" if callable(default) else repr(default)  # an initialiser
