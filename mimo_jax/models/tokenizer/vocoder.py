"""Vocoder of the audio tokenizer: coarse mel (100 Hz) to the wave (24 kHz), on packed rows.

B rows, T mel frames, F mel bins, N samples of a frame (n_fft), S samples.

Source: report section 2.1 and the released code.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.audio.features import hann_window, istft_frames
from mimo_jax.config import AudioTokenizerConfig, ComputeConfig
from mimo_jax.models.tokenizer.segments import segment_positions, shift
from mimo_jax.models.transformer import Linear, Transformer

MAX_MAGNITUDE = 100.0


class Vocoder(nn.Module):
    """Linear map, transformer with a window, magnitude and phase of each frame, inverse STFT."""

    config: AudioTokenizerConfig
    compute: ComputeConfig

    @nn.compact
    def coefficients(
        self, mel_BTF: jax.Array, segment_ids_BT: jax.Array, extent_BT: jax.Array | None = None
    ) -> jax.Array:
        """Log magnitudes and phases of each frame [B, T, n_fft + 2], float32 (float64 in float64); see `__call__`."""
        mel, width = self.config.mel, self.config.vocoder.d_model
        x_BTD = Linear((mel.n_mels,), (width,), ("embed",), (None,), False, self.compute, name="embed")(mel_BTF)
        x_BTD, _ = Transformer(self.config.vocoder, self.compute, name="transformer")(
            x_BTD, segment_ids_BL=segment_ids_BT, positions_BL=segment_positions(segment_ids_BT)
        )
        if extent_BT is not None:
            x_BTD = jnp.where((segment_ids_BT > 0)[..., None], x_BTD, 0)
        # Phases of many radians and logs of magnitudes: bfloat16 would be heard as noise.
        wide = self.compute if self.compute.dtype == "float64" else dataclasses.replace(self.compute, dtype="float32")
        return Linear((width,), (mel.n_fft + 2,), ("embed",), (None,), True, wide, name="head")(x_BTD)

    def __call__(self, mel_BTF: jax.Array, segment_ids_BT: jax.Array, extent_BT: jax.Array | None = None) -> jax.Array:
        """Maps coarse mel frames to samples.

        Args:
            mel_BTF: float.
            segment_ids_BT: int32; segments may stand side by side.
            extent_BT: int32, with one sequence at the start of each row: 1 at the frames that are overlap-added, as in
                the released code's padded batch (see `reference`), where padding is not silent. By default segments.

        Returns:
            wav_BS, S = hop * T, float32 (float64 in float64); zero at padding (outside the extent).
        """
        coefficients = self.coefficients(mel_BTF, segment_ids_BT, extent_BT)
        return synthesize(coefficients, segment_ids_BT if extent_BT is None else extent_BT, self.config.mel.hop_length)


def synthesize(coefficients_BTE: jax.Array, segment_ids_BT: jax.Array, hop: int) -> jax.Array:
    """Inverse STFT of log magnitudes and phases [B, T, E = n_fft + 2]: wav_BS, each segment by itself."""
    log_magnitude, phase = jnp.split(coefficients_BTE, 2, axis=-1)
    # The minimum stands inside: exp of a large number would make the gradient 0 * inf.
    magnitude = jnp.exp(jnp.minimum(log_magnitude, math.log(MAX_MAGNITUDE)))
    spectrum = jax.lax.complex(magnitude * jnp.cos(phase), magnitude * jnp.sin(phase))
    return overlap_add(istft_frames(spectrum), segment_ids_BT, hop)


def overlap_add(frames_BTN: jax.Array, segment_ids_BT: jax.Array, hop: int) -> jax.Array:
    """Overlap-adds windowed frames with "same" padding, each segment by itself.

    A segment of n frames gives hop * n samples: the overlap-added frames divided by the overlap-added squared Hann
    window, cropped by (N - hop) / 2 on both sides.

    Args:
        frames_BTN: windowed frames (see `istft_frames`).
        segment_ids_BT: int32; segments may stand side by side, 0 is padding.
        hop: samples between two frames.

    Returns:
        wav_BS, S = hop * T, in the dtype of the frames; zero at padding.
    """
    batch, length, size = frames_BTN.shape
    # Seen from the cropped grid, frame t begins `crop` samples before block t. Zeros in front make that whole blocks:
    # then block f of the output is the sum over chunks j of frame f + before - j, made of slices and additions.
    crop = (size - hop) // 2
    before = -(-crop // hop)
    lead = before * hop - crop
    chunks = -(-(lead + size) // hop)
    pad = (lead, chunks * hop - lead - size)
    frames = jnp.pad(frames_BTN, ((0, 0), (0, 0), pad)).reshape(batch, length, chunks, hop)
    squares = np.pad(hann_window(size) ** 2, pad).reshape(chunks, hop).astype(frames.dtype)

    wav = jnp.zeros((batch, length, hop), frames.dtype)
    envelope = jnp.zeros((batch, length, hop), frames.dtype)
    for j in range(chunks):
        same = (segment_ids_BT > 0) & (segment_ids_BT == shift(segment_ids_BT, j - before))
        wav = wav + jnp.where(same[..., None], shift(frames[:, :, j], j - before), 0)
        envelope = envelope + jnp.where(same[..., None], squares[j], 0)
    return (wav / jnp.where(envelope > 0, envelope, 1)).reshape(batch, length * hop)
