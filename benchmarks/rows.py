"""Rows for benchmarks that need no data."""

from __future__ import annotations

import numpy as np

from mimo_jax.config import LMTrainConfig
from mimo_jax.rows import LMRows


def made_up_rows(config: LMTrainConfig, seed: int) -> LMRows:
    """Rows of two documents each, text and patches mixed; they depend on the seed alone."""
    d, m = config.data, config.model
    B, L, C = d.rows, d.row_length, d.row_patches
    rng = np.random.default_rng(seed)
    text_BL = rng.integers(16, m.vocab_size, (B, L)).astype(np.int32)
    at_BC = np.sort(rng.permuted(np.tile(np.arange(L), (B, 1)), axis=1)[:, :C], axis=1).astype(np.int32)
    np.put_along_axis(text_BL, at_BC, m.empty_id, axis=1)
    border = L // 3
    second_L = np.arange(L) >= border
    codes = [rng.integers(0, size, (B, C, m.group_size)) for size in m.codebook_sizes]
    return LMRows(
        text_BL=text_BL,
        patches_BCGR=np.stack(codes, -1).astype(np.uint16),
        patch_positions_BC=at_BC,
        segment_ids_BL=np.tile(1 + second_L, (B, 1)).astype(np.int32),
        positions_BL=np.tile(np.arange(L) - border * second_L, (B, 1)).astype(np.int32),
        task_ids_BL=np.zeros((B, L), np.uint8),
        text_weights_BL=np.where(text_BL == m.empty_id, 0.1, 1.0).astype(np.float32),
        audio_weights_BC=np.ones((B, C), np.float32),
    )
