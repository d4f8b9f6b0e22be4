"""Every setting of the stack, as frozen dataclasses: the single source of truth.

`config_files` reads and writes them: config files, command-line overrides, JSON.

Symbols: B batch, L sequence positions, C patches of a row, G frames of a patch, R RVQ channels of the language
model, T mel frames (100 Hz), M RVQ frames (25 Hz), S samples (24 kHz).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or impossible. The message names the setting."""


def require(condition: bool, setting: str, expected: str, got: object) -> None:
    """Raises ConfigError, naming the setting, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{setting}: expected {expected}, got {got!r}")


class Checked:
    """Settings that check themselves; `_group` stands before their names in errors."""

    _group = ""

    def _require(self, condition: bool, name: str, expected: str) -> None:
        require(condition, f"{self._group}{name}", expected, getattr(self, name))

    def _positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) > 0, name, "a positive integer")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= 0, name, "a non-negative integer")


# ----------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class TransformerConfig(Checked):
    """One stack of pre-norm transformer blocks. Every stack of the system is one of these.

    `layernorm` + `gelu` with biases is the audio tokenizer's block; `rmsnorm` + `swiglu` with q/k/v biases is the
    Qwen2 block of the language model (report section 2). `window` = (left, right), inclusive; -1 is unlimited.
    """

    d_model: int
    num_layers: int
    num_heads: int
    head_dim: int
    d_ff: int
    num_kv_heads: int
    causal: bool
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    mlp_bias: bool = False
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    out_bias: bool = False
    window: tuple[int, int] = (-1, -1)
    rope_theta: float = 640_000.0

    def __post_init__(self) -> None:
        self._positive("d_model", "num_layers", "num_heads", "head_dim", "d_ff", "num_kv_heads")
        divides = self.num_heads % self.num_kv_heads == 0
        self._require(divides, "num_kv_heads", f"a divisor of num_heads {self.num_heads}")
        self._require(self.head_dim % 2 == 0, "head_dim", "an even number (rotary embedding)")
        self._require(len(self.window) == 2 and min(self.window) >= -1, "window", "(left, right), each >= -1")

    @staticmethod
    def qwen2(
        d_model: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        d_ff: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
    ) -> TransformerConfig:
        """A stack of Qwen2 blocks (LLM, patch encoder, patch decoder, A2T decoder)."""
        return TransformerConfig(d_model, num_layers, num_heads, head_dim, d_ff, num_kv_heads or num_heads, causal)

    @staticmethod
    def codec(
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        causal: bool,
        window: tuple[int, int] = (-1, -1),
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
    ) -> TransformerConfig:
        """A stack of the audio tokenizer's blocks: LayerNorm, GELU, q/v/out biased and k not, theta 10000."""
        sizes = (d_model, num_layers, num_heads, d_model // num_heads, d_ff, num_heads)
        return TransformerConfig(
            *sizes,
            causal=causal,
            norm=norm,
            norm_eps=1e-5 if norm == "layernorm" else 1e-6,
            mlp="gelu",
            mlp_bias=True,
            k_bias=False,
            out_bias=True,
            window=window,
            rope_theta=10_000.0,
        )

    def params_per_layer(self) -> int:
        """Parameters of one block."""
        d, q, kv = self.d_model, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = d * q + 2 * d * kv + q * d
        attention += q * self.q_bias + kv * self.k_bias + kv * self.v_bias + d * self.out_bias
        mlp = (3 if self.mlp == "swiglu" else 2) * d * self.d_ff + (self.d_ff + d) * self.mlp_bias
        return attention + mlp + 2 * self.norm_params()

    def norm_params(self) -> int:
        """Parameters of one norm layer."""
        return self.d_model * (2 if self.norm == "layernorm" else 1)

    def num_params(self) -> int:
        """Parameters of all blocks and of the final norm that follows them."""
        return self.num_layers * self.params_per_layer() + self.norm_params()

    def flops_per_position(self, context: float) -> float:
        """Forward FLOPs of one position: 2 per weight, plus attention over `context` keys on average.

        Pass (length + 1) / 2 for causal attention over a document of `length` positions.
        """
        d, q, kv = self.d_model, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = d * q + 2 * d * kv + q * d + (3 if self.mlp == "swiglu" else 2) * d * self.d_ff
        left, right = self.window
        if left >= 0 and right >= 0:
            context = min(context, left + right + 1)
        return self.num_layers * (2.0 * weights + 4.0 * context * q)


@dataclass(frozen=True)
class MelConfig(Checked):
    """Log-mel spectrogram: HTK scale, no filter norm, magnitude, log(max(x, floor)). Frequencies in Hz."""

    sample_rate: int = 24_000
    n_fft: int = 960
    win_length: int = 960
    hop_length: int = 240
    n_mels: int = 128
    f_min: float = 0.0
    f_max: float | None = None
    floor: float = 1e-7

    def __post_init__(self) -> None:
        self._require(0 < self.win_length <= self.n_fft, "win_length", f"1..n_fft ({self.n_fft})")
        self._require(0 < self.hop_length <= self.win_length, "hop_length", f"1..win_length ({self.win_length})")
        top = self.sample_rate / 2 if self.f_max is None else self.f_max
        self._require(0 <= self.f_min < top <= self.sample_rate / 2, "f_max", "f_min < f_max <= sample_rate / 2")


@dataclass(frozen=True)
class RVQConfig(Checked):
    """Residual vector quantiser, learned by exponential moving averages (report section 2.1; released code)."""

    # Entries of each level; all codebooks have the encoder's width.
    codebook_sizes: tuple[int, ...] = (1024, 1024) + (128,) * 18
    ema_decay: float = 0.99  # decay of the code sums and counts
    epsilon: float = 1e-5  # Laplace smoothing of the counts
    kmeans_iterations: int = 50  # Lloyd iterations of the start on the first batch
    dead_code_threshold: float = 2.0  # a code whose EMA count falls below this is dead
    revival: Literal["batch", "none"] = "batch"  # dead codes are replaced by vectors of the `batch`, or stay (`none`)
    # `first` as published (the residual handed on is the straight-through value, so only the first level's commitment
    # reaches the encoder) or `all` levels.
    commitment: Literal["first", "all"] = "first"
    dropout_probability: float = 0.5  # share of the training segments that are quantised with a random number of levels
    # Learn as the released code does: dead codes come back as they were (its moving average undoes the replacement in
    # the same step), k-means stores centroids as sums, and commitment is `first`.
    reference_quirks: bool = False

    def __post_init__(self) -> None:
        self._require(min(self.codebook_sizes, default=0) > 1, "codebook_sizes", "sizes > 1")
        require(max(self.codebook_sizes) <= 65_535, "codebook_sizes", "sizes that fit uint16", max(self.codebook_sizes))
        self._require(0 < self.ema_decay < 1, "ema_decay", "a number in (0, 1)")
        self._require(0 <= self.dropout_probability <= 1, "dropout_probability", "a number in [0, 1]")

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)


