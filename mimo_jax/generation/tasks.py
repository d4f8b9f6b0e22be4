"""The tasks by name, with what each needs and takes. Imports nothing, so that the command line answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a task is."""

    summary: str  # for people
    needs: tuple[str, ...]  # fields of `TaskRequest` that must be given
    takes: tuple[str, ...] = ()  # fields that may be given
    speaks: bool = False  # whether the answer holds speech
    converses: bool = False  # whether a conversation can go on from its history


TASKS: Mapping[str, Task] = {
    "asr": Task("Transcribe recordings.", ("audio",), ("template",)),
    "tts": Task("Speak texts.", ("text",), ("template",), speaks=True),
    "instruct-tts": Task(
        "Speak texts in a style. Without --instruction, the text itself describes style and words.",
        ("text",),
        ("instruction", "voice", "template"),
        speaks=True,
    ),
    "understand": Task("Answer a question about recordings.", ("audio", "text"), ("thinking",)),
    "dialogue": Task(
        "Answer speech by speech.", ("audio",), ("system", "voice", "turns", "history"), speaks=True, converses=True
    ),
    "speech-to-text": Task("Answer speech by text.", ("audio",), ("thinking", "turns", "history"), converses=True),
    "chat": Task("Answer text by text.", ("text",), ("thinking", "turns", "history"), converses=True),
    "few-shot": Task(
        "Do to recordings what was done in examples (pre-trained models).",
        ("audio", "instruction"),
        ("examples",),
        speaks=True,
    ),
    "continue": Task("Go on speaking after recordings (pre-trained models).", ("audio",), speaks=True),
    "clone": Task(
        "Speak texts in the voice of a recording.", ("text", "voice"), ("voice_text", "template"), speaks=True
    ),
}
