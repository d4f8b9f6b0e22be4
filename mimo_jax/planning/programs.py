"""Plans of generation and of tokenising: the programs that `generation.generate` and `models.tokenizer.codec` run.

Both run on one device, whatever the topology has. For a TPU their programs are compiled for it; for GPUs, and without a
compiler, memory is arithmetic. Times are rooflines of matrix products and memory, which take turns.

B requests, P prompt positions, N new positions, S = P + N slots of the cache, V vocabulary, M RVQ frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from mimo_jax.chips import Topology
from mimo_jax.config import AudioLMConfig, AudioTokenizerConfig, ComputeConfig, ConfigError
from mimo_jax.generation.generate import Generator, Prompt, Request
from mimo_jax.kernels.dispatch import default_implementation
from mimo_jax.models.audio_lm import abstract_params
from mimo_jax.models.tokenizer import audio_tokenizer
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.planning import memory
from mimo_jax.planning.compiled import Compiled, Compiler, DoesNotFitError, tpu_devices
from mimo_jax.sharding import unboxed
from mimo_jax.training.language_model import CODES_PER_SECOND

_GIB = 2**30
_MOST_POSITIONS = 2**22  # the prompts of a plan are made, on this machine
_LONGEST_CLIP = 24 * 3600  # seconds


@dataclass(frozen=True)
class ProgramPlan:
    """A plan of what runs on one device.

    Attributes:
        program: `generate` or `tokenize`.
        topology: as asked for.
        sizes: what it runs on: requests, prompt, new positions; clips, RVQ frames.
        peak_hbm_bytes: the compiler's figure, or the sum of the parts below.
        hbm_limit_bytes: what a program can use.
        hbm_by_category: bytes by name; they add up to the peak.
        model_flops: of each part of the work.
        seconds: compute and memory of each part of the work.
        rates: figures that follow, by name.
        compile_seconds: None if nothing was compiled.
        cached: whether it was compiled earlier.
    """

    program: str
    topology: str
    sizes: Mapping[str, int]
    peak_hbm_bytes: int
    hbm_limit_bytes: int
    hbm_by_category: Mapping[str, int]
    model_flops: Mapping[str, float]
    seconds: Mapping[str, Mapping[str, float]]
    rates: Mapping[str, float]
    compile_seconds: float | None = None
    cached: bool = False

    @property
    def fits(self) -> bool:
        return self.peak_hbm_bytes <= self.hbm_limit_bytes

    @property
    def headroom(self) -> float:
        """Share of the memory that stays free."""
        return 1 - self.peak_hbm_bytes / self.hbm_limit_bytes

    def to_json(self) -> dict[str, Any]:
        bounds = {part: max(times, key=times.__getitem__) for part, times in self.seconds.items()}
        derived = {"devices": 1, "fits": self.fits, "headroom": self.headroom, "bound": bounds}
        return dataclasses.asdict(self) | derived

    def __str__(self) -> str:
        how = "compiled" if self.compile_seconds is not None else "by arithmetic"
        sizes = ", ".join(f"{size:,} {name}" for name, size in self.sizes.items())
        lines = [f"{self.program} on one device of {self.topology} (it uses no more): {sizes}"]
        lines += ["", f"memory of the device ({how})"]
        parts = {**self.hbm_by_category, "in all": self.peak_hbm_bytes, "of": self.hbm_limit_bytes}
        lines += [f"  {name:<14}{size / _GIB:10.2f} GiB" for name, size in parts.items()]
        lines += [f"  fits, {100 * self.headroom:.0f} % stay free" if self.fits else "  does not fit"]
        lines += ["", "time (roofline)"]
        for part, times in self.seconds.items():
            terms = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in times.items())
            lines.append(
                f"  {part:<20}{1e3 * sum(times.values()):10.2f} ms ({terms}), {self.model_flops[part]:.4g} FLOPs"
            )
        lines += ["", *(f"{name.replace('_', ' ')}: {value:,.4g}" for name, value in self.rates.items())]
        if self.compile_seconds is not None:
            lines.append(f"compiled in {self.compile_seconds:.0f} s" + " (cached)" * self.cached)
        return "\n".join(lines)


def plan_generation(
    model: AudioLMConfig,
    compute: ComputeConfig,
    topology: Topology,
    compiler: Compiler | None = None,
    batch: int = 1,
    length: int = 2048,
) -> ProgramPlan:
    """The plan of generating speech: a prompt of patches of half the length, and as many new patches.

    Args:
        model: the language model.
        compute: precision that it was trained with.
        topology: of which one device is used.
        compiler: what compiles for TPUs; arithmetic only without one.
        batch: requests.
        length: positions of prompt and answer.

    Raises:
        ConfigError: sizes are impossible, or it does not fit the device.
    """
    if batch < 1 or length < 2 or batch * length > _MOST_POSITIONS:
        raise ConfigError(
            f"--batch={batch}, --length={length}: expected a request and two positions at least, and {_MOST_POSITIONS} "
            "positions at most"
        )
    generator = Generator(model, {}, compute, max_positions=2 * length, platform="tpu" if topology.is_tpu else "gpu")
    half = length // 2
    codes = np.zeros((half, model.group_size, model.num_channels), np.int32)
    prompt = Prompt(np.full(half, model.empty_id, np.int32), codes)
    requests = [Request(prompt, length - half, stop_ids=())] * batch
    bucket = generator.bucket_of(requests)
    B, P, N = bucket.requests, bucket.prompt, bucket.new
    params = jax.eval_shape(generator.prepared, unboxed(abstract_params(model, compute)["params"]))
    rows = _shapes(generator.arrays(requests, bucket))
    width = jnp.dtype(compute.dtype).itemsize
    llm = model.llm
    cache = 2 * llm.num_layers * B * (P + N) * llm.num_kv_heads * llm.head_dim * width
    fixed = {"parameters": _bytes(params), "cache": cache, "batch": _bytes(rows)}
    if compiler is not None and topology.is_tpu:
        here = SingleDeviceSharding(tpu_devices(topology)[0])
        with default_implementation("mosaic"):
            programs = generator.lowered(_shapes(params, here), _shapes(rows, here), N, platforms=("tpu",))
        answers = _compile(programs, topology, compiler, fixed)
        peak = max(answer.peak_bytes for answer in answers)
    else:
        answers = []
        layer = memory.block_bytes(llm, compute, 1)["all"] + 3 * memory.score_bytes(llm, P + N, 1, width)
        peak = int(sum(fixed.values()) + max(B * P * layer, 3 * B * model.vocab_size * 4))

    # A step reads all parameters and slots; the patch decoder reads its own once for each of its steps.
    patch_params = model.num_params() - model.num_llm_params()
    embedding = model.vocab_size * llm.d_model
    text = model.flops_per_position(P + N, 0.0)
    flops = {
        "prefill": B * P * (model.flops_per_position(P, 1.0, generate=False) - 2.0 * embedding),
        "position of text": B * text,
        "position of speech": B * model.flops_per_position(P + N, 1.0),
    }
    traffic = {
        "prefill": width * (model.num_llm_params() - embedding) + cache * P / (P + N),
        "position of text": width * (model.num_llm_params() - embedding) + cache,
    }
    patch_reads = width * patch_params * model.num_steps
    traffic["position of speech"] = traffic["position of text"] + patch_reads
    activations = B * P * llm.num_layers * memory.block_bytes(llm, compute, 1)["all"] * 2
    traffic["prefill"] += activations
    seconds = _times(topology, flops, traffic)
    text_step, speech_step = (sum(seconds[f"position of {kind}"].values()) for kind in ("text", "speech"))
    spoken = model.group_size / CODES_PER_SECOND  # seconds of a patch
    rates = {
        "tokens_per_second": B / text_step,
        "patches_per_second": B / speech_step,
        "real_time_factor": (sum(seconds["prefill"].values()) / N + speech_step) / (B * spoken),
    }
    sizes = {"requests": B, "prompt positions": P, "new positions": N}
    return _plan("generate", topology, sizes, fixed, peak, flops, seconds, rates, answers)


def plan_tokenizing(
    model: AudioTokenizerConfig,
    compute: ComputeConfig,
    topology: Topology,
    compiler: Compiler | None = None,
    seconds_of_clip: float = 30.0,
) -> ProgramPlan:
    """The plan of encoding clips, one after the other as ingest does.

    Args:
        model: the audio tokenizer.
        compute: precision that it was trained with.
        topology: of which one device is used.
        compiler: what compiles for TPUs; arithmetic only without one.
        seconds_of_clip: length of the clips; longer ones are cut into segments of 60 s.

    Raises:
        ConfigError: sizes are impossible, or it does not fit the device.
    """
    if not 0 < seconds_of_clip <= _LONGEST_CLIP:
        raise ConfigError(f"--length={seconds_of_clip}: expected a positive number of seconds, {_LONGEST_CLIP} at most")
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(lambda key: audio_tokenizer.init_variables(model, compute, key), key)
    variables = unboxed(boxed)
    samples = max(model.mel.n_fft, round(seconds_of_clip * model.mel.sample_rate))

    def codec(compute: ComputeConfig) -> Codec:
        return Codec(model, {}, {}, compute)

    rows = codec(compute).row_shapes(samples)
    codes = rows[1].shape[1] // model.mel_frames_per_code
    fixed = {"parameters": _bytes(variables), "batch": _bytes(rows)}
    answers: list[Compiled] = []
    if compiler is not None and topology.is_tpu:
        here = SingleDeviceSharding(tpu_devices(topology)[0])
        arguments = (_shapes(variables, here), *_shapes(rows, here))
        with default_implementation("mosaic"):
            try:  # `auto` asks the devices that are here
                traced = codec(dataclasses.replace(compute, attention="splash")).program(*arguments)
            except ValueError:  # rows that are no multiple of the kernel's block
                traced = codec(compute).program(*arguments)
        answers = _compile([traced.lower(lowering_platforms=("tpu",))], topology, compiler, fixed)
        # The program does not see the decoder, which lies there all the same.
        peak = fixed["parameters"] + answers[0].peak_bytes - (answers[0].argument_bytes - fixed["batch"])
    else:
        stack, mel = model.encoder, model.mel_frames_per_code
        positions = codes * model.pool
        width = jnp.dtype(compute.dtype).itemsize
        layer = 2 * memory.block_bytes(stack, compute, 1)["all"]
        layer += 3 * memory.score_bytes(stack, positions, 1, width)
        spectra = codes * mel * (2 * model.mel.n_fft + 6 * stack.d_model) * 4
        peak = int(sum(fixed.values()) + max(positions * layer, spectra))
    flops = {"clip": codes * model.flops_per_code(codes, decode=False)}
    encoder = _bytes(variables["params"]["encoder"])
    block = memory.block_bytes(model.encoder, compute, 1)["all"]
    traffic = {"clip": encoder + 2 * model.encoder.num_layers * codes * model.pool * block}
    times = _times(topology, flops, traffic)
    heard = min(seconds_of_clip, codes / model.frame_rate) / sum(times["clip"].values())
    rates = {"real_time_factor": 1 / heard, "audio_hours_per_chip_hour": heard * topology.chip.devices}
    sizes = {"clips": 1, "RVQ frames": codes}
    return _plan("tokenize", topology, sizes, fixed, peak, flops, times, rates, answers)


def _plan(
    program: str,
    topology: Topology,
    sizes: Mapping[str, int],
    fixed: Mapping[str, int],
    peak: int,
    flops: Mapping[str, float],
    seconds: Mapping[str, Mapping[str, float]],
    rates: Mapping[str, float],
    answers: list[Compiled],
) -> ProgramPlan:
    name = topology.name
    categories = {**fixed, "temporaries": peak - sum(fixed.values())}
    took = sum(answer.seconds for answer in answers) if answers else None
    cached = bool(answers) and all(answer.cached for answer in answers)
    limit = topology.chip.hbm_bytes
    return ProgramPlan(program, name, sizes, peak, limit, categories, flops, seconds, rates, took, cached)


def _compile(programs: Any, topology: Topology, compiler: Compiler, fixed: Mapping[str, int]) -> list[Compiled]:
    try:
        return [compiler(program, topology) for program in programs]
    except DoesNotFitError as error:
        given = ", ".join(f"{name} {size / _GIB:.1f} GiB" for name, size in fixed.items())
        raise DoesNotFitError(f"{error} Lower --batch or --length ({given})") from None


def _times(topology: Topology, flops: Mapping[str, float], traffic: Mapping[str, float]) -> dict[str, dict[str, float]]:
    chip = topology.chip
    rate = chip.peak_flops * chip.attainable
    return {part: {"compute": flops[part] / rate, "memory": traffic[part] / chip.hbm_rate} for part in flops}


def _shapes(tree: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
