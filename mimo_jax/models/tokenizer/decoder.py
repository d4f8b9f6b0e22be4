"""Decoder of the audio tokenizer: quantised vectors (25 Hz) to a coarse mel (100 Hz), on packed rows.

B rows, M RVQ frames (25 Hz), H hidden frames (50 Hz), T mel frames (100 Hz), D width, F mel bins; L positions on any
grid, K taps of a kernel, O output channels.

Source: report section 2.1 and the released code.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mimo_jax.config import AudioTokenizerConfig, ComputeConfig
from mimo_jax.models.tokenizer.segments import same_segment, segment_positions, segment_sum, shift
from mimo_jax.models.transformer import KVCache, Linear, Transformer

GROUP_NORM_EPS = 1e-5


class UpConv(nn.Module):
    """Transposed convolution, then group norm with one group, then a crop of the right end, for each segment by itself.

    With norm `sequence`, as published, the statistics run over all channels and the whole
    (n - 1) * stride + kernel_size samples of a segment of n positions: also over the kernel_size - stride samples that
    are cropped afterwards. With norm `frame` they run over all channels of the `stride` samples that one position
    gives, so that nothing depends on later positions.
    """

    features_in: int
    features_out: int
    kernel_size: int
    stride: int
    compute: ComputeConfig
    norm: Literal["sequence", "frame"] = "sequence"

    @nn.compact
    def __call__(self, x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Maps [B, L, features_in] to [B, L * stride, features_out] in the compute dtype; padding gives zeros."""
        stride, overlap = self.stride, self.kernel_size - self.stride
        param_dtype = jnp.dtype(self.compute.param_dtype)
        outputs = (self.kernel_size, self.features_out)
        conv = Linear((self.features_in,), outputs, ("embed",), (None, None), False, self.compute, name="conv")
        taps_BLKO = conv(x_BLD)
        taps_BLKO = taps_BLKO.astype(jnp.promote_types(taps_BLKO.dtype, jnp.float32))

        def vector(name: str, init: nn.initializers.Initializer) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(init, ("norm",)), (self.features_out,), param_dtype)

        bias = vector("bias", nn.initializers.zeros)
        scale, offset = vector("norm_scale", nn.initializers.ones), vector("norm_bias", nn.initializers.zeros)

        valid_BL11 = (segment_ids_BL > 0)[..., None, None]
        body, beyond = taps_BLKO[:, :, :stride], taps_BLKO[:, :, stride:] + bias
        if overlap:
            # The last taps of a position fall on the first samples of the next one, if it is of the same segment ...
            carried = jnp.where(same_segment(segment_ids_BL, 1)[..., None, None], shift(taps_BLKO[:, :, stride:], 1), 0)
            body = jnp.concatenate([body[:, :, :overlap] + carried, body[:, :, overlap:]], axis=2)
        body = body + bias
        if self.norm == "frame":
            mean = body.mean((2, 3), keepdims=True)
            variance = jnp.square(body - mean).mean((2, 3), keepdims=True)
        else:
            # ... and beyond the end of a segment they are cropped, but count in the statistics.
            last_BL11 = valid_BL11 & (segment_ids_BL != shift(segment_ids_BL, -1))[..., None, None]

            def total(of_body: jax.Array, of_beyond: jax.Array) -> jax.Array:
                sums_BL = jnp.where(valid_BL11, of_body, 0).sum((2, 3)) + jnp.where(last_BL11, of_beyond, 0).sum((2, 3))
                return segment_sum(sums_BL, segment_ids_BL)[..., None, None]

            positions = segment_sum(valid_BL11[..., 0, 0].astype(body.dtype), segment_ids_BL)[..., None, None]
            size = (positions * stride + overlap) * self.features_out
            size = jnp.maximum(size, 1)
            mean = total(body, beyond) / size
            variance = total((body - mean) ** 2, (beyond - mean) ** 2) / size
        body = (body - mean) * jax.lax.rsqrt(variance + GROUP_NORM_EPS) * scale + offset
        body = jnp.where(valid_BL11, body, 0).astype(jnp.dtype(self.compute.dtype))
        return body.reshape(body.shape[0], -1, self.features_out)


