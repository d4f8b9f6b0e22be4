"""Conversations for fine-tuning, in the published template: one conversation on each line of a JSONL file.

    [{"role": "system",
      "content": [{"type": "text", "text": "Your voice should be:"}, {"type": "audio", "audio": "voice.wav"}]},
     {"role": "user", "content": [{"type": "audio", "audio": "question.wav"}]},
     {"role": "assistant", "thinking": null, "Chain-of-thought": "",
      "content": [{"type": "text", "text": "Hello."}, {"type": "audio", "audio": "answer.wav"}]}]

A line may also be an object `{"messages": [...], "id": ..., "format": ...}`, and a file `.json` holds a list of
conversations. Audio paths are relative to the file; contents "" (the template's placeholders) are left out.

Ingest replaces the paths by frames of the record's codes (`Conversation.to_json`); `segments` turns that into the text
and speech of a training document, in which the assistant's contents are targets: every turn of the assistant, from the
end of its (empty or opened) think block to the line break after `<|im_end|>`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.data import chat
from mimo_jax.data.layouts import CONVERSATION_FORMATS, SpeechSpan, TextSpan
from mimo_jax.data.manifest import ManifestError, is_text
from mimo_jax.data.records import DataError, Record


@dataclass(frozen=True)
class Conversation:
    """A checked conversation."""

    id: str  # its own, or `FILE:LINE`
    format: str  # one of `CONVERSATION_FORMATS`
    # `role`, `content` (list of {"text": str} or {"audio": index into `audio`}), `thinking`, `chain`.
    messages: tuple[Mapping[str, Any], ...]
    audio: tuple[str, ...]  # paths of its recordings

    def to_json(self, frames: Sequence[tuple[int, int]]) -> str:
        """What a record stores: `frames` are first and last (exclusive) RVQ frame of each recording."""
        values = {"format": self.format, "messages": self.messages, "frames": frames}
        return json.dumps(values, ensure_ascii=False, sort_keys=True)


class Conversations:
    """A file of conversations, checked when it is opened and parsed again when it is read: 8 bytes a line in memory.

    Raises:
        ManifestError: the file is missing, empty, or a conversation is wrong (file, line and field are named).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        digest, position = hashlib.sha256(), 0
        offsets: list[tuple[int, int]] = []
        self._items: list[Any] | None = None
        try:
            if self.path.suffix == ".json":
                data = self.path.read_bytes()
                digest.update(data)
                self._items = _parse(data, str(self.path))
                if not isinstance(self._items, list):
                    raise ManifestError(f"{self.path}: expected a list of conversations")
                offsets = [(0, number) for number in range(1, len(self._items) + 1)]
            else:
                with open(self.path, "rb") as file:
                    for number, line in enumerate(file, 1):
                        digest.update(line)
                        if line.strip():
                            offsets.append((position, number))
                        position += len(line)
        except OSError as error:
            raise ManifestError(f"{self.path}: cannot read the conversations ({error.strerror})") from None
        if not offsets:
            raise ManifestError(f"{self.path}: expected at least one conversation, the file is empty")
        self._places = np.asarray(offsets, np.int64)
        self.sha256 = digest.hexdigest()
        for _ in self.read(0, len(self)):
            pass

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Iterator[Conversation]:
        """Yields conversations start..stop."""
        with open(self.path, "rb") as file:
            for offset, number in self._places[start:stop].tolist():
                where = f"{self.path}:{number}"
                if self._items is None:
                    file.seek(offset)
                    values = _parse(file.readline(), where)
                else:
                    values = self._items[number - 1]
                yield check_conversation(values, where, self.path.absolute().parent)


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, a number of too many digits
        raise ManifestError(f"{where}: expected JSON in UTF-8 ({error})") from None


