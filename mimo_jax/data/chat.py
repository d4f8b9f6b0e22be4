"""The published conversation formats, as ordered segments that prompts and training documents both come from.

    system      `<|im_start|>system\\n` contents `<|im_end|>\\n`
    user        `<|im_start|>user\\n` contents `<|im_end|>\\n`
    assistant   `<|im_start|>assistant\\n` [thinking] answer `<|im_end|>\\n`
    thinking    `<think>\\n` chain `\\n</think>\\n`, or `<think>\\n\\n</think>\\n` where there is none

    render(asr(codes_MR, "Transcribe this") + answer("hello"), tokenizer, group_size=4, num_channels=8)

Every segment is tokenised on its own, as published. Only what is made here can be a special token: text that reads
`<|im_end|>` is encoded as the characters it consists of. M RVQ frames, G frames of a patch, R channels of the model.

Source: released inference code; `spec`, table "Token layouts"; the label masks are those of the released toolkit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mimo_jax.config import ConfigError
from mimo_jax.data.layouts import STREAM_GROUP, SpeechSpan, TextSpan
from mimo_jax.text.tokenizers import TextTokenizer


class Special(str):
    """A special token by its name."""


IM_START, IM_END, SOSTM = Special("<|im_start|>"), Special("<|im_end|>"), Special("<|sostm|>")
OPEN_THINK, CLOSE_THINK = "<think>\n", "</think>\n"
STYLE_SYSTEM = "你需要根据指定的风格指令和文本内容来生成语音。"
STYLE_VOICE_SYSTEM = "你需要根据指定的风格指令和文本内容来生成和语音prompt具有相同音色的语音。你的音色应该是："
VOICE_SYSTEM = "Your voice should be:"


@dataclass(frozen=True)
class Text:
    """Text: raw strings and `Special` tokens. `assistant` marks what a fine-tuned model learns to say."""

    parts: tuple[str, ...]
    assistant: bool = False


@dataclass(frozen=True, eq=False)
class Speech:
    """`<|sosp|>` patches `<|eosp|>` of integer codes [M, >= R]. An open one shall go on: whole patches, no end."""

    codes_MR: np.ndarray
    assistant: bool = False
    open: bool = False


@dataclass(frozen=True, eq=False)
class Stream:
    """Speech with its text: `<|sostm|>`, 5 text tokens and 5 patches in turn, `<|eot|>` after the text, `<|eostm|>`.

    An open one shall go on: it holds whole patches and as much of the text as comes before the last, and no end.
    """

    text: str
    codes_MR: np.ndarray
    assistant: bool = False
    open: bool = False


Segment = Text | Speech | Stream


# Turns ----------------------------------------------------------------------------------------------------


def user(*contents: str | Segment, role: str = "user") -> tuple[Segment, ...]:
    """A turn of the user or, with role "system", of the system; each string is a segment."""
    return (Text((IM_START, f"{role}\n")), *_segments(contents), Text((IM_END, "\n")))


def opening(thinking: bool | None = None) -> tuple[Segment, ...]:
    """Beginning of the assistant's turn: None nothing, False an empty chain of thought, True an open one."""
    start = Text((IM_START, "assistant\n"))
    if thinking is None:
        return (start,)
    return (start, Text((OPEN_THINK if thinking else f"{OPEN_THINK}\n{CLOSE_THINK}",)))


def answer(content: str | Stream, chain: str | None = None) -> tuple[Segment, ...]:
    """What the assistant says after `opening`, all of it learned: [chain of thought] content `<|im_end|>\\n`."""
    thought = () if chain is None else (Text((f"{chain}\n{CLOSE_THINK}",), True),)
    said = Text((content,), True) if isinstance(content, str) else Stream(content.text, content.codes_MR, True)
    return (*thought, said, Text((IM_END, "\n"), True))


def past_answer(content: str | Stream) -> tuple[Segment, ...]:
    """A whole turn of the assistant in the history of a conversation: no thinking, nothing learned."""
    return (*opening(), *_segments([content]), Text((IM_END, "\n")))


def voice(codes_MR: np.ndarray) -> tuple[Segment, ...]:
    """System turn that gives a spoken dialogue its voice."""
    return user(VOICE_SYSTEM, Speech(codes_MR), role="system")


# Tasks: everything before the answer ----------------------------------------------------------------------


def asr(codes_MR: np.ndarray, template: str) -> tuple[Segment, ...]:
    """Transcription."""
    return (*user(Speech(codes_MR), template), *opening(False))


def tts(text: str, template: str) -> tuple[Segment, ...]:
    """Speech of a text; the answer is a Stream."""
    return (spoken_request(f"{template}: {capitalize(text)}"), *opening())


def instruct_tts(
    text: str, template: str | None = None, instruction: str | None = None, voice_MR: np.ndarray | None = None
) -> tuple[Segment, ...]:
    """Speech in a style; the answer is a chain of thought and a Stream.

    Args:
        text: what to say; without an instruction, a description of style and words in free form.
        template: wording of the request, with an instruction.
        instruction: style.
    """
    contents = [STYLE_SYSTEM] if voice_MR is None else [STYLE_VOICE_SYSTEM, Speech(voice_MR)]
    wanted = capitalize(text) if instruction is None else f"{template}: {capitalize(text)}({instruction})"
    start = Text((IM_START, f"assistant\n{OPEN_THINK}"))
    return (*user(*contents, role="system"), spoken_request(wanted), start)


