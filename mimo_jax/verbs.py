"""What each verb of the command line does: from parsed options to the functions of the package.

Modules are imported by the verb that needs them, so that the command line answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_jax.config import (
    AdversarialTrainConfig,
    ConfigError,
    JobConfig,
    LMTrainConfig,
    TokenizerTrainConfig,
)
from mimo_jax.config_files import load_config

if TYPE_CHECKING:
    from mimo_jax.generation.app import AppTiming, GenerationSettings, SpeechModel, SpeechOutput


def run_train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.distributed or options.coordinator:
        import jax

        given = (options.coordinator, options.processes, options.process)
        if options.coordinator and None in given:
            raise ConfigError("--coordinator: expected --processes and --process beside it")
        jax.distributed.initialize(*given)
    if isinstance(config, LMTrainConfig):
        from mimo_jax.training.language_model import train_language_model

        train_language_model(config, options.workdir)
    elif isinstance(config, TokenizerTrainConfig):
        from mimo_jax.training.tokenizer import train_tokenizer

        train_tokenizer(config, options.workdir)
    else:
        raise ConfigError(
            f"--config={options.config}: this describes the adversarial stage of the audio tokenizer, "
            "which this version does not train"
        )


def run_config_show(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    figures = derived_figures(config)
    if options.json:
        print(json.dumps({"config": dataclasses.asdict(config), "derived": figures}, indent=2))
        return
    for key, value in flat_settings(dataclasses.asdict(config), "config"):
        print(f"{key} = {value}")
    print()
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value:,.6g}")


def flat_settings(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted key, value), in order."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def derived_figures(config: JobConfig) -> dict[str, int | float]:
    """What follows from a job's settings: parameters, positions, FLOPs (a training step counts 3 forward passes)."""
    steps = config.run.steps
    if isinstance(config, LMTrainConfig):
        lm, rows = config.model, config.data
        positions = rows.rows * rows.row_length
        patches = rows.row_patches / rows.row_length
        flops = lm.flops_per_position(rows.row_length, patches, generate=config.loss.trains_audio)
        return {
            "parameters": lm.num_params(),
            "parameters, LLM": lm.num_llm_params(),
            "parameters, patch encoder": lm.patch_encoder.num_params(),
            "parameters, patch decoder": lm.patch_decoder.num_params(),
            "positions per step": positions,
            "positions in all": positions * steps,
            "patches per step, at most": rows.rows * rows.row_patches,
            "FLOPs per position, forward": flops,
            "FLOPs per step": 3 * flops * positions,
            "FLOPs in all": 3 * flops * positions * steps,
        }
    assert isinstance(config, TokenizerTrainConfig | AdversarialTrainConfig)
    tokenizer, audio = config.model, config.data
    codes = audio.rows * audio.row_codes
    flops = tokenizer.flops_per_code(min(audio.row_codes, audio.max_seconds * tokenizer.frame_rate))
    figures: dict[str, int | float] = {"parameters": tokenizer.num_params()}
    if isinstance(config, TokenizerTrainConfig):
        figures["parameters, A2T text decoder"] = config.a2t.num_params(tokenizer.encoder.d_model)
    channels = 8  # of the RVQ levels, the language model reads these
    return {
        **figures,
        "RVQ frames per second": tokenizer.frame_rate,
        f"bit/s, first {channels} levels": tokenizer.bitrate(channels),
        "bit/s, all levels": tokenizer.bitrate(),
        "hours of audio per step, at most": codes / tokenizer.frame_rate / 3600,
        "hours of audio in all, at most": codes * steps / tokenizer.frame_rate / 3600,
        "FLOPs per RVQ frame, forward": flops,
        "FLOPs per step, without A2T": 3 * flops * codes,
        "FLOPs in all, without A2T": 3 * flops * codes * steps,
    }


def run_data_ingest(options: argparse.Namespace) -> None:
    from mimo_jax.data.ingest import ingest_audio
    from mimo_jax.loading import load_codec
    from mimo_jax.text.tokenizers import load_text_tokenizer

    text_tokenizer = load_text_tokenizer(options.text_tokenizer) if options.text_tokenizer else None
    done = ingest_audio(
        options.manifest,
        load_codec(options.audio_tokenizer, options.step),
        options.out,
        text_tokenizer=text_tokenizer,
        records_per_shard=options.records_per_shard,
        max_skipped=options.max_skipped,
        worker=options.worker,
        threads=options.threads,
    )
    _say_ingested(done, options.out)


