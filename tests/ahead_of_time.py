"""Kernels compiled for TPUs, or lowered for GPUs, that are not here. Nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from mimo_jax.chips import CHIPS, parse_topology
from mimo_jax.config import MeshConfig
from mimo_jax.planning.compiled import tpu_devices
from mimo_jax.sharding import BATCH_AXES, MESH_AXES, make_mesh

TPUS = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")
PRODUCTION_SIZES, PRODUCTION_WIDTH, PRODUCTION_VECTORS = (1024, 1024, *[128] * 18), 1280, 4096  # vectors of a device


def on_gpu(kind: str = "NVIDIA H100 80GB HBM3") -> Any:
    """As if the program were for such a GPU."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    types = (AxisType.Auto,) * len(MESH_AXES)
    return use_abstract_mesh(AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, axis_types=types, abstract_device=device))


def triton_kernels(function: Callable, *shapes: Any) -> int:
    """The number of Triton kernels in a program that is lowered for an H100."""
    with on_gpu():
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("__gpu$xla.gpu.triton")


def compiled_for(name: str, function: Callable, rows: Any, tables: Any) -> Any:
    """A program of `rows`, cut over all devices of a topology, and of `tables`, compiled for it."""
    pytest.importorskip("libtpu")
    devices = tpu_devices(parse_topology(name))
    mesh = make_mesh(MeshConfig(data=len(devices), fsdp=1, tensor=1), devices)
    with jax.set_mesh(mesh):
        cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((BATCH_AXES,), ()))
        program = jax.jit(function, in_shardings=(cut, whole)).lower(rows, tables)
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # such programs cannot be read back
    try:
        return program.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def print_comparison(name: str, kernel: Any, plain: Any, flops: float, vmem: int) -> None:
    """Prints HBM traffic of two compiled programs for the same work, VMEM and roofline; the kernel's must be less."""
    chip = CHIPS[name.split(":")[0]]
    kernel_bytes, plain_bytes = (program.cost_analysis()["bytes accessed"] for program in (kernel, plain))
    print(
        f"\n{name}: {vmem / 2**20:.1f} MiB of VMEM by arithmetic; {kernel_bytes / 1e6:.1f} MB of HBM traffic a device, "
        f"XLA's program {plain_bytes / 1e6:.1f} MB; {flops / 1e9:.0f} GFLOP in bfloat16\n"
        f"  roofline: {1e3 * flops / chip.peak_flops:.2f} ms of matrix unit, "
        f"{1e3 * kernel_bytes / chip.hbm_rate:.2f} ms of HBM; XLA's program {1e3 * plain_bytes / chip.hbm_rate:.2f} ms"
    )
    assert 0 < kernel_bytes < plain_bytes
