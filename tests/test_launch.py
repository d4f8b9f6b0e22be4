"""Several real processes of one job on loopback, started as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_pipeline.builders import WORDS

from mimo_jax import supervisor
from mimo_jax.cli import main
from mimo_jax.supervisor import supervise

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "mimo_jax.cli"]


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Flags of a small text job on data of its own."""
    folder = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(0)
    texts = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 12)) for _ in range(200)]
    (folder / "corpus.txt").write_text("\n".join(texts) + "\n")
    corpus, model, shards = (str(folder / name) for name in ("corpus.txt", "text.model", "shards"))
    assert main(["text-tokenizer", "train", corpus, "--vocab-size", "300", "--out", model]) == 0
    assert main(["data", "ingest-text", corpus, "--split", "line", "--text-tokenizer", model, "--out", shards]) == 0
    settings = ["data.text_tokenizer=" + model, "data.sources.text.path=" + shards, "run.steps=12", "run.eval_every=12"]
    settings += ["data.validation.text.path=" + shards, "run.log_every=1", "run.eval_batches=1", "data.row_length=64"]
    settings += ["run.checkpoint_every=3"]
    return ["--config", f"{ROOT / 'configs' / 'text.py'}:tiny", *(f"--config.{s}" for s in settings)]


# One device for each process, where the other tests have four in one.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """Losses of the job in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    command = [*COMMAND, "train", *job, "--workdir", str(workdir)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return losses(workdir)


@pytest.mark.slow
def test_two_processes_train_as_one_does(job, alone, tmp_path):
    command = [*COMMAND, "launch", "local", "--processes", "2", "--restarts", "0", *job, "--workdir", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(alone) == 12
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_a_killed_process_ends_the_job_in_time_and_it_goes_on_exactly(job, alone, tmp_path, victim):
    command = [*COMMAND, "launch", "local", "--processes", "2", *job, "--workdir", str(tmp_path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=-3, text=True) as launcher:
        while not (tmp_path / "metrics.jsonl").is_file() or len(losses(tmp_path)) < 5:
            assert launcher.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        begin = time.monotonic()
        os.kill(int(children[victim]), signal.SIGKILL)
        assert launcher.stderr is not None
        line = next(line for line in launcher.stderr if line.startswith("launch:"))
        assert time.monotonic() - begin < 60
        assert f"process {victim} of 2 was ended by SIGKILL" in line
        assert "(restart 1 of 10)" in launcher.stderr.read()
        assert launcher.wait(300) == 0
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-4)


@pytest.mark.slow
def test_a_process_that_gives_up_ends_the_job_in_time(job, tmp_path):
    (tmp_path / "checkpoints").write_text("no folder\n")  # process 0 alone fails, and process 1 would wait for it
    command = [*COMMAND, "launch", "local", "--processes", "2", "--restarts", "0", *job, "--workdir", str(tmp_path)]
    begin = time.monotonic()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode not in (0, 2) and "launch: process" in done.stderr
    assert time.monotonic() - begin < 120


STUB = """
import os, pathlib, signal, sys, time

processes = "--process" in sys.argv
me = int(sys.argv[sys.argv.index("--process") + 1]) if processes else 0
attempt = pathlib.Path(sys.argv[1]) / f"attempt-{me}"
attempt.write_text(attempt.read_text() + "x" if attempt.exists() else "x")
exec(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("body", "restarts", "code", "attempts", "message"),
    [
        ("sys.exit(0)", 3, 0, 1, ""),
        # Process 1 is killed once; process 0 has lost it and is aborted.
        (
            "first = attempt.read_text() == 'x'; time.sleep(0.2 * (me == 0)); "
            "os.kill(os.getpid(), (signal.SIGABRT, signal.SIGKILL)[me]) if first else sys.exit(0)",
            3,
            0,
            2,
            "process 1 of 2 was ended by SIGKILL",
        ),
        ("sys.exit(3 * me)", 1, 3, 2, "process 1 of 2 ended with code 3"),
        ("sys.exit(2 * (me == 0))", 5, 2, 1, "process 0 of 2 ended with code 2"),
    ],
    ids=["fine", "killed", "fails", "usage"],
)
def test_supervisor_names_the_cause_and_starts_again(tmp_path, capfd, body, restarts, code, attempts, message):
    command = [sys.executable, "-c", STUB, str(tmp_path), body]
    assert supervise(command, 2, restarts, tmp_path / "logs") == code
    assert [len((tmp_path / f"attempt-{i}").read_text()) for i in range(2)] == [attempts] * 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("codes", "order"),
    [((1, -9), [1, 0]), ((-6, 1), [1, 0]), ((-6, -6, -9, 0), [2, 0, 1]), ((None, 0, 3), [2]), ((0, None), [])],
)
def test_the_likeliest_cause_comes_first(codes, order):
    jobs = [SimpleNamespace(returncode=code, poll=lambda code=code: code) for code in codes]
    assert supervisor._failed(jobs) == order


def test_supervisor_ends_processes_that_wait_for_a_lost_one(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "_FINISH_SECONDS", 0.5)
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60 * (me == 0)); sys.exit(7)"
    begin = time.monotonic()
    assert supervise([sys.executable, "-c", STUB, str(tmp_path), body], 2, 0, tmp_path / "logs") == 7
    printed = capfd.readouterr().err
    assert time.monotonic() - begin < 20 and "process 1 of 2 ended with code 7" in printed
    assert "process 0 of 2 does not end by itself: killed" in printed


@pytest.mark.parametrize("group", [False, True], ids=["process", "terminal"])
def test_signal_to_the_supervisor_reaches_the_processes_once_and_nothing_is_started_again(tmp_path, group):
    program = "import sys; from mimo_jax.supervisor import supervise; from pathlib import Path; "
    program += "sys.exit(supervise(sys.argv[2:], 2, 5, Path(sys.argv[1])))"
    body = "seen = []; [signal.signal(n, lambda n, _: seen.append(n)) for n in (signal.SIGTERM, signal.SIGINT)]; "
    body += "print('up', flush=True); [time.sleep(0.1) for _ in range(600) if not seen]; time.sleep(0.5); "
    body += "sys.exit(128 + seen[0] if len(seen) == 1 else 9)"
    command = [sys.executable, "-c", program, str(tmp_path), sys.executable, "-c", STUB, str(tmp_path), body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True) as job:
        assert job.stdout is not None and "up" in job.stdout.readline()
        while "up" not in (tmp_path / "process-1.log").read_text():
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGINT) if group else job.terminate()
        assert job.wait(20) == (130 if group else 143)
    assert (tmp_path / "attempt-1").read_text() == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems leave them running")
def test_processes_save_and_end_when_the_supervisor_is_killed(tmp_path):
    program = "import sys; from mimo_jax.supervisor import supervise; from pathlib import Path; "
    program += "sys.exit(supervise(sys.argv[2:], 2, 5, Path(sys.argv[1])))"
    body = "signal.signal(signal.SIGTERM, lambda *_: (attempt.write_text('saved'), sys.exit(143))); "
    body += "attempt.write_text('up'); time.sleep(60)"
    command = [sys.executable, "-c", program, str(tmp_path), sys.executable, "-c", STUB, str(tmp_path), body]

    def wait_for(word):
        files = [tmp_path / "attempt-0", tmp_path / "attempt-1"]
        deadline = time.monotonic() + 20
        while [f.read_text() if f.is_file() else "" for f in files] != [word, word]:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with subprocess.Popen(command, env=ENVIRONMENT) as job:
        wait_for("up")
        job.kill()
    wait_for("saved")
