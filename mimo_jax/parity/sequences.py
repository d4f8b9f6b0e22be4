"""The reference's `input_ids` and our rows.

T groups, G frames of a group, R channels, L positions of a row. Of [1 + R, T * G] ids, row 0 holds the text id of a
group in its first column, then -100 (in prompts) or the id again (in what was generated); rows 1.. hold the codes, the
channel's "empty" id where the group is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mimo_jax.config import AudioLMConfig
from mimo_jax.generation.generate import Prompt
from mimo_jax.rows import LMRows


class Groups(NamedTuple):
    """One sequence: text id of each group [T], and its codes [T, G, R]."""

    text_T: np.ndarray
    codes_TGR: np.ndarray

    @classmethod
    def of_prompt(cls, prompt: Prompt, config: AudioLMConfig) -> Groups:
        """A prompt of ours."""
        shape = (len(prompt.text), config.group_size, config.num_channels)
        codes_TGR = np.broadcast_to(np.array(config.codebook_sizes), shape).copy()
        codes_TGR[prompt.text == config.empty_id] = prompt.patches
        return cls(prompt.text.astype(np.int32), codes_TGR)

    def patches(self, config: AudioLMConfig) -> np.ndarray:
        """int32 codes [C, G, R] of the groups that are patches."""
        return self.codes_TGR[self.text_T == config.empty_id].astype(np.int32)


def read_ids(ids: np.ndarray, config: AudioLMConfig) -> Groups:
    """The groups of reference ids."""
    G = config.group_size
    return Groups(ids[0, ::G].astype(np.int32), ids[1:].T.reshape(-1, G, config.num_channels))


def write_ids(groups: Groups, config: AudioLMConfig, prompt: int | None = None) -> np.ndarray:
    """Reference ids int64 of a sequence whose groups from `prompt` on were generated (none by default)."""
    G, R = config.group_size, config.num_channels
    text_T, codes_TGR = groups
    text_TG = np.full((len(text_T), G), -100)
    text_TG[:, 0] = text_T
    if prompt is not None:
        text_TG[prompt:] = text_T[prompt:, None]
    return np.concatenate([text_TG.reshape(1, -1), codes_TGR.reshape(-1, R).T]).astype(np.int64)


def one_row(sequences: Sequence[Groups], config: AudioLMConfig) -> tuple[LMRows, list[slice]]:
    """All sequences side by side in one packed row, with every target weighing 1, and where each of them lies."""
    text_L = np.concatenate([s.text_T for s in sequences])
    lengths = [len(s.text_T) for s in sequences]
    ends = np.cumsum(lengths)
    at_C = np.flatnonzero(text_L == config.empty_id).astype(np.int32)
    rows = LMRows(
        text_BL=text_L[None],
        patches_BCGR=np.concatenate([s.patches(config) for s in sequences])[None],
        patch_positions_BC=at_C[None],
        segment_ids_BL=np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None],
        positions_BL=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None],
        task_ids_BL=np.zeros((1, len(text_L)), np.uint8),
        text_weights_BL=np.ones((1, len(text_L)), np.float32),
        audio_weights_BC=np.ones((1, len(at_C)), np.float32),
    )
    return rows, [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]
