"""Several real processes of one job on loopback, started as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.builders import WORDS

from mimo_jax.cli import main

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "mimo_jax.cli"]


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 12)) for _ in range(200)]
    (tmp_path / "corpus.txt").write_text("\n".join(texts) + "\n")
    corpus, model = str(tmp_path / "corpus.txt"), str(tmp_path / "text.model")
    assert main(["text-tokenizer", "train", corpus, "--vocab-size", "300", "--out", model]) == 0
    shards = str(tmp_path / "shards")
    assert main(["data", "ingest-text", corpus, "--split", "line", "--text-tokenizer", model, "--out", shards]) == 0
    settings = ["data.text_tokenizer=" + model, "data.sources.text.path=" + shards, "run.steps=4", "run.eval_every=4"]
    settings += ["data.validation.text.path=" + shards, "run.log_every=1", "run.eval_batches=1", "data.row_length=64"]
    train = ["train", "--config", f"{ROOT / 'configs' / 'text.py'}:tiny", *(f"--config.{s}" for s in settings)]
    # One device for each process, where the other tests have four in one.
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    for workdir, launcher in (("one", []), ("two", [str(ROOT / "launch" / "local.sh"), "2"])):
        command = [*launcher, *COMMAND, *train, "--workdir", str(tmp_path / workdir)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "two")) == 4
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