class Decoder(nn.Module):
    """Up-convolution, causal transformer, up-convolution."""

    config: AudioTokenizerConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, compute, d = self.config, self.compute, self.config.decoder.d_model
        if c.pool > 1:
            self.up1 = UpConv(d, d, c.pool, c.pool, compute, c.decoder_norm)
        self.transformer = Transformer(c.decoder, compute)
        self.up2 = UpConv(d, c.mel.n_mels, 3, c.stem_stride, compute, c.decoder_norm)

    def __call__(
        self, q_BMD: jax.Array, segment_ids_BM: jax.Array, extent_BM: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Decodes rows.

        Args:
            q_BMD: quantised vectors, float.
            segment_ids_BM: int32; segments may stand side by side.
            extent_BM: int32, with one sequence at the start of each row: 1 at the frames over which the up-convolutions
                run, as in the released code's padded batch (see `reference`). By default they run over the segments.

        Returns:
            Coarse mel [B, T, F] in the compute dtype, zero at padding, and its segment ids [B, T]: each RVQ frame gives
            4 mel frames.
        """
        c = self.config

        def up(conv: UpConv, x_BLD: jax.Array, ids_BL: jax.Array, repeat: int) -> jax.Array:
            if extent_BM is None:
                return conv(x_BLD, ids_BL)
            extent_BL = jnp.repeat(extent_BM, repeat, axis=1)
            y_BLD = conv(jnp.where((ids_BL > 0)[..., None], x_BLD, 0), extent_BL)
            return jnp.where((jnp.repeat(ids_BL, conv.stride, axis=1) > 0)[..., None], y_BLD, 0)

        x_BHD, segment_ids_BH = q_BMD, segment_ids_BM
        if c.pool > 1:
            x_BHD = up(self.up1, q_BMD, segment_ids_BM, 1)
            segment_ids_BH = jnp.repeat(segment_ids_BM, c.pool, axis=1)
        x_BHD, _ = self.transformer(
            x_BHD, segment_ids_BL=segment_ids_BH, positions_BL=segment_positions(segment_ids_BH)
        )
        mel_BTF = up(self.up2, x_BHD, segment_ids_BH, c.pool)
        return mel_BTF, jnp.repeat(segment_ids_BH, c.stem_stride, axis=1)

    def step(self, q_BMD: jax.Array, past: DecoderPast) -> tuple[jax.Array, DecoderPast]:
        """Decodes the next frames of sequences; needs `decoder_norm` "frame".

        Args:
            q_BMD: quantised vectors. Those of the last step may be padded: what they give is to be ignored.
            past: what the frames before have left.

        Returns:
            Coarse mel [B, T, F] of these frames, and the new past.
        """
        ones_BM = jnp.ones(q_BMD.shape[:2], jnp.int32)
        x_BHD = self.up1(q_BMD, ones_BM) if self.config.pool > 1 else q_BMD
        x_BHD, cache = self.transformer(x_BHD, cache=past.cache)
        # The last taps of the hidden frame before fall on the first sample of these.
        row_BHD = jnp.concatenate([past.last_B1D, x_BHD], axis=1)
        ids_BH = jnp.ones(row_BHD.shape[:2], jnp.int32).at[:, 0].set(past.cache.lengths_B > 0)
        mel_BTF = self.up2(row_BHD, ids_BH)[:, self.config.stem_stride :]
        return mel_BTF, DecoderPast(cache, x_BHD[:, -1:])


class DecoderPast(flax.struct.PyTreeNode):
    """What streaming keeps of the frames before: keys and values, and the last hidden frame [B, 1, D]."""

    cache: KVCache
    last_B1D: jax.Array
