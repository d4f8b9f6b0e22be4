"""Requests from the command line and from JSONL files: names of files and settings become `TaskRequest`s.

A line of a file is an object with the fields of `TaskRequest`, recordings and history as names of files, and any of
`SETTINGS`:

    {"task": "tts", "text": "hello", "seed": 3, "temperature": 0.8, "name": "greeting"}
    {"task": "dialogue", "audio": "question.wav", "voice": "anna.wav", "max_seconds": 8}
    {"task": "few-shot", "instruction": "Say it happily.", "audio": "c.wav",
     "examples": [{"input": "a.wav", "output": "b.wav", "text": "what b.wav says"}]}
    {"task": "chat", "turns": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "hello"}], "text": "bye"}
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.audio.files import load_audio
from mimo_jax.config import ConfigError
from mimo_jax.generation.app import GenerationSettings, SpeechModel, TaskRequest
from mimo_jax.generation.outputs import load_history
from mimo_jax.generation.sampling import SamplingConfig

# Settings of a request and their types; the samplers' are spelled out one by one.
SETTINGS: Mapping[str, type] = {
    "max_seconds": float,
    "min_seconds": float,
    "max_text": int,
    "max_new": int,
    "constrain": bool,
    "force_text": bool,
    "seed": int,
    **{f"{head}{name}": kind for head in ("", "text_") for name, kind in
       (("temperature", float), ("top_k", int), ("top_p", float))},
}  # fmt: skip
_FIELDS: Mapping[str, type] = {
    **dict.fromkeys(("task", "name", "audio", "text", "instruction", "voice", "voice_text", "system", "history"), str),
    "template": int,
    "thinking": bool,
    "turns": list,
    "examples": list,
}


def apply_settings(settings: GenerationSettings, values: Mapping[str, Any]) -> GenerationSettings:
    """Settings with some changed.

    Args:
        values: keys of `SETTINGS`; None leaves a setting as it is. Of a text sampler, what is not given is off.

    Raises:
        ConfigError: a value is impossible.
    """
    values = {key: value for key, value in values.items() if value is not None}
    changes = {f.name: values[f.name] for f in dataclasses.fields(settings) if f.name in values}
    names = [f.name for f in dataclasses.fields(SamplingConfig)]
    patch = {name: values[name] for name in names if name in values}
    text = {name: values[f"text_{name}"] for name in names if f"text_{name}" in values}
    if patch:
        changes["patch_sampling"] = dataclasses.replace(settings.patch_sampling, **patch)
    if text:
        changes["text_sampling"] = SamplingConfig(**text)
    return dataclasses.replace(settings, **changes)


def read_requests(path: str | Path, task: str) -> list[dict[str, Any]]:
    """The lines of a JSONL file, checked; names of files are made relative to its folder.

    Args:
        task: of lines that do not say.

    Raises:
        ConfigError: a line is not an object, or has an unknown key or a value of another type.
        OSError: the file cannot be read.
    """
    path, requests = Path(path), []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ConfigError(f"expected a JSON object, got {line[:60]!r}")
            request = {"task": task, **request}
            check_request(request)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
        for key in ("audio", "voice", "history"):
            if key in request:
                request[key] = str(path.parent / request[key])
        for item in [*request.get("turns", ()), *request.get("examples", ())]:
            for key in ("audio", "input", "output"):
                if key in item:
                    item[key] = str(path.parent / item[key])
        requests.append(request)
    if not requests:
        raise ConfigError(f"{path}: expected at least one request")
    return requests


def check_request(request: Mapping[str, Any]) -> None:
    """Checks a request whose recordings and history are still names of files. Raises ConfigError: it cannot be one."""
    for key, value in request.items():
        kind = _FIELDS.get(key) or SETTINGS.get(key)
        if kind is None:
            raise ConfigError(f"{key}: unknown key; expected one of {', '.join([*_FIELDS, *SETTINGS])}")
        accepted: Any = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{key}: expected {kind.__name__}, got {value!r}")
    name = request.get("name", "output")
    if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise ConfigError(f"name: expected the name of a file without folder and suffix, got {name!r}")
    items = {"examples": {"input", "output", "text"}, "turns": {"role", "text", "audio"}}
    for field, keys in items.items():
        for item in request.get(field, ()):
            values = item.values() if isinstance(item, dict) else [None]
            complete = isinstance(item, dict) and (set(item) == keys if field == "examples" else set(item) <= keys)
            if not complete or not all(isinstance(v, str) for v in values):
                raise ConfigError(f"{field}: expected objects with the texts {', '.join(sorted(keys))}, got {item!r}")
    for number, item in enumerate(request.get("turns", ())):
        role = "assistant" if number % 2 else "user"
        spoken = number % 2 == 1 and request.get("task") == "dialogue"
        if item.get("role") != role or not (set(item) - {"role"}) or (spoken and len(item) != 3):
            wanted = "text and audio" if spoken else "text or audio"
            raise ConfigError(f"turns: expected turn {number} to be of role {role} with {wanted}, got {item!r}")
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in request.items()
        if key in _FIELDS and key != "name"
    }
    TaskRequest(**fields)


def make_requests(
    requests: Sequence[Mapping[str, Any]],
    model: SpeechModel,
    settings: GenerationSettings,
    prompt_seconds: float | None = None,
) -> list[TaskRequest]:
    """Reads the files of requests.

    Args:
        requests: what `check_request` has let pass.
        settings: where a request has none of its own; the seeds of those that have none follow `settings.seed`.
        prompt_seconds: use only the beginning of each recording that is to be continued.

    Raises:
        ConfigError: a request is impossible.
        AudioError: a recording cannot be read.
    """
    rate = model.codec.config.mel.sample_rate

    @functools.cache
    def audio(path: str) -> np.ndarray:
        return load_audio(path, rate, model.codec.config.resampler)

    def turn(item: Mapping[str, str]) -> Any:
        if len(item) == 3:
            return item["text"], audio(item["audio"])
        return item["text"] if "text" in item else audio(item["audio"])

    made = []
    for number, request in enumerate(requests):
        fields: dict[str, Any] = {k: v for k, v in request.items() if k in _FIELDS and k != "name"}
        for key in ("audio", "voice"):
            if key in fields:
                fields[key] = audio(fields[key])
        if fields["task"] == "continue":
            wav = fields["audio"] if "audio" in fields else np.zeros(0, np.float32)
            wav = fields["audio"] = wav if prompt_seconds is None else wav[: max(1, round(prompt_seconds * rate))]
            if model.codec.num_codes(len(wav)) < model.generator.config.group_size:
                raise ConfigError(
                    f"{request.get('audio', 'audio')}: expected at least one patch "
                    f"({1 / model.patches_per_second:.2f} s) to continue, got {len(wav) / rate:.2f} s"
                )
        if "history" in fields:
            fields["history"] = load_history(fields["history"], model)
        if "examples" in fields:
            fields["examples"] = tuple((audio(e["input"]), audio(e["output"]), e["text"]) for e in fields["examples"])
        if "turns" in fields:
            fields["turns"] = tuple(map(turn, fields["turns"]))
        seeded = dataclasses.replace(settings, seed=(settings.seed + number) % 2**32)
        made.append(TaskRequest(**fields, settings=apply_settings(seeded, request)))
    return made


def output_names(requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """A different file name for each request: its `name`, or what it is about and its task."""
    names = []
    for number, request in enumerate(requests):
        task, audio = request["task"], request.get("audio")
        stem = f"{task}-{number}" if audio is None else f"{Path(audio).stem}-{task}"
        names.append(request.get("name", stem))
    return names if len(set(names)) == len(names) else [f"{i}-{name}" for i, name in enumerate(names)]