def check_conversation(values: Any, where: str, folder: Path) -> Conversation:
    """Checks one conversation. Raises ManifestError: it is not in the template; names the field."""
    whole = values if isinstance(values, dict) else {"messages": values}
    given: Any = whole.get("messages")
    _need(isinstance(given, list) and bool(given), f"{where}: messages", "a list of messages", given)
    audio: dict[str, int] = {}
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(given):
        name = f"{where}: messages[{i}]"
        _need(isinstance(message, dict), name, "an object with role and content", message)
        role, before = message.get("role"), messages[-1]["role"] if messages else "system"
        allowed = {"system": ("system", "user"), "user": ("assistant",), "assistant": ("user",)}[before]
        _need(role in allowed, f"{name}.role", " or ".join(allowed), role)
        content = _contents(message.get("content"), f"{name}.content", folder, audio)
        checked: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            kinds = sorted(kind for item in content for kind in item)
            _need(kinds in (["text"], ["audio", "text"]), f"{name}.content", "a text, or a text and an audio", kinds)
            thinking = message.get("thinking")
            _need(thinking in (True, False, None), f"{name}.thinking", "true, false or null", thinking)
            chain = _text(message.get("Chain-of-thought") or "", f"{name}.Chain-of-thought")
            _need(bool(chain.strip()) or not thinking, f"{name}.Chain-of-thought", "what was thought", chain)
            # The published empty block is an empty chain: a line break belongs to its end.
            checked |= {"thinking": thinking, "chain": chain.removesuffix("\n") if thinking else ""}
        messages.append(checked)
    _need(messages[-1]["role"] == "assistant", f"{where}: messages", "an answer at the end", messages[-1]["role"])
    form = whole.get("format") or guess_format(messages)
    _need(form in CONVERSATION_FORMATS, f"{where}: format", f"one of {', '.join(CONVERSATION_FORMATS)}", form)
    return Conversation(_text(whole.get("id") or Path(where).name, f"{where}: id"), form, tuple(messages), tuple(audio))


def _contents(items: Any, name: str, folder: Path, audio: dict[str, int]) -> list[dict[str, Any]]:
    """Contents of a message as {"text": str} or {"audio": number}; new recordings are added to `audio`."""
    items = [{"type": "text", "text": items}] if isinstance(items, str) else items
    _need(isinstance(items, list), name, "a text or a list of contents", items)
    contents: list[dict[str, Any]] = []
    for j, item in enumerate(items):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in ("text", "audio"):
            raise ManifestError(f'{name}[{j}]: expected an object of type "text" or "audio", got {item!r}')
        value = _text(item.get(kind), f"{name}[{j}].{kind}")
        _need(kind == "text" or "\0" not in value, f"{name}[{j}].audio", "a path", value)
        if value:
            number: Any = audio.setdefault(str(folder / value), len(audio)) if kind == "audio" else value
            contents.append({kind: number})
    _need(bool(contents), name, "something that is said or heard", items)
    return contents