@dataclass(frozen=True)
class AudioTokenizerConfig(Checked):
    """Audio tokenizer: mel encoder, RVQ, decoder to a coarse mel, vocoder (report section 2.1).

    Attributes:
        encoder_skip_layer: 1-based.
        pool: stride of the last down-sampling (1 leaves it out).
        decoder_norm: what the decoder's two group norms take statistics over: the whole `sequence`, as published, or
            each `frame`, so that streamed decoding equals decoding at once.
        resampler: how recordings come to its sample rate; the published models' inputs went through `sinc`.
    """

    mel: MelConfig
    encoder: TransformerConfig
    decoder: TransformerConfig
    vocoder: TransformerConfig
    rvq: RVQConfig = RVQConfig()
    encoder_skip_layer: int | None = 3
    stem_stride: int = 2
    pool: int = 2
    decoder_norm: Literal["sequence", "frame"] = "sequence"
    resampler: Literal["soxr", "sinc"] = "soxr"

    def __post_init__(self) -> None:
        wide, decoded = self.encoder.d_model, self.decoder.d_model
        require(wide == decoded, "decoder.d_model", f"encoder.d_model ({wide})", decoded)
        skip, layers = self.encoder_skip_layer, self.encoder.num_layers
        self._require(skip is None or 1 <= skip < layers, "encoder_skip_layer", f"1..{layers - 1}")
        self._require(self.stem_stride == 2, "stem_stride", "2")
        self._require(self.pool in (1, 2), "pool", "1 or 2")

    @property
    def mel_frames_per_code(self) -> int:
        return self.stem_stride * self.pool

    @property
    def samples_per_code(self) -> int:
        """Samples of one RVQ frame (960 at 25 Hz)."""
        return self.mel_frames_per_code * self.mel.hop_length

    @property
    def frame_rate(self) -> float:
        """RVQ frames per second."""
        return self.mel.sample_rate / self.samples_per_code

    def bitrate(self, num_levels: int | None = None) -> float:
        """Bits per second of the first `num_levels` levels (all by default)."""
        return self.frame_rate * sum(math.log2(n) for n in self.rvq.codebook_sizes[:num_levels])

    def num_params(self) -> int:
        """Trained parameters and codebooks."""
        d, n_mels, v = self.encoder.d_model, self.mel.n_mels, self.vocoder.d_model
        encoder = 3 * n_mels * d + d + 3 * d * d + d + self.encoder.num_params()
        decoder = self.decoder.num_params() + 3 * d * n_mels + n_mels + 2 * n_mels
        if self.pool > 1:
            encoder += self.pool * d * d + self.encoder.norm_params()
            decoder += self.pool * d * d + d + 2 * d
        vocoder = n_mels * v + self.vocoder.num_params() + v * (self.mel.n_fft + 2) + self.mel.n_fft + 2
        return encoder + decoder + vocoder + sum(self.rvq.codebook_sizes) * d

    def flops_per_code(self, num_codes: float, decode: bool = True) -> float:
        """Forward FLOPs of encoding, and decoding, one RVQ frame of a clip of `num_codes` frames."""
        d, n_mels, v = self.encoder.d_model, self.mel.n_mels, self.vocoder.d_model
        mid, mel = self.pool, self.mel_frames_per_code
        encoder = mel * 6.0 * n_mels * d + mid * (6.0 * d * d + self.encoder.flops_per_position(num_codes * mid))
        encoder += 2.0 * mid * d * d
        rvq = 2.0 * sum(self.rvq.codebook_sizes) * d
        if not decode:
            return encoder + rvq
        decoder = 2.0 * mid * d * d + mid * self.decoder.flops_per_position((num_codes * mid + 1) / 2)
        decoder += mid * 6.0 * d * n_mels
        vocoder = 2.0 * n_mels * v + self.vocoder.flops_per_position(num_codes * mel) + 2.0 * v * (self.mel.n_fft + 2)
        vocoder *= mel
        return encoder + rvq + decoder + vocoder


