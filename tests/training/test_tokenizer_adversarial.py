"""The adversarial job: what it takes from the first stage, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from training import jobs

from mimo_jax.config import ComputeConfig, ConfigError, MeshConfig
from mimo_jax.config_files import load_config, to_json
from mimo_jax.loading import load_codec
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.sharding import make_mesh
from mimo_jax.training import metrics, tokenizer_adversarial
from mimo_jax.training.checkpoint import CheckpointError, load_params
from mimo_jax.training.metrics import MetricsWriter
from mimo_jax.training.samples import Samples

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return jobs.adversarial(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    jobs.train(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2)), workdir)
    return workdir


def test_decoder_and_vocoder_learn_and_the_codes_stay(config, run):
    before, after = load_params(config.init_from)[1], load_params(run)[1]
    jax.tree.map(np.testing.assert_array_equal, before["codebook"], after["codebook"])
    old, new = (variables["params"]["audio_tokenizer"] for variables in (before, after))
    jax.tree.map(np.testing.assert_array_equal, old["encoder"], new["encoder"])
    for part in ("decoder", "vocoder"):
        assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(old[part]), jax.tree.leaves(new[part]), strict=True))
    assert load_codec(run).fingerprint == load_codec(config.init_from).fingerprint
    wav = np.random.default_rng(0).normal(size=9000).astype(np.float32) * 0.1
    first, second = (load_codec(path).encode([wav])[0] for path in (config.init_from, run))
    np.testing.assert_array_equal(first, second)


def test_reports_terms_margins_and_norms_of_both_players(config, run):
    lines = metrics.read(run / "metrics.jsonl")
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [0, 3, 6]
    train = [line for line in lines if line["split"] == "train"][-1]
    assert {"mel", "adversarial", "feature", "discriminator", "margin", "accuracy"} <= set(train)
    for name in config.discriminator.names:
        assert train[f"{name}/margin"] == pytest.approx(train[f"{name}/real"] - train[f"{name}/fake"], abs=1e-6)
        assert 0 <= train[f"{name}/accuracy"] <= 1
    for name in ("mel", "adversarial", "feature"):
        assert train[f"term_norm/{name}"] > 0
    for group in ("audio_tokenizer", "discriminators"):
        assert train[f"gradient_norm/{group}"] > 0 and train[f"learning_rate/{group}"] > 0
    assert "level/00/perplexity" in train


def test_samples_can_be_listened_to(config, run):
    folder = run / "samples"
    assert sorted(int(p.name) for p in folder.iterdir()) == [0, 3, 6]
    names = {p.name for p in (folder / "6").iterdir()}
    stems = [f"clip-{i:02d}" for i in range(config.data.samples)]
    assert names == {f"{s}{e}" for s in stems for e in ("-original.wav", "-3-levels.wav", ".png")}
    sounds = {name: soundfile.read(folder / "6" / f"clip-00-{name}.wav") for name in ("original", "3-levels")}
    assert len({len(wav) for wav, _ in sounds.values()}) == 1 and sounds["original"][1] == 24_000
    original = [soundfile.read(folder / step / "clip-00-original.wav")[0] for step in ("0", "6")]
    np.testing.assert_array_equal(*original)
    assert np.abs(original[0]).max() > 0.01
    assert (folder / "6/clip-00.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_from_a_run_of_its_own_stage_with_its_discriminators(config, run):
    cfg = dataclasses.replace(config, init_from=str(run), mesh=MeshConfig(data=2, fsdp=2))
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        job = tokenizer_adversarial.assemble(cfg, mesh)
        origin = tokenizer_adversarial.find_origin(cfg)
        params, codebook = tokenizer_adversarial.read_origin(origin, job.abstract, job.placed)
        state = jax.jit(job.start, out_shardings=job.placed)(params, codebook, jax.random.key(3))
    learnt = load_params(run)[1]["params"]["discriminators"]
    jax.tree.map(np.testing.assert_array_equal, state.params["discriminators"], learnt)
    for name, layers in state.spectral.items():
        for layer, vectors in layers.items():
            matrix = np.asarray(learnt[name][layer]["kernel"]).reshape(-1, vectors["u"].shape[0])
            ratio = np.linalg.norm(matrix @ np.asarray(vectors["u"])) / np.linalg.norm(matrix, 2)
            assert 0.9 < ratio < 1.0001, (name, layer)


def test_a_first_stage_of_another_model_is_refused_by_the_setting(config, tmp_path):
    model = dataclasses.replace(config.model, decoder_norm="frame")
    with pytest.raises(ConfigError, match=r"model\.decoder_norm: expected 'sequence', as in .*, got 'frame'"):
        jobs.train(dataclasses.replace(config, model=model), tmp_path)


def test_codes_of_another_precision_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"compute\.dtype: expected 'float32', as in .*, got 'bfloat16'"):
        jobs.train(dataclasses.replace(config, compute=ComputeConfig(dtype="bfloat16")), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists(), "found before anything is written"


def test_a_checkpoint_of_something_else_is_refused(config, tmp_path):
    with pytest.raises(CheckpointError, match="expected a complete checkpoint"):
        jobs.train(dataclasses.replace(config, init_from=str(tmp_path / "none")), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"run\.accumulation: expected 1, got 2"):
        jobs.train(dataclasses.replace(config, run=dataclasses.replace(config.run, accumulation=2)), tmp_path / "b")
    with pytest.raises(ConfigError, match=r"data\.row_text: expected 0"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, row_text=8))


def test_a_language_model_is_no_first_stage(config, tmp_path, monkeypatch):
    meta = {"config": json.loads(to_json(load_config(f"{CONFIGS / 'joint.py'}:tiny")))}
    monkeypatch.setattr(tokenizer_adversarial, "read_meta", lambda path: meta)
    with pytest.raises(ConfigError, match="expected the checkpoint of an audio tokenizer, got one of language_model"):
        jobs.train(config, tmp_path)


def test_samples_that_cannot_be_written_do_not_end_a_run(config, tmp_path, capsys):
    samples = Samples(AudioTokenizer(config.model, config.compute), tmp_path, 1, None)
    samples._make = lambda state, rows: (np.ones((1, 8), np.int32), np.full((1, 1920), np.nan), [np.zeros((1, 1920))])
    samples.write(3, None, None, MetricsWriter(tmp_path))
    assert "step 3  no samples written" in capsys.readouterr().out


def test_discriminators_have_no_weight_decay(config):
    from mimo_jax.training.optimizer import decays

    params = {"audio_tokenizer": {"decoder": {"kernel": 0}}, "discriminators": {"period_2": {"conv_0": {"kernel": 0}}}}
    found = decays(params)
    assert found["audio_tokenizer"]["decoder"]["kernel"] and not found["discriminators"]["period_2"]["conv_0"]["kernel"]


def test_config_says_what_was_run(config, run):
    saved = json.loads((run / "config.json").read_text())
    assert saved["job"] == "tokenizer_adversarial" and saved["init_from"] == config.init_from
