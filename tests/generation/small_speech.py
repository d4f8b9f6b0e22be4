"""A language model and an audio tokenizer of a few thousand random parameters."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import numpy as np
from data_pipeline.builders import CharTokenizer

from mimo_jax.config import AudioLMConfig, AudioTokenizerConfig, ComputeConfig, MelConfig, RVQConfig, TransformerConfig
from mimo_jax.generation.app import SpeechModel
from mimo_jax.generation.generate import Generator
from mimo_jax.models.audio_lm import init_params
from mimo_jax.models.tokenizer.audio_tokenizer import init_variables
from mimo_jax.models.tokenizer.codec import Codec

CODEBOOKS = (40, 30, 12, 12)
AUDIO = AudioTokenizerConfig(
    mel=MelConfig(n_mels=20),
    encoder=TransformerConfig.codec(16, 2, 2, 32, causal=False),
    decoder=TransformerConfig.codec(16, 1, 2, 32, causal=True),
    vocoder=TransformerConfig.codec(16, 1, 2, 32, causal=False, window=(40, 10)),
    rvq=RVQConfig(codebook_sizes=CODEBOOKS),
    encoder_skip_layer=1,
)


def lm_config(vocab_size: int) -> AudioLMConfig:
    stack = TransformerConfig.qwen2
    return AudioLMConfig(
        vocab_size=vocab_size,
        empty_id=CharTokenizer.special["<|empty|>"],
        llm=stack(16, 1, 2, 8, 32),
        patch_encoder=stack(8, 1, 2, 4, 16, causal=False),
        patch_decoder=stack(8, 1, 2, 4, 16),
        codebook_sizes=CODEBOOKS[:3],
        delays=(0, 1, 2),
    )


@functools.cache
def lm_variables(vocab_size: int) -> dict:
    return jax.jit(init_params, static_argnums=(0, 1))(lm_config(vocab_size), ComputeConfig(), jax.random.key(0))


@functools.cache
def audio_variables() -> dict:
    variables = jax.jit(init_variables, static_argnums=(0, 1))(AUDIO, ComputeConfig(), jax.random.key(1))
    return nn.meta.unbox(variables)


def speech_model() -> SpeechModel:
    variables = audio_variables()
    tokenizer = CharTokenizer()
    return SpeechModel(
        Generator(lm_config(tokenizer.vocab_size), lm_variables(tokenizer.vocab_size)["params"]),
        Codec(AUDIO, variables["params"], variables["codebook"]),
        tokenizer,
        {"checkpoint": "nowhere"},
    )


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(24_000 * seconds))).astype(np.float32)
