"""Language model core: text embedding, causal transformer, untied text head (report section 2.2).

Axes: B batch, L positions, D width, V text vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mimo_jax.config import AudioLMConfig, ComputeConfig
from mimo_jax.models.transformer import Transformer, initializer


class LLM(nn.Module):
    """Parameters: `embedding` [V, D], `transformer`, `head` [D, V]."""

    config: AudioLMConfig
    compute: ComputeConfig

    def setup(self) -> None:
        vocab, width = self.config.vocab_size, self.config.llm.d_model
        param_dtype = jnp.dtype(self.compute.param_dtype)
        rows = nn.with_logical_partitioning(initializer(), ("vocab", "embed"))
        columns = nn.with_logical_partitioning(initializer(), ("embed", "vocab"))
        self.embedding = self.param("embedding", rows, (vocab, width), param_dtype)
        self.head = self.param("head", columns, (width, vocab), param_dtype)
        self.transformer = Transformer(self.config.llm, self.compute)

    def embed(self, text_BL: jax.Array) -> jax.Array:
        """Text embeddings [B, L, D]; zero where the id is `<|empty|>`."""
        x_BLD = jnp.asarray(self.embedding)[text_BL].astype(self.compute.dtype)
        return jnp.where((text_BL != self.config.empty_id)[..., None], x_BLD, 0)

    def logits(self, h: jax.Array) -> jax.Array:
        """Text logits [..., V] of hidden states [..., D], float32 (float64 for float64)."""
        dtype = jnp.dtype(self.compute.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        return jnp.einsum("...d,dv->...v", h.astype(dtype), jnp.asarray(self.head, dtype), preferred_element_type=wide)
