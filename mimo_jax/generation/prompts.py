"""Prompts of every task, and what may follow them.

Two kinds of model read them: `chat` models the published conversations (`data.chat`), `base` models the beginnings of
the documents that `data.layouts` makes (and the published few-shot prompts, which are of that kind).

    prompts = Prompts(tokenizer, config, "chat")
    prompts.tts("hello", template=0).prompt

M RVQ frames, R channels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np

from mimo_jax.config import AudioLMConfig, ConfigError
from mimo_jax.data import chat
from mimo_jax.data.chat import SOSTM, Segment, Speech, Stream, Text
from mimo_jax.data.hashing import hash_ints
from mimo_jax.data.layouts import (
    CLOSE_INSTRUCTION,
    NEWLINE,
    OPEN_INSTRUCTION,
    PREFIX_MIXED,
    PREFIX_SPEECH,
    STREAM_GROUP,
)
from mimo_jax.generation.generate import Prompt
from mimo_jax.generation.sampling import (
    CHAT_TEXT,
    DEFAULT_TEXT,
    DIALOGUE_TEXT,
    GREEDY,
    TTS_TEXT,
    UNDERSTANDING_TEXT,
    SamplingConfig,
)
from mimo_jax.text.tokenizers import TextTokenizer

Kind = Literal["chat", "base"]

_CJK = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt with what its layout says about the answer."""

    prompt: Prompt
    stop_ids: tuple[int, ...]  # ids that end the answer
    allowed_ids: np.ndarray  # int32, ids that can occur in the answer, stop ids included
    text_sampling: SamplingConfig = DEFAULT_TEXT  # sampler of the text head, as published for the task
    forced_ids: tuple[int, ...] = ()  # ids of the first positions of the answer, -1 = free (`Prompts.hold_text`)
    text: tuple[int, ...] = ()  # ids of the words to be spoken, where the task gives them
    stream: int | None = None  # positions of the answer's stream that the prompt holds already; None before `<|sostm|>`
    thinking: bool = False  # whether the answer begins inside a chain of thought


@functools.cache
def _templates() -> dict[str, list[str]]:
    lists: dict[str, list[str]] = json.loads(resources.files(__package__).joinpath("templates.json").read_text("utf-8"))
    return lists


def asr_templates() -> tuple[str, ...]:
    """Published wordings of the wish for a transcript: Chinese, then English."""
    return (*_templates()["asr_zh_templates"], *_templates()["asr_en_templates"])


def tts_templates(text: str) -> tuple[str, ...]:
    """Published wordings of the wish to hear a text, in Chinese if it has a Chinese character."""
    return tuple(_templates()["tts_zh_templates" if _CJK.search(text) else "tts_en_templates"])


def choose_template(templates: Sequence[str], index: int | None, seed: int) -> str:
    """The template of an index, or one drawn by a seed. Raises ConfigError: there is no such index."""
    if index is None:
        index = hash_ints(seed, len(templates)) % len(templates)
    if not 0 <= index < len(templates):
        raise ConfigError(f"template: expected 0..{len(templates) - 1}, got {index}")
    return templates[index]


