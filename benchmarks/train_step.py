"""Speed of the training step of a language-model job on the devices that are here.

    python benchmarks/train_step.py --config configs/joint.py:1b [--config.data.rows=8 ...] [--steps 20]
    python benchmarks/train_step.py --reference            # the shapes of which the published code's speed is known
    python benchmarks/train_step.py --reference --fill 0.1 0.5 1.0   # cost of the patch slots

Made-up rows, every patch slot used. Prints, and with --json writes: positions/s, model TFLOP/s, their share of the
matrix product rate that the same run measures, peak memory, and the time of each part alone (forward and backward).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rows import made_up_rows

from mimo_jax.chips import chip_of
from mimo_jax.config import LMTrainConfig, TransformerConfig
from mimo_jax.config_files import load_config
from mimo_jax.models.audio_lm import AudioLM, init_params
from mimo_jax.sharding import batch_sharding, make_mesh
from mimo_jax.training.cross_entropy import cross_entropy
from mimo_jax.training.language_model import LMJob, assemble
from mimo_jax.training.metrics import summarize
from mimo_jax.training.optimizer import apply_gradients, make_optimizer, trained
from mimo_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[1]
_GROUPS = 5
# The published code, float32, 2 CPU cores: positions/s of a step of [1, 512] positions of which 384 are patches.
REFERENCE_POSITIONS_PER_SECOND = 180.0


def reference_job() -> LMTrainConfig:
    """The job that was measured with the published code."""
    config = load_config(f"{ROOT}/configs/joint.py:tiny")
    assert isinstance(config, LMTrainConfig)
    stack = TransformerConfig.qwen2
    model = dataclasses.replace(
        config.model,
        vocab_size=8192,
        llm=stack(512, 8, 8, 64, 1408, num_kv_heads=4),
        patch_encoder=stack(256, 4, 8, 32, 1024, causal=False),
        patch_decoder=stack(256, 8, 8, 32, 1024),
    )
    data = dataclasses.replace(config.data, rows=1, row_length=512, row_patches=384)
    # Stacked layers would copy what the backward pass reads into the stack and out of it.
    compute = dataclasses.replace(config.compute, remat="none", scan_layers=False)
    return dataclasses.replace(config, model=model, data=data, compute=compute)


def seconds(function: Callable[[], Any], repeat: int) -> float:
    """Median of so many calls, after one that compiles."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@functools.cache
def _product(dtype: str) -> tuple[Callable[[], Any], float]:
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return lambda: product(x, x), 2.0 * n**3


def matmul_rate(dtype: str) -> float:
    """FLOP/s of one large matrix product on one device."""
    product, flops = _product(dtype)
    return flops / seconds(product, 5)


def start(cfg: LMTrainConfig, mesh: jax.sharding.Mesh) -> tuple[LMJob, Any]:
    """The parts of the job and its state."""
    job = assemble(cfg, mesh)
    init = jax.jit(init_params, static_argnums=(0, 1), out_shardings={"params": job.placed.params})
    params = init(cfg.model, cfg.compute, jax.random.key(0))["params"]
    return job, jax.jit(job.start, out_shardings=job.placed, donate_argnums=0)(params)


def time_steps(cfg: LMTrainConfig, steps: int, warm_up: int) -> dict[str, float]:
    """Times whole steps, in groups in which the host runs ahead, as in training.

    Before and after each group the rate of a large matrix product is measured: machines that are shared change their
    speed from minute to minute.
    """
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        job, state = start(cfg, mesh)
        rows = jax.device_put(made_up_rows(cfg, seed=0), batch_sharding(mesh))
        begin = time.perf_counter()
        for _ in range(warm_up):
            state, metrics = job.update(state, rows, {})
        jax.block_until_ready(state)
        compiled, taken, rates = time.perf_counter() - begin, [], [matmul_rate(cfg.compute.dtype)]
        groups = min(_GROUPS, steps)
        for group in range(groups):
            begin, count = time.perf_counter(), steps * (group + 1) // groups - steps * group // groups
            for _ in range(count):
                state, metrics = job.update(state, rows, {})
            loss = summarize([0], [metrics]).scalars["loss"]  # waits for it
            taken.append((time.perf_counter() - begin) / count)
            rates.append(matmul_rate(cfg.compute.dtype))
    memory = [d.memory_stats() or {} for d in mesh.local_devices]
    positions, patches = cfg.data.rows * cfg.data.row_length, cfg.data.row_patches / cfg.data.row_length
    # Two documents a row, of a third and two thirds: their mean context is 5/9 of the row's.
    length = cfg.data.row_length * 5 / 9
    flops = 3 * positions * cfg.model.flops_per_position(length, patches, generate=cfg.loss.trains_audio)
    between = [(a + b) / 2 * jax.device_count() for a, b in itertools.pairwise(rates)]
    step = statistics.median(taken)
    return {
        "step_seconds": step,
        "positions_per_second": positions / step,
        "model_flops_per_second": flops / step,
        "matmul_flops_per_second": statistics.median(between),
        "of_matmul": statistics.median(flops / t / rate for t, rate in zip(taken, between, strict=True)),
        "first_steps_seconds": compiled,
        "peak_memory_bytes": max(m.get("peak_bytes_in_use", 0) for m in memory),
        "loss": loss,
    }


