"""Programs compiled ahead of time for TPUs that are not here, and a cache of what the compiler said of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mimo_jax.atomic import atomic_write
from mimo_jax.chips import Topology
from mimo_jax.config import ConfigError, LMTrainConfig
from mimo_jax.kernels.dispatch import default_implementation
from mimo_jax.planning import hlo
from mimo_jax.planning.hlo import Collective, collectives
from mimo_jax.sharding import MESH_AXES, batch_sharding, make_mesh, shardings, unboxed
from mimo_jax.training import loop, lora
from mimo_jax.training.language_model import abstract_rows, assemble
from mimo_jax.xla_flags import tpu_flags


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program.

    Attributes:
        argument_bytes: what goes in, per device.
        peak_bytes: per device.
        collectives: see `hlo.collectives`.
        seconds: that compiling took, once.
        cached: whether that was earlier.
    """

    argument_bytes: int
    peak_bytes: int
    collectives: tuple[Collective, ...]
    seconds: float
    cached: bool = False

    def to_json(self) -> bytes:
        values = dataclasses.asdict(self)
        del values["cached"]
        return json.dumps(values).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Compiled:
        """Reads what `to_json` wrote; raises ValueError, TypeError or KeyError for anything else."""
        values = dict(json.loads(content))
        found = tuple(Collective(**c | {"group": tuple(c["group"])}) for c in values.pop("collectives"))
        result = cls(**values, collectives=found, cached=True)
        for name in ("argument_bytes", "peak_bytes", "seconds"):
            if not isinstance(getattr(result, name), (int, float)):
                raise TypeError(name)
        return result


class Compiler(NamedTuple):
    """How programs are compiled.

    Attributes:
        cache: folder of earlier answers; None to compile always. An entry is found by a hash of the lowered program
            (what config and source make of each other), of the topology, of the versions of JAX and the compiler, of
            flags and LIBTPU_INIT_ARGS and of what reads the program. One that cannot be read is made anew.
        hlo: file that the text of the compiled program goes to; such programs are compiled always.
    """

    cache: Path | None = None
    hlo: str | None = None

    def __call__(self, program: Any, topology: Topology, flags: Mapping[str, str] | None = None) -> Compiled:
        """Compiles a lowered program: minutes.

        Args:
            program: what `lower` gives.
            topology: where it shall run.
            flags: of the compiler, as in `xla_flags`. One that it does not know is named on stderr, and left out.

        Raises:
            ConfigError: it needs more memory than the devices have.
        """
        flags = dict(flags or {})
        entry = self._entry(program, topology, flags)
        if entry is not None and not self.hlo:
            try:
                return Compiled.from_json(entry.read_bytes())
            except (OSError, ValueError, TypeError, KeyError):
                pass
        begin = time.monotonic()
        enabled = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)  # such programs cannot be read back
        try:
            compiled = _compile(program, flags)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = next((line for line in str(error).splitlines() if "memory" in line), str(error))
            raise DoesNotFitError(f"--topology={topology.name}: does not fit: {reason.strip()}.") from None
        finally:
            jax.config.update("jax_enable_compilation_cache", enabled)
        text, size = compiled.as_text(), compiled.memory_analysis()
        if self.hlo:
            atomic_write(self.hlo, text.encode())
        result = Compiled(
            size.argument_size_in_bytes,
            size.peak_memory_in_bytes,
            tuple(collectives(text)),
            time.monotonic() - begin,
        )
        if entry is not None:
            try:
                atomic_write(entry, result.to_json())
            except OSError as error:
                print(f"plan: {entry.parent}: cannot be written ({error.strerror}), nothing is kept", file=sys.stderr)
        return result

    def _entry(self, program: Any, topology: Topology, flags: Mapping[str, str]) -> Path | None:
        if self.cache is None:
            return None
        versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu") if _installed(name)]
        reader = Path(hlo.__file__).read_text("utf-8")  # an entry holds what it read
        parts = [topology.name, str(topology.slices), *versions, reader, program.as_text()]
        parts += filter(None, [os.environ.get("LIBTPU_INIT_ARGS"), *(f"{k}={flags[k]}" for k in sorted(flags))])
        return self.cache / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.json"


def _compile(program: Any, flags: dict[str, str]) -> Any:
    while True:
        try:
            return program.compile(compiler_options=flags or None)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or unknown[1] not in flags:
                raise
            print(f"plan: this compiler has no flag {unknown[1]}: compiled without it", file=sys.stderr)
            flags = {k: v for k, v in flags.items() if k != unknown[1]}


class DoesNotFitError(ConfigError):
    """A program needs more memory than the devices have."""


def default_cache() -> Path:
    """The user's folder of plans."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimo-jax" / "plans"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


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


def place(group: Sequence[int], mesh: Mesh) -> Place:
    """Where a group of devices lies, given by their numbers in `mesh.devices.flat`."""
    devices = [mesh.devices.flat[i] for i in group]
    on_mesh = np.array(np.unravel_index(group, mesh.devices.shape)).T
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
    if not _installed("libtpu"):
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


def compile_step(cfg: LMTrainConfig, topology: Topology, compiler: Compiler) -> tuple[Compiled, Mesh]:
    """Compiles the training step of a job for a TPU topology, with the flags that `mimo-jax train` sets there.

    Raises:
        ConfigError: it cannot be placed, or needs more memory than the devices have (`DoesNotFitError`).
    """
    # `auto` asks the devices that are here, for attention and for kernels.
    if cfg.compute.attention == "auto":
        cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, attention="splash"))
    mesh = make_mesh(cfg.mesh, tpu_devices(topology))
    loop.check_rows(cfg.data.rows, cfg.run.accumulation, mesh)
    job = assemble(cfg, mesh)
    with jax.set_mesh(mesh), default_implementation("mosaic"):
        state = loop.with_shardings(job.abstract, job.placed)
        base: Any = {}
        if cfg.lora.rank:
            frozen = lora.split(job.learnt, job.everything)[0]
            base = loop.with_shardings(unboxed(frozen), shardings(frozen, mesh))
        traced = job.update.trace(state, abstract_rows(cfg, batch_sharding(mesh)), base)
        flags = tpu_flags(cfg.mesh.tensor != 1, os.environ.get("LIBTPU_INIT_ARGS", ""))  # as `train` sets them
        try:
            return compiler(traced.lower(lowering_platforms=("tpu",)), topology, flags), mesh
        except DoesNotFitError as error:
            raise DoesNotFitError(
                f"{error} Raise run.accumulation, set compute.patch_chunk or compute.remat=full, or cut the model over "
                "more devices"
            ) from None
