"""Audio language model: patch encoder, LLM, patch decoder (report section 2.2).

One position of a row is one text token or one audio patch. A hidden state predicts the next position: the text head
says which text token, or `<|empty|>`, which means that a patch comes; the patch decoder then says which.

Axes: B batch, L positions, C patch slots of a row, N patches, G frames of a patch, R channels, T steps of the patch
decoder, D LLM width, P patch-decoder width, V text vocabulary, V_r audio vocabulary of channel r.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AudioLMConfig, ComputeConfig
from mimo_jax.models.llm import LLM
from mimo_jax.models.patch_codec import PatchDecoder, PatchEncoder
from mimo_jax.models.transformer import KVCache, unstack_layers
from mimo_jax.rows import LMRows
from mimo_jax.sharding import rows_per_device

GROUPS = ("llm", "patch_encoder", "patch_decoder")


class AudioLM(nn.Module):
    """The whole model. Parameter groups: `llm`, `patch_encoder` (with the audio tables), `patch_decoder`.

    `apply` needs a method for anything but the packed forward pass, as in
    `model.apply({"params": p}, h, method="text_head")`.
    """

    config: AudioLMConfig
    compute: ComputeConfig

    def setup(self) -> None:
        self.llm = LLM(self.config, self.compute)
        self.patch_encoder = PatchEncoder(self.config, self.compute)
        self.patch_decoder = PatchDecoder(self.config, self.compute)

    def __call__(self, rows: LMRows) -> jax.Array:
        """Hidden states [B, L, D] of packed rows, after the final norm, in the compute dtype."""
        x_BLD = self.embed(rows.text_BL, rows.patches_BCGR, rows.patch_positions_BC)
        return self.hidden(x_BLD, rows.segment_ids_BL, rows.positions_BL)[0]

    # ------------------------------------------------------------------------------------------------------
    # LLM

    def embed(self, text_BL: jax.Array, patches_BCGR: jax.Array, patch_positions_BC: jax.Array) -> jax.Array:
        """Input vectors of rows.

        Args:
            text_BL: int32 text ids; `<|empty|>` where the position is a patch.
            patches_BCGR: int codes of the patch slots. C = 0 (rows without audio) leaves the patch encoder out.
            patch_positions_BC: int32 position of each patch; L marks an unused slot.

        Returns:
            [B, L, D] in the compute dtype.
        """
        return self.add_patches(self.embed_text(text_BL), patches_BCGR, patch_positions_BC)

    def add_patches(self, x_BLD: jax.Array, patches_BCGR: jax.Array, patch_positions_BC: jax.Array) -> jax.Array:
        """Input vectors [B, L, D] of the text of rows, with those of their patches added; arguments as in `embed`."""
        if patches_BCGR.shape[1] == 0:
            return x_BLD

        def encode(model: AudioLM, x_BXGE: jax.Array) -> jax.Array:
            return model.patch_encoder(x_BXGE.reshape(-1, *x_BXGE.shape[2:])).reshape(*x_BXGE.shape[:2], -1)

        patches_BCD = self._over_patches(encode, self.patch_encoder.embed(patches_BCGR))
        return jax.vmap(lambda x, at, patches: x.at[at].add(patches, mode="drop"))(
            x_BLD, patch_positions_BC, patches_BCD
        )

    def embed_text(self, text_BL: jax.Array) -> jax.Array:
        """Text embeddings [B, L, D]; zero where the id is `<|empty|>`."""
        return self.llm.embed(text_BL)

    def embed_patches(self, patches_NGR: jax.Array) -> jax.Array:
        """Vectors [N, D] of patches; "empty" ids contribute nothing."""
        return self.patch_encoder(self.patch_encoder.embed(patches_NGR))

    def hidden(
        self,
        x_BLD: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        cache: KVCache | None = None,
        cache_valid_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states [B, L, D] after the final norm, and the new cache; arguments as in `Transformer`."""
        return self.llm.transformer(
            x_BLD,
            segment_ids_BL=segment_ids_BL,
            positions_BL=positions_BL,
            cache=cache,
            cache_valid_BL=cache_valid_BL,
        )

    def text_head(self, h: jax.Array) -> jax.Array:
        """Text logits [..., V] of hidden states [..., D]; float32 (float64 for float64)."""
        return self.llm.logits(h)

    def text_head_kernel(self) -> jax.Array:
        """Kernel [D, V] of the text head, in the parameter dtype: what a chunked cross-entropy needs."""
        return self.llm.head

    # ------------------------------------------------------------------------------------------------------
    # Patch decoder

    def patch_hidden(self, h_ND: jax.Array, patches_NGR: jax.Array) -> jax.Array:
        """Teacher-forced hidden states [N, T, P] of the patch decoder.

        Args:
            h_ND: LLM hidden state of the position before each patch.
            patches_NGR: int true codes.
        """
        return self.patch_decoder.hidden(h_ND, self._delayed(patches_NGR))

    def _delayed(self, codes: jax.Array) -> jax.Array:
        """Embedded codes [B, ..., T - 1, E] of the steps of patches [B, ..., G, R], without the last."""
        return self.patch_encoder.embed(codes, self.config.delays, self.config.num_steps - 1)

    def channel_logits(self, y: jax.Array, channel: int) -> jax.Array:
        """Logits [..., V_r] of one channel from hidden states [..., P] of the patch decoder."""
        return self.patch_decoder.logits(y, channel)

    def patch_logits(self, h_ND: jax.Array, patches_NGR: jax.Array) -> tuple[jax.Array, ...]:
        """Teacher-forced logits of each channel: R arrays [N, G, V_r]; arguments as in `patch_hidden`."""
        y_NTP = self.patch_hidden(h_ND, patches_NGR)
        G = self.config.group_size
        return tuple(self.channel_logits(y_NTP[:, d : d + G], r) for r, d in enumerate(self.config.delays))

    def patch_cross_entropy(self, h_BCD: jax.Array, patches_BCGR: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Teacher-forced cross-entropy of the patches of rows, without the logits of more than one channel at once.

        Args:
            h_BCD: LLM hidden state of the position before each patch.
            patches_BCGR: int true codes.

        Returns:
            Cross-entropy in nats [B, C, R] of each channel, summed over the G frames of a patch, float32 (float64 for
            float64), and int32 [B, C, R], how many of the G codes were the best guess.
        """

        # The logits are recomputed in the backward pass.
        @functools.partial(nn.remat, static_argnums=3)
        def channel(model: AudioLM, y_NGP: jax.Array, codes_NGV: jax.Array, r: int) -> tuple[jax.Array, jax.Array]:
            logits = model.channel_logits(y_NGP, r)
            top = jax.lax.stop_gradient(logits).max(-1)
            total = jnp.exp(logits - top[..., None]).sum(-1)
            target = jnp.where(jnp.arange(logits.shape[-1]) == codes_NGV, logits, 0).sum(-1)
            return (jnp.log(total) + top - target).sum(-1), (target >= top).sum(-1, dtype=jnp.int32)

        def channels(model: AudioLM, h_BXD: jax.Array, x_BXSE: jax.Array, patches_BXGR: jax.Array) -> Any:
            patches_NGR = patches_BXGR.reshape(-1, *patches_BXGR.shape[2:]).astype(jnp.int32)
            x_NSE = x_BXSE.reshape(-1, *x_BXSE.shape[2:])
            y_NTP = model.patch_decoder.hidden(h_BXD.reshape(len(patches_NGR), -1), x_NSE)
            G = model.config.group_size
            both = [
                channel(model, y_NTP[:, d : d + G], patches_NGR[..., r, None], r)
                for r, d in enumerate(model.config.delays)
            ]
            return tuple(jnp.stack(x, -1).reshape(*h_BXD.shape[:2], -1) for x in zip(*both, strict=True))

        return self._over_patches(channels, h_BCD, self._delayed(patches_BCGR), patches_BCGR)

    def start_patch(self, h_ND: jax.Array) -> jax.Array:
        """Input [N, P] of the patch decoder's step 0."""
        return self.patch_decoder.start(h_ND)

    def patch_decoder_step(self, x_NP: jax.Array, cache: KVCache) -> tuple[tuple[jax.Array, ...], KVCache]:
        """One step of the patch decoder.

        Args:
            x_NP: input of the step, from `start_patch` (step 0) or `embed_codes`.
            cache: the steps so far; a patch starts with
                `KVCache.zeros(config.patch_decoder, N, config.num_steps, dtype)`.

        Returns:
            Logits [N, V_r] of every channel, of which `active_channels(config, step)` are meant, and the new cache.
        """
        y_NP, cache = self.patch_decoder.step(x_NP, cache)
        return tuple(self.channel_logits(y_NP, r) for r in range(self.config.num_channels)), cache

    def embed_codes(self, codes_NR: jax.Array, active_R: jax.Array) -> jax.Array:
        """Input [N, P] of the next step: the sum of the embeddings of the codes just chosen.

        Args:
            codes_NR: int32 code of each channel; what inactive channels hold does not matter.
            active_R: bool, from `active_channels`.
        """
        empty = np.array(self.config.codebook_sizes)
        codes_NR = jnp.where(active_R, codes_NR, empty)
        return self.patch_decoder.code_input(self.patch_encoder.embed(codes_NR[:, None])[:, 0])

    def _over_patches(self, function: Callable[..., Any], *arrays_BC: jax.Array) -> Any:
        """`function(self, *arrays_BC)`, over `compute.patch_chunk` patches per device at a time.

        Args:
            function: maps arrays [B, X, ...] to a tree of such arrays, each patch by itself.
            arrays_BC: arrays [B, C, ...].
        """
        B, C = arrays_BC[0].shape[:2]
        size = min(C, max(1, self.compute.patch_chunk // rows_per_device(B))) if self.compute.patch_chunk else C
        if size == C:
            return function(self, *arrays_BC)
        size = -(-C // -(-C // size))  # chunks of like size: less padding
        pad = -C % size

        def chunks(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

        scan = nn.scan(
            lambda model, _, xs: (None, function(model, *xs)),
            variable_broadcast=("params", "lora"),
            split_rngs={"params": False},
        )
        _, out = scan(self, None, tuple(map(chunks, arrays_BC)))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, C + pad, *x.shape[3:])[:, :C], out)

    def touch(self) -> None:
        """Runs every part once on the smallest input: what `init` needs."""
        c = self.config
        patches = jnp.zeros((1, c.group_size, c.num_channels), jnp.int32)
        h, _ = self.hidden(self.embed(jnp.zeros((1, 1), jnp.int32), patches[None], jnp.zeros((1, 1), jnp.int32)))
        self.patch_logits(h[0], patches)


def active_channels(config: AudioLMConfig, step: jax.Array | int) -> jax.Array:
    """Which channels the patch decoder predicts at a step: bool [R], true where d_r <= step < d_r + G.

    At step t an active channel r predicts the code of frame t - d_r.
    """
    frame_R = step - jnp.array(config.delays)
    return (frame_R >= 0) & (frame_R < config.group_size)


def _init(config: AudioLMConfig, compute: ComputeConfig, key: jax.Array) -> Any:
    # The rows of `touch` are too short for a kernel, and attention has no parameters.
    return AudioLM(config, dataclasses.replace(compute, attention="dense")).init(key, method="touch")


def init_params(config: AudioLMConfig, compute: ComputeConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh variables {"params": ...}: matrices and tables normal 0.02, norm scales 1, biases 0.

    Jit it with `static_argnums=(0, 1)` and `out_shardings=shardings(abstract_params(config, compute), mesh)` to create
    parameters where they belong.
    """
    return nn.meta.unbox(_init(config, compute, key))


def abstract_params(config: AudioLMConfig, compute: ComputeConfig) -> Any:
    """Shapes of the variables in boxes with the logical names of their axes: what `sharding.shardings` reads."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: _init(config, compute, key), key)


def unroll_params(params: Mapping[str, Any], config: AudioLMConfig) -> dict[str, Any]:
    """Parameters with scanned layers -> the same with unrolled layers, which decode faster on CPU."""
    stacks = {"llm": config.llm, "patch_encoder": config.patch_encoder, "patch_decoder": config.patch_decoder}
    return {
        group: {**params[group], "transformer": unstack_layers(params[group]["transformer"], stack.num_layers)}
        for group, stack in stacks.items()
    }


def unrolled(compute: ComputeConfig) -> ComputeConfig:
    """The compute settings that fit `unroll_params`: layers unrolled, nothing recomputed."""
    return dataclasses.replace(compute, scan_layers=False, remat="none")