def time_parts(cfg: LMTrainConfig, repeat: int) -> dict[str, float]:
    """Times the parts of a step alone, forward and backward, on the rows of a micro-batch."""
    mesh = make_mesh(cfg.mesh)
    accumulation = cfg.run.accumulation
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, rows=cfg.data.rows // accumulation),
        run=dataclasses.replace(cfg.run, accumulation=1),
    )
    with jax.set_mesh(mesh):
        job, state = start(cfg, mesh)
        rows = jax.device_put(made_up_rows(cfg, seed=0), batch_sharding(mesh))
        model, params = job.model, state.params
        B, L = rows.text_BL.shape
        C, width = rows.patch_positions_BC.shape[1], cfg.model.llm.d_model
        dtype = jnp.dtype(cfg.compute.dtype)
        h_BLD = jax.device_put(jnp.ones((B, L, width), dtype), batch_sharding(mesh))

        def part(method: Callable[..., Any], *inputs: jax.Array) -> float:
            """Time of the gradients of a method of the model, of its parameters and floating inputs."""

            def total(params: Any, *inputs: jax.Array) -> jax.Array:
                return jnp.sum(model.apply({"params": params}, *inputs, method=method).astype(jnp.float32))

            floating = tuple(i + 1 for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating))
            gradient = jax.jit(jax.grad(total, (0, *floating)))
            return seconds(lambda: gradient(params, *inputs), repeat)

        head = jax.jit(
            jax.grad(
                lambda k, h: cross_entropy(h, k, rows.text_BL, cfg.compute.logits_chunk)[0].sum(),
                (0, 1),
            )
        )
        parts = {
            "llm": part(lambda m, h, ids, at: m.hidden(h, ids, at)[0], h_BLD, rows.segment_ids_BL, rows.positions_BL),
            "text_head": seconds(lambda: head(params["llm"]["head"], h_BLD), repeat),
        }
        if C:
            zeros_BLD = jnp.zeros_like(h_BLD)
            inputs = (zeros_BLD, rows.patches_BCGR, rows.patch_positions_BC)
            parts["patch_encoder"] = part(AudioLM.add_patches, *inputs)
            if cfg.loss.trains_audio:
                decoder = (h_BLD[:, :C], rows.patches_BCGR)
                parts["patch_decoder"] = part(lambda m, h, codes: m.patch_cross_entropy(h, codes)[0], *decoder)
        seconds_of = {f"{name}_seconds": value * accumulation for name, value in parts.items()}
        return seconds_of | {"optimizer_seconds": time_optimizer(cfg, job, state, repeat)}


def time_optimizer(cfg: LMTrainConfig, job: LMJob, state: TrainState, repeat: int) -> float:
    """Times norms, clipping and update; takes the state with it."""
    optimizer = make_optimizer(cfg.optimizer, job.rates, cfg.run.steps)

    def apply(state: TrainState, gradients: Any) -> TrainState:
        loss = jnp.float32(0)
        return apply_gradients(state, gradients, loss, optimizer, cfg.optimizer, max_bad_steps=cfg.run.max_bad_steps)[0]

    update = jax.jit(apply, donate_argnums=0, out_shardings=job.placed)
    gradients = jax.tree.map(jnp.ones_like, trained(state.params, job.rates))

    def step() -> Any:
        nonlocal state
        state = update(state, gradients)
        return state

    return seconds(step, repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--config", metavar="FILE:SIZE")
    job.add_argument("--reference", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--fill", type=float, nargs="+", metavar="SHARE", help="shares of the row that are patch slots")
    parser.add_argument("--no-parts", action="store_true", help="whole steps only")
    parser.add_argument("--json", metavar="FILE")
    options, overrides = parser.parse_known_args()
    cfg = reference_job() if options.reference else load_config(options.config, overrides)
    if not isinstance(cfg, LMTrainConfig) or cfg.lora.rank or (options.reference and overrides):
        parser.error("expected a language-model job without LoRA; --reference takes no settings")
    chip = chip_of(jax.devices()[0].device_kind)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {cfg.compute.dtype}")
    results = []
    for fill in options.fill or [cfg.data.row_patches / cfg.data.row_length]:
        data = dataclasses.replace(cfg.data, row_patches=round(fill * cfg.data.row_length))
        one = dataclasses.replace(cfg, data=data)
        found = time_steps(one, options.steps, options.warm_up)
        if not options.no_parts:
            found |= time_parts(one, max(3, options.steps // 4))
        found["row_patches"] = data.row_patches
        found["mfu"] = found["model_flops_per_second"] / (chip.peak_flops * jax.device_count()) if chip else 0.0
        results.append(found)
        print(f"\n{data.rows} rows x {data.row_length} positions, {data.row_patches} patch slots")
        print(f"  step              {found['step_seconds']:9.4f} s   {found['positions_per_second']:,.0f} positions/s")
        print(
            f"  model FLOPs       {found['model_flops_per_second'] / 1e12:9.3f} TFLOP/s, "
            f"{found['of_matmul']:.1%} of a large matrix product ({found['matmul_flops_per_second'] / 1e12:.3f})"
            + (f", MFU {found['mfu']:.1%}" if chip else "")
        )
        if found["peak_memory_bytes"]:
            print(f"  peak memory       {found['peak_memory_bytes'] / 2**30:9.2f} GiB")
        for name in ("llm", "text_head", "patch_encoder", "patch_decoder", "optimizer"):
            if f"{name}_seconds" in found:
                print(f"  {name:<18}{found[f'{name}_seconds']:9.4f} s")
        if options.reference and not options.fill:
            ratio = found["positions_per_second"] / REFERENCE_POSITIONS_PER_SECOND
            print(f"  {ratio:.2f} x the published code's {REFERENCE_POSITIONS_PER_SECOND:.0f} positions/s")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