class Prompts:
    """Prompts for one model.

    All methods take codes as integers [M, >= R] and raise ConfigError for empty texts and malformed codes.
    """

    def __init__(self, tokenizer: TextTokenizer, config: AudioLMConfig, kind: Kind) -> None:
        self._tokenizer, self._config, self.kind = tokenizer, config, kind

    # Tasks ------------------------------------------------------------------------------------------------

    def asr(self, codes_MR: np.ndarray, template: int | None = None, seed: int = 0) -> TaskPrompt:
        """Speech to be transcribed. Template: an index into `asr_templates`, or drawn by the seed."""
        wording = self._wording(asr_templates(), template, seed)
        if self.kind == "base":
            return self._written(self._base(Speech(codes_MR), NEWLINE), GREEDY)
        return self._written(chat.asr(codes_MR, wording), GREEDY)

    def tts(self, text: str, template: int | None = None, seed: int = 0) -> TaskPrompt:
        """Text to be spoken. Template: an index into `tts_templates`."""
        self._require(text, "text")
        wording = self._wording(tts_templates(text), template, seed)
        if self.kind == "base":
            return self._spoken((*self._base(text, NEWLINE), Text((SOSTM,))), TTS_TEXT, text)
        return self._spoken((*chat.tts(text, wording), Text((SOSTM,))), TTS_TEXT, chat.capitalize(text))

    def instruct_tts(
        self,
        text: str,
        instruction: str | None = None,
        voice_MR: np.ndarray | None = None,
        template: int | None = None,
        seed: int = 0,
    ) -> TaskPrompt:
        """Text to be spoken in a style; without an instruction, the text itself describes style and words."""
        self._require(text, "text")
        wording = self._wording(tts_templates(text), template, seed)
        if self.kind == "base":
            if instruction is None or voice_MR is not None:
                raise ConfigError("instruct-tts: base prompts need an instruction and take no voice")
            pieces = (text, OPEN_INSTRUCTION, instruction, CLOSE_INSTRUCTION)
            return self._spoken((*self._base(*pieces), Text((SOSTM,))), TTS_TEXT, text)
        segments = chat.instruct_tts(text, wording, instruction, voice_MR)
        said = "" if instruction is None else chat.capitalize(text)
        return self._spoken(segments, TTS_TEXT, said, thinking=True)

    def understanding(self, codes_MR: np.ndarray, question: str, thinking: bool = False) -> TaskPrompt:
        """A question about a recording."""
        self._require(question, "text")
        self._chat_only("thinking", "it", thinking)
        if self.kind == "base":
            pieces = (Speech(codes_MR), f"Question: {question}\nAnswer:")
            return self._written(self._base(*pieces), UNDERSTANDING_TEXT)
        return self._written(chat.understanding(codes_MR, question, thinking), UNDERSTANDING_TEXT, thinking)

    def spoken_dialogue(
        self,
        turns: Sequence[np.ndarray | Stream],
        system: str | None = None,
        voice_MR: np.ndarray | None = None,
        history: Prompt | None = None,
    ) -> TaskPrompt:
        """Speech to be answered by speech.

        Args:
            turns: user (codes) and assistant (Streams) alternately, the user first and last.
            history: what the model has seen and said so far; system and voice stand in it, if anywhere.
        """
        self._chat_only("dialogue", "conversations")
        segments = chat.dialogue(turns, None, *((None, None) if history else (system, voice_MR)))
        return self._spoken((*segments, Text((SOSTM,))), DIALOGUE_TEXT, history=history)

    def written_dialogue(
        self, turns: Sequence[str | np.ndarray], thinking: bool = False, history: Prompt | None = None
    ) -> TaskPrompt:
        """Speech or text to be answered by text: arguments as `spoken_dialogue`; turns of the assistant are texts."""
        self._chat_only("dialogue", "conversations")
        if isinstance(turns[-1], str):
            self._require(turns[-1], "text")
        sampling = CHAT_TEXT if isinstance(turns[-1], str) else DIALOGUE_TEXT
        return self._written(chat.dialogue(turns, thinking), sampling, thinking, history)

    def few_shot(
        self, instruction: str, examples: Iterable[tuple[np.ndarray, Stream]], codes_MR: np.ndarray
    ) -> TaskPrompt:
        """Speech to be answered in the way of examples (base models)."""
        segments: list[Segment] = [Text((f"{PREFIX_MIXED}{instruction}{NEWLINE}",))]
        for question_MR, reply in examples:
            segments += [Speech(question_MR), Text((NEWLINE,)), reply, Text((" \n\n",))]
        segments += [Speech(codes_MR), Text((NEWLINE,)), Text((SOSTM,))]
        return self._spoken(segments, GREEDY, base=True)

    def continuation(self, codes_MR: np.ndarray) -> TaskPrompt:
        """Speech to be continued (base models). It goes on where the last whole patch ends; the rest is left out."""
        special = self._tokenizer.special
        stops = (special["<|eosp|>"], special["<|endoftext|>"])
        prompt = self._render([Text((PREFIX_SPEECH,)), Speech(codes_MR, open=True)])
        return TaskPrompt(prompt, stops, np.array([special["<|empty|>"], *stops]))

    def clone(
        self, text: str, voice_MR: np.ndarray, voice_text: str | None = None, template: int | None = None, seed: int = 0
    ) -> TaskPrompt:
        """Text to be spoken in the voice of a recording. Not published; the layouts are those of TTS.

        Args:
            voice_text: what is said in it. With it, the answer's stream begins with the recording itself; base models
                need it.
        """
        self._require(text, "text")
        if voice_text is None and self.kind == "base":
            raise ConfigError("voice_text: expected what is said in the recording, which base prompts need")
        wording = self._wording(tts_templates(text), template, seed)
        said = text = text.strip()
        start: Segment = Text((SOSTM,))
        if voice_text is not None:
            self._require(voice_text, "voice_text")
            before = voice_text.strip()
            said = f"{before}{'' if _CJK.search(before[-1] + text[0]) else ' '}{text}"
            start = Stream(said, voice_MR, open=True)
        if self.kind == "base":
            segments = (*self._base(said, NEWLINE), start)
        else:
            system = chat.user(chat.STYLE_VOICE_SYSTEM, Speech(voice_MR), role="system")
            segments = (*system, chat.spoken_request(f"{wording}: {said}"), *chat.opening(), start)
        task = self._spoken(segments, TTS_TEXT, said)
        spoken = len(voice_MR) // self._config.group_size
        if voice_text is None or len(task.text) <= -(-spoken // STREAM_GROUP) * STREAM_GROUP:
            return task
        # A recording that ends inside a turn of the stream leaves the rest of the turn to be spoken.
        return dataclasses.replace(task, forced_ids=(self._config.empty_id,) * (-spoken % STREAM_GROUP))

    # What follows -----------------------------------------------------------------------------------------

    def hold_text(self, task: TaskPrompt) -> TaskPrompt:
        """The same with the grammar of the stream held: its text is the given one, in turns of 5 tokens and 5 patches.

        A chain of thought is left empty. A patch at least follows the text; then the model may only speak on or end.

        Raises:
            ConfigError: the words are not given.
        """
        special = self._tokenizer.special
        if not task.text:
            raise ConfigError("force_text: expected a task whose words are given (tts, instruct-tts, clone)")
        empty, end = special["<|empty|>"], special["<|eostm|>"]
        ids: list[int] = []
        for start in range(0, len(task.text), STREAM_GROUP):
            ids += [*chat.stream_text(task.text, start, special), *[empty] * STREAM_GROUP]
        ids = ids[: ids.index(special["<|eot|>"]) + 2]
        if task.stream is None:
            ids = [*self._tokenizer.encode(f"\n{chat.CLOSE_THINK}"), special[SOSTM], *ids]
        return dataclasses.replace(task, forced_ids=tuple(ids[task.stream or 0 :]), allowed_ids=np.array([empty, end]))

    def closed(self, answer: Prompt) -> Prompt:
        """An answer with the end of the assistant's turn, as a conversation goes on from it."""
        text, end = answer.text, self._tokenizer.special[chat.IM_END]
        if len(text) and text[-1] == self._tokenizer.special["<|endoftext|>"]:
            text = text[:-1]
        closing = [*([] if len(text) and text[-1] == end else [end]), *self._tokenizer.encode("\n")]
        return Prompt(np.concatenate([text, np.asarray(closing, np.int32)]), answer.patches)

    def _written(
        self,
        segments: Iterable[Segment],
        sampling: SamplingConfig,
        thinking: bool = False,
        history: Prompt | None = None,
    ) -> TaskPrompt:
        """A text is the answer."""
        stops = self._stops()
        return TaskPrompt(self._render(segments, history), stops, self._text_and(*stops), sampling, thinking=thinking)

    def _spoken(
        self,
        segments: Iterable[Segment],
        sampling: SamplingConfig,
        said: str = "",
        thinking: bool = False,
        history: Prompt | None = None,
        base: bool = False,
    ) -> TaskPrompt:
        """A stream is the answer."""
        special, prompt = self._tokenizer.special, self._render(segments, history)
        stops = (special["<|eostm|>"], *self._stops(base))
        extra = [special["<|empty|>"], special["<|eot|>"], *([special[SOSTM]] if thinking else [])]
        begins = np.flatnonzero(prompt.text == special[SOSTM])
        return TaskPrompt(
            prompt,
            stops,
            self._text_and(*extra, *stops),
            sampling,
            text=tuple(self._tokenizer.encode(said)),
            stream=None if thinking else len(prompt.text) - 1 - int(begins[-1]),
            thinking=thinking,
        )

    def _stops(self, base: bool = False) -> tuple[int, ...]:
        special = self._tokenizer.special
        end = () if base or self.kind == "base" else (special[chat.IM_END],)
        return (special["<|endoftext|>"], *end)

    @functools.cached_property
    def _text_ids(self) -> np.ndarray:
        """Ids of ordinary text."""
        return np.setdiff1d(np.arange(self._tokenizer.vocab_size), [*self._tokenizer.special.values()])

    def _text_and(self, *ids: int) -> np.ndarray:
        return np.append(self._text_ids, ids).astype(np.int32)

    # Pieces -----------------------------------------------------------------------------------------------

    def _base(self, *pieces: str | Segment) -> tuple[Segment, ...]:
        return tuple(Text((p,)) if isinstance(p, str) else p for p in (PREFIX_MIXED, *pieces))

    def _render(self, segments: Iterable[Segment], history: Prompt | None = None) -> Prompt:
        c = self._config
        prompt = Prompt.of(chat.render(segments, self._tokenizer, c.group_size, c.num_channels), c)
        return prompt if history is None else history + prompt

    def _require(self, text: str, name: str) -> None:
        if not text.strip():
            raise ConfigError(f"{name}: expected some words, got none")

    def _chat_only(self, name: str, unlearnt: str, given: bool = True) -> None:
        """Refuses a base model what it has not learnt."""
        if given and self.kind == "base":
            raise ConfigError(f"{name}: expected chat prompts (base models have not learnt {unlearnt})")

    def _wording(self, templates: Sequence[str], index: int | None, seed: int) -> str:
        self._chat_only("template", "other wordings than one", index is not None)
        return choose_template(templates, index, seed)
