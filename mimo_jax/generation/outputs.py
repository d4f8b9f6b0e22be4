"""Outputs as files: speech as wav, words as txt, conversations and the record of a call as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import save_wav
from mimo_jax.config import ConfigError
from mimo_jax.generation.app import GenerationSettings, SpeechModel, SpeechOutput, words
from mimo_jax.generation.generate import Prompt, Timing
from mimo_jax.generation.tasks import TASKS


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError where files of two outputs would have one name."""
    if len({name.removesuffix("-full").removesuffix("-history") for name in names}) != len(names):
        raise ConfigError(f"names: expected {len(names)} different names, -full and -history apart, got {list(names)}")


def write_output(
    folder: str | Path,
    name: str,
    output: SpeechOutput,
    answers: str | None,
    model: SpeechModel,
    settings: GenerationSettings,
) -> dict[str, Any]:
    """Writes an output as NAME.wav (speech), NAME-full.wav (speech with what it goes on after), NAME.txt and, of a
    conversation, NAME-history.json, each whole or not at all.

    Args:
        answers: what it answers (a path, a text), for the record.

    Returns:
        Its item of the record, for `write_record`.
    """
    folder, rate = Path(folder), model.codec.config.mel.sample_rate
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
    if TASKS[output.task].converses:
        save_history(folder / f"{name}-history.json", model, output.history)
        files["history"] = f"{name}-history.json"
    own = output.settings != dataclasses.replace(settings, seed=output.seed)
    return {
        "name": name,
        "task": output.task,
        "input": answers,
        "text": output.text,
        **({"thinking": output.thinking} if output.thinking else {}),
        "seconds": len(output.wav) / rate,
        "patches": -(-len(output.codes_MR) // model.generator.config.group_size),
        "positions": output.positions,
        "stopped": output.stopped,
        "seed": output.seed,
        **({"settings": dataclasses.asdict(output.settings)} if own else {}),
        "files": files,
    }


def write_record(
    folder: str | Path,
    task: str,
    model: SpeechModel,
    items: Sequence[Mapping[str, Any]],
    timing: Timing,
    settings: GenerationSettings,
) -> Path:
    """Writes TASK.json: settings, timings and what `write_output` has returned so far; returns its path."""
    record = {
        "task": task,
        "model": dict(model.description),
        "prompts": model.prompts,
        "settings": dataclasses.asdict(settings),
        "timing": {
            **dataclasses.asdict(timing),
            "patches_per_second": timing.patches_per_second,
            "real_time_factor": timing.real_time_factor,
        },
        "items": items,
    }
    path = Path(folder) / f"{task}.json"
    atomic_write(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def save_history(path: Path, model: SpeechModel, history: Sequence[Prompt]) -> None:
    """Writes the turns of a conversation: text ids with `<|empty|>` for patches, codes [M, R], and words to read."""
    turns = [
        {
            "words": words(model.tokenizer, turn.text),
            "ids": turn.text.tolist(),
            "codes": turn.patches.reshape(-1, turn.patches.shape[-1]).tolist(),
        }
        for turn in history
    ]
    value = {"tokenizers": [model.tokenizer.fingerprint, model.codec.fingerprint], "turns": turns}
    atomic_write(path, (json.dumps(value, ensure_ascii=False) + "\n").encode())


def load_history(path: str | Path, model: SpeechModel) -> tuple[Prompt, ...]:
    """Reads what `save_history` wrote.

    Raises:
        ConfigError: the file is no history, or of a model with other tokenizers.
        OSError: the file cannot be read.
    """
    c = model.generator.config
    try:
        value = json.loads(Path(path).read_bytes())
        turns = tuple(
            Prompt(
                np.asarray(turn["ids"], np.int32),
                np.asarray(turn["codes"], np.int32).reshape(-1, c.group_size, c.num_channels),
            )
            for turn in value["turns"]
        )
        tokenizers = value["tokenizers"]
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ConfigError(f"{path}: expected the history that an earlier call has written ({error})") from None
    expected = [model.tokenizer.fingerprint, model.codec.fingerprint]
    if tokenizers != expected:
        raise ConfigError(f"{path}: expected a history made with the tokenizers {expected}, got {tokenizers}")
    return turns
