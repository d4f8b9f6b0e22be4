"""What a training job needs and how fast it will be, before anything is booked: `mimo-jax plan`.

For a TPU topology the real training step is compiled, here, for the real devices: memory and collectives are the
compiler's. For GPUs, and where nothing shall be compiled, both are arithmetic (`planning.memory`, `_collectives`).

The time of a step is a roofline. Matrix products run at `Chip.attainable` of the peak and take turns with what memory
bounds; collectives run beside both:

    step = max(compute + memory, interconnect, network, host)
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from mimo_jax.chips import Topology
from mimo_jax.config import ConfigError, LMTrainConfig
from mimo_jax.planning import memory
from mimo_jax.planning.compiled import Compiled, Compiler, compile_step, place
from mimo_jax.sharding import MESH_AXES, mesh_shape
from mimo_jax.training.language_model import CODES_PER_SECOND

_GIB = 2**30
_DAY = 86_400.0
# Share of the forward pass that the backward pass computes anew. Logits always are.
_RECOMPUTED = {"offload": 1.0, "full": 1.0, "dots": 0.1, "none": 0.05}
_WIRES = ("interconnect", "network", "host")
_HOST_RATE = 10e9  # bytes/s between a device and its host, each way: ours, on the cautious side
LANES = 128  # of a TPU register: the narrowest shard that is gathered as such (docs/planning.md)
_STORAGE_RATE = 200e6  # bytes/s that one host writes to a bucket


@dataclass(frozen=True)
class Plan:
    """A plan; everything is per step and, for memory and traffic, per device.

    Attributes:
        topology: as asked for.
        chips: in all.
        mesh: size of each mesh axis.
        accumulation: micro-batches of a step.
        positions_per_step: of the whole job, padding included.
        peak_hbm_bytes: the compiler's figure, or the sum of the parts below.
        hbm_limit_bytes: what a program can use.
        hbm_by_category: bytes by name; they add up to the peak.
        model_flops_per_step: 3 forward passes, attention counted causally over whole rows, nothing twice.
        collective_bytes: bytes that a device sends, by mesh axes; `network` between slices or hosts.
        seconds: of compute, memory, interconnect, network, and host where activations wait in its memory.
        step_seconds: of a step.
        compile_seconds: None if nothing was compiled.
        cached: whether it was compiled earlier.
        audio_hours_per_step: at most, as if every patch slot were used.
        steps: of the whole job.
        checkpoint_bytes: of one checkpoint.
        peak_flops: of all devices.
        advice: what to change if it does not fit.
    """

    topology: str
    chips: int
    mesh: Mapping[str, int]
    accumulation: int
    positions_per_step: int
    peak_hbm_bytes: int
    hbm_limit_bytes: int
    hbm_by_category: Mapping[str, int]
    model_flops_per_step: float
    collective_bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    step_seconds: float
    compile_seconds: float | None
    audio_hours_per_step: float
    steps: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    peak_flops: float
    cached: bool = False
    advice: str = ""

    @property
    def fits(self) -> bool:
        return self.peak_hbm_bytes <= self.hbm_limit_bytes

    @property
    def headroom(self) -> float:
        """Share of the memory that stays free."""
        return 1 - self.peak_hbm_bytes / self.hbm_limit_bytes

    @property
    def bound(self) -> str:
        """The term that the step takes as long as, or the longer one of the two that take turns."""
        wire = max(_WIRES, key=lambda name: self.seconds.get(name, 0.0))
        work = max(("compute", "memory"), key=lambda name: self.seconds[name])
        return wire if self.step_seconds == self.seconds.get(wire) else work

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, of the vendor's peak."""
        return self.model_flops_per_step / (self.step_seconds * self.peak_flops)

    @property
    def positions_per_second(self) -> float:
        return self.positions_per_step / self.step_seconds

    @property
    def audio_hours_per_day(self) -> float:
        return self.audio_hours_per_step * _DAY / self.step_seconds

    @property
    def days(self) -> float:
        return self.steps * self.step_seconds / _DAY

    def to_json(self) -> dict[str, Any]:
        derived = ("fits", "headroom", "bound", "mfu", "positions_per_second", "audio_hours_per_day", "days")
        values = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        return values | {"chip_hours": self.days * 24 * self.chips}

    def __str__(self) -> str:
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        parts = {**self.hbm_by_category, "in all": self.peak_hbm_bytes, "of": self.hbm_limit_bytes}
        how = "compiled" if self.compile_seconds is not None else "by arithmetic"
        lines = [f"{self.topology}: {self.chips} chips, mesh {mesh}, {self.accumulation} micro-batches"]
        lines += ["", f"memory of a device ({how})"]
        lines += [f"  {name:<14}{size / _GIB:10.2f} GiB" for name, size in parts.items()]
        verdict = f"fits, {100 * self.headroom:.0f} % stay free" if self.fits else f"does not fit{self.advice}"
        lines += [f"  {verdict}", "", "step (roofline)"]
        lines += [f"  {name:<14}{seconds:10.3f} s" for name, seconds in self.seconds.items()]
        lines += [f"  {'in all':<14}{self.step_seconds:10.3f} s, bound by {self.bound}"]
        lines += [f"  sent over {axes:<12}{size / 1e9:8.2f} GB" for axes, size in self.collective_bytes.items()]
        hours = self.days * 24 * self.chips
        lines += [
            "",
            f"model FLOPs {self.model_flops_per_step:.4g} a step, MFU {100 * self.mfu:.1f} %",
            f"{self.positions_per_second:,.0f} positions/s, up to {self.audio_hours_per_day:,.0f} hours of audio a day",
            f"{self.steps:,} steps take {self.days:,.1f} days, {hours:,.0f} chip hours",
            f"a checkpoint has {self.checkpoint_bytes / 1e9:.1f} GB and takes about {self.checkpoint_seconds:.0f} s",
        ]
        if self.compile_seconds is not None:
            lines.append(f"compiled in {self.compile_seconds:.0f} s" + " (cached)" * self.cached)
        return "\n".join(lines)


