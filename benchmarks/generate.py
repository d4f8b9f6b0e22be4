"""Speed of generating speech with a language model on the device that is here.

    python benchmarks/generate.py --config configs/joint.py:1b [--batch 1 8 64] [--config.compute.dtype=bfloat16 ...]
    python benchmarks/generate.py --reference            # the shapes of which the published code's speed is known

Untrained weights, a short prompt of text, then patches alone, sampled as published. Prints, and with --json writes:
patches/s of all requests together, the real-time factor of a request, and what a position spends its time on: the LLM
step is that of a run of text without sampling, sampling is timed alone, patch decoder and encoder are the rest.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from train_step import reference_job, seconds

from mimo_jax.config import LMTrainConfig
from mimo_jax.config_files import load_config
from mimo_jax.generation.generate import Generator, Prompt, Request
from mimo_jax.generation.sampling import DEFAULT_TEXT, GREEDY, PATCHES, SamplingConfig, sample, sampling_params
from mimo_jax.kernels.delay_sample import delay_sample
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


def sampling_step(generator: Generator, batch: int) -> Callable[[], Any]:
    """All draws of a position alone: a text id, and the codes of a patch."""
    c, table = generator.config, generator.params["patch_encoder"]["embedding"]
    keys = jax.random.split(jax.random.key(0), batch)
    text, patch = sampling_params([DEFAULT_TEXT] * batch), sampling_params([PATCHES] * batch)
    pattern = dict(sizes=c.audio_vocab_sizes, delays=c.delays, group_size=c.group_size)

    @jax.jit
    def draws(text_BV: jax.Array, logits_BV: jax.Array, bits_TBR: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(x: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            t, bits_BR = inputs
            # What was drawn last feeds the next draw, as in the patch decoder.
            drawn = delay_sample(
                logits_BV + x, bits_BR, t, table, patch, implementation=generator.compute.kernels, **pattern
            )
            return drawn[1][:, :1].astype(jnp.float32), None

        steps = (jnp.arange(c.num_steps), bits_TBR)
        return sample(keys, text_BV, text), jax.lax.scan(step, jnp.zeros((batch, 1)), steps)[0]

    normal = functools.partial(jax.random.normal, jax.random.key(1))
    bits = jax.random.bits(jax.random.key(2), (c.num_steps, batch, c.num_channels))
    inputs = normal((batch, c.vocab_size)), normal((batch, sum(c.audio_vocab_sizes))), bits
    return lambda: draws(*inputs)


def measure(generator: Generator, batch: int, new: int, repeat: int) -> dict[str, float]:
    """Times whole runs in turns; medians."""
    empty = generator.config.empty_id
    run = functools.partial(seconds_per_position, generator, batch, new)
    draws = sampling_step(generator, batch)
    text, speech = (
        functools.partial(run, 0 if empty else 1, GREEDY, GREEDY),
        functools.partial(run, empty, DEFAULT_TEXT, PATCHES),
    )
    text(), speech()
    turns = [(text()[0], *speech(), seconds(draws, 10)) for _ in range(repeat)]
    llm, total, host, sampling = (statistics.median(values) for values in zip(*turns, strict=True))
    return {
        "batch": batch,
        "patches_per_second": batch / total,
        "real_time_factor": total * CODES_PER_SECOND / generator.config.group_size,
        "position_seconds": total,
        "llm_step_seconds": llm,
        "patch_seconds": total - llm - sampling,
        "sampling_seconds": sampling,
        "host_seconds": host,
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
