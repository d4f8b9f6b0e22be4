"""Which mesh, accumulation, remat and patch chunk suit a job best: ranked by arithmetic, the best compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from mimo_jax.chips import Topology
from mimo_jax.config import ComputeConfig, ConfigError, LMTrainConfig, MeshConfig
from mimo_jax.planning.compiled import Compiler, DoesNotFitError
from mimo_jax.planning.plan import LANES, Plan, plan_training
from mimo_jax.sharding import MESH_AXES

_REMATS: tuple[str, ...] = get_args(get_type_hints(ComputeConfig)["remat"])
_CHUNKS = (1, 2, 4, 8, 16)  # in which the patches of a micro-batch may be worked on
_SHOWN = 10
# Step times that differ by less are alike: then shards of full width come first, then the wires decide, then memory.
_ALIKE = 0.03
_REFUSED = 1.1  # what the compiler refuses is taken to need so many times the memory there is


@dataclass(frozen=True)
class Candidate:
    """A way to place a job.

    Attributes:
        config: the job so placed.
        plan: its plan by arithmetic.
    """

    config: LMTrainConfig
    plan: Plan

    @property
    def settings(self) -> dict[str, Any]:
        """What sets it apart."""
        c = self.config
        mesh = {f"mesh.{axis}": self.plan.mesh[axis] for axis in MESH_AXES}
        chunk = {"compute.remat": c.compute.remat, "compute.patch_chunk": c.compute.patch_chunk}
        return {**mesh, "run.accumulation": c.run.accumulation, **chunk}

    @property
    def overrides(self) -> list[str]:
        """What to add to a command that names the job's config."""
        return [f"--config.{name}={value}" for name, value in self.settings.items()]


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        ranking: the best of each mesh and remat, by arithmetic.
        tried: what was compiled, with the plan that came of it; None where the compiler refused it.
        best: the winner.
        plan: its plan; compiled, unless nothing was to be.
    """

    ranking: Sequence[Candidate]
    tried: Sequence[tuple[Candidate, Plan | None]]
    best: Candidate
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        def row(candidate: Candidate) -> dict[str, Any]:
            shown = ("peak_hbm_bytes", "step_seconds", "bound", "mfu")
            return candidate.settings | {name: getattr(candidate.plan, name) for name in shown}

        return {
            "ranking": [row(c) for c in self.ranking],
            "compiled": [
                c.settings | {name: plan and getattr(plan, name) for name in ("peak_hbm_bytes", "step_seconds")}
                for c, plan in self.tried
            ],
            "overrides": self.best.overrides,
            "plan": self.plan.to_json(),
        }

    def __str__(self) -> str:
        names = f"{'data x fsdp x tensor':<21}{'micro-batches':>13}{'remat':>9}{'patches':>9}{'GiB':>8}{'step s':>9}"
        lines = ["by arithmetic, the best of each mesh and remat", f"{names}  {'bound':<13}MFU"]
        for candidate in self.ranking:
            plan, compute = candidate.plan, candidate.config.compute
            mesh, gib = " x ".join(str(size) for size in plan.mesh.values()), plan.peak_hbm_bytes / 2**30
            lines.append(
                f"{mesh:<21}{plan.accumulation:>13}{compute.remat:>9}{compute.patch_chunk or 'all':>9}"
                f"{gib:>8.1f}{plan.step_seconds:>9.2f}  {plan.bound:<13}{100 * plan.mfu:>3.0f} %"
            )
        if self.tried:
            lines += ["", "compiled"]
        for candidate, found in self.tried:
            verdict = "does not fit"
            if found is not None:
                verdict = f"{found.peak_hbm_bytes / 2**30:.1f} GiB, {found.step_seconds:.2f} s, {found.bound}"
            lines.append(f"  {' '.join(f'{name}={value}' for name, value in candidate.settings.items())}: {verdict}")
        return "\n".join([*lines, "", "best", "  " + " ".join(self.best.overrides), "", str(self.plan)])


def search(
    cfg: LMTrainConfig, topology: Topology, compiler: Compiler | None, headroom: float = 0.1, compiles: int = 3
) -> Search:
    """Ranks the ways to place a job, its batch unchanged, and compiles the best ones.

    It goes on while a way that was not compiled yet promises to be faster than the fastest that was. What compiling
    shows of one, that it needs more memory or, for its collectives, more time than arithmetic says, is then expected of
    the others (time: of those of the same `tensor`).

    Args:
        cfg: the job; its mesh, accumulation, remat and patch chunk do not matter.
        topology: what it shall run on.
        compiler: arithmetic only without one, and for GPUs.
        headroom: share of the memory that shall stay free.
        compiles: how many at most.

    Raises:
        ConfigError: nothing fits, or the compiler refused all that it was given.
    """
    room = (1 - headroom) * topology.chip.hbm_bytes
    possible = _ranked(cfg, topology)
    if not possible:
        raise ConfigError(
            f"--topology={topology.name}: no mesh of the {topology.devices} devices can cut data.rows={cfg.data.rows} "
            "and the parameters evenly"
        )
    ranked = [c for c in possible if c.plan.peak_hbm_bytes <= room]
    if not ranked:
        wanted = f"{100 * headroom:.0f} % of the memory free"
        raise ConfigError(f"--topology={topology.name}: no placement of {cfg.data.rows} rows leaves {wanted}")
    best_of: dict[Any, Candidate] = {}
    for one in ranked:
        best_of.setdefault((*one.plan.mesh.values(), one.config.compute.remat), one)
    ranking = list(best_of.values())[:_SHOWN]
    if compiler is None or not topology.is_tpu or not compiles:
        return Search(ranking, [], ranked[0], ranked[0].plan)
    tried: list[tuple[Candidate, Plan | None]] = []
    best: tuple[Candidate, Plan] | None = None
    factor = 1.0  # by which the compiler was found to need more memory than arithmetic says
    slower: dict[int, float] = {}  # and more time, with `tensor` devices

    def expected(candidate: Candidate) -> float:
        return candidate.plan.step_seconds * slower.get(candidate.plan.mesh["tensor"], 1.0)

    while len(tried) < compiles:
        promising = [
            c
            for c in ranked
            if factor * c.plan.peak_hbm_bytes <= room
            and (best is None or expected(c) < (1 - _ALIKE) * best[1].step_seconds)
        ]
        if not promising:
            break
        candidate = min(promising, key=lambda c: round(math.log(expected(c)) / _ALIKE))  # of like ones the first
        ranked = [c for c in ranked if c is not candidate]
        try:
            plan = plan_training(candidate.config, topology, compiler)
        except DoesNotFitError:
            tried.append((candidate, None))
            factor = max(factor, _REFUSED * topology.chip.hbm_bytes / candidate.plan.peak_hbm_bytes)
            continue
        tried.append((candidate, plan))
        factor = max(factor, plan.peak_hbm_bytes / candidate.plan.peak_hbm_bytes)
        tensor = plan.mesh["tensor"]
        slower[tensor] = max(slower.get(tensor, 1.0), plan.step_seconds / candidate.plan.step_seconds)
        if plan.peak_hbm_bytes <= room and (best is None or plan.step_seconds < best[1].step_seconds):
            best = candidate, plan
    if best is not None:
        return Search(ranking, tried, *best)
    told = "; ".join(
        f"{' '.join(c.overrides)} needs {'too much' if plan is None else f'{plan.peak_hbm_bytes / 2**30:.1f} GiB'}"
        for c, plan in tried
    )
    raise ConfigError(f"--topology={topology.name}: the compiler found no room: {told}")


def _ranked(cfg: LMTrainConfig, topology: Topology) -> list[Candidate]:
    """All ways to place a job, the fastest first."""

    def key(candidate: Candidate) -> tuple[float, ...]:
        plan = candidate.plan
        wires = plan.seconds["interconnect"] + plan.seconds["network"] + plan.seconds.get("host", 0.0)
        narrow = plan.mesh["fsdp"] > 1 and cfg.model.llm.d_model / plan.mesh["fsdp"] < LANES
        return round(math.log(plan.step_seconds) / _ALIKE), narrow, wires, plan.peak_hbm_bytes

    return sorted(_candidates(cfg, topology), key=key)


def _candidates(cfg: LMTrainConfig, topology: Topology) -> Iterator[Candidate]:
    for mesh in _meshes(topology):
        devices = mesh.data * mesh.fsdp
        if cfg.data.rows % devices:
            continue
        rows = cfg.data.rows // devices
        try:
            plan_training(dataclasses.replace(cfg, mesh=mesh, run=_accumulated(cfg, rows)), topology)
        except ConfigError:  # an axis of a parameter cannot be cut so
            continue
        for accumulation in (n for n in range(1, rows + 1) if rows % n == 0):
            patches = rows // accumulation * cfg.data.row_patches
            chunks = [patches // n if n > 1 else 0 for n in _CHUNKS if patches % n == 0 and (patches or n == 1)]
            for remat, chunk in itertools.product(_REMATS, chunks):
                compute = dataclasses.replace(cfg.compute, remat=remat, patch_chunk=chunk)  # type: ignore[arg-type]
                placed = dataclasses.replace(cfg, mesh=mesh, run=_accumulated(cfg, accumulation), compute=compute)
                yield Candidate(placed, plan_training(placed, topology))


def _accumulated(cfg: LMTrainConfig, accumulation: int) -> Any:
    return dataclasses.replace(cfg.run, accumulation=accumulation)


def _meshes(topology: Topology) -> Iterator[MeshConfig]:
    """Meshes of a topology: slices along `data`, and `tensor` within a host, whose devices read the same rows."""
    for tensor in _divisors(min(topology.chip.host, topology.devices)):
        if topology.devices % (tensor * topology.slices) == 0:
            for fsdp in _divisors(topology.devices // tensor // topology.slices):
                yield MeshConfig(data=topology.devices // tensor // fsdp, fsdp=fsdp, tensor=tensor)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
