"""The search: what it ranks can be placed, its winner is the config it says, and the compiler has the last word."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from mimo_jax.chips import parse_topology
from mimo_jax.cli import main
from mimo_jax.config import ConfigError
from mimo_jax.config_files import load_config
from mimo_jax.planning import search as module
from mimo_jax.planning.compiled import Compiler, DoesNotFitError
from mimo_jax.planning.plan import plan_training
from mimo_jax.planning.search import search

JOINT = Path(__file__).parents[2] / "configs" / "joint.py"
V5E, V5P = parse_topology("v5e:8x8"), parse_topology("v5p:4x4x4")


@pytest.fixture(scope="module")
def job():
    return load_config(f"{JOINT}:1b")


def test_the_winner_is_at_least_as_fast_as_the_config_and_fits(job):
    found = search(job, V5P, None)
    assert found.plan.step_seconds <= plan_training(job, V5P).step_seconds and found.plan.headroom >= 0.1
    assert found.plan.positions_per_step == job.data.rows * job.data.row_length
    overridden = load_config(f"{JOINT}:1b", found.best.overrides)
    assert plan_training(overridden, V5P) == found.plan
    times = [c.plan.step_seconds for c in found.ranking]
    assert len(times) == 10 and all(b > 0.96 * a for a, b in itertools.pairwise(times))


def test_every_candidate_keeps_the_batch_and_the_validators_rules(job):
    seen = list(module._candidates(job, parse_topology("v5e:4x4", 2)))
    assert {c.config.compute.remat for c in seen} == {"none", "dots", "full", "offload"}
    for c in seen:
        mesh, rows = c.plan.mesh, c.config.data.rows
        assert mesh["data"] % 2 == 0 and mesh["tensor"] in (1, 2, 4) and rows == job.data.rows
        assert rows % (c.config.run.accumulation * mesh["data"] * mesh["fsdp"]) == 0


def test_of_like_steps_full_lanes_come_first(job):
    first = search(load_config(f"{JOINT}:7b"), parse_topology("v5p:8x8x4"), None).best
    assert 4096 / first.plan.mesh["fsdp"] >= 128


def answers(monkeypatch, *factors, slower=()):
    """A compiler whose peaks are those of arithmetic times a factor; None refuses. `slower` are factors of the time."""
    given = iter(factors)
    asked = []

    def compiled(cfg, topology, compiler=None):
        plan = plan_training(cfg, topology)
        if compiler is None:
            return plan
        asked.append(plan.peak_hbm_bytes)
        factor, slow = next(given), slower[len(asked) - 1] if slower else 1.0
        if factor is None:
            raise DoesNotFitError("no")
        return dataclasses.replace(
            plan,
            peak_hbm_bytes=int(factor * plan.peak_hbm_bytes),
            step_seconds=slow * plan.step_seconds,
            compile_seconds=1.0,
        )

    monkeypatch.setattr(module, "plan_training", compiled)
    return asked


def test_what_the_compiler_refuses_is_followed_by_something_smaller(job, monkeypatch):
    asked = answers(monkeypatch, None, 1.6, 1.0)
    found = search(job, V5E, Compiler())
    assert [plan is None for _, plan in found.tried] == [True, False, False]
    assert asked[0] > asked[1] > asked[2] and found.plan.compile_seconds == 1.0
    assert found.best is found.tried[-1][0]


def test_what_turns_out_slow_is_followed_by_something_faster(job, monkeypatch):
    answers(monkeypatch, 1.0, 1.0, 1.0, slower=(2.0, 1.0, 1.0))
    found = search(job, V5E, Compiler())
    (first, slow), (second, plan), *_ = found.tried
    assert found.best is second and found.plan is plan and plan.step_seconds < slow.step_seconds
    assert first.plan.mesh["tensor"] != second.plan.mesh["tensor"]  # the others of its kind are expected to be as slow
    assert len(found.tried) == 2


def test_a_search_ends_after_as_many_compiles_as_allowed(job, monkeypatch):
    asked = answers(monkeypatch, None, None)
    with pytest.raises(ConfigError, match="found no room: .*mesh.fsdp=.* needs too much"):
        search(job, V5E, Compiler(), compiles=2)
    assert len(asked) == 2


def test_nothing_fits(job):
    with pytest.raises(ConfigError, match="no placement of 512 rows"):
        search(job, parse_topology("v5e:2x2"), None, headroom=0.9)
    with pytest.raises(ConfigError, match="no mesh of the 12 devices can cut data.rows=512"):
        search(job, parse_topology("v5e:2x2", 3), None)


def test_on_gpus_the_command_ranks_by_arithmetic(capsys):
    arguments = ["plan", "--config", f"{JOINT}:1b", "--topology", "h100:16", "--search"]
    assert not main([*arguments, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"]["compile_seconds"] is None and shown["compiled"] == [] and len(shown["ranking"]) == 10
    assert all(o.startswith("--config.") for o in shown["overrides"])
    assert not main(arguments)
    text = capsys.readouterr().out
    assert "micro-batches" in text and " ".join(shown["overrides"]) in text
