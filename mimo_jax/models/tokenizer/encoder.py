"""Encoder of the audio tokenizer: log-mel (100 Hz) to the RVQ's input (25 Hz), on packed rows.

B rows, T mel frames (100 Hz), H hidden frames (50 Hz), M RVQ frames (25 Hz), F mel bins, D width. A segment is encoded
as if it were alone: whatever lies outside is the convolutions' zero padding, and attention and positions stay inside.
(`extent_BT` gives the released code's padded batch instead; see `reference`.)

Source: report section 2.1 and the released code.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mimo_jax.config import AudioTokenizerConfig, ComputeConfig
from mimo_jax.models.tokenizer.segments import segment_positions, shift
from mimo_jax.models.transformer import Linear, Norm, Transformer


class Encoder(nn.Module):
    """Two convolutions (the second halves the rate), transformer with a skip, and a pooling convolution."""

    config: AudioTokenizerConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self, mel_BTF: jax.Array, segment_ids_BT: jax.Array, extent_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes rows.

        Args:
            mel_BTF: log-mel frames; T is a multiple of the mel frames of an RVQ frame.
            segment_ids_BT: int32, 0 at frames that belong to no clip. A segment begins at a whole RVQ frame, and at
                least one frame of padding follows it.
            extent_BT: int32, with one clip at the start of each row: not 0 at the frames that the convolutions read as
                the released code does, padding included.

        Returns:
            z_BMD in the compute dtype, and segment_ids_BM int32: RVQ frame m exists if mel frame 4 m does.
        """
        c, compute, d = self.config, self.compute, self.config.encoder.d_model
        mel_BTF = _mask(mel_BTF.astype(jnp.dtype(compute.dtype)), segment_ids_BT)

        # Kernel 3 as one product of three neighbours: on CPU its gradient is much faster than that of a convolution.
        neighbours = jnp.stack([shift(mel_BTF, 1), mel_BTF, shift(mel_BTF, -1)], axis=2)
        x_BTD = Linear((3, c.mel.n_mels), (d,), (None, None), ("embed",), True, compute, name="conv1")(neighbours)
        x_BTD = _mask(nn.gelu(x_BTD, approximate=False), segment_ids_BT if extent_BT is None else extent_BT)

        # Stride 2: hidden frame j sees the frames 2 j - 1, 2 j, 2 j + 1.
        pairs = x_BTD.reshape(x_BTD.shape[0], -1, 2, d)
        neighbours = jnp.concatenate([shift(pairs[:, :, 1:], 1), pairs], axis=2)
        x_BHD = Linear((3, d), (d,), (None, None), ("embed",), True, compute, name="conv2")(neighbours)
        x_BHD = nn.gelu(x_BHD, approximate=False)
        segment_ids_BH = segment_ids_BT[:, ::2]
        x_BHD = _mask(x_BHD, segment_ids_BH)

        where = {"segment_ids_BL": segment_ids_BH, "positions_BL": segment_positions(segment_ids_BH)}
        lower = c.encoder_skip_layer or 0
        skip_BHD = None
        if lower:
            config = dataclasses.replace(c.encoder, num_layers=lower)
            x_BHD, _ = Transformer(config, compute, final_norm=False, name="lower")(x_BHD, **where)
            skip_BHD = x_BHD
        config = dataclasses.replace(c.encoder, num_layers=c.encoder.num_layers - lower)
        x_BHD, _ = Transformer(config, compute, final_norm=False, name="upper")(x_BHD, **where)
        if skip_BHD is not None:
            x_BHD = x_BHD + skip_BHD
        x_BHD = Norm(c.encoder.norm, d, c.encoder.norm_eps, compute, name="norm")(x_BHD)
        if c.pool == 1:
            return x_BHD, segment_ids_BH

        # A segment of an odd number of hidden frames sees a zero as its last one.
        x_BHD = _mask(x_BHD, segment_ids_BH)
        if extent_BT is not None:
            x_BHD = _mask(_repeat_last(x_BHD, segment_ids_BH), extent_BT[:, ::2])
        pairs = x_BHD.reshape(x_BHD.shape[0], -1, c.pool, d)
        z_BMD = Linear((c.pool, d), (d,), (None, None), ("embed",), False, compute, name="pool")(pairs)
        z_BMD = nn.gelu(z_BMD, approximate=False)
        z_BMD = Norm(c.encoder.norm, d, c.encoder.norm_eps, compute, name="pool_norm")(z_BMD)
        return z_BMD, segment_ids_BH[:, :: c.pool]


def _mask(x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    return jnp.where((segment_ids_BL > 0)[..., None], x_BLD, 0)


def _repeat_last(x_BLD: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Fills the padding of a row with the last vector of its only segment."""
    last_B = jnp.maximum(jnp.sum(segment_ids_BL > 0, axis=1) - 1, 0)
    last_BD = x_BLD[jnp.arange(x_BLD.shape[0]), last_B]
    return jnp.where((segment_ids_BL > 0)[..., None], x_BLD, last_BD[:, None])
