"""The real jobs, at a size that compiles in seconds.

As a program it trains one of them in WORKDIR, and ends itself by SIGKILL when it asks for the batch of step KILL_AT (0:
never). It notes the hash of every batch in WORKDIR.batches:

    python jobs.py CONFIG_JSON WORKDIR [KILL_AT]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from data_pipeline.builders import ALL_LAYOUTS, WORDS, random_record, write_set, write_wavs

from mimo_jax.config import (
    A2TConfig,
    AdversarialTrainConfig,
    AudioDataConfig,
    AudioLMConfig,
    AudioTokenizerConfig,
    DiscriminatorConfig,
    LayoutWeights,
    LearningRates,
    LMDataConfig,
    LMLossConfig,
    LMTrainConfig,
    MelConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    RVQConfig,
    SourceConfig,
    TokenizerTrainConfig,
    TrainingConfig,
    TransformerConfig,
)
from mimo_jax.config_files import from_config_dict
from mimo_jax.data.loader import RowLoader
from mimo_jax.data.records import Record
from mimo_jax.data.shards import index_shards
from mimo_jax.text.tokenizers import TextTokenizer, train_sentencepiece
from mimo_jax.training.checkpoint import find
from mimo_jax.training.language_model import train_language_model
from mimo_jax.training.tokenizer import train_tokenizer
from mimo_jax.training.tokenizer_adversarial import train_adversarial

RUN = RunConfig(steps=6, log_every=2, eval_every=3, eval_batches=0, checkpoint_every=3)


def make_text_tokenizer(folder: Path) -> TextTokenizer:
    rng = np.random.default_rng(0)
    texts = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 12)) + "." for _ in range(300)]
    return train_sentencepiece(texts, folder / "text.model", 320)


def language_model(folder: Path) -> LMTrainConfig:
    """A joint job on shard sets that it writes into `folder`."""
    tokenizer = make_text_tokenizer(folder)
    rng = np.random.default_rng(1)
    speech = write_set(folder / "speech", [random_record(rng, f"s{i}") for i in range(40)])
    text = write_set(folder / "words", [Record(id=f"t{i}", text=" ".join(WORDS[: 2 + i % 18]) * 3) for i in range(60)])
    held = write_set(folder / "held", [random_record(rng, f"h{i}") for i in range(8)])
    for path in (speech, text, held):
        index_shards(path, tokenizer)
    stack = TransformerConfig.qwen2
    return LMTrainConfig(
        model=AudioLMConfig(
            vocab_size=320,
            empty_id=tokenizer.special["<|empty|>"],
            llm=stack(32, 2, 2, 16, 64),
            patch_encoder=stack(16, 1, 2, 8, 32, causal=False),
            patch_decoder=stack(16, 1, 2, 8, 32),
            codebook_sizes=(1024, 1024),  # each channel costs seconds of compilation
            delays=(0, 1),
        ),
        data=LMDataConfig(
            sources={
                "speech": SourceConfig(str(speech), 0.7, ALL_LAYOUTS),
                "words": SourceConfig(str(text), 0.3, LayoutWeights(text=1.0)),
            },
            validation={"held": SourceConfig(str(held), 1.0, ALL_LAYOUTS)},
            text_tokenizer=str(folder / "text.model"),
            rows=4,
            row_length=128,
            row_patches=80,
            block_documents=20,
        ),
        run=RUN,
        learning_rates=LearningRates(llm=1e-2, patch_encoder=1e-2, patch_decoder=1e-2),
        loss=LMLossConfig(channel_weights=(12.0, 8.0)),
    )


def text_only(config: LMTrainConfig) -> LMTrainConfig:
    """The same model as a text job."""
    words = {"words": config.data.sources["words"]}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=words, validation=words, row_patches=0),
        loss=LMLossConfig(text_weight=1.0, channel_weights=(0.0, 0.0)),
        learning_rates=LearningRates(llm=1e-2),
    )


def audio_tokenizer(folder: Path) -> TokenizerTrainConfig:
    """A tokenizer job on noises that it writes into `folder`."""
    make_text_tokenizer(folder)
    manifest = str(write_wavs(folder / "wavs", 12))
    stack = TransformerConfig.codec
    return TokenizerTrainConfig(
        model=AudioTokenizerConfig(
            mel=MelConfig(n_mels=32),
            encoder=stack(32, 2, 2, 64, causal=False),
            decoder=stack(32, 2, 2, 64, causal=True),
            vocoder=stack(32, 1, 2, 64, causal=False, window=(40, 10)),
            rvq=RVQConfig(codebook_sizes=(16, 8, 8), kmeans_iterations=5, dead_code_threshold=0.1),
            encoder_skip_layer=1,
        ),
        a2t=A2TConfig(TransformerConfig.qwen2(32, 1, 2, 16, 64), vocab_size=320),
        data=AudioDataConfig(
            manifest=manifest,
            validation=manifest,
            text_tokenizer=str(folder / "text.model"),
            rows=4,
            row_codes=48,
            row_text=64,
            max_seconds=1.0,
            samples=0,  # one more program to compile
            block_documents=6,
        ),
        run=RUN,
        learning_rate=1e-2,
        optimizer=OptimizerConfig(weight_decay=0.01),
    )


def adversarial(folder: Path) -> AdversarialTrainConfig:
    """The second stage from a first one, which is trained in `folder` as `test_tokenizer_job` trains it."""
    first = audio_tokenizer(folder)
    if not (folder / "stage-1").is_dir():
        train_tokenizer(dataclasses.replace(first, mesh=MeshConfig(data=2, fsdp=2)), folder / "stage-1")
    return AdversarialTrainConfig(
        model=first.model,
        discriminator=DiscriminatorConfig((2, 3), (4, 8, 8), (256, 128), 4),
        data=dataclasses.replace(first.data, row_codes=16, row_text=0, max_seconds=0.5, text_tokenizer="", samples=4),
        run=RUN,
        learning_rate=3e-3,
        discriminator_learning_rate=3e-3,
        init_from=str(folder / "stage-1"),
    )


def train(config: TrainingConfig, workdir: Path) -> None:
    if isinstance(config, LMTrainConfig):
        train_language_model(config, workdir)
    elif isinstance(config, AdversarialTrainConfig):
        train_adversarial(config, workdir)
    else:
        train_tokenizer(config, workdir)


def digest(workdir: Path, step: int | None = None) -> str:
    """SHA-256 of all arrays of a checkpoint: parameters, codebooks, moments, counters, power iterations."""
    path = find(workdir, step)
    content = hashlib.sha256()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in ("variables", "optimizer"):
            for where, x in jax.tree_util.tree_leaves_with_path(reader.restore(path / item)):
                content.update(jax.tree_util.keystr(where).encode() + np.asarray(x).tobytes())
    return content.hexdigest()


def note_batches(path: Path, kill_at: int) -> None:
    """Makes every loader write the hash of each batch that it hands out, and kills the process at a step."""
    original = RowLoader.__next__

    def noted(self: RowLoader):
        if not self.one_pass and self.step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = original(self)
        if not self.one_pass:
            content = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in batch)).hexdigest()
            with path.open("a") as file:
                file.write(json.dumps([self.step, content]) + "\n")
        return batch

    RowLoader.__next__ = noted


if __name__ == "__main__":
    note_batches(Path(sys.argv[2]).with_suffix(".batches"), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    train(from_config_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
    print("digest", digest(Path(sys.argv[2])))
