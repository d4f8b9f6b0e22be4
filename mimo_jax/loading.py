"""Trained models from their checkpoints, ready to use: what the command line and the quickstart share."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_jax.config import (
    AdversarialTrainConfig,
    ConfigError,
    LMModelConfig,
    LMTrainConfig,
    TokenizerModelConfig,
    TokenizerTrainConfig,
)

if TYPE_CHECKING:
    from mimo_jax.generation.app import SpeechModel
    from mimo_jax.generation.prompts import Kind
    from mimo_jax.models.tokenizer.codec import Codec

SPEECH_GROUPS = ("patch_encoder", "patch_decoder")


def load_codec(checkpoint: str | os.PathLike[str], step: int | None = None, **options: Any) -> Codec:
    """The audio tokenizer of a tokenizer run of either stage, or a converted one.

    Args:
        step: step to load, the newest intact one by default.
        options: `segment_seconds` and `reference_quirks` of the codec.

    Raises:
        ConfigError: the checkpoint is of another job.
        CheckpointError: there is no intact checkpoint.
    """
    from mimo_jax.models.tokenizer.codec import Codec
    from mimo_jax.training.checkpoint import load_params

    config, variables, _ = load_params(checkpoint, step)
    if not isinstance(config, TokenizerTrainConfig | AdversarialTrainConfig | TokenizerModelConfig):
        raise ConfigError(f"{checkpoint}: expected the checkpoint of an audio tokenizer, got one of job {config.job}")
    return Codec(config.model, variables["params"]["audio_tokenizer"], variables["codebook"], config.compute, **options)


def load_speech_model(
    checkpoint: str | os.PathLike[str],
    audio_tokenizer: str | os.PathLike[str],
    text_tokenizer: str | os.PathLike[str] | None = None,
    *,
    step: int | None = None,
    speaks: bool = True,
    prompts: Kind | None = None,
) -> SpeechModel:
    """A language model with the tokenizers it was trained with, as `generation.app` uses it.

    Args:
        checkpoint: working directory of a language model run, or a checkpoint, which may be a converted one.
        audio_tokenizer: the same of the tokenizer that made the model's shards.
        text_tokenizer: file; by default that of the run's config, or the one beside converted weights.
        step: step of the language model to load, the newest intact one by default.
        speaks: whether speech shall be generated, which needs a trained patch decoder.
        prompts: which prompts the model knows; by default "chat" after conversations and for a converted model, else
            "base".

    Raises:
        ConfigError: the parts do not belong together, or the model has not learnt what is asked of it.
        CheckpointError: there is no intact checkpoint.
    """
    from mimo_jax.generation.app import SpeechModel
    from mimo_jax.generation.generate import Generator
    from mimo_jax.text.tokenizers import load_text_tokenizer
    from mimo_jax.training.checkpoint import load_params

    config, variables, meta = load_params(checkpoint, step)
    if not isinstance(config, LMTrainConfig | LMModelConfig):
        raise ConfigError(f"{checkpoint}: expected the checkpoint of a language model, got one of job {config.job}")
    needed = SPEECH_GROUPS if speaks else SPEECH_GROUPS[:1]
    missing = [group for group in needed if group not in meta["trained_groups"]]
    if missing:
        raise ConfigError(f"{checkpoint}: its {' and '.join(missing)} has not been trained yet; use a later stage")
    if isinstance(config, LMModelConfig):
        beside = Path(checkpoint) / config.text_tokenizer
    else:
        beside = Path(config.data.text_tokenizer)
    tokenizer = load_text_tokenizer(text_tokenizer or beside)
    codec = load_codec(audio_tokenizer)
    trained_with = meta["data_fingerprint"]
    for name, path, fingerprint in (
        ("text_tokenizer", tokenizer.name, tokenizer.fingerprint),
        ("audio_tokenizer", audio_tokenizer, codec.fingerprint),
    ):
        if fingerprint != trained_with.get(name, fingerprint):  # published weights do not say what made their codes
            part = f"{name.replace('_', ' ')} that the model was trained with ({trained_with[name]})"
            raise ConfigError(f"{path}: expected the {part}, got {fingerprint}")
    return SpeechModel(
        Generator(config.model, variables["params"], config.compute, tokenizer.vocab_size),
        codec,
        tokenizer,
        {
            "checkpoint": str(Path(checkpoint)),
            "step": meta["step"],
            "audio_tokenizer": str(Path(audio_tokenizer)),
            "audio_tokenizer_fingerprint": codec.fingerprint,
            "text_tokenizer": tokenizer.name,
            "text_tokenizer_fingerprint": tokenizer.fingerprint,
        },
        prompts or ("base" if isinstance(config, LMTrainConfig) and not _has_conversations(config) else "chat"),
    )


def _has_conversations(config: LMTrainConfig) -> bool:
    """Whether a model was trained on conversations."""
    layouts = [dataclasses.asdict(source.layouts) for source in config.data.sources.values()]
    return any(name.startswith("sft_") and weight > 0 for shares in layouts for name, weight in shares.items())
