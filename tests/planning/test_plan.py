"""Plans: published speeds come out, parts add up, and what the compiler says is what the plan says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from mimo_jax.chips import parse_topology
from mimo_jax.cli import main
from mimo_jax.config import ConfigError, LMTrainConfig
from mimo_jax.config_files import load_config
from mimo_jax.planning.compiled import Compiler, default_cache
from mimo_jax.planning.plan import Plan, plan_training

CONFIGS = Path(__file__).parents[2] / "configs"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")


def plan(job: str, topology: str, *overrides: str, slices: int = 1, compiled: bool = False) -> Plan:
    config = load_config(f"{CONFIGS}/{job}", [f"--config.{o}" for o in overrides])
    assert isinstance(config, LMTrainConfig)
    return plan_training(config, parse_topology(topology, slices), Compiler(default_cache()) if compiled else None)


# A dense text model of 8 billion parameters at 8192 positions.
EIGHT_BILLION = (
    "model.vocab_size=128256",
    "model.empty_id=128000",
    "model.llm.num_layers=32",
    "model.llm.d_ff=14336",
    "data.row_patches=0",
)


@pytest.mark.parametrize(
    ("topology", "flags", "published"),
    [
        # MaxText, Llama 3.1 8B on 256 chips.
        ("v6e:16x16", ("data.rows=768", "run.accumulation=1", "compute.remat=full", "mesh.fsdp=256"), 7207),
        # torchtitan, Llama 3.1 8B on 8 GPUs, 2 rows each, FSDP, selective checkpointing, torch.compile.
        ("h100:8", ("data.rows=16", "run.accumulation=1", "compute.remat=dots", "mesh.fsdp=8"), 6667),
    ],
)
def test_published_speeds_come_out_within_a_fifth(topology, flags, published):
    found = plan("text.py:7b", topology, *EIGHT_BILLION, *flags)
    assert found.positions_per_second / found.chips == pytest.approx(published, rel=0.2)


def test_a_plan_by_arithmetic_is_complete():
    found = plan("joint.py:7b", "v5p:8x8x4")
    shown = found.to_json()
    assert shown["chips"] == 256 and shown["mesh"] == {"data": 8, "fsdp": 32, "tensor": 1}
    assert shown["positions_per_step"] == 2048 * 8192 and shown["compile_seconds"] is None
    assert shown["peak_hbm_bytes"] == sum(shown["hbm_by_category"].values()) and shown["fits"]
    assert shown["step_seconds"] == max(
        found.seconds["compute"] + found.seconds["memory"], found.seconds["interconnect"], found.seconds["network"]
    )
    assert shown["days"] == pytest.approx(298_023 * found.step_seconds / 86_400)
    assert 12 * 8_018_587_648 <= shown["checkpoint_bytes"] < 12.2 * 8_018_587_648
    assert 0.3 < shown["mfu"] < 0.7


KEYS = (
    "chips topology mesh positions_per_step peak_hbm_bytes hbm_limit_bytes fits hbm_by_category model_flops_per_step "
    "collective_bytes step_seconds bound mfu positions_per_second audio_hours_per_day days checkpoint_bytes "
    "compile_seconds"
)


@pytest.mark.parametrize("topology", ["v5e:16x16", "h100:256"])
def test_json_of_the_command_has_all_keys(topology, capsys):
    arguments = ["plan", "--config", f"{CONFIGS}/joint.py:7b", "--topology", topology, "--no-compile", "--json"]
    assert not main(arguments)
    shown = json.loads(capsys.readouterr().out)
    assert set(KEYS.split()) <= set(shown) and not shown["cached"]
    assert shown["chips"] == 256 and shown["topology"] == topology
    assert shown["positions_per_second"] == pytest.approx(shown["positions_per_step"] / shown["step_seconds"])


def test_activations_in_the_hosts_memory_leave_the_devices_and_cost_its_wires():
    full, moved = (plan("joint.py:7b", "v5e:16x16", f"compute.remat={remat}") for remat in ("full", "offload"))
    # One row of 8192 positions at a time, 34 of 36 layers, bfloat16.
    freed = full.hbm_by_category["activations"] - moved.hbm_by_category["activations"]
    assert freed == 34 * 8192 * 4096 * 2
    assert moved.seconds["host"] > 0 and "host" not in full.seconds
    assert dataclasses.replace(moved, seconds=moved.seconds | {"host": 99.0}, step_seconds=99.0).bound == "host"


def test_narrow_shards_are_gathered_at_twice_the_price():
    wide, narrow = (plan("text.py:7b", "v5e:16x16", f"mesh.fsdp={n}").collective_bytes["fsdp"] for n in (32, 256))
    assert narrow / wide == pytest.approx(5 / 3, rel=0.05)  # two gathers that count twice, and a scatter


def test_checkpoints_of_adapters_hold_what_is_trained():
    found = plan("sft.py:7b", "h100:8", "lora.rank=64")
    assert 1.5e9 < found.checkpoint_bytes < 3e9
    full = plan("sft.py:7b", "h100:8")
    assert found.seconds["compute"] < 0.85 * full.seconds["compute"]
    assert found.collective_bytes["fsdp"] < 0.75 * full.collective_bytes["fsdp"]


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [((4, 3, 5, 0), "compute"), ((1, 3, 5, 0), "interconnect"), ((1, 2, 0, 4), "network"), ((1, 2, 1, 0), "memory")],
)
def test_the_bound_is_what_the_step_takes_as_long_as(seconds, bound):
    found = plan("sft.py:7b", "h100:8")
    named = dict(zip(("compute", "memory", "interconnect", "network"), seconds, strict=True))
    step = max(seconds[0] + seconds[1], *seconds[2:])
    assert dataclasses.replace(found, seconds=named, step_seconds=step).bound == bound


def test_slices_send_little_over_the_network():
    found = plan("joint.py:7b", "v5e:16x16", "run.accumulation=4", slices=2)
    assert 0 < found.collective_bytes["network"] < found.collective_bytes["data"]
    assert found.seconds["network"] < found.seconds["compute"]


def test_text_of_a_program_needs_a_program(capsys):
    arguments = ["plan", "--config", f"{CONFIGS}/joint.py:7b", "--topology", "v5p:8x8x4", "--no-compile", "--hlo", "x"]
    assert main(arguments) == 2
    assert "--hlo=x: nothing is compiled" in capsys.readouterr().err


def test_more_devices_take_less_memory_and_time_each():
    small, large = (plan("joint.py:7b", f"v5p:{shape}", "run.accumulation=4") for shape in ("8x8x4", "8x8x8"))
    assert large.step_seconds < small.step_seconds and large.peak_hbm_bytes < small.peak_hbm_bytes


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v9:4x4", 1, "KIND one of"),
        ("v5p:4xx4", 1, "KIND:AxB"),
        ("h100:8x8", 1, "one number of GPUs"),
        ("h100:8", 2, "one slice"),
        ("v5e:4x4", 0, "at least one slice"),
        ("v5e:4x4x4", 1, "2 axes"),
        ("v5p:256", 1, "3 axes"),
    ],
)
def test_impossible_topologies_are_refused(topology, slices, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(topology, slices)


def test_without_the_compiler_for_tpus_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="extra `tpu`"):
        plan("joint.py:tiny", "v5e:2x2", compiled=True)


@needs_libtpu
@pytest.mark.slow
def test_a_small_step_compiles_for_tpus():
    found = plan("joint.py:tiny", "v5e:2x2", "mesh.fsdp=2", "compute.remat=full", compiled=True)
    assert found.compile_seconds is not None and found.fits
    assert found.peak_hbm_bytes == sum(found.hbm_by_category.values())
    assert {"data", "fsdp"} <= set("+".join(found.collective_bytes).split("+"))


@needs_libtpu
def test_a_topology_that_the_compiler_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="v5e:3x7"):
        plan("joint.py:tiny", "v5e:3x7", "data.rows=21", compiled=True)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "slices", "flags"),
    [
        ("v5p:8x8x4", 1, ()),
        ("v5e:16x16", 1, ()),
        ("v6e:16x16", 1, ()),
        ("v5e:16x16", 2, ("run.accumulation=4",)),
    ],
)
def test_the_published_batch_fits_with_a_tenth_to_spare(topology, slices, flags):
    found = plan("joint.py:7b", topology, *flags, slices=slices, compiled=True)
    assert found.positions_per_step == 2048 * 8192 and found.headroom >= 0.1, str(found)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:2x4", {"fsdp": 8}), ("v5e:4x4", {"fsdp": 8, "tensor": 2}), ("v5e:4x4", {"data": 2, "fsdp": 8})],
    ids=["fsdp", "fsdp-tensor", "data-fsdp"],
)
def test_traffic_by_arithmetic_is_within_a_factor_of_the_programs(topology, mesh):
    """Per axis, at shards of 128 lanes, within 2; within 3 with `tensor`, where the program gathers over both at once.

    Sums over data and fsdp at once (norms, the table's gradient) are left out.
    """
    flags = [f"mesh.{axis}={mesh.get(axis, 1)}" for axis in ("data", "fsdp", "tensor")]
    flags += "data.row_patches=0 loss.channel_weights=(0,0,0,0,0,0,0,0) learning_rates.patch_decoder=0".split()
    flags += "data.rows=16 data.row_length=1024 compute.remat=full compute.dtype=bfloat16".split()
    llm = dict(d_model=1024, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=128, d_ff=2816)
    flags += [f"model.llm.{name}={value}" for name, value in llm.items()]
    arithmetic = plan("joint.py:tiny", topology, *flags).collective_bytes
    program = plan("joint.py:tiny", topology, *flags, compiled=True).collective_bytes
    factor = 3 if "tensor" in mesh else 2
    for axis in mesh:
        found = program[axis] + (program.get("fsdp+tensor", 0) if axis == "fsdp" else 0)
        assert 1 / factor < arithmetic[axis] / found < factor, (arithmetic, program)
