"""The arrays that a step reads: packed rows of the language model and of the audio tokenizer.

B rows of the batch, L positions, C patch budget, G frames of a patch, R channels; S samples, T mel frames (100 Hz),
M RVQ frames (25 Hz), U text tokens. Segment 0 is padding; documents of a row are numbered from 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray on the host, jax.Array on the device


class LMRows(NamedTuple):
    """Packed rows of the language model. One position is one text token or one audio patch.

    A position's hidden state predicts the next position of the same document; weights are aligned with the target:
    `text_weights_BL[b, i]` weighs the prediction of position i, made from position i - 1.
    """

    text_BL: Array  # int32 text id; `<|empty|>` where the position is a patch
    patches_BCGR: Array  # uint16; the row's patches in order
    patch_positions_BC: Array  # int32 position of each patch in the row; L = unused slot
    segment_ids_BL: Array  # int32
    positions_BL: Array  # int32, restarts at 0 in each document
    task_ids_BL: Array  # uint8, index into `data.layouts.TASKS`
    text_weights_BL: Array  # float32
    audio_weights_BC: Array  # float32


class TokenizerRows(NamedTuple):
    """Packed clips for the audio tokenizer.

    A clip of n samples has T_i = n // hop + 1 mel frames and M_i = ceil(T_i / 4) RVQ frames. Its slot is M_i + 1 RVQ
    frames long and starts at a multiple of 960 samples (4 mel frames, 1 RVQ frame); it holds the clip reflect-padded by
    n_fft / 2 samples on both sides, then zeros. So mel frame t of the row is the window that starts at sample hop * t,
    and the extra RVQ frame keeps the windows of a clip out of the next slot.
    """

    wav_BS: Array  # float32, S = 960 M
    segment_ids_BT: Array  # int32 at 100 Hz; 0 outside the T_i frames of a clip
    text_BU: Array  # int32 A2T inputs: end-of-text, then the tokens
    text_targets_BU: Array  # int32 A2T targets: the tokens, then end-of-text
    text_segment_ids_BU: Array  # int32, the clip that a text token belongs to; 0 = padding
    text_positions_BU: Array  # int32, M_i + index within the text
    text_weights_BU: Array  # float32
