"""What the submodules of a model take and give, without the model knowing that it is watched."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax


class Trace:
    """First input and first output (the residual stream, of a block) of the submodules of one call, by path."""

    def __init__(self, seen: dict[str, tuple[Any, Any]]) -> None:
        self._seen = seen

    def given(self, path: str) -> Any:
        """What the submodule at `path` (such as `encoder/lower/layers_0`) took."""
        return self._seen[path][0]

    def result(self, path: str) -> Any:
        """What it gave."""
        return self._seen[path][1]


def traced(model: nn.Module, variables: Any, *args: Any, method: Any = None) -> tuple[Any, Trace]:
    """Result of a method of a model with unrolled layers, and its trace."""
    out, seen = _run(model, method, variables, *args)
    return out, Trace(seen)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(model: nn.Module, method: Any, variables: Any, *args: Any) -> tuple[Any, Any]:
    seen: dict[str, tuple[Any, Any]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            seen["/".join(context.module.path)] = (_first(args), _first(result))
        return result

    with nn.intercept_methods(record):
        out = model.apply(variables, *args, method=method)
    return out, seen


def _first(x: Any) -> Any:
    while isinstance(x, tuple):
        x = x[0] if x else None
    return x
