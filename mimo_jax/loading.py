"""Trained models from their checkpoints, ready to use: what the command line and the quickstart share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_jax.config import ConfigError, LMTrainConfig, TokenizerTrainConfig

if TYPE_CHECKING:
    from mimo_jax.generation.app import SpeechModel
    from mimo_jax.models.tokenizer.codec import Codec

SPEECH_GROUPS = ("patch_encoder", "patch_decoder")


def load_codec(checkpoint: str | os.PathLike[str], step: int | None = None) -> Codec:
    """The audio tokenizer of a tokenizer run.

    Args:
        checkpoint: working directory of the run, or one of its checkpoints.
        step: step to load, the newest intact one by default.

    Raises:
        ConfigError: the checkpoint is of another job.
        CheckpointError: there is no intact checkpoint.
    """
    from mimo_jax.models.tokenizer.codec import Codec
    from mimo_jax.training.checkpoint import load_params

    config, variables, _ = load_params(checkpoint, step)
    if not isinstance(config, TokenizerTrainConfig):
        raise ConfigError(f"{checkpoint}: expected the checkpoint of an audio tokenizer, got one of job {config.job}")
    return Codec(config.model, variables["params"]["audio_tokenizer"], variables["codebook"], config.compute)


def load_speech_model(
    checkpoint: str | os.PathLike[str],
    audio_tokenizer: str | os.PathLike[str],
    text_tokenizer: str | os.PathLike[str] | None = None,
    *,
    step: int | None = None,
    speaks: bool = True,
) -> SpeechModel:
    """A language model with the tokenizers it was trained with, as `generation.app` uses it.

    Args:
        checkpoint: working directory of a language model run, or one of its checkpoints.
        audio_tokenizer: the same of the tokenizer run that made the model's shards.
        text_tokenizer: file; by default where the run's config says it was.
        step: step of the language model to load, the newest intact one by default.
        speaks: whether speech shall be generated, which needs a trained patch decoder.

    Raises:
        ConfigError: the parts do not belong together, or the model has not learnt what is asked of it.
        CheckpointError: there is no intact checkpoint.
    """
    from mimo_jax.generation.app import SpeechModel
    from mimo_jax.generation.generate import Generator
    from mimo_jax.text.tokenizers import load_text_tokenizer
    from mimo_jax.training.checkpoint import load_params

    config, variables, meta = load_params(checkpoint, step)
    if not isinstance(config, LMTrainConfig):
        raise ConfigError(f"{checkpoint}: expected the checkpoint of a language model, got one of job {config.job}")
    needed = SPEECH_GROUPS if speaks else SPEECH_GROUPS[:1]
    missing = [group for group in needed if group not in meta["trained_groups"]]
    if missing:
        raise ConfigError(f"{checkpoint}: its {' and '.join(missing)} has not been trained yet; use a later stage")
    tokenizer = load_text_tokenizer(text_tokenizer or config.data.text_tokenizer)
    codec = load_codec(audio_tokenizer)
    trained_with = meta["data_fingerprint"]
    for name, path, fingerprint in (
        ("text_tokenizer", tokenizer.name, tokenizer.fingerprint),
        ("audio_tokenizer", audio_tokenizer, codec.fingerprint),
    ):
        if fingerprint != trained_with[name]:
            part = name.replace("_", " ")
            raise ConfigError(
                f"{path}: expected the {part} that the model was trained with ({trained_with[name]}), got {fingerprint}"
            )
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
    )
