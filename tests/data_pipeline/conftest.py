"""Fixtures of the data tests: a trained text tokenizer, and shard sets with the job that reads them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from data_pipeline.builders import ALL_LAYOUTS, WORDS, random_record, tiny_model, write_set

from mimo_jax.config import LayoutWeights, LearningRates, LMDataConfig, LMTrainConfig, RunConfig, SourceConfig
from mimo_jax.data.records import Record
from mimo_jax.data.shards import index_shards
from mimo_jax.text.tokenizers import TextTokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    rng = np.random.default_rng(0)
    texts = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 12)) + "." for _ in range(300)]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("text") / "text.model", 320)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, sentencepiece: TextTokenizer) -> SimpleNamespace:
    """A speech set, a text set and a held-out set with lengths, and the job that reads them."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(1)
    speech = write_set(root / "speech", [random_record(rng, f"s{i}") for i in range(150)])
    text = write_set(root / "text", [Record(id=f"t{i}", text=" ".join(WORDS[: 2 + i % 18]) * 3) for i in range(120)])
    held = write_set(root / "held", [random_record(rng, f"h{i}") for i in range(23)])
    for folder in (speech, text, held):
        index_shards(folder, sentencepiece)
    cfg = LMTrainConfig(
        model=tiny_model(sentencepiece),
        data=LMDataConfig(
            sources={
                "speech": SourceConfig(str(speech), 0.7, ALL_LAYOUTS),
                "text": SourceConfig(str(text), 0.3, LayoutWeights(text=1.0)),
            },
            validation={"held": SourceConfig(str(held), 1.0, ALL_LAYOUTS)},
            text_tokenizer=sentencepiece.name,
            rows=6,
            row_length=256,
            row_patches=160,
            block_documents=40,
        ),
        run=RunConfig(steps=10, seed=3),
        learning_rates=LearningRates(llm=1e-3),
    )
    return SimpleNamespace(root=root, speech=speech, text=text, held=held, cfg=cfg, tokenizer=sentencepiece)
