"""Fine-tuning from end to end: published folder in, 24 conversations learned by heart, published folder out and in."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from training import sft_case

from mimo_jax.config import LearningRates, LMTrainConfig, LoRAConfig, MeshConfig
from mimo_jax.config_files import to_json
from mimo_jax.convert import export_published, import_published
from mimo_jax.data.ingest import ingest_conversations
from mimo_jax.data.shards import ShardSet
from mimo_jax.generation.generate import Generator
from mimo_jax.interop.published import config_json, load_lm, load_tokenizer, to_published
from mimo_jax.interop.safetensors import save
from mimo_jax.models.audio_lm import init_params
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.text.tokenizers import load_text_tokenizer
from mimo_jax.training import metrics
from mimo_jax.training.checkpoint import load_params
from mimo_jax.training.language_model import train_language_model

pytestmark = pytest.mark.slow
JOBS = Path(__file__).with_name("jobs.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}


@pytest.fixture(scope="module")
def start(parity_dir, tmp_path_factory):
    """Conversations as shards (codes of a published-shape audio tokenizer), and an imported model: (folder, job)."""
    folder = tmp_path_factory.mktemp("sft")
    published = parity_dir / "lm" / "lm_a" / "model"
    tokenizer = load_text_tokenizer(published)
    vocab_size = json.loads((published / "config.json").read_text())["vocab_size"]
    path = sft_case.write_conversations(folder / "chat")
    audio, variables = load_tokenizer(parity_dir / "tokenizer" / "tok_a" / "model")
    codec = Codec(audio, variables["params"], variables["codebook"])
    ingest_conversations(path, codec, folder / "shards", text_tokenizer=tokenizer, progress=False)

    job = sft_case.job(folder / "shards", tokenizer, vocab_size, init_from=str(folder / "base"))
    params = jax.jit(init_params, static_argnums=(0, 1))(job.model, job.compute, jax.random.key(0))["params"]
    model = folder / "model"
    model.mkdir()
    save(model, to_published(jax.device_get(params), job.model))
    (model / "config.json").write_text(json.dumps(config_json(job.model, "float32")))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(published / name, model / name)
    import_published(model, folder / "base")
    data = dataclasses.replace(job.data, text_tokenizer=str(folder / "base" / "assets" / "tokenizer.json"))
    return folder, dataclasses.replace(job, data=data)


def accuracy(workdir: Path) -> tuple[float, float]:
    """Share of text targets and of codes that are the best guess, teacher-forced, over all conversations."""
    last = [line for line in metrics.read(workdir / "metrics.jsonl") if line["split"] == "validation"][-1]
    codes = np.mean([last[f"channel/{r}/accuracy"] for r in range(8)])
    assert {n for n in last if n.startswith("task/sft_") and n.endswith("word_ce")} == {
        f"task/sft_{name}/word_ce" for name in sft_case.CONVERSATION_FORMATS
    }
    return last["text/word_accuracy"], float(codes)


def answers(folder: Path, job: LMTrainConfig, workdir: Path, name: str) -> sft_case.Score:
    """Exports a run, imports it again and lets it answer greedily."""
    export_published(workdir, folder / f"{name}-published")
    import_published(folder / f"{name}-published", folder / f"{name}-again")
    config, again = load_lm(folder / f"{name}-published")
    assert config == job.model
    _, variables, _ = load_params(folder / f"{name}-again")
    jax.tree.map(np.testing.assert_array_equal, variables["params"], again)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], load_params(workdir)[1]["params"])
    tokenizer = load_text_tokenizer(folder / f"{name}-published")
    generator = Generator(job.model, variables["params"], job.compute, tokenizer.vocab_size)
    return sft_case.free_running(generator, ShardSet(folder / "shards"), tokenizer)


def report(capsys, name: str, workdir: Path, score: sft_case.Score) -> None:
    text, codes = accuracy(workdir)
    with capsys.disabled():
        print(f"\n{name}: teacher-forced text {text:.2%}, codes {codes:.2%}; free-running {score}")


def test_fine_tuned_model_answers_as_taught_after_export_and_import(start, capsys):
    folder, job = start
    job = dataclasses.replace(job, run=dataclasses.replace(job.run, steps=150, checkpoint_every=150))
    train_language_model(job, folder / "full")
    score = answers(folder, job, folder / "full", "full")
    report(capsys, "full", folder / "full", score)
    text, codes = accuracy(folder / "full")
    assert text == 1.0 and codes >= 0.99
    assert score.texts_right == score.texts and score.codes_right >= 0.95 * score.codes


def test_adapters_learn_the_same(start, capsys):
    folder, job = start
    run = dataclasses.replace(job.run, steps=80, checkpoint_every=80)
    rates = LearningRates(llm=3e-3, patch_encoder=3e-3, patch_decoder=4e-3)
    job = dataclasses.replace(job, lora=LoRAConfig(rank=32, alpha=64.0, tables=True), run=run, learning_rates=rates)
    train_language_model(job, folder / "lora")
    score = answers(folder, job, folder / "lora", "lora")
    report(capsys, "LoRA", folder / "lora", score)
    assert accuracy(folder / "lora")[1] >= 0.95


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=8, tables=True)], ids=["full", "lora"])
def test_eight_devices_fine_tune_as_one_does(start, lora, tmp_path, capsys):
    _, job = start
    run = dataclasses.replace(job.run, steps=8, log_every=1, eval_every=8, checkpoint_every=8)
    data = dataclasses.replace(job.data, row_length=256, row_patches=64)
    job = dataclasses.replace(job, lora=lora, run=run, data=data)
    losses = {}
    for devices, mesh in ((1, MeshConfig(1, 1, 1)), (8, MeshConfig(1, 4, 2))):
        (tmp_path / "config.json").write_text(to_json(dataclasses.replace(job, mesh=mesh)))
        command = [sys.executable, str(JOBS), str(tmp_path / "config.json"), str(tmp_path / str(devices))]
        # XLA has as many threads as devices, and one that waits in a collective keeps its own: NPROC adds some.
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "32"}
        subprocess.run(command, env=ENVIRONMENT | flags, check=True, capture_output=True, timeout=900)
        lines = metrics.read(tmp_path / str(devices) / "metrics.jsonl")
        losses[devices] = np.array([line["loss"] for line in lines if line["split"] == "train"])
    apart = np.abs(losses[8] / losses[1] - 1)
    with capsys.disabled():
        print(f"\n8 devices against 1, relative difference of the loss by step: {' '.join(f'{d:.1e}' for d in apart)}")
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert (apart <= 1e-5 * 2.0 ** np.arange(8)).all()  # Adam's first steps amplify rounding
