"""Audio tokenizer: wave to RVQ codes (25 Hz, 20 levels) and back, on packed rows.

B rows, S samples (24 kHz), T mel frames (100 Hz), M RVQ frames (25 Hz), R levels, D width. Rows are laid out as
`mimo_jax.rows.TokenizerRows` describes, and every clip in them comes out as if it were alone.

Two collections: "params", with the groups `encoder`, `decoder` and `vocoder`, and "codebook", which is learned by
moving averages (see `rvq`) and never by gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mimo_jax.audio.features import frame_log_mel
from mimo_jax.config import AudioTokenizerConfig, ComputeConfig
from mimo_jax.models.tokenizer import rvq
from mimo_jax.models.tokenizer.decoder import Decoder
from mimo_jax.models.tokenizer.encoder import Encoder
from mimo_jax.models.tokenizer.vocoder import Vocoder
from mimo_jax.rows import TokenizerRows


class TokenizerOutput(NamedTuple):
    """What a training step needs of one pass. `squared_error_R` to `dead_R` are those of `rvq.QuantizerOutput`."""

    wav_BS: jax.Array  # reconstruction; sample 0 of a slot is sample 0 of its clip
    quantized_BMD: jax.Array  # straight-through
    codes_BMR: jax.Array
    segment_ids_BM: jax.Array
    squared_error_R: jax.Array
    vectors_R: jax.Array
    code_counts: tuple[jax.Array, ...]
    codebook: rvq.Codebook
    dead_R: jax.Array


class AudioTokenizer(nn.Module):
    """Mel encoder, RVQ, decoder and vocoder."""

    config: AudioTokenizerConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, self.compute)
        self.decoder = Decoder(c, self.compute)
        self.vocoder = Vocoder(c, self.compute)
        dtype = jnp.promote_types(jnp.dtype(self.compute.param_dtype), jnp.float32)

        def level(size: int) -> rvq.Level:
            return rvq.random_level(size, c.encoder.d_model, c.rvq.epsilon, self.make_rng("params"), dtype)

        # One variable for each level, so that the collection is {level_00: {entries, code_sum, count}, level_01: ...}.
        self.levels = [
            self.variable("codebook", rvq.level_name(i), level, size) for i, size in enumerate(c.rvq.codebook_sizes)
        ]

    @property
    def _codebook(self) -> rvq.Codebook:
        return {rvq.level_name(i): level.value for i, level in enumerate(self.levels)}

    def encode_features(
        self, wav_BS: jax.Array, segment_ids_BT: jax.Array, extent_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes rows up to the quantiser.

        Args:
            wav_BS: float, S = 960 M; clips in slots, reflect-padded.
            segment_ids_BT: int32 at 100 Hz.
            extent_BT: int32, the frames of the released code's padded batch, to get its artefacts (see `reference`).

        Returns:
            z_BMD in the compute dtype, and segment_ids_BM int32 at 25 Hz.
        """
        return self.encoder(frame_log_mel(wav_BS, self.config.mel), segment_ids_BT, extent_BT)

    def encode(
        self,
        wav_BS: jax.Array,
        segment_ids_BT: jax.Array,
        num_levels: int | None = None,
        extent_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Codes int32 [B, M, R] of the first `num_levels` levels (all by default); 0 at padding."""
        z_BMD, segment_ids_BM = self.encode_features(wav_BS, segment_ids_BT, extent_BT)
        codes_NR = rvq.quantize(self._codebook, _flat(z_BMD), num_levels, self.compute.kernels)
        codes_BMR = codes_NR.reshape(*segment_ids_BM.shape, -1)
        return jnp.where((segment_ids_BM > 0)[..., None], codes_BMR, 0)

    def dequantize(self, codes_BMR: jax.Array) -> jax.Array:
        """Sum [B, M, D] of the entries that the codes of the first R levels name; float32 (float64 in float64)."""
        codes_NR = codes_BMR.reshape(-1, codes_BMR.shape[-1])
        q_ND = rvq.dequantize(self._codebook, codes_NR, self.compute.kernels)
        return q_ND.reshape(*codes_BMR.shape[:2], -1)

    def decode(self, codes_BMR: jax.Array, segment_ids_BM: jax.Array) -> jax.Array:
        """Wave [B, S] of the codes of the first R levels, R being as many as are given; zero at padding.

        `segment_ids_BM` is int32; segments may stand side by side. Each RVQ frame gives 960 samples.
        """
        return self.decode_features(self.dequantize(codes_BMR), segment_ids_BM)

    def decode_features(
        self, q_BMD: jax.Array, segment_ids_BM: jax.Array, extent_BM: jax.Array | None = None
    ) -> jax.Array:
        """Wave [B, S] of quantised vectors, float32 (float64 in float64); zero at padding (outside the extent).

        `extent_BM`, int32, are the frames of the released code's padded batch, to get its artefacts (see `reference`).
        """
        mel_BTF, segment_ids_BT = self.decoder(q_BMD, segment_ids_BM, extent_BM)
        if extent_BM is not None:
            extent_BM = jnp.repeat(extent_BM, self.config.mel_frames_per_code, axis=1)
        return self.vocoder(mel_BTF, segment_ids_BT, extent_BM)

    def decode_coefficients(self, q_BMD: jax.Array, segment_ids_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What `decode_features` makes its wave of by `vocoder.synthesize`, and segment_ids_BT at 100 Hz."""
        mel_BTF, segment_ids_BT = self.decoder(q_BMD, segment_ids_BM)
        return self.vocoder.coefficients(mel_BTF, segment_ids_BT), segment_ids_BT

    def __call__(
        self,
        rows: TokenizerRows,
        train: bool = False,
        rng: jax.Array | None = None,
        taps: Mapping[str, jax.Array] | None = None,
    ) -> TokenizerOutput:
        """Encodes, quantises and decodes rows.

        Args:
            rows: packed clips; the text is not used here.
            train: update the codebook and draw quantiser dropout; otherwise all levels are used and the codebook stays.
            rng: random key, needed for training.
            taps: zeros [B, M, D] that are added to the quantiser's `input` and to what the `decoder` reads: the
                gradient with respect to them is that of the losses at these places.

        Raises:
            ValueError: `train` without `rng`.
        """
        z_BMD, segment_ids_BM = self.encode_features(rows.wav_BS, rows.segment_ids_BT)
        if taps is not None:
            z_BMD = z_BMD + taps["input"]
        key_levels = key_revive = None
        if train:
            if rng is None:
                raise ValueError("rng: expected a random key, which training needs, got None")
            key_levels, key_revive = jax.random.split(rng)
        out = self._quantize(z_BMD, segment_ids_BM, key_levels, key_revive)
        quantized_BMD = out.quantized_ND.reshape(z_BMD.shape)
        decoded_BMD = quantized_BMD if taps is None else quantized_BMD + taps["decoder"]
        return TokenizerOutput(
            wav_BS=self.decode_features(decoded_BMD, segment_ids_BM),
            quantized_BMD=quantized_BMD,
            codes_BMR=out.codes_NR.reshape(*segment_ids_BM.shape, -1),
            segment_ids_BM=segment_ids_BM,
            squared_error_R=out.squared_error_R,
            vectors_R=out.vectors_R,
            code_counts=out.code_counts,
            codebook=out.codebook,
            dead_R=out.dead_R,
        )

    def encode_quantized(
        self, rows: TokenizerRows, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """What the decoder reads, from frozen encoder and codebooks.

        Args:
            rng: random key of quantiser dropout; all levels are used without one.

        Returns:
            Quantised vectors [B, M, D], segment_ids_BM int32, and how often each entry of each level was chosen.
        """
        z_BMD, segment_ids_BM = self.encode_features(rows.wav_BS, rows.segment_ids_BT)
        out = self._quantize(z_BMD, segment_ids_BM, rng, None)
        return out.quantized_ND.reshape(z_BMD.shape), segment_ids_BM, out.code_counts

    def _quantize(
        self, z_BMD: jax.Array, segment_ids_BM: jax.Array, key_levels: Any, key_revive: Any
    ) -> rvq.QuantizerOutput:
        c, levels_N = self.config.rvq, None
        if key_levels is not None and c.dropout_probability > 0:
            levels_N = rvq.draw_levels(c, segment_ids_BM, key_levels).reshape(-1)
        mask_N = (segment_ids_BM > 0).reshape(-1)
        return rvq.train_quantize(c, self._codebook, _flat(z_BMD), mask_N, levels_N, key_revive)


def _flat(x_BMD: jax.Array) -> jax.Array:
    return x_BMD.reshape(-1, x_BMD.shape[-1])


def init_variables(config: AudioTokenizerConfig, compute: ComputeConfig, key: jax.Array) -> dict[str, Any]:
    """Random variables {"params", "codebook"}; parameters are boxed with their logical axes.

    The codebook is random until `rvq.init_codebooks` has seen a batch. Use `jax.eval_shape` for shapes alone.
    """
    codes = 2
    rows = {
        "codes_BMR": jnp.zeros((1, codes, config.rvq.num_levels), jnp.int32),
        "segment_ids_BM": jnp.ones((1, codes), jnp.int32),
    }
    wav_BS = jnp.zeros((1, codes * config.samples_per_code), jnp.dtype(compute.param_dtype))
    segment_ids_BT = jnp.ones((1, codes * config.mel_frames_per_code), jnp.int32)

    def both(model: AudioTokenizer) -> None:
        model.encode(wav_BS, segment_ids_BT)
        model.decode(**rows)

    return dict(AudioTokenizer(config, compute).init(key, method=both))
