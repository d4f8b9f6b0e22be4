"""The plans that stand in the headers of the configs: every 7b and 1b has one, and they are what the planner says."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from mimo_jax.chips import parse_topology
from mimo_jax.config import LMTrainConfig
from mimo_jax.config_files import load_config
from mimo_jax.planning.compiled import Compiler, default_cache
from mimo_jax.planning.plan import Plan, plan_training

CONFIGS = Path(__file__).parents[2] / "configs"
JOBS = ("text", "understanding", "joint", "sft")
LINE = re.compile(
    r"^    (?P<size>\S+) (?P<topology>\w+:[\dx]+)(?: slices=(?P<slices>\d+))?(?P<flags>(?: \S+=\S+)*): "
    r"(?P<gib>[\d.]+) GiB (?P<how>compiled|by arithmetic), (?P<seconds>[\d.]+) s$",
    re.MULTILINE,
)


class Claim(NamedTuple):
    """A line of a header."""

    job: str
    size: str
    topology: str
    slices: int
    flags: tuple[str, ...]
    gib: float
    compiled: bool
    seconds: float

    def plan(self, compiler: Compiler | None = None) -> Plan:
        overrides = [f"--config.{flag}" for flag in self.flags]
        config = load_config(f"{CONFIGS}/{self.job}.py:{self.size}", overrides)
        assert isinstance(config, LMTrainConfig)
        return plan_training(config, parse_topology(self.topology, self.slices), compiler)


def claims(job: str) -> list[Claim]:
    header = ast.get_docstring(ast.parse((CONFIGS / f"{job}.py").read_text()), clean=False) or ""
    return [
        Claim(
            job,
            found["size"],
            found["topology"],
            int(found["slices"] or 1),
            tuple(found["flags"].split()),
            float(found["gib"]),
            found["how"] == "compiled",
            float(found["seconds"]),
        )
        for found in LINE.finditer(header)
    ]


@pytest.mark.parametrize("job", JOBS)
def test_headers_have_plans_of_both_large_sizes_that_fit_with_a_tenth_to_spare(job):
    found = claims(job)
    assert {claim.size for claim in found} == {"1b", "7b"}
    for claim in found:
        assert claim.gib * 2**30 < 0.9 * parse_topology(claim.topology).chip.hbm_bytes, claim


@pytest.mark.parametrize(
    "claim", [c for job in JOBS for c in claims(job)], ids=lambda c: f"{c.job}-{c.size}-{c.topology}"
)
def test_times_of_headers_are_those_of_the_arithmetic(claim):
    """A step that wires do not bound takes as long compiled as by arithmetic; memory is compared where it is that."""
    plan = claim.plan()
    assert plan.step_seconds == pytest.approx(claim.seconds, abs=0.051) and plan.bound in ("compute", "memory")
    assert claim.compiled or plan.peak_hbm_bytes / 2**30 == pytest.approx(claim.gib, abs=0.051)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")
@pytest.mark.parametrize("job", JOBS)
def test_compiled_figures_of_headers_are_those_of_the_compiler(job):
    """One of each config, the smallest: minutes each, unless the user's cache has it."""
    tpu = [c for c in claims(job) if c.size == "1b" and parse_topology(c.topology).is_tpu]
    claim = next((c for c in tpu if c.compiled), tpu[0])
    plan = claim.plan(Compiler(default_cache()))
    assert plan.headroom >= 0.1 and plan.step_seconds == pytest.approx(claim.seconds, rel=0.02)
    if claim.compiled:
        assert plan.peak_hbm_bytes / 2**30 == pytest.approx(claim.gib, rel=0.03)
