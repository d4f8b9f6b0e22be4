"""Plans of generation and tokenising: sizes are those that the code runs, and figures follow from each other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mimo_jax import presets
from mimo_jax.chips import parse_topology
from mimo_jax.cli import main
from mimo_jax.config import ConfigError
from mimo_jax.planning.compiled import Compiler, default_cache
from mimo_jax.planning.programs import plan_generation, plan_tokenizing

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = parse_topology("h100:1")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")


def generation(batch: int = 1, length: int = 2048, topology: str = "h100:1", size: str = "7b", compiler=None):
    model, compute = presets.audio_lm(size), presets.compute(size)
    return plan_generation(model, compute, parse_topology(topology), compiler, batch, length)


def test_generation_holds_the_model_once_and_a_cache_for_every_request():
    one, eight = generation(1), generation(8)
    norms = 2 * 4096 * 37 + 1024 * 2 * 30  # in float32
    assert one.hbm_by_category["parameters"] == pytest.approx(2 * 8_018_587_648 + 2 * norms, rel=1e-4)
    assert one.hbm_by_category["cache"] == 2 * 36 * 2048 * 8 * 128 * 2
    assert eight.hbm_by_category["cache"] == 8 * one.hbm_by_category["cache"]
    assert one.peak_hbm_bytes == sum(one.hbm_by_category.values()) and one.fits
    # Few requests wait for the parameters to be read.
    assert 6 < eight.rates["tokens_per_second"] / one.rates["tokens_per_second"] < 8
    assert one.rates["patches_per_second"] < one.rates["tokens_per_second"]
    assert not generation(8, 8192, topology="v5e:1x1").fits


def test_a_clip_costs_its_flops_and_the_tokenizer_its_memory():
    model, compute = presets.audio_tokenizer("7b"), presets.compute("7b")
    short, long = (plan_tokenizing(model, compute, H100, None, seconds) for seconds in (10.0, 60.0))
    assert short.hbm_by_category["parameters"] == pytest.approx(4 * model.num_params(), rel=0.1)
    assert short.sizes["RVQ frames"] == 252 and long.sizes["RVQ frames"] == 1501  # of a bucket, and a guard
    assert long.model_flops["clip"] > 5 * short.model_flops["clip"]
    assert short.rates["audio_hours_per_chip_hour"] == pytest.approx(1 / short.rates["real_time_factor"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["joint.py:7b", "--program", "tokenize"], "expected an audio tokenizer job"),
        (["tokenizer.py:7b", "--program", "generate"], "expected a language model job"),
        (["tokenizer.py:7b", "--program", "tokenize", "--batch", "2"], "one after the other"),
        (["joint.py:7b", "--program", "generate", "--search"], "--program=train"),
        (["joint.py:7b", "--program", "generate", "--length", "1"], "two positions"),
        (["joint.py:7b", "--program", "generate", "--length", "1e30"], "4194304 positions at most"),
        (["tokenizer.py:7b", "--program", "tokenize", "--length", "1e12"], "86400 at most"),
        (["joint.py:7b", "--length", "10"], "expected --program=generate or tokenize"),
    ],
)
def test_what_a_program_cannot_do_is_refused(arguments, message, capsys):
    assert main(["plan", "--topology", "h100:1", "--config", f"{CONFIGS}/{arguments[0]}", *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


def test_json_and_text_of_a_program(capsys):
    arguments = ["plan", "--topology", "h100:1", "--config", f"{CONFIGS}/tokenizer.py:7b", "--program", "tokenize"]
    assert not main([*arguments, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["devices"] == 1 and shown["compile_seconds"] is None and shown["bound"] == {"clip": "compute"}
    assert not main(arguments)
    assert "one device of h100:1" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.slow
def test_programs_compile_for_tpus():
    compiler = Compiler(default_cache())
    found = generation(2, 64, "v5e:1x1", "tiny", compiler)
    assert found.compile_seconds and found.fits
    tokenizer = presets.audio_tokenizer("tiny")
    found = plan_tokenizing(tokenizer, presets.compute("tiny"), parse_topology("v5e:1x1"), compiler, 2.0)
    assert found.compile_seconds and found.peak_hbm_bytes == sum(found.hbm_by_category.values())
    with pytest.raises(ConfigError, match="does not fit"):
        generation(8, 8192, "v5e:1x1", "7b", compiler)