def run_data_ingest_text(options: argparse.Namespace) -> None:
    from mimo_jax.data.ingest import ingest_text
    from mimo_jax.text.tokenizers import load_text_tokenizer

    done = ingest_text(
        options.files,
        options.out,
        split=options.split,
        language=options.language,
        text_tokenizer=load_text_tokenizer(options.text_tokenizer) if options.text_tokenizer else None,
        records_per_shard=options.records_per_shard,
        max_skipped=options.max_skipped,
        worker=options.worker,
    )
    _say_ingested(done, options.out)


def _say_ingested(done: Any, out: str) -> None:
    if done is None:
        print(f"{out}: this worker's shards are made; others are still to come")
    else:
        print(f"{out}: {len(done):,} records")


def run_data_index(options: argparse.Namespace) -> None:
    from mimo_jax.data.shards import index_path, index_shards
    from mimo_jax.text.tokenizers import load_text_tokenizer

    tokenizer = load_text_tokenizer(options.text_tokenizer)
    for folder in options.shards:
        index = index_shards(folder, tokenizer, progress=True)
        print(f"{index_path(folder, tokenizer)}: {len(index.text):,} records, {int(index.text.sum()):,} text tokens")


def run_data_show(options: argparse.Namespace) -> None:
    from mimo_jax.data.show import show_rows

    config = load_config(options.config, options.overrides)
    if not isinstance(config, LMTrainConfig):
        raise ConfigError(f"--config={options.config}: expected a language model job, got job {config.job}")
    print(show_rows(config, options.split, options.rows, options.layout))


def run_text_tokenizer_train(options: argparse.Namespace) -> None:
    from mimo_jax.text.tokenizers import train_sentencepiece

    tokenizer = train_sentencepiece(
        corpus_lines(options.files),
        options.out,
        options.vocab_size,
        character_coverage=options.character_coverage,
        seed=options.seed,
    )
    print(f"{options.out}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint}")


def corpus_lines(files: Sequence[str]) -> Iterator[str]:
    """Lines of text files, and the `text` of JSONL files (manifests among them)."""
    for path in files:
        for number, line in enumerate(_lines(path), 1):
            if not path.endswith(".jsonl"):
                yield line
                continue
            try:
                text = json.loads(line).get("text", "")
            except (json.JSONDecodeError, AttributeError):
                raise ConfigError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}") from None
            if text:
                yield str(text)


def _lines(path: str) -> Iterator[str]:
    """Lines of a UTF-8 file, without their ends."""
    with open(path, encoding="utf-8") as file:
        try:
            for line in file:
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start})") from None


def run_generate_continue(options: argparse.Namespace) -> None:
    from mimo_jax.generation.app import generate_speech_continuation

    _generate_from_audio(options, "continue", generate_speech_continuation, speaks=True)


def run_generate_asr(options: argparse.Namespace) -> None:
    from mimo_jax.generation.app import transcribe

    _generate_from_audio(options, "asr", transcribe, speaks=False)


def run_generate_tts(options: argparse.Namespace) -> None:
    from mimo_jax.generation.app import generate_tts

    texts = list(options.text or [])
    for path in options.text_file or []:
        texts += [line.strip() for line in _lines(path) if line.strip()]
    if not texts:
        raise ConfigError("generate tts: expected --text or --text-file with something to say")
    settings = _settings(options)
    model = _speech_model(options, speaks=True)
    outputs, timing = generate_tts(model, texts, settings)
    _write(options, "tts", model, outputs, timing, settings, [f"tts-{i}" for i in range(len(texts))], texts)