def _need(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ManifestError(f"{name}: expected {expected}, got {got!r}")


def _text(value: Any, name: str) -> str:
    _need(isinstance(value, str) and is_text(value), name, "a string without lone surrogates", value)
    return value


def guess_format(messages: Sequence[Mapping[str, Any]]) -> str:
    """Format of a conversation that does not say.

    A spoken answer to speech is spoken dialogue; to text, TTS, and instruct-TTS where it is thought about or a system
    turn asks for a style. A text answer to text is text dialogue, to speech alone spoken dialogue, to speech and text
    transcription if the text is one of the published templates (whatever its case and full stop), else understanding.
    """
    heard, asked = (any(kind in c for m in messages if m["role"] == "user" for c in m["content"]) for kind in _KINDS)
    answers = [m for m in messages if m["role"] == "assistant"]
    if any("audio" in c for c in answers[-1]["content"]):
        if heard:
            return "spoken_dialogue"
        style = messages[0]["role"] == "system" or any(m["thinking"] for m in answers)
        return "instruct_tts" if style else "tts"
    if not heard:
        return "text_dialogue"
    if not asked:
        return "spoken_dialogue"
    words = [c["text"] for m in messages if m["role"] == "user" for c in m["content"] if "text" in c]
    return "asr" if all(_plain(w) in _asr_templates() for w in words) else "understanding"


_KINDS = ("audio", "text")


def _plain(text: str) -> str:
    return text.strip().rstrip(".。!！").casefold()


@functools.cache
def _asr_templates() -> frozenset[str]:
    lists = json.loads((importlib.resources.files("mimo_jax") / "generation" / "templates.json").read_text("utf-8"))
    return frozenset(_plain(t) for name, texts in lists.items() if name.startswith("asr") for t in texts)


# Records --------------------------------------------------------------------------------------------------


def make_record(conversation: Conversation, codes: Sequence[np.ndarray], seconds: float, levels: int) -> Record:
    """The record of a conversation whose recordings have these codes [M, levels]; `seconds` is their length in all."""
    ends = np.cumsum([0, *map(len, codes)]).tolist()
    frames = list(itertools.pairwise(ends))
    joined = np.concatenate([np.zeros((0, levels), np.uint16), *codes])
    return Record(conversation.id, joined, duration=seconds, conversation=conversation.to_json(frames))


def record_format(record: Record) -> int:
    """Number of a record's format in `CONVERSATION_FORMATS`."""
    return CONVERSATION_FORMATS.index(json.loads(record.conversation)["format"])


def audio_frames(record: Record) -> list[tuple[int, int]]:
    """First and last (exclusive) frame of each recording, as often as it is heard or said."""
    values = json.loads(record.conversation)
    frames = values["frames"]
    return [tuple(frames[c["audio"]]) for m in values["messages"] for c in m["content"] if "audio" in c]


def segments(record: Record) -> tuple[chat.Segment, ...]:
    """A conversation as the prompts of `generation` have it, answers included.

    Where a text answer is asked for by one recording and one text, the recording stands first; a system turn
    without a voice, instruct-TTS apart, stands in the user's first turn, a blank line behind it.
    """
    values = json.loads(record.conversation)
    codes = [record.codes_MR[first:last] for first, last in values["frames"]]
    speaks = any("audio" in c for m in values["messages"] if m["role"] == "assistant" for c in m["content"])
    before: list[str | chat.Segment] = []
    turns: list[chat.Segment] = []
    for message in values["messages"]:
        contents: list[Any] = [c["text"] if "text" in c else chat.Speech(codes[c["audio"]]) for c in message["content"]]
        texts = [c for c in contents if isinstance(c, str)]
        if message["role"] == "system":
            if len(texts) < len(contents) or values["format"] == "instruct_tts":
                turns += chat.user(*contents, role="system")
            else:
                before += [*contents, "\n\n"]
        elif message["role"] == "user":
            alone = len(texts) == len(contents) == 1
            if values["format"] in ("tts", "instruct_tts") and alone and not before:
                turns.append(chat.spoken_request(texts[0]))
                continue
            if len(texts) == 1 and len(contents) == 2:
                heard = next(c for c in contents if not isinstance(c, str))
                contents = [texts[0], "\n\n", heard] if speaks else [heard, texts[0]]
            turns += chat.user(*before, *contents)
            before = []
        else:
            thinking, chain = message["thinking"], message["chain"] if message["thinking"] else None
            said = [c for c in contents if not isinstance(c, str)]
            if values["format"] == "instruct_tts" and thinking:
                turns.append(chat.Text((chat.IM_START, f"assistant\n{chat.OPEN_THINK}")))
            else:
                turns += chat.opening(thinking)
            turns += chat.answer(chat.Stream(texts[0], said[0].codes_MR) if said else texts[0], chain)
    return tuple(turns)


def render(record: Record, tokenizer: Any, group_size: int, num_channels: int) -> tuple[TextSpan | SpeechSpan, ...]:
    """Ids and patches of a conversation, in order; the assistant's are targets.

    Raises:
        DataError: the record is not a conversation.
    """
    try:
        return chat.render(segments(record), tokenizer, group_size, num_channels)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"record {record.id!r}: conversation: not as ingest writes it ({error})") from None
