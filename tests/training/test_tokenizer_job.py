"""The tokenizer job on real audio files: the codebooks start by k-means, learn, and are part of the checkpoint."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from training import jobs

from mimo_jax.config import ConfigError, MeshConfig
from mimo_jax.data.loader import RowLoader
from mimo_jax.models.tokenizer import rvq
from mimo_jax.training import metrics
from mimo_jax.training.checkpoint import load_params


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return jobs.audio_tokenizer(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def batches():
    """The training batches of the run, in the order in which they were read."""
    return []


@pytest.fixture(scope="module")
def run(config, batches, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    original = RowLoader.__next__

    def noted(self: RowLoader):
        batch = original(self)
        if not self.one_pass:
            batches.append(batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowLoader, "__next__", noted)
        jobs.train(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2)), workdir)
    return workdir


def test_reports_terms_and_levels_and_learns(run):
    lines = metrics.read(run / "metrics.jsonl")
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [0, 3, 6]
    assert validation[-1]["loss"] < validation[0]["loss"] and validation[-1]["mel"] < validation[0]["mel"]
    train = [line for line in lines if line["split"] == "train"][-1]
    for level in ("00", "01", "02"):
        assert 0 < train[f"level/{level}/usage"] <= 1
        assert 1 <= train[f"level/{level}/perplexity"] <= 16
        assert train[f"level/{level}/revived"] >= 0 and train[f"level/{level}/error"] >= 0
    assert {"a2t", "a2t_accuracy", "mel", "mel_5", "commitment", "learning_rate"} <= set(train)
    assert train["gradient_norm/audio_tokenizer"] > 0 and train["gradient_norm/text_decoder"] > 0
    assert train["total/audio_hours"] == pytest.approx(train["total/audio_seconds"] / 3600)
    assert train["total/clips"] >= 6 * 4


def test_codebooks_start_from_the_first_batch(run):
    """Random codebooks, which k-means replaces, would use few entries of a level of 16."""
    first = metrics.read(run / "metrics.jsonl")[0]
    assert first["level/00/usage"] > 0.5


def test_checkpoint_holds_codebooks_that_have_moved(config, run):
    config_back, variables, meta = load_params(run)
    assert config_back.model == config.model
    assert meta["trained_groups"] == ["audio_tokenizer", "text_decoder"]
    assert sorted(variables["codebook"]) == [rvq.level_name(i) for i in range(3)]
    earlier = load_params(run, step=3)[1]["codebook"]
    for level in variables["codebook"]:
        assert not np.array_equal(variables["codebook"][level]["code_sum"], earlier[level]["code_sum"])


def test_first_step_trains_on_the_batch_that_k_means_saw(run, batches):
    assert len(batches) == 1 + 6
    jax.tree.map(np.testing.assert_array_equal, batches[0], batches[1])
    assert not np.array_equal(batches[1].wav_BS, batches[2].wav_BS)


def test_accumulation_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.accumulation: expected 1, got 2"):
        jobs.train(dataclasses.replace(config, run=dataclasses.replace(config.run, accumulation=2)), tmp_path)
