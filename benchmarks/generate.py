"""Speed of generating speech with a language model on the device that is here.

    python benchmarks/generate.py --config configs/joint.py:1b [--batch 1 8 64] [--config.compute.dtype=bfloat16 ...]
    python benchmarks/generate.py --reference            # the shapes of which the published code's speed is known

Untrained weights, a short prompt of text, then patches alone, sampled as published. Prints, and with --json writes:
patches/s of all requests together, the real-time factor of a request, and what a position spends its time on. The parts
are differences between whole runs: text ids without sampling (LLM step), patches without sampling, all of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from train_step import reference_job

from mimo_jax.config import LMTrainConfig
from mimo_jax.config_files import load_config
from mimo_jax.generation.generate import Generator, Prompt, Request
from mimo_jax.generation.sampling import DEFAULT_TEXT, GREEDY, PATCHES, SamplingConfig
from mimo_jax.models.audio_lm import init_params
from mimo_jax.training.language_model import CODES_PER_SECOND

PROMPT = 64  # positions
# The published code, float32, 2 CPU cores: 0.075 to 0.089 s a patch, one request at a time.
REFERENCE_PATCHES_PER_SECOND = 1 / 0.082


def seconds_per_position(
    generator: Generator, batch: int, new: int, text_id: int, text: SamplingConfig, patch: SamplingConfig
) -> tuple[float, float]:
    """Of one run in which every new position is `text_id`: decoding, and what `generate` takes beside its programs."""
    config = generator.config
    none = np.zeros((0, config.group_size, config.num_channels), np.int32)
    prompt = Prompt(np.full(PROMPT, 0 if config.empty_id else 1, np.int32), none)
    requests = [
        Request(prompt, new, (), forced_ids=(text_id,) * new, text_sampling=text, patch_sampling=patch, seed=seed)
        for seed in range(batch)
    ]
    begin = time.perf_counter()
    results, timing = generator.generate(requests)
    wall = time.perf_counter() - begin
    assert all(len(result.text) == new for result in results)
    return timing.decode_seconds / new, (wall - timing.prefill_seconds - timing.decode_seconds) / new


def measure(generator: Generator, batch: int, new: int, repeat: int) -> dict[str, float]:
    """Times whole runs in turns; medians of the runs and of the differences between runs of a turn."""
    empty = generator.config.empty_id
    run = functools.partial(seconds_per_position, generator, batch, new)
    kinds = {
        "llm": lambda: run(0 if empty else 1, GREEDY, GREEDY),
        "greedy": lambda: run(empty, GREEDY, GREEDY),
        "sampled": lambda: run(empty, DEFAULT_TEXT, PATCHES),
    }
    for kind in kinds.values():
        kind()
    turns = [{name: kind() for name, kind in kinds.items()} for _ in range(repeat)]

    def median(value: Callable[[dict[str, tuple[float, float]]], float]) -> float:
        return statistics.median(value(turn) for turn in turns)

    total = median(lambda turn: turn["sampled"][0])
    return {
        "batch": batch,
        "patches_per_second": batch / total,
        "real_time_factor": total * CODES_PER_SECOND / generator.config.group_size,
        "position_seconds": total,
        "llm_step_seconds": median(lambda turn: turn["llm"][0]),
        "patch_seconds": median(lambda turn: turn["greedy"][0] - turn["llm"][0]),
        "sampling_seconds": median(lambda turn: turn["sampled"][0] - turn["greedy"][0]),
        "host_seconds": median(lambda turn: turn["sampled"][1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--config", metavar="FILE:SIZE")
    job.add_argument("--reference", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once (default 1 8)")
    parser.add_argument("--new", type=int, default=64, help="patches of each (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options, overrides = parser.parse_known_args()
    cfg = reference_job() if options.reference else load_config(options.config, overrides)
    if not isinstance(cfg, LMTrainConfig) or cfg.lora.rank or (options.reference and overrides):
        parser.error("expected a language-model job without LoRA; --reference takes no settings")
    # Weights in the precision that they are used in: there is nothing to train.
    compute = dataclasses.replace(cfg.compute, param_dtype=cfg.compute.dtype)
    params = jax.jit(init_params, static_argnums=(0, 1))(cfg.model, compute, jax.random.key(0))["params"]
    generator = Generator(cfg.model, params, compute)
    del params
    print(f"{jax.devices()[0].device_kind}, {compute.dtype}, {cfg.model.num_params():,} parameters")
    results = []
    for batch in options.batch:
        found = measure(generator, batch, options.new, options.repeat)
        results.append(found)
        print(f"\n{batch} requests, {options.new} patches each after {PROMPT} positions of text")
        print(
            f"  in all              {found['patches_per_second']:9.1f} patches/s, "
            f"real-time factor {found['real_time_factor']:.3f}"
        )
        names = {"llm_step": "LLM step", "patch": "patch decoder, encoder", "sampling": "sampling", "host": "host"}
        for key, name in names.items():
            print(f"  {name:<24}{found[f'{key}_seconds'] * 1e3:9.2f} ms a position")
        if options.reference:
            ratio = found["patches_per_second"] / REFERENCE_PATCHES_PER_SECOND
            print(f"  {ratio:.1f} x the published code's {REFERENCE_PATCHES_PER_SECOND:.1f} patches/s")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