@dataclass(frozen=True)
class A2TConfig:
    """Text decoder of the audio-to-text objective: a causal LM that reads the quantised sequence as its prefix."""

    transformer: TransformerConfig
    vocab_size: int

    def num_params(self, audio_width: int) -> int:
        d = self.transformer.d_model
        return 2 * self.vocab_size * d + audio_width * d + self.transformer.num_params()


@dataclass(frozen=True)
class AudioLMConfig(Checked):
    """Audio language model: patch encoder, LLM, patch decoder (report section 2.2)."""

    vocab_size: int  # rows of the text embedding and of the untied text head
    empty_id: int  # id of `<|empty|>`, which stands for "this position is a patch"
    llm: TransformerConfig
    patch_encoder: TransformerConfig
    patch_decoder: TransformerConfig
    # Sizes of the RVQ channels the model reads and writes; its audio tables have one row more, the last id being
    # "empty".
    codebook_sizes: tuple[int, ...] = (1024, 1024) + (128,) * 6
    group_size: int = 4  # RVQ frames of one patch
    delays: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)  # step at which each channel starts in the patch decoder

    def __post_init__(self) -> None:
        self._require(0 <= self.empty_id < self.vocab_size, "empty_id", f"an id below vocab_size {self.vocab_size}")
        channels = self.num_channels
        self._require(len(self.delays) == channels, "delays", f"one delay for each of {channels} channels")
        self._require(min(self.delays) == 0, "delays", "a smallest delay of 0")
        self._positive("group_size")
        require(self.llm.causal and self.patch_decoder.causal, "causal", "causal LLM and patch decoder", False)

    @property
    def num_channels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def audio_vocab_sizes(self) -> tuple[int, ...]:
        """Rows of each audio embedding table: codebook size + 1 (the last id is "empty")."""
        return tuple(n + 1 for n in self.codebook_sizes)

    @property
    def num_steps(self) -> int:
        """Steps of the patch decoder: group_size + largest delay (11)."""
        return self.group_size + max(self.delays)

    def num_params(self) -> int:
        """All parameters: 8,018,587,648 at the published sizes."""
        tables = sum(self.audio_vocab_sizes)
        d, e, p = self.llm.d_model, self.patch_encoder.d_model, self.patch_decoder.d_model
        codec = tables * e + self.group_size * e * d + d * p + tables * p + (e * p if e != p else 0)
        return self.num_llm_params() + codec + self.patch_encoder.num_params() + self.patch_decoder.num_params()

    def num_llm_params(self) -> int:
        """LLM with its embedding and head: 7,622,619,136 at the published sizes."""
        return 2 * self.vocab_size * self.llm.d_model + self.llm.num_params()

    def flops_per_position(self, length: float, patch_fraction: float, generate: bool = True) -> float:
        """Forward FLOPs of one position of a document of `length` positions, a share of which are patches.

        Args:
            length: positions of the document (attention is counted causally).
            patch_fraction: share of positions that are patches; they pay for the patch encoder and decoder.
            generate: whether the patch decoder runs (stage 1 leaves it out).
        """
        d, e, p, g = self.llm.d_model, self.patch_encoder.d_model, self.patch_decoder.d_model, self.group_size
        llm = self.llm.flops_per_position((length + 1) / 2) + 2.0 * d * self.vocab_size
        patch = g * self.patch_encoder.flops_per_position(g) + 2.0 * g * e * d
        if generate:
            steps = self.num_steps
            patch += 2.0 * d * p + steps * self.patch_decoder.flops_per_position((steps + 1) / 2)
            patch += 2.0 * g * p * sum(self.audio_vocab_sizes)
            if e != p:
                patch += 2.0 * g * self.num_channels * e * p
        return llm + patch_fraction * patch


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Multi-period and multi-scale STFT discriminators of the adversarial stage (report section 2.1)."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)  # of its layers; all but the last have stride 3
    stft_sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    stft_channels: int = 32
    # RVQ frames of each row that they see in a step, at a place drawn for each row; 0 is the whole row.
    window_codes: int = 0

    def __post_init__(self) -> None:
        require(self.window_codes >= 0, "discriminator.window_codes", "a non-negative integer", self.window_codes)
        sizes = (*self.periods, *self.stft_sizes, *self.period_channels, self.stft_channels)
        require(min(sizes) > 0 and bool(self.period_channels), "discriminator", "positive sizes", self)
        require(bool(self.periods + self.stft_sizes), "discriminator", "at least one discriminator", self)
        for name in ("periods", "stft_sizes"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"discriminator.{name}", "different numbers", values)
        require(all(n % 4 == 0 for n in self.stft_sizes), "discriminator.stft_sizes", "multiples of 4", self.stft_sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the discriminators, in order."""
        return *(f"period_{p}" for p in self.periods), *(f"stft_{n}" for n in self.stft_sizes)

    def _layers(self) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
        """(places for each sample, weights) of the layers of one of each kind; the last ones score."""
        places, inputs, period = 1.0, 1, []
        for i, n in enumerate(self.period_channels):
            places /= 3 if i < len(self.period_channels) - 1 else 1
            period.append((places, 5 * inputs * n))
            inputs = n
        period.append((places, 3 * inputs))
        c = self.stft_channels  # an STFT has 2 places for each sample: hops of a quarter, half as many frequencies
        stft = [(2.0, 27 * 2 * c), *((2.0 / 2**i, 27 * c * c) for i in (1, 2, 3)), (0.25, 9 * c * c), (0.25, 9 * c)]
        return period, stft

    def num_params(self) -> int:
        """Parameters of all discriminators."""
        period, stft = self._layers()
        of_period = sum(w for _, w in period) + sum(self.period_channels) + 1
        of_stft = sum(w for _, w in stft) + 5 * self.stft_channels + 1
        return len(self.periods) * of_period + len(self.stft_sizes) * of_stft

    def flops_per_sample(self) -> float:
        """Forward FLOPs of all discriminators for one sample of a wave."""
        period, stft = self._layers()
        one, other = (sum(2.0 * places * weights for places, weights in layers) for layers in (period, stft))
        return len(self.periods) * one + len(self.stft_sizes) * other


# ----------------------------------------------------------------------------------------------------------
# How a job computes


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """Precision and memory. Nothing here changes what is computed, only how.

    Attributes:
        dtype: activations; norms, softmax, RVQ and losses are float32 whatever it is.
        param_dtype: stored parameters.
        remat: what the backward pass keeps of each layer beside its input: `none` keeps all, `dots` the matmul outputs,
            `full` nothing; `offload` is `full`, and the inputs (of rows, not of patches) wait in the host's memory.
        scan_layers: one compiled layer for a whole stack (stacked weights); False unrolls (faster decoding on CPU).
        attention: implementation; `auto` picks splash on TPU, elsewhere dense for short rows and chunked for long ones.
            `triton` is for GPUs.
        kernels: implementation of RVQ search, RVQ lookups and delay-pattern sampling (`mimo_jax.kernels.dispatch`).
        patch_chunk: patches per device that go through patch encoder and patch decoder at once; 0 takes all. Fewer need
            less memory, and gather the parameters of both once per chunk.
        logits_chunk: text logits (positions x ids) that exist at once on a device.
    """

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["none", "dots", "full", "offload"] = "none"
    scan_layers: bool = True
    attention: Literal["auto", "dense", "chunked", "splash", "triton"] = "auto"
    kernels: Literal["auto", "xla", "mosaic", "triton", "interpret"] = "auto"
    patch_chunk: int = 0
    logits_chunk: int = 2**26

    _group = "compute."

    def __post_init__(self) -> None:
        self._not_negative("patch_chunk")
        self._positive("logits_chunk")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis at most) takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        require(sum(s == -1 for s in sizes) <= 1, "mesh", "at most one axis of -1", sizes)
        require(all(s == -1 or s > 0 for s in sizes), "mesh", "positive axis sizes or -1", sizes)


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW with global-norm clipping. Decay acts on matrices only (not on norms, biases and embeddings of codes).

    Attributes:
        warmup_fraction: share of the run over which the learning rate rises from 0.
        warmup_tokens: the same in tokens, instead of the share; 0 is not given.
        final_fraction: of the peak learning rate, at the end of the cosine.
        spike_sigmas: a step whose loss or gradient norm is so many standard deviations above the mean of the latest
            `spike_window` good ones is skipped; 0 skips none.
        moment_dtype: of both moments as they are stored; arithmetic is in float32.
        stochastic_rounding: bfloat16 moments and parameters are rounded at random, so that small changes are kept on
            average, instead of to the nearest.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_fraction: float = 0.01
    final_fraction: float = 0.1
    warmup_tokens: int = 0
    spike_sigmas: float = 0.0
    spike_window: int = 128
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            self._require(0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        for name in ("eps", "clip_norm"):
            self._require(getattr(self, name) > 0, name, "a positive number")
        self._require(self.weight_decay >= 0, "weight_decay", "a non-negative number")
        self._require(self.spike_sigmas >= 0, "spike_sigmas", "a non-negative number")
        self._require(1 < self.spike_window <= 2**20, "spike_window", "2..2^20 steps")
        self._not_negative("warmup_tokens")
        self._require(0 <= self.warmup_fraction < 1, "warmup_fraction", "a number in [0, 1)")
        self._require(0 <= self.final_fraction <= 1, "final_fraction", "a number in [0, 1]")


@dataclass(frozen=True)
class RunConfig(Checked):
    """Length, seeds and rhythm of a run, in optimiser steps.

    Attributes:
        steps: length of the run; where `tokens` is given, what follows from it.
        tokens: the same as positions of rows, padding included (RVQ frames of rows for the audio tokenizer); the last
            step may go beyond. One of the two is given.
        keep_checkpoints: so many of the newest are kept.
        keep_every_tokens: the first one at or after each multiple of so many tokens is kept for ever; 0 keeps none.
        keep_best: so many are kept of those saved at a step with a validation, the ones with the least loss.
        max_bad_steps: steps that are not finite, or spikes, are skipped and recorded; this many in a row end the run.
        rollback_after: after so many skipped steps in a row the run goes back to the state of its last checkpoint, and
            on with the rows after them; 0 never does.
        max_rollbacks: so often at most; then the run ends.
        grace_seconds: after a signal to stop, the process ends if it has not reached the end of a step by then.
        hang_seconds: so long without a step, a validation batch or the begin of a checkpoint writes the stacks of all
            threads to stderr and ends the process; compiling counts. 0 is never.
    """

    steps: int = 0
    seed: int = 0
    accumulation: int = 1
    log_every: int = 10
    eval_every: int = 500
    eval_batches: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    max_bad_steps: int = 10
    data_threads: int = 2
    grace_seconds: float = 45.0
    hang_seconds: float = 3600.0
    tokens: int = 0
    keep_every_tokens: int = 0
    keep_best: int = 0
    rollback_after: int = 0
    max_rollbacks: int = 3

    _group = "run."

    def __post_init__(self) -> None:
        self._require(self.steps > 0 or self.tokens > 0, "steps", "a positive integer, or run.tokens instead")
        self._not_negative("steps", "tokens", "keep_every_tokens", "keep_best", "rollback_after", "max_rollbacks")
        self._not_negative("eval_batches", "data_threads")
        self._require(self.steps < 2**31, "steps", "fewer than 2^31")
        self._require(abs(self.seed) < 2**63, "seed", "an integer of 64 bits")
        # Clocks of the system take no more.
        self._require(0 < self.grace_seconds < 1e9, "grace_seconds", "a positive number below 1e9")
        self._require(0 <= self.hang_seconds < 1e9, "hang_seconds", "at least 0 and below 1e9")
        self._positive("accumulation", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        self._positive("max_bad_steps")
        fewer = f"less than run.max_bad_steps ({self.max_bad_steps})"
        self._require(self.rollback_after < self.max_bad_steps, "rollback_after", fewer)

    @property
    def patience(self) -> int:
        """Skipped steps in a row after which nothing is updated any more, until the host has seen it."""
        return self.rollback_after or self.max_bad_steps

    def counted(self, tokens_per_step: int) -> RunConfig:
        """The same with the `steps` that follow from `tokens`, where those are given."""
        if not self.tokens:
            return self
        steps = -(-self.tokens // tokens_per_step)
        expected = f"0 beside run.tokens, or the {steps} steps that it makes"
        require(self.steps in (0, steps), "run.steps", expected, self.steps)
        return dataclasses.replace(self, steps=steps)


# ----------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class LayoutWeights:
    """Share of each layout among the documents made from a source (they need not sum to 1).

    The `sft` ones are the formats of post-training. A conversation has one format, so there only 0 or not matters.
    """

    text: float = 0.0
    continuation: float = 0.0
    interleaved: float = 0.0
    asr: float = 0.0
    tts: float = 0.0
    caption: float = 0.0
    instruct_tts: float = 0.0
    sft_asr: float = 0.0
    sft_tts: float = 0.0
    sft_instruct_tts: float = 0.0
    sft_understanding: float = 0.0
    sft_spoken_dialogue: float = 0.0
    sft_text_dialogue: float = 0.0

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        require(all(v >= 0 for v in values.values()), "layouts", "non-negative weights", values)


@dataclass(frozen=True)
class SourceConfig(Checked):
    """One shard set, the share of positions it contributes, and the layouts its records become."""

    path: str  # folder of the shard set
    weight: float  # share among the sources (they need not sum to 1)
    layouts: LayoutWeights
    # (tokens, weight) in ascending order: from the first block of documents on that begins at or after so many
    # positions of rows, the source has that weight. On the command line as `1e9:0.5,2e9:0`.
    changes: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        self._require(self.weight >= 0, "weight", "a non-negative number")
        pairs = all(len(pair) == 2 and pair[0] > 0 and pair[1] >= 0 for pair in self.changes)
        at = [pair[0] for pair in self.changes]
        self._require(pairs and at == sorted(set(at)), "changes", "(tokens, weight) in ascending order")

    def weight_at(self, tokens: float) -> float:
        """Its weight from so many tokens on."""
        return [self.weight, *(weight for at, weight in self.changes if at <= tokens)][-1]

    @property
    def used(self) -> bool:
        """Whether it has a weight at any time."""
        return self.weight > 0 or any(weight > 0 for _, weight in self.changes)


@dataclass(frozen=True)
class LMDataConfig(Checked):
    """Rows of the language model."""

    sources: Mapping[str, SourceConfig]  # shard sets to mix, by name
    validation: Mapping[str, SourceConfig]  # held-out shard sets, by name
    text_tokenizer: str  # SentencePiece model or Hugging Face `tokenizer.json`
    rows: int  # rows of the global batch
    row_length: int  # positions L of a row
    row_patches: int  # patch budget C of a row (0 for text-only data)
    block_documents: int = 4096  # documents that are permuted, mixed and packed together
    # Whether the conditioning side of ASR, TTS, caption and instruct-TTS documents is a target too.
    target_conditioning: bool = True

    _group = "data."

    def __post_init__(self) -> None:
        self._positive("rows", "block_documents")
        for name, source in self.validation.items():
            require(not source.changes, f"data.validation.{name}.changes", "none", source.changes)
        times = sorted({at for source in self.sources.values() for at, _ in source.changes})
        for at in (0.0, *times) if times else ():
            weights = [source.weight_at(at) for source in self.sources.values()]
            require(any(weights), "data.sources", f"a source with a positive weight from {at:,.0f} tokens on", weights)
        self._require(0 <= self.row_patches <= self.row_length, "row_patches", f"0..row_length ({self.row_length})")


@dataclass(frozen=True)
class AudioDataConfig(Checked):
    """Rows of the audio tokenizer: whole utterances packed by RVQ frames and text tokens."""

    manifest: str  # JSONL manifest of the training audio
    validation: str  # JSONL manifest of the held-out audio
    text_tokenizer: str  # tokenizer of the A2T targets
    rows: int  # rows of the global batch
    row_codes: int  # RVQ frames M of a row (25 per second)
    row_text: int  # text tokens U of a row
    max_seconds: float = 30.0  # longer recordings are cropped at random, and a cropped one has no A2T target
    samples: int = 4  # clips whose reconstruction is written at each validation, to listen to
    block_documents: int = 1024  # utterances that are permuted and packed together

    _group = "data."

    def __post_init__(self) -> None:
        self._positive("rows")
        self._require(self.row_codes > 1, "row_codes", "at least 2 RVQ frames")
        self._not_negative("row_text", "samples")
        self._require(self.max_seconds > 0, "max_seconds", "a positive number of seconds")


# ----------------------------------------------------------------------------------------------------------
# Jobs: one dataclass per file of `mimo_jax/training`


@dataclass(frozen=True)
class MelLossConfig:
    """The reconstruction loss of both stages of the tokenizer. What the report leaves open is named here."""

    mel_weight: float = 1.0
    mel_scale: Literal["log", "linear"] = "log"  # `log` or `linear` magnitudes
    mel_reduction: Literal["mean", "sum"] = "mean"  # `mean` or `sum` over bins (always a mean over frames)

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(not name.endswith("_weight") or value >= 0, f"loss.{name}", "a non-negative number", value)


@dataclass(frozen=True)
class TokenizerLossConfig(MelLossConfig):
    """Stage 1 of the tokenizer: 10 A2T + 1 reconstruction + 1 commitment."""

    a2t_weight: float = 10.0
    commitment_weight: float = 1.0
    # `mean` over text tokens, or `sum` over the tokens of an utterance, as the report's equation has it.
    a2t_reduction: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True)
class AdversarialLossConfig(MelLossConfig):
    """Stage 2 of the tokenizer: 1 reconstruction + 1 adversarial + 2 feature matching."""

    adversarial_weight: float = 1.0
    feature_weight: float = 2.0
    # `none` adds the terms as the report has it; with `gradients` the weights are those of the norms of their
    # gradients, where all terms meet (log magnitudes and phases of the vocoder).
    balance: Literal["none", "gradients"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = self.mel_weight > 0 or self.balance == "none"
        require(fine, "loss.mel_weight", "a positive number to balance by", self.mel_weight)


def _settle_length(job: Any) -> None:
    """Derives the steps of a training job whose length is given in tokens."""
    object.__setattr__(job, "run", job.run.counted(job.tokens_per_step))
    tokens, warmup = job.run.steps * job.tokens_per_step, job.optimizer.warmup_tokens
    require(warmup < tokens, "optimizer.warmup_tokens", f"fewer than the {tokens} tokens of the run", warmup)


class _AudioTraining:
    data: AudioDataConfig

    def __post_init__(self) -> None:
        _settle_length(self)

    @property
    def tokens_per_step(self) -> int:
        """RVQ frames of the rows of a step."""
        return self.data.rows * self.data.row_codes


@dataclass(frozen=True)
class TokenizerTrainConfig(_AudioTraining):
    """Tokenizer stage 1: unified representation learning."""

    model: AudioTokenizerConfig
    a2t: A2TConfig
    data: AudioDataConfig
    run: RunConfig
    learning_rate: float
    loss: TokenizerLossConfig = TokenizerLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    job: Literal["tokenizer"] = "tokenizer"


@dataclass(frozen=True)
class AdversarialTrainConfig(_AudioTraining):
    """Tokenizer stage 2: decoder and vocoder against the discriminators, from a stage-1 checkpoint.

    `init_from`: run or checkpoint with the audio tokenizer; one of this stage gives its discriminators too.
    """

    model: AudioTokenizerConfig
    discriminator: DiscriminatorConfig
    data: AudioDataConfig
    run: RunConfig
    learning_rate: float
    discriminator_learning_rate: float
    init_from: str
    loss: AdversarialLossConfig = AdversarialLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(b1=0.8, b2=0.99)
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    job: Literal["tokenizer_adversarial"] = "tokenizer_adversarial"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.data.row_text == 0, "data.row_text", "0: this stage reads no text", self.data.row_text)
        window, row = self.discriminator.window_codes, self.data.row_codes
        require(window <= row, "discriminator.window_codes", f"at most data.row_codes ({row})", window)
        require(self.init_from != "", "init_from", "the run of stage 1 to go on from", "")
        for name in ("learning_rate", "discriminator_learning_rate"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))


@dataclass(frozen=True)
class LearningRates(Checked):
    """Peak learning rate of each part; 0 freezes it."""

    llm: float
    patch_encoder: float = 0.0
    patch_decoder: float = 0.0

    _group = "learning_rates."

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            self._require(value >= 0, name, "a non-negative number")


@dataclass(frozen=True)
class LMLossConfig:
    """Weights of the text term and of each RVQ channel; their weighted sum is divided by the sum of the weights.

    `empty_weight` is the weight of a text target that is `<|empty|>` (released fine-tuning toolkit).
    """

    text_weight: float = 100.0
    channel_weights: tuple[float, ...] = (12.0, 8.0, 6.0, 4.0, 2.0, 2.0, 1.0, 1.0)
    empty_weight: float = 0.01

    def __post_init__(self) -> None:
        weights = (self.text_weight, *self.channel_weights)
        require(min(weights) >= 0 and sum(weights) > 0, "loss", "non-negative weights, not all zero", weights)

    @property
    def trains_audio(self) -> bool:
        return any(w > 0 for w in self.channel_weights)


@dataclass(frozen=True)
class LoRAConfig(Checked):
    """Low-rank branches beside frozen matrices: y = x W + alpha / rank (x A) B. Rank 0 trains these."""

    rank: int = 0  # columns of A, rows of B
    alpha: float = 32.0
    # Names of the matrices that get one.
    targets: tuple[Literal["q", "k", "v", "out", "up", "gate", "down", "projection", "input", "codes"], ...] = (
        *("q", "k", "v", "out", "up", "gate", "down"),
    )  # every layer of every stack
    tables: bool = False  # whether the tables and heads of text and audio are trained in full beside them

    _group = "lora."

    def __post_init__(self) -> None:
        self._not_negative("rank")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class LMTrainConfig:
    """Text pre-training, stage 1 (understanding), stage 2 (joint) and post-training of the language model.

    `init_from`: checkpoint directory to take parameters from ("" starts from scratch). A text checkpoint fills the LLM.
    """

    model: AudioLMConfig
    data: LMDataConfig
    run: RunConfig
    learning_rates: LearningRates
    loss: LMLossConfig = LMLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    lora: LoRAConfig = LoRAConfig()
    init_from: str = ""
    job: Literal["language_model"] = "language_model"

    @property
    def tokens_per_step(self) -> int:
        """Positions of the rows of a step."""
        return self.data.rows * self.data.row_length

    def __post_init__(self) -> None:
        _settle_length(self)
        channels, weights = self.model.num_channels, self.loss.channel_weights
        expected = f"one weight for each of {channels} channels"
        require(len(weights) == channels, "loss.channel_weights", expected, weights)
        require(self.init_from != "" or not self.lora.rank, "init_from", "the checkpoint that adapters stand on", "")
        rows, parts = self.data.rows, self.run.accumulation
        require(rows % parts == 0, "run.accumulation", f"a divisor of data.rows ({rows})", parts)
        if self.loss.trains_audio:
            expected = "a positive patch budget, since audio channels have loss weights"
            require(self.data.row_patches > 0, "data.row_patches", expected, 0)
        else:
            rate, expected = self.learning_rates.patch_decoder, "0, since no audio channel has a loss weight"
            require(rate == 0, "learning_rates.patch_decoder", expected, rate)


@dataclass(frozen=True)
class TokenizerModelConfig:
    """What the checkpoint of a converted audio tokenizer holds: a model, no job."""

    model: AudioTokenizerConfig
    compute: ComputeConfig = ComputeConfig()
    job: Literal["audio_tokenizer"] = "audio_tokenizer"


@dataclass(frozen=True)
class LMModelConfig:
    """What the checkpoint of a converted language model holds. `text_tokenizer` is a path within the checkpoint."""

    model: AudioLMConfig
    compute: ComputeConfig = ComputeConfig()
    text_tokenizer: str = ""
    job: Literal["audio_lm"] = "audio_lm"


TRAINING_JOBS: dict[str, type] = {
    "tokenizer": TokenizerTrainConfig,
    "tokenizer_adversarial": AdversarialTrainConfig,
    "language_model": LMTrainConfig,
}
JOBS = {**TRAINING_JOBS, "audio_tokenizer": TokenizerModelConfig, "audio_lm": LMModelConfig}
TrainingConfig = TokenizerTrainConfig | AdversarialTrainConfig | LMTrainConfig
JobConfig = TrainingConfig | TokenizerModelConfig | LMModelConfig