def plan_training(cfg: LMTrainConfig, topology: Topology, compiler: Compiler | None = None) -> Plan:
    """The plan of a language-model job.

    Args:
        cfg: the job.
        topology: what it shall run on.
        compiler: what compiles the training step for TPUs; arithmetic only without one, and for GPUs.

    Raises:
        ConfigError: the job cannot be placed on the topology, or the compiler for TPUs is not installed.
    """
    chip = topology.chip
    shape = dict(zip(MESH_AXES, mesh_shape(cfg.mesh, topology.devices), strict=True))
    if shape["data"] % topology.slices:
        raise ConfigError(f"mesh.data: expected a multiple of the {topology.slices} slices, got {shape['data']}")
    parts = memory.plan_memory(cfg, topology)
    step = None
    if compiler is None or not topology.is_tpu:
        sent, wires = _collectives(cfg, topology, shape, parts)
        categories, peak = dict(parts.parts), parts.total
    else:
        step, mesh = compile_step(cfg, topology, compiler)
        sent, wires = _traffic(step, mesh, topology)
        categories, peak = _categories(parts, step), step.peak_bytes
    positions = cfg.data.rows * cfg.data.row_length
    flops = (
        3
        * positions
        * cfg.model.flops_per_position(
            cfg.data.row_length, cfg.data.row_patches / cfg.data.row_length, generate=cfg.loss.trains_audio
        )
    )
    # Forward and anew; the gradient of what flows through; that of the parameters, as many as are trained.
    passes = 2 + _RECOMPUTED[cfg.compute.remat] + parts.trained / parts.parameters
    executed = flops / 3 * passes / topology.devices
    seconds = {
        "compute": executed / (chip.peak_flops * chip.attainable),
        "memory": memory.traffic(cfg, shape, parts.trained) / chip.hbm_rate,
        **wires,
    }
    kept_by_host = memory.offloaded(cfg, cfg.data.rows / (shape["data"] * shape["fsdp"]))
    if kept_by_host:
        seconds["host"] = kept_by_host / shape["tensor"] / _HOST_RATE
    hosts = max(1, min(topology.devices, shape["fsdp"] * shape["tensor"]) // chip.host)
    return Plan(
        topology=topology.name + (f" x {topology.slices} slices" if topology.slices > 1 else ""),
        chips=topology.chips,
        mesh=shape,
        accumulation=cfg.run.accumulation,
        positions_per_step=positions,
        peak_hbm_bytes=peak,
        hbm_limit_bytes=chip.hbm_bytes,
        hbm_by_category=categories,
        model_flops_per_step=flops,
        collective_bytes=sent,
        seconds=seconds,
        step_seconds=max(seconds["compute"] + seconds["memory"], *(seconds.get(wire, 0.0) for wire in _WIRES)),
        compile_seconds=None if step is None else step.seconds,
        cached=step is not None and step.cached,
        audio_hours_per_step=cfg.data.rows * cfg.data.row_patches * cfg.model.group_size / CODES_PER_SECOND / 3600,
        steps=cfg.run.steps,
        checkpoint_bytes=parts.checkpoint,
        checkpoint_seconds=parts.checkpoint / (_STORAGE_RATE * hosts),
        peak_flops=topology.devices * chip.peak_flops,
        advice="" if peak <= chip.hbm_bytes else parts.advice,
    )


def _categories(parts: memory.MemoryPlan, step: Compiled) -> dict[str, int]:
    """The compiler's peak by category: parameters and optimiser are exact, `batch` is what else goes in (padding to
    tiles included), and what comes to be is shared out as arithmetic says."""
    fixed = {name: parts.parts[name] for name in ("parameters", "optimiser")}
    fixed["batch"] = max(0, step.argument_bytes - sum(fixed.values()))
    rest = max(0, step.peak_bytes - sum(fixed.values()))
    gradients = min(rest, parts.parts["gradients"])
    activations = min(rest - gradients, parts.parts["activations"])
    made = {"gradients": gradients, "activations": activations, "temporaries": rest - gradients - activations}
    return {**fixed, **made}


def _traffic(step: Compiled, mesh: Mesh, topology: Topology) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes that a device sends by mesh axes, and seconds on the wires."""
    sent: dict[str, float] = defaultdict(float)
    seconds = {"interconnect": 0.0, "network": 0.0}
    for collective in step.collectives:
        if collective.kind == "slices":  # reduced over the slices in a ring
            far = 2 * collective.wire_bytes * (topology.slices - 1) / topology.slices
            sent["network"] += far
            seconds["network"] += far / topology.chip.network_rate
            continue
        where = place(collective.group, mesh)
        sent["+".join(where.mesh_axes)] += collective.wire_bytes
        if where.slices > 1:
            seconds["network"] += collective.wire_bytes / topology.chip.network_rate
        else:
            seconds["interconnect"] += collective.wire_bytes / topology.torus_rate(where.torus_axes)
    return {axes: int(size) for axes, size in sent.items()}, seconds


def _collectives(
    cfg: LMTrainConfig, topology: Topology, shape: Mapping[str, int], parts: memory.MemoryPlan
) -> tuple[dict[str, int], dict[str, float]]:
    """The same by arithmetic: per micro-batch, parameters are gathered for both passes and gradients scattered."""
    m, width = cfg.model, 2 if cfg.compute.dtype == "bfloat16" else 4
    data, fsdp, tensor = (shape[axis] for axis in MESH_AXES)
    rows = cfg.data.rows // (cfg.run.accumulation * data * fsdp)
    narrowest = LANES * fsdp if topology.is_tpu and fsdp > 1 else 0
    gathered = memory.gathered_params(cfg, rows, narrowest) * width / tensor
    # Gradients of what works on patches are summed once for each chunk.
    alone = 0 if cfg.lora.rank else parts.trained - (m.num_llm_params() if cfg.learning_rates.llm else 0)
    learnt = (parts.trained + (memory.patch_chunks(cfg, rows) - 1) * alone) * width / tensor
    sent = {
        "fsdp": (2 * gathered + learnt) * (fsdp - 1) / fsdp,
        "data": 2 * learnt / fsdp * (data - 1) / data,
        # Two gathers and two scatters of the residual stream in each pass of a layer.
        "tensor": 12 * m.llm.num_layers * rows * cfg.data.row_length * m.llm.d_model * width * (tensor - 1) / tensor,
    }
    sent = {axis: cfg.run.accumulation * size for axis, size in sent.items() if size}
    seconds = {"interconnect": 0.0, "network": 0.0}
    inside = math.prod(topology.bounds) * topology.chip.devices if topology.is_tpu else topology.bounds[1]
    rate = topology.torus_rate(topology.bounds) if topology.is_tpu else topology.chip.link_rate
    reach = 1  # devices that the axes so far span, from the innermost
    for axis in reversed(MESH_AXES):
        reach *= shape[axis]
        size = sent.get(axis, 0.0)
        if reach <= inside:
            seconds["interconnect"] += size / rate
        elif axis == "data" and topology.is_tpu:  # summed in each slice first, then between slices
            near = max(1, shape[axis] // topology.slices)
            far = 2 * learnt * cfg.run.accumulation / fsdp / near * (1 - 1 / topology.slices)
            seconds["interconnect"] += size / rate
            seconds["network"] += far / topology.chip.network_rate
            sent["network"] = far
        else:
            seconds["network"] += size / topology.chip.network_rate
    return {axis: int(size) for axis, size in sent.items()}, seconds
