"""Patch encoder and patch decoder: the bridge between RVQ codes and the language model (report section 2.2).

The encoder turns the codes of a patch into one vector of the LLM; the decoder turns a hidden state of the LLM into the
codes of the next patch, in G + max(delay) steps: channel r is predicted at steps d_r .. d_r + G - 1, and the input of a
step is the sum of the embeddings of the codes predicted at the step before. One set of audio tables serves both.

Axes: N patches, G frames of a patch, R channels, T steps, D LLM width, E width of encoder and tables, P decoder width,
V_r entries of channel r and its "empty" id, which is the last and stands for nothing: it contributes zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mimo_jax.config import AudioLMConfig, ComputeConfig
from mimo_jax.kernels.rvq_embed import rvq_embed
from mimo_jax.models.transformer import KVCache, Linear, Transformer, initializer


def _short_rows(compute: ComputeConfig) -> ComputeConfig:
    """Rows of 4 frames or 11 steps are always dense, whatever the rows of the LLM ask for."""
    return dataclasses.replace(compute, attention="dense")


class PatchEncoder(nn.Module):
    """Parameters: `embedding` [sum of V_r, E] (the audio tables one below the other), `transformer`, `projection`."""

    config: AudioLMConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, width = self.config, self.config.patch_encoder.d_model
        init = nn.with_logical_partitioning(initializer(), ("audio_vocab", "embed"))
        shape = (sum(c.audio_vocab_sizes), width)
        self.embedding = self.param("embedding", init, shape, jnp.dtype(self.compute.param_dtype))
        self.transformer = Transformer(c.patch_encoder, _short_rows(self.compute))
        self.projection = Linear(
            (c.group_size, width), (c.llm.d_model,), ("frame", None), ("embed",), use_bias=False, compute=self.compute
        )

    def embed(self, codes: jax.Array, delays: Sequence[int] | None = None, num_steps: int | None = None) -> jax.Array:
        """Sum [B, ..., T, E] over the channels of the embeddings of codes [B, ..., G, R], as `rvq_embed` makes it."""
        # Looked up in the parameters' precision: thousands of gradients add up in a row, which bfloat16 would lose.
        return rvq_embed(
            jnp.asarray(self.embedding),
            codes,
            self.config.audio_vocab_sizes,
            delays=delays,
            num_steps=num_steps,
            dtype=self.compute.dtype,
            implementation=self.compute.kernels,
        )

    def __call__(self, x_NGE: jax.Array) -> jax.Array:
        """Embedded codes of N patches, from `embed` -> their vectors [N, D] in the LLM."""
        y_NGE, _ = self.transformer(x_NGE)
        return self.projection(y_NGE)


class PatchDecoder(nn.Module):
    """Parameters: `input` [D, P], `transformer`, `head_r` [P, V_r], and `codes` [E, P] if E differs from P.

    It reads the tables through sums that `PatchEncoder.embed` looked up.
    """

    config: AudioLMConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, width = self.config, self.config.patch_decoder.d_model

        def linear(inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Linear:
            return Linear((inputs,), (outputs,), axes[:1], axes[1:], use_bias=False, compute=self.compute)

        self.input = linear(c.llm.d_model, width, ("embed", None))
        self.transformer = Transformer(c.patch_decoder, _short_rows(self.compute))
        self.head = [linear(width, size, ("embed", "audio_vocab")) for size in c.audio_vocab_sizes]
        if c.patch_encoder.d_model != width:
            self.codes = linear(c.patch_encoder.d_model, width, ("embed", None))

    def start(self, h_ND: jax.Array) -> jax.Array:
        """Input [N, P] of step 0: the projected hidden state of the position before the patch."""
        return self.input(h_ND)

    def code_input(self, x: jax.Array) -> jax.Array:
        """Input [..., P] of a later step, from the embedded codes [..., E] of the step before."""
        return x if self.config.patch_encoder.d_model == self.config.patch_decoder.d_model else self.codes(x)

    def hidden(self, h_ND: jax.Array, x_NSE: jax.Array) -> jax.Array:
        """Teacher-forced hidden states [N, T, P] of all steps.

        Args:
            h_ND: hidden state of the position before each patch.
            x_NSE: embedded true codes of all steps but the last, S = T - 1; nobody reads those of the last.
        """
        x_NTP = jnp.concatenate([self.start(h_ND)[:, None], self.code_input(x_NSE)], axis=1)
        return self.transformer(x_NTP)[0]

    def step(self, x_NP: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Hidden state [N, P] of the next step."""
        y, cache = self.transformer(x_NP[:, None], cache=cache)
        return y[:, 0], cache

    def logits(self, y: jax.Array, channel: int) -> jax.Array:
        """Logits [..., V_r] of one channel, float32 (float64 for float64)."""
        return self.head[channel](y).astype(jnp.promote_types(self.compute.dtype, jnp.float32))