def _generate_from_audio(options: argparse.Namespace, task: str, generate: Callable[..., Any], speaks: bool) -> None:
    from mimo_jax.audio.files import load_audio

    settings = _settings(options)
    prompt_seconds = getattr(options, "prompt_seconds", None)
    if prompt_seconds is not None and not 0 < prompt_seconds < math.inf:
        raise ConfigError(f"--prompt-seconds: expected a positive number, got {prompt_seconds}")
    model = _speech_model(options, speaks)
    rate = model.codec.config.mel.sample_rate
    wavs = [load_audio(path, rate) for path in options.input]
    if prompt_seconds is not None:
        wavs = [wav[: max(1, round(prompt_seconds * rate))] for wav in wavs]
    patch = model.generator.config.group_size
    for path, wav in zip(options.input, wavs, strict=True):
        if task == "continue" and model.codec.num_codes(len(wav)) < patch:
            raise ConfigError(
                f"{path}: expected at least one patch ({1 / model.patches_per_second:.2f} s) to continue, "
                f"got {len(wav) / rate:.2f} s"
            )
    outputs, timing = generate(model, wavs, settings)
    names = [f"{Path(path).stem}-{task}" for path in options.input]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names)]
    _write(options, task, model, outputs, timing, settings, names, options.input)


def _settings(options: argparse.Namespace) -> GenerationSettings:
    from mimo_jax.generation.app import GenerationSettings
    from mimo_jax.generation.sampling import PATCHES, SamplingConfig

    text = None
    if any(getattr(options, f"text_{name}") is not None for name in ("temperature", "top_k", "top_p")):
        temperature = 1.0 if options.text_temperature is None else options.text_temperature
        text = SamplingConfig(temperature, options.text_top_k or 0, options.text_top_p or 0.0)
    patches = {
        name: getattr(options, name)
        for name in ("temperature", "top_k", "top_p")
        if getattr(options, name, None) is not None
    }
    lengths = {
        name: getattr(options, name) for name in ("max_seconds", "min_seconds", "max_text") if hasattr(options, name)
    }
    return GenerationSettings(
        **lengths,
        text_sampling=text,
        patch_sampling=dataclasses.replace(PATCHES, **patches),
        constrain=not options.free,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _speech_model(options: argparse.Namespace, speaks: bool) -> SpeechModel:
    from mimo_jax.loading import load_speech_model

    Path(options.out).mkdir(parents=True, exist_ok=True)  # before the work is done that goes there
    return load_speech_model(
        options.checkpoint, options.audio_tokenizer, options.text_tokenizer, step=options.step, speaks=speaks
    )


def _write(
    options: argparse.Namespace,
    task: str,
    model: SpeechModel,
    outputs: list[SpeechOutput],
    timing: AppTiming,
    settings: GenerationSettings,
    names: list[str],
    inputs: list[str],
) -> None:
    from mimo_jax.generation.app import write_outputs

    path = write_outputs(options.out, task, model, outputs, timing, settings, names, inputs)
    rate = model.codec.config.mel.sample_rate
    for name, output in zip(names, outputs, strict=True):
        ended = "ended by the model" if output.stopped else "cut at the limit"
        print(f"{name}: {len(output.wav) / rate:.2f} s of speech, {ended}{f': {output.text}' if output.text else ''}")
    speed = f"{timing.positions} positions in {timing.decode_seconds:.2f} s"
    if timing.real_time_factor is not None:
        speed += f", {timing.patches_per_second:.1f} patches/s, real-time factor {timing.real_time_factor:.2f}"
    print(f"{speed}; compiled in {timing.compile_seconds:.1f} s")
    print(path)


def run_quickstart(options: argparse.Namespace) -> None:
    from mimo_jax.quickstart import run_quickstart as run

    print(run(options.out, options.audio or ()))


def run_prepare_debian(options: argparse.Namespace) -> None:
    from mimo_jax.corpora.debian import ASTERISK_LANGUAGES, prepare_debian

    summary = prepare_debian(
        options.out,
        root=options.root,
        languages=options.language or ASTERISK_LANGUAGES,
        festvox=not options.no_festvox,
        min_characters=options.min_characters,
        progress=lambda line: print(line, file=sys.stderr),
    )
    for line in summary.skipped:
        print(f"left out: {line}", file=sys.stderr)
    for path, clips, seconds in zip((summary.train, summary.validation), summary.clips, summary.seconds, strict=True):
        print(f"{path}: {clips:,} clips, {seconds / 60:.1f} minutes")
