"""Prompts of the pre-training layouts, and what may follow them.

    continuation   `<Spe>:` `<|sosp|>` patches            -> patches, `<|eosp|>` or EOT
    asr            `[Int]:` S(a) `\\n`                     -> text, EOT
    tts            `[Int]:` text `\\n` `<|sostm|>`         -> the rest of Stream(text, a), `<|eostm|>` or EOT

A prompt is the beginning of the document that `data.layouts` makes of the same record, piece by piece.

M RVQ frames, R channels, G frames of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimo_jax.config import AudioLMConfig, ConfigError
from mimo_jax.data.layouts import NEWLINE, PREFIX_MIXED, PREFIX_SPEECH
from mimo_jax.generation.generate import Prompt
from mimo_jax.text.tokenizers import TextTokenizer


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt with what its layout says about the answer.

    Attributes:
        prompt: positions to start from.
        stop_ids: ids that end the answer.
        allowed_ids: ids that can occur in the answer, stop ids included.
    """

    prompt: Prompt
    stop_ids: tuple[int, ...]
    allowed_ids: tuple[int, ...]


def continuation_prompt(tokenizer: TextTokenizer, config: AudioLMConfig, codes_MR: np.ndarray) -> TaskPrompt:
    """Speech to be continued. It goes on where the last whole patch ends; frames beyond that are left out.

    Args:
        tokenizer: the model's text tokenizer.
        config: of the model.
        codes_MR: integer codes of the clip, at least R levels.

    Raises:
        ConfigError: the clip is shorter than a patch, or has too few levels.
    """
    whole = len(codes_MR) // config.group_size * config.group_size
    patches = _patches(config, codes_MR[:whole])
    special = tokenizer.special
    prompt = _prompt(config, tokenizer.encode(PREFIX_SPEECH), [special["<|sosp|>"]], patches)
    stops = (special["<|eosp|>"], special["<|endoftext|>"])
    return TaskPrompt(prompt, stops, (special["<|empty|>"], *stops))


def asr_prompt(tokenizer: TextTokenizer, config: AudioLMConfig, codes_MR: np.ndarray) -> TaskPrompt:
    """Speech to be transcribed; its last frame is repeated to fill the last patch. See `continuation_prompt`."""
    missing = -len(codes_MR) % config.group_size
    patches = _patches(config, np.concatenate([codes_MR, np.repeat(codes_MR[-1:], missing, axis=0)]))
    special = tokenizer.special
    begin, end = [special["<|sosp|>"]], [special["<|eosp|>"]]
    prompt = _prompt(config, tokenizer.encode(PREFIX_MIXED), begin, patches, end, tokenizer.encode(NEWLINE))
    stops = (special["<|endoftext|>"],)
    return TaskPrompt(prompt, stops, (*_text_ids(tokenizer), *stops))


def tts_prompt(tokenizer: TextTokenizer, config: AudioLMConfig, text: str) -> TaskPrompt:
    """Text to be spoken.

    Args:
        tokenizer: the model's text tokenizer.
        config: of the model.
        text: what to say.

    Raises:
        ConfigError: there is no text.
    """
    ids = tokenizer.encode(text)
    if not text.strip() or not ids:
        raise ConfigError("text: expected something to say, got none")
    special = tokenizer.special
    prompt = _prompt(config, tokenizer.encode(PREFIX_MIXED), ids, tokenizer.encode(NEWLINE), [special["<|sostm|>"]])
    stops = (special["<|eostm|>"], special["<|endoftext|>"])
    return TaskPrompt(prompt, stops, (*_text_ids(tokenizer), special["<|empty|>"], special["<|eot|>"], *stops))


def _text_ids(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Ids of ordinary text."""
    special = set(tokenizer.special.values())
    return tuple(i for i in range(tokenizer.vocab_size) if i not in special)


def _patches(config: AudioLMConfig, codes_MR: np.ndarray) -> np.ndarray:
    codes_MR = np.asarray(codes_MR)
    if codes_MR.ndim != 2 or codes_MR.shape[1] < config.num_channels or len(codes_MR) < config.group_size:
        expected = f"at least {config.group_size} frames of {config.num_channels} levels"
        raise ConfigError(f"codes: expected {expected}, got shape {codes_MR.shape}")
    return codes_MR[:, : config.num_channels].reshape(-1, config.group_size, config.num_channels)


def _prompt(config: AudioLMConfig, *pieces: Sequence[int] | np.ndarray) -> Prompt:
    """Joins lists of ids and arrays of patches [n, G, R]."""
    shape = (0, config.group_size, config.num_channels)
    text: list[int] = []
    patches = [np.zeros(shape, np.int32)]
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            text += [config.empty_id] * len(piece)
            patches.append(piece.astype(np.int32))
        else:
            text += piece
    return Prompt(np.asarray(text, np.int32), np.concatenate(patches))
