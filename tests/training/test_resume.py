"""A run that is killed at any moment and started again ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training import jobs

from mimo_jax.config_files import to_json
from mimo_jax.training import metrics

TOY = Path(__file__).with_name("toy.py")
JOBS = Path(__file__).with_name("jobs.py")
# The programs import the package and, as the tests do, from the folder of the tests.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}


def run(*arguments: object, code: int = 0, program: Path = TOY) -> str:
    """Runs a job in a process of its own and returns the digest that it printed."""
    command = [sys.executable, str(program), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    found = re.search(r"^digest (\w+)$", done.stdout, re.MULTILINE)
    return found[1] if found else ""


def losses(workdir: Path) -> list[tuple]:
    kept = metrics.read(workdir / "metrics.jsonl")
    return [(line["step"], line["split"], line["loss"]) for line in kept]


def test_killed_run_ends_with_the_same_bits(tmp_path):
    seed = random.randrange(1 << 30)
    kill_at = random.Random(seed).randrange(2, 13)
    whole = run(tmp_path / "whole", 12)
    run(tmp_path / "killed", 12, kill_at, code=-signal.SIGKILL)
    assert run(tmp_path / "killed", 12) == whole, f"killed at step {kill_at}"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"killed at step {kill_at}"


@pytest.mark.slow
@pytest.mark.parametrize("job", [jobs.language_model, jobs.audio_tokenizer, jobs.adversarial])
def test_killed_job_ends_with_the_same_bits_and_reads_the_same_batches(job, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(to_json(job(tmp_path)))
    kill_at = random.randrange(2, 7)
    whole = run(config, tmp_path / "whole", program=JOBS)
    run(config, tmp_path / "killed", kill_at, program=JOBS, code=-signal.SIGKILL)
    assert run(config, tmp_path / "killed", program=JOBS) == whole, f"killed at step {kill_at}"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"killed at step {kill_at}"
    assert batches(tmp_path / "killed") == batches(tmp_path / "whole"), f"killed at step {kill_at}"


def batches(workdir: Path) -> dict[int, str]:
    """Hash of the batch of each step; a step that was read twice must have read the same."""
    found: dict[int, str] = {}
    for line in workdir.with_suffix(".batches").read_text().splitlines():
        step, content = json.loads(line)
        assert found.setdefault(step, content) == content, step
    return found


@pytest.mark.slow
def test_run_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    whole = run(tmp_path / "whole", 24)
    for kill_at in (3, 6, 7, 10, 13, 13, 18, 21):  # twice before the next checkpoint, and during a save
        run(tmp_path / "killed", 24, kill_at, code=-signal.SIGKILL)
    assert run(tmp_path / "killed", 24) == whole
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def run_two_processes(workdir: Path, steps: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TOY), str(workdir), str(steps), "0", str(i), "2", str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "step" in outputs[0] and "step" not in outputs[1].replace("digest", ""), "one process reports"


@pytest.mark.slow
def test_two_processes_train_like_one_and_their_checkpoint_continues_in_one(tmp_path):
    run(tmp_path / "one", 8)
    run_two_processes(tmp_path / "two", 8)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    assert [entry[2] for entry in one] == pytest.approx([entry[2] for entry in two], rel=1e-5)
    run(tmp_path / "two", 12)  # a longer run, on one process
    assert losses(tmp_path / "two")[-1][0] == 12
