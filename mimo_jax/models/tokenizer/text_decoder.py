"""Text decoder of the audio-to-text objective: a causal LM whose prefix is the quantised sequence of the clip.

B rows, M RVQ frames, U text tokens, D width of the audio tokenizer, V text vocabulary.

Source: report section 2.1 (A2T). Its size is not stated there.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mimo_jax.config import A2TConfig, ComputeConfig
from mimo_jax.models.tokenizer.segments import segment_positions
from mimo_jax.models.transformer import Linear, Transformer, initializer


class TextDecoder(nn.Module):
    """Reads the quantised frames and the text of the packed clips. The text head is its parameter `head` [width, V]."""

    config: A2TConfig
    audio_width: int
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        quantized_BMD: jax.Array,
        segment_ids_BM: jax.Array,
        text_BU: jax.Array,
        text_segment_ids_BU: jax.Array,
        text_positions_BU: jax.Array,
    ) -> jax.Array:
        """Hidden states that predict the next token at every text position.

        The row is all frames, then all text tokens; a token sees the frames of its own clip and the text before it.

        Args:
            quantized_BMD: quantised vectors.
            segment_ids_BM: int32 clip of each RVQ frame.
            text_BU: as in `mimo_jax.rows.TokenizerRows`, and so are the last two.
            text_segment_ids_BU: int32.
            text_positions_BU: int32.

        Returns:
            [B, U, width] in the compute dtype. The logits [B, U, V] would be 200 GB in a published batch: the loss
            makes them from `head` chunk by chunk.
        """
        width, vocab = self.config.transformer.d_model, self.config.vocab_size
        param_dtype = jnp.dtype(self.compute.param_dtype)
        frames = Linear((self.audio_width,), (width,), (None,), ("embed",), False, self.compute, name="frames")
        rows = nn.with_logical_partitioning(initializer(), ("vocab", "embed"))
        table = self.param("embedding", rows, (vocab, width), param_dtype)
        self.param("head", nn.with_logical_partitioning(initializer(), ("embed", "vocab")), (width, vocab), param_dtype)
        # Looked up before it is rounded: the gradients of a row add up in the dtype of the table.
        text = table[text_BU].astype(jnp.dtype(self.compute.dtype))
        x = jnp.concatenate([frames(quantized_BMD), text], axis=1)
        segment_ids = jnp.concatenate([segment_ids_BM, text_segment_ids_BU], axis=1)
        positions = jnp.concatenate([segment_positions(segment_ids_BM), text_positions_BU], axis=1)
        x, _ = Transformer(self.config.transformer, self.compute, name="transformer")(
            x, segment_ids_BL=segment_ids, positions_BL=positions
        )
        return x[:, segment_ids_BM.shape[1] :]
