"""Speech continuation, text to speech and transcription with a trained model: waves and texts in, waves and texts out.

    model = SpeechModel(Generator(config, params), codec, tokenizer)
    outputs, timing = generate_tts(model, ["hello"], GenerationSettings(seed=1))
    write_outputs("out", "tts", model, outputs, timing, settings)

Waves are float32, mono, at the audio tokenizer's rate (24 kHz). Every input has a seed of its own (`seed` + its index),
so its answer does not depend on how inputs are batched.

M RVQ frames, R channels, S samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.config import ConfigError
from mimo_jax.generation.generate import Generated, Generator, Request
from mimo_jax.generation.prompts import TaskPrompt, asr_prompt, continuation_prompt, tts_prompt
from mimo_jax.generation.sampling import DEFAULT_TEXT, GREEDY, PATCHES, TTS_TEXT, SamplingConfig
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.text.tokenizers import TextTokenizer


@dataclass(frozen=True)
class SpeechModel:
    """A language model with the two tokenizers it was trained with.

    Attributes:
        generator: the language model.
        codec: the audio tokenizer.
        tokenizer: the text tokenizer.
        description: where they come from, for the record that `write_outputs` makes.

    Raises:
        ConfigError: the three do not fit together.
    """

    generator: Generator
    codec: Codec
    tokenizer: TextTokenizer
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lm, levels = self.generator.config, self.codec.config.rvq.codebook_sizes
        if levels[: lm.num_channels] != lm.codebook_sizes:
            raise ConfigError(
                f"audio tokenizer: expected codebooks {lm.codebook_sizes}, as the model reads, got {levels}"
            )
        if self.tokenizer.special["<|empty|>"] != lm.empty_id or self.tokenizer.vocab_size > lm.vocab_size:
            raise ConfigError(
                f"text tokenizer {self.tokenizer.name}: expected <|empty|> at id {lm.empty_id} and at most "
                f"{lm.vocab_size} ids, got {self.tokenizer.special['<|empty|>']} and {self.tokenizer.vocab_size}"
            )

    @property
    def patches_per_second(self) -> float:
        """6.25 at the published sizes."""
        return self.codec.config.frame_rate / self.generator.config.group_size


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Attributes:
        max_seconds: speech to generate at most (continuation, TTS).
        min_seconds: speech that a continuation has at least.
        max_text: text tokens of a transcript at most.
        text_sampling: sampler of the text head; by default the published one of the task (ASR is greedy).
        patch_sampling: sampler of the patch decoder.
        constrain: draw only ids that the layout has a place for (a continuation holds no words).
        seed: of the first input; the next ones follow.
        batch_size: inputs that run together.
    """

    max_seconds: float = 20.0
    min_seconds: float = 0.0
    max_text: int = 256
    text_sampling: SamplingConfig | None = None
    patch_sampling: SamplingConfig = PATCHES
    constrain: bool = True
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds < math.inf:
            raise ConfigError(f"max_seconds: expected a positive number, got {self.max_seconds!r}")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ConfigError(f"min_seconds: expected 0..max_seconds ({self.max_seconds}), got {self.min_seconds!r}")
        for name in ("max_text", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a positive integer, got {getattr(self, name)!r}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed: expected an integer in 0..2^32-1, got {self.seed!r}")


@dataclass(frozen=True)
class SpeechOutput:
    """The answer to one input.

    Attributes:
        text: generated text (empty for a continuation).
        codes_MR: uint16, generated frames.
        wav: float32 [S], generated speech; for a continuation, cut out of the decoding of prompt and answer together.
        full_wav: float32 [S], a continuation with its prompt; equal to `wav` otherwise.
        positions: generated positions.
        stopped: whether the model ended the answer itself, before its limit.
        seed: all draws follow from it.
    """

    text: str
    codes_MR: np.ndarray
    wav: np.ndarray
    full_wav: np.ndarray
    positions: int
    stopped: bool
    seed: int


@dataclass(frozen=True)
class AppTiming:
    """Wall seconds of one call, over all batches.

    Attributes:
        encode_seconds: audio tokenizer, waves to codes.
        compile_seconds: compilation of the language model's programs.
        prefill_seconds: prompts through the language model.
        decode_seconds: new positions.
        vocode_seconds: audio tokenizer, codes to waves.
        positions: new positions.
        patches: new patches.
        audio_seconds: speech generated.
    """

    encode_seconds: float
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    vocode_seconds: float
    positions: int
    patches: int
    audio_seconds: float

    @property
    def patches_per_second(self) -> float:
        return self.patches / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work per second of speech, without compilation; None without speech."""
        work = self.encode_seconds + self.prefill_seconds + self.decode_seconds + self.vocode_seconds
        return work / self.audio_seconds if self.audio_seconds else None


def generate_speech_continuation(
    model: SpeechModel, prompts: Sequence[np.ndarray], settings: GenerationSettings = GenerationSettings()
) -> tuple[list[SpeechOutput], AppTiming]:
    """Lets the model go on speaking.

    Args:
        model: from a joint (stage 2) checkpoint.
        prompts: float waves [S], at least one patch (0.16 s) each.
        settings: `max_seconds`, `min_seconds` and what all tasks share.

    Returns:
        One output per prompt, in order, and the time it took.

    Raises:
        ConfigError: a prompt is too short.
    """
    rate = model.patches_per_second
    limits = math.ceil(settings.max_seconds * rate), math.ceil(settings.min_seconds * rate)
    started = time.perf_counter()
    codes = model.codec.encode(prompts, num_levels=model.generator.config.num_channels)
    encode_seconds = time.perf_counter() - started
    tasks = [continuation_prompt(model.tokenizer, model.generator.config, c) for c in codes]
    return _run(model, tasks, settings, DEFAULT_TEXT, lambda task: limits, encode_seconds, join_prompt=True)


def generate_tts(
    model: SpeechModel, texts: Sequence[str], settings: GenerationSettings = GenerationSettings()
) -> tuple[list[SpeechOutput], AppTiming]:
    """Speaks texts.

    Args:
        model: from a joint (stage 2) checkpoint.
        texts: what to say.
        settings: `max_seconds` and what all tasks share.

    Returns:
        One output per text, in order, and the time it took.

    Raises:
        ConfigError: a text is empty.
    """
    patches = math.ceil(settings.max_seconds * model.patches_per_second)
    tasks = [tts_prompt(model.tokenizer, model.generator.config, text) for text in texts]

    def limits(task: TaskPrompt) -> tuple[int, int]:
        return patches + len(task.prompt.text), 0  # the stream says the text too

    return _run(model, tasks, settings, TTS_TEXT, limits, 0.0)


def transcribe(
    model: SpeechModel, wavs: Sequence[np.ndarray], settings: GenerationSettings = GenerationSettings()
) -> tuple[list[SpeechOutput], AppTiming]:
    """Writes down what is said.

    Args:
        model: from an understanding (stage 1) or joint (stage 2) checkpoint.
        wavs: float waves [S].
        settings: `max_text` and what all tasks share.

    Returns:
        One output per wave, in order, and the time it took.

    Raises:
        ConfigError: a wave is empty.
    """
    started = time.perf_counter()
    codes = model.codec.encode(wavs, num_levels=model.generator.config.num_channels)
    encode_seconds = time.perf_counter() - started
    tasks = [asr_prompt(model.tokenizer, model.generator.config, c) for c in codes]
    return _run(model, tasks, settings, GREEDY, lambda task: (settings.max_text, 0), encode_seconds)


def _run(
    model: SpeechModel,
    tasks: Sequence[TaskPrompt],
    settings: GenerationSettings,
    text_sampling: SamplingConfig,
    limits: Callable[[TaskPrompt], tuple[int, int]],
    encode_seconds: float,
    join_prompt: bool = False,
) -> tuple[list[SpeechOutput], AppTiming]:
    """Generates in batches and decodes the speech. `limits` gives the most and the fewest new positions of a task."""
    requests = []
    for number, task in enumerate(tasks):
        max_new, min_new = limits(task)
        requests.append(
            Request(
                prompt=task.prompt,
                max_new=max_new,
                min_new=min_new,
                stop_ids=task.stop_ids,
                allowed_ids=task.allowed_ids if settings.constrain else None,
                text_sampling=settings.text_sampling or text_sampling,
                patch_sampling=settings.patch_sampling,
                seed=(settings.seed + number) % 2**32,
            )
        )
    generated: list[Generated] = []
    timings = []
    for first in range(0, len(requests), settings.batch_size):
        results, timing = model.generator.generate(requests[first : first + settings.batch_size])
        generated += results
        timings.append(timing)
    started = time.perf_counter()
    outputs = [
        _output(model, settings, request, result, join_prompt)
        for request, result in zip(requests, generated, strict=True)
    ]
    samples = sum(len(o.wav) for o in outputs)
    return outputs, AppTiming(
        encode_seconds=encode_seconds,
        compile_seconds=sum(t.compile_seconds for t in timings),
        prefill_seconds=sum(t.prefill_seconds for t in timings),
        decode_seconds=sum(t.decode_seconds for t in timings),
        vocode_seconds=time.perf_counter() - started,
        positions=sum(t.positions for t in timings),
        patches=sum(t.patches for t in timings),
        audio_seconds=samples / model.codec.config.mel.sample_rate,
    )


def _output(
    model: SpeechModel, settings: GenerationSettings, request: Request, result: Generated, join_prompt: bool
) -> SpeechOutput:
    codes_MR = result.codes[: math.ceil(settings.max_seconds * model.codec.config.frame_rate)]
    before_MR = request.prompt.patches.reshape(-1, codes_MR.shape[1]) if join_prompt else codes_MR[:0]
    full_wav = model.codec.decode(np.concatenate([before_MR.astype(np.uint16), codes_MR]))
    special = set(model.tokenizer.special.values())
    ids = [int(i) for i in result.text if i not in special]
    return SpeechOutput(
        text=model.tokenizer.decode(ids).strip(),
        codes_MR=codes_MR,
        wav=full_wav[len(before_MR) * model.codec.config.samples_per_code :],
        full_wav=full_wav,
        positions=len(result.text),
        stopped=result.stop_id is not None,
        seed=request.seed,
    )


def write_outputs(
    folder: str | Path,
    task: str,
    model: SpeechModel,
    outputs: Sequence[SpeechOutput],
    timing: AppTiming,
    settings: GenerationSettings,
    names: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
) -> Path:
    """Writes each output as NAME.wav (speech), NAME-full.wav (speech with its prompt) and NAME.txt, and a TASK.json.

    The JSON holds settings, seeds, files and timings, and comes last. Files are written whole or not at all.

    Args:
        folder: made if missing.
        task: name of the JSON file.
        model: its `description` goes into the JSON.
        outputs: what to write.
        timing: of the call that made them.
        settings: of that call.
        names: stems of the files; TASK-0, TASK-1, ... by default.
        inputs: what each output answers (a path, a text), for the JSON.

    Returns:
        Path of the JSON file.

    Raises:
        ConfigError: two outputs have one name.
        OSError: a file cannot be written.
    """
    from mimo_jax.audio.files import save_wav

    folder = Path(folder)
    names = [f"{task}-{i}" for i in range(len(outputs))] if names is None else names
    if len(set(names)) != len(outputs):
        raise ConfigError(f"names: expected {len(outputs)} different names, got {list(names)}")
    rate = model.codec.config.mel.sample_rate
    items = []
    for number, (name, output) in enumerate(zip(names, outputs, strict=True)):
        files = {}
        waves = {"wav": (f"{name}.wav", output.wav)}
        if len(output.full_wav) > len(output.wav):
            waves["full_wav"] = (f"{name}-full.wav", output.full_wav)
        for kind, (file, wave) in waves.items():
            if len(wave):
                save_wav(folder / file, wave, rate)
                files[kind] = file
        if output.text:
            atomic_write(folder / f"{name}.txt", f"{output.text}\n".encode())
            files["text"] = f"{name}.txt"
        items.append(
            {
                "name": name,
                "input": None if inputs is None else inputs[number],
                "text": output.text,
                "seconds": len(output.wav) / rate,
                "patches": -(-len(output.codes_MR) // model.generator.config.group_size),
                "positions": output.positions,
                "stopped": output.stopped,
                "seed": output.seed,
                "files": files,
            }
        )
    record = {
        "task": task,
        "model": dict(model.description),
        "settings": dataclasses.asdict(settings),
        "timing": {
            **dataclasses.asdict(timing),
            "patches_per_second": timing.patches_per_second,
            "real_time_factor": timing.real_time_factor,
        },
        "items": items,
    }
    path = folder / f"{task}.json"
    atomic_write(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return path
