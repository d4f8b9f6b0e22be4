"""Several processes of one job, one of which is told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimo_jax.training import checkpoint, signals

PROGRAM = """
import hashlib, json, pathlib, sys, time
import jax
from training import toy
from mimo_jax.training import loop
from mimo_jax.training.signals import stop_signal

workdir, port, processes, process, busy, settings = sys.argv[1:]
evaluate, train_loop, validated = loop.evaluate, loop.train_loop, []

class Slow(toy.ToyLoader):
    def __next__(self):
        if self.position == 4 and busy == "step":
            print("ready", flush=True)
        time.sleep(0.1)
        return super().__next__()

def slow_batches(batches):
    for rows in list(batches) * 100:
        print("ready", flush=True)
        time.sleep(0.1)
        yield rows

def slow_evaluate(step, state, batches, *rest):
    validated.append(1)
    return evaluate(step, state, slow_batches(batches) if len(validated) == 2 else batches, *rest)

def slow_compilation(state, train_step, *rest, **named):
    def step(state, rows):
        if int(state.step) == 5:  # of the run that continues
            print("ready", flush=True)
            # No handler of Python runs meanwhile, as when XLA compiles.
            hashlib.pbkdf2_hmac("sha256", b"in C", b"without an end", (1 << 31) - 1)
        return train_step(state, rows)
    return train_loop(state, step, *rest, **named)

if busy == "validation":
    loop.evaluate = slow_evaluate
if busy == "compilation":
    loop.train_loop = slow_compilation
with stop_signal(0.0):
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    with stop_signal(30.0):
        toy.train(pathlib.Path(workdir), toy.make_config(**json.loads(settings)), Slow())
"""


def stop(workdir: Path, processes: int, victims: list[int], number: int, busy: str, **settings: float) -> list[str]:
    """Starts a job, sends the signal to some of its processes once all are where they should be, and returns what each
    wrote to stderr; all have ended by themselves with code 128 + signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])), "XLA_FLAGS": ""}
    arguments = [str(processes), busy, json.dumps({"steps": 400, "eval_every": 8, "checkpoint_every": 5} | settings)]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(workdir), str(port), arguments[0], str(i), *arguments[1:]],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        for job in jobs:
            assert job.stdout is not None
            while "ready" not in (line := job.stdout.readline()):
                assert line, job.communicate()[1]
        for i in victims:
            jobs[i].send_signal(number)
        begin = time.monotonic()
        errors = [job.communicate(timeout=60)[1] for job in jobs]
        assert time.monotonic() - begin < 60
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [128 + number] * processes, "\n".join(errors)
    return errors


def steps_saved(workdir: Path) -> list[int]:
    return checkpoint.good_steps(workdir / "checkpoints")


@pytest.mark.parametrize(
    ("processes", "victims", "number"),
    [
        (2, [1], signal.SIGTERM),
        pytest.param(2, [0], signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, [0, 1], signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(4, [2], signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(4, [0, 1, 2, 3], signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_signal_to_some_process_stops_and_saves_all_at_the_same_step(tmp_path, processes, victims, number):
    errors = stop(tmp_path, processes, victims, number, "step", eval_every=400, checkpoint_every=400)
    saved = steps_saved(tmp_path)
    assert len(saved) == 1 and 5 <= saved[0] < 100, errors
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == saved[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_signal_to_some_process_breaks_a_validation_off(tmp_path, victim):
    stop(tmp_path, 2, [victim], signal.SIGTERM, "validation")
    assert steps_saved(tmp_path)[-1] == 8
    assert '"step": 8, "split": "validation"' not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_all_processes_that_compile_end_in_time_and_the_checkpoint_is_intact(tmp_path, victim):
    errors = stop(tmp_path, 2, [victim], signal.SIGTERM, "compilation", grace_seconds=2.0)
    assert all("no step ended within 2 s. The last complete checkpoint is intact" in text for text in errors)
    assert steps_saved(tmp_path) == [5]


def test_a_second_signal_ends_a_busy_process_at_once():
    program = "import hashlib, sys; from mimo_jax.training.signals import stop_signal\nwith stop_signal(60):"
    program += "\n print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'in C', b'without an end', (1 << 31) - 1)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True, env=environment) as job:
        assert job.stdout is not None and "ready" in job.stdout.readline()
        job.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        assert "a second one ended it at once" in job.communicate(timeout=20)[1]
        assert job.returncode == 130


def test_a_block_inside_another_shares_its_signals_and_has_its_own_grace_time():
    before = signal.getsignal(signal.SIGTERM)
    with signals.stop_signal(1.0) as outer:
        with signals.stop_signal(2.0) as inner:
            assert inner is outer and inner.grace_seconds == 2.0
        assert outer.grace_seconds == 1.0 and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
