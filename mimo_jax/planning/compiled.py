"""The training step compiled ahead of time for TPUs that are not here."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mimo_jax.atomic import atomic_write
from mimo_jax.chips import Topology
from mimo_jax.config import ConfigError, LMTrainConfig
from mimo_jax.planning.hlo import Collective, collectives
from mimo_jax.sharding import MESH_AXES, batch_sharding, make_mesh, shardings, unboxed
from mimo_jax.training import loop, lora
from mimo_jax.training.language_model import abstract_rows, assemble


class Place(NamedTuple):
    """Where a group of devices lies.

    Attributes:
        mesh_axes: axes of the mesh along which they differ.
        torus_axes: how many places along each axis of the torus they take, 1 where they do not differ.
        slices: how many slices they are on.
    """

    mesh_axes: tuple[str, ...]
    torus_axes: tuple[int, ...]
    slices: int


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step.

    Attributes:
        mesh: the devices it was compiled for.
        argument_bytes: state and batch, per device.
        peak_bytes: per device.
        collectives: see `hlo.collectives`.
        seconds: that compiling took.
    """

    mesh: Mesh
    argument_bytes: int
    peak_bytes: int
    collectives: list[Collective]
    seconds: float

    def place(self, group: Sequence[int]) -> Place:
        """Where a group of devices lies, given by their numbers in `mesh.devices.flat`."""
        devices = [self.mesh.devices.flat[i] for i in group]
        on_mesh = np.array(np.unravel_index(group, self.mesh.devices.shape)).T
        coords = np.array([device.coords for device in devices])
        slices = {getattr(device, "slice_index", None) for device in devices}
        return Place(
            tuple(name for name, column in zip(MESH_AXES, on_mesh.T, strict=True) if len(set(column)) > 1),
            tuple(len(set(column)) for column in coords.T),
            len(slices),
        )


def tpu_devices(topology: Topology) -> list[Any]:
    """Devices of a TPU topology, for compiling only.

    Raises:
        ConfigError: the compiler for TPUs is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology={topology.name}: compiling for TPUs needs the extra `tpu` (or --no-compile)")
    # Nobody asks a metadata server, and several processes may compile at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **slices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--topology={topology.name}: the compiler does not know it ({reason})") from None
    if len(found.devices) != topology.devices:
        raise ConfigError(
            f"--topology={topology.name}: expected {topology.devices} devices, the compiler has {len(found.devices)}"
        )
    return list(found.devices)


def compile_step(cfg: LMTrainConfig, topology: Topology, hlo: str | None = None) -> CompiledStep:
    """Compiles the training step of a job for a TPU topology: minutes. Its text is written to the file `hlo`, if given.

    Raises:
        ConfigError: it cannot be placed, or needs more memory than the devices have.
    """
    if cfg.compute.attention == "auto":  # which asks the devices that are here
        cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, attention="splash"))
    mesh = make_mesh(cfg.mesh, tpu_devices(topology))
    loop.check_rows(cfg.data.rows, cfg.run.accumulation, mesh)
    job = assemble(cfg, mesh)
    begin = time.monotonic()
    with jax.set_mesh(mesh):
        state = loop.with_shardings(job.abstract, job.placed)
        base: Any = {}
        if cfg.lora.rank:
            frozen = lora.split(job.learnt, job.everything)[0]
            base = loop.with_shardings(unboxed(frozen), shardings(frozen, mesh))
        traced = job.update.trace(state, abstract_rows(cfg, batch_sharding(mesh)), base)
        program = traced.lower(lowering_platforms=("tpu",))
        cache = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)  # such programs cannot be read back
        try:
            compiled = program.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = next((line for line in str(error).splitlines() if "memory" in line), str(error))
            raise ConfigError(
                f"--topology={topology.name}: does not fit: {reason.strip()}. Raise run.accumulation, set "
                "compute.patch_chunk or compute.remat=full, or cut the model over more devices"
            ) from None
        finally:
            jax.config.update("jax_enable_compilation_cache", cache)
    text = compiled.as_text()
    if hlo:
        atomic_write(hlo, text.encode())
    size = compiled.memory_analysis()
    return CompiledStep(
        mesh,
        size.argument_size_in_bytes,
        size.peak_memory_in_bytes,
        collectives(text),
        time.monotonic() - begin,
    )
