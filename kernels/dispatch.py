"""Which implementation of a kernel runs.

xla: plain JAX, the `reference` of each kernel.
mosaic: the Pallas kernel for TPUs.
triton: the Pallas kernel for GPUs.
interpret: the kernel for TPUs, interpreted operation by operation wherever this runs: for tests of its numbers.
auto: what `default_implementation` says; by default mosaic on TPU and xla elsewhere. The kernels for GPUs have been
    lowered, but not timed on one, and a kernel that is not faster than XLA has no place.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal

import jax

from mimo_jax.sharding import current_mesh

Implementation = Literal["auto", "xla", "mosaic", "triton", "interpret"]
Chosen = Literal["xla", "mosaic", "triton", "interpret"]

_default: contextvars.ContextVar[Implementation] = contextvars.ContextVar("kernels", default="auto")


@contextlib.contextmanager
def default_implementation(implementation: Implementation) -> Iterator[None]:
    """What `auto` means inside the block. It is read while a program is traced: one traced before stays as it is."""
    token = _default.set(implementation)
    try:
        yield
    finally:
        _default.reset(token)


def chosen(implementation: Implementation) -> Chosen:
    """The implementation that runs here, of the one that was asked for."""
    if implementation == "auto":
        implementation = _default.get()
    if implementation == "auto":
        implementation = "mosaic" if jax.default_backend() == "tpu" else "xla"
    return implementation


def if_cut(implementation: Chosen, mesh: Any) -> Chosen:
    """`xla` where a mesh of several devices is set but `mesh_that_divides` gave none: XLA cannot cut a kernel."""
    whole = current_mesh()
    return "xla" if mesh is None and whole is not None and whole.size > 1 else implementation