def understanding(codes_MR: np.ndarray, question: str, thinking: bool = False) -> tuple[Segment, ...]:
    """A question about a recording."""
    return (*user(Speech(codes_MR), question), *opening(thinking))


def dialogue(
    turns: Sequence[str | np.ndarray | Stream],
    thinking: bool | None = None,
    system: str | None = None,
    voice_MR: np.ndarray | None = None,
) -> tuple[Segment, ...]:
    """A conversation up to the opening of the next answer.

    Args:
        turns: user and assistant alternately, the user first and last. The user's are texts or codes [M, >= R], the
            assistant's texts or Streams.
        thinking: None where the answer is a Stream; else as in `opening`.
        system: how to behave; it stands in the first turn of the user.
    """
    segments = list(voice(voice_MR)) if voice_MR is not None else []
    for number, content in enumerate(turns):
        if number % 2:
            segments += past_answer(content)  # type: ignore[arg-type]
        else:
            before = (system, "\n\n") if system and number == 0 else ()
            segments += user(*before, Speech(content) if isinstance(content, np.ndarray) else content)
    return (*segments, *opening(thinking))


def spoken_request(text: str) -> Text:
    """A user's turn in one segment."""
    return Text((IM_START, f"user\n{text}", IM_END, "\n"))


def capitalize(text: str) -> str:
    """Text in one case only gets a capital at its beginning, and small letters elsewhere, as published."""
    return text.capitalize() if text.isupper() or text.islower() else text


def _segments(contents: Iterable[str | Segment]) -> tuple[Segment, ...]:
    return tuple(Text((c,)) if isinstance(c, str) else c for c in contents)


# Segments to ids and patches ------------------------------------------------------------------------------


def render(
    segments: Iterable[Segment], tokenizer: TextTokenizer, group_size: int, num_channels: int
) -> tuple[TextSpan | SpeechSpan, ...]:
    """Ids and patches of segments, in order; `target` says what the assistant says.

    Args:
        segments: what to render; the last frame of codes is repeated to fill the last patch.

    Raises:
        ConfigError: codes are not integers [M >= 1, >= R].
    """
    spans: list[TextSpan | SpeechSpan] = []
    special = tokenizer.special

    def ids(values: Sequence[int], target: bool) -> None:
        if values:
            spans.append(TextSpan(np.asarray(values, np.int32), target))

    for segment in segments:
        target = segment.assistant
        if isinstance(segment, Text):
            for part in segment.parts:
                ids([special[part]] if isinstance(part, Special) else tokenizer.encode(part), target)
            continue
        patches = to_patches(segment.codes_MR, group_size, num_channels, whole=segment.open)
        if isinstance(segment, Speech):
            ids([special["<|sosp|>"]], target)
            spans.append(SpeechSpan(patches, target))
            ids([] if segment.open else [special["<|eosp|>"]], target)
            continue
        text = tokenizer.encode(segment.text)
        ids([special[SOSTM]], target)
        for start in range(0, len(patches) if segment.open else max(len(text), len(patches)), STREAM_GROUP):
            ids(stream_text(text, start, special), target)
            if start < len(patches):
                spans.append(SpeechSpan(patches[start : start + STREAM_GROUP], target))
        ids([] if segment.open else [special["<|eostm|>"]], target)
    return tuple(spans)


def stream_text(text: Sequence[int], start: int, special: Mapping[str, int]) -> list[int]:
    """Text ids of the turn of a stream that begins at token `start`, `<|eot|>` included where the text ends."""
    stop = start + STREAM_GROUP
    return [*text[start:stop], *([special["<|eot|>"]] if start < len(text) <= stop else [])]


def to_patches(codes_MR: np.ndarray, group_size: int, num_channels: int, whole: bool = False) -> np.ndarray:
    """Codes as uint16 patches [n, G, R]. The last frame fills the last patch, or `whole` leaves a cut patch out."""
    codes_MR = np.asarray(codes_MR)
    shortest = group_size if whole else 1
    if (
        codes_MR.ndim != 2
        or codes_MR.shape[1] < num_channels
        or len(codes_MR) < shortest
        or codes_MR.dtype.kind not in "iu"
    ):
        expected = f"integers of at least {shortest} frames and {num_channels} levels"
        raise ConfigError(f"codes: expected {expected}, got {codes_MR.dtype} {codes_MR.shape}")
    missing = -len(codes_MR) % group_size
    if whole:
        codes_MR = codes_MR[: len(codes_MR) - len(codes_MR) % group_size]
    elif missing:
        codes_MR = np.concatenate([codes_MR, np.repeat(codes_MR[-1:], missing, axis=0)])
    return codes_MR[:, :num_channels].astype(np.uint16).reshape(-1, group_size, num_channels)
