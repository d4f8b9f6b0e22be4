"""A tiny audio tokenizer and packed rows for it, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.audio.packing import empty_row, num_codes, slot_codes, write_clip
from mimo_jax.config import A2TConfig, AudioTokenizerConfig, ComputeConfig, MelConfig, RVQConfig, TransformerConfig
from mimo_jax.models.tokenizer import rvq
from mimo_jax.rows import TokenizerRows

WIDTH, VOCAB = 16, 23


def fast_jit(function: Callable) -> Callable:
    """`jax.jit` for functions that run a few times on tiny shapes: compiles in half the time, without optimisations."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def tiny_config(commitment: str = "first", dropout: float = 0.0, threshold: float = 0.0) -> AudioTokenizerConfig:
    """16 wide, 2 + 1 + 1 layers, 4 levels; every mechanism of the published tokenizer."""
    codec = TransformerConfig.codec
    return AudioTokenizerConfig(
        mel=MelConfig(n_mels=12),
        encoder=codec(WIDTH, 2, 2, 32, causal=False),
        decoder=codec(WIDTH, 1, 2, 32, causal=True),
        vocoder=codec(8, 1, 2, 16, causal=False, window=(4, 2)),
        rvq=RVQConfig(
            codebook_sizes=(16, 16, 8, 8),
            dead_code_threshold=threshold,
            commitment=commitment,
            dropout_probability=dropout,
            kmeans_iterations=10,
        ),
        encoder_skip_layer=1,
    )


def tiny_a2t() -> A2TConfig:
    return A2TConfig(TransformerConfig.qwen2(12, 1, 2, 6, 24), vocab_size=VOCAB)


def compute(dtype: str) -> ComputeConfig:
    return ComputeConfig(dtype=dtype, param_dtype=dtype)


def noise_clips(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Noise whose spectrum and loudness move, so that frames differ; float32."""
    rng = np.random.default_rng(seed)
    clips = []
    for length in lengths:
        time = np.arange(length) / 24_000
        tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * time * (1 + 2 * time))
        envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 13 * time + rng.uniform(0, 6))
        clips.append((0.1 * envelope * (tone + rng.normal(size=length))).astype(np.float32))
    return clips


def make_rows(
    config: AudioTokenizerConfig,
    clips: list[list[np.ndarray]],
    texts: list[list[list[int]]],
    row_codes: int,
    row_text: int,
    dtype: str = "float32",
) -> TokenizerRows:
    """Rows of clips with their texts, in the layout of `TokenizerRows`; end of text is id 0."""
    rows = []
    for row_clips, row_texts in zip(clips, texts, strict=True):
        wav_S, ids_T = empty_row(row_codes, config)
        inputs, targets, ids, positions = (np.zeros(row_text, np.int32) for _ in range(4))
        weights = np.zeros(row_text, dtype)
        code = token = 0
        for i, (wav, text) in enumerate(zip(row_clips, row_texts, strict=True)):
            write_clip(wav_S, ids_T, code, wav, i + 1, config)
            code += slot_codes(len(wav), config)
            if text:
                span = slice(token, token + len(text) + 1)
                inputs[span], targets[span], ids[span], weights[span] = [0, *text], [*text, 0], i + 1, 1
                positions[span] = num_codes(len(wav), config) + np.arange(len(text) + 1)
                token += len(text) + 1
        rows.append((wav_S.astype(dtype), ids_T, inputs, targets, ids, positions, weights))
    return TokenizerRows(*(jnp.asarray(np.stack(arrays)) for arrays in zip(*rows, strict=True)))


def random_params(boxed: Any, seed: int = 0, scale: float = 0.15) -> Any:
    """Parameters with generous random values (also biases and norms), so that no path is hidden by a zero."""
    leaves, tree = jax.tree.flatten(nn.unbox(boxed))
    rng = np.random.default_rng(seed)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(nn.unbox(boxed))[0]]
    values = [("scale" in path) + scale * rng.normal(size=leaf.shape) for path, leaf in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(tree, [jnp.asarray(v, leaf.dtype) for v, leaf in zip(values, leaves, strict=True)])


def random_codebook(config: AudioTokenizerConfig, seed: int = 1, dtype: str = "float32") -> rvq.Codebook:
    """Codebooks whose levels shrink, as residuals do, with uneven counts."""
    rng = np.random.default_rng(seed)
    return {
        rvq.level_name(i): rvq.level_from_entries(
            jnp.asarray(rng.normal(size=(size, config.encoder.d_model)) * 0.7**i, dtype),
            jnp.asarray(rng.uniform(3, 9, size=size), dtype),
            config.rvq.epsilon,
        )
        for i, size in enumerate(config.rvq.codebook_sizes)
    }
