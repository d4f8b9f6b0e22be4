"""Kills processes of a training job at random, and continues on another mesh: does the job end, and is it the same job?

    python benchmarks/kill_and_restart.py --folder /tmp/kill [--repetitions 10] [--seed 0] [--signal KILL|STOP]

A small text job on made-up shards trains 20 steps on 8 virtual CPU devices in 4 processes (`mimo-jax launch local`),
once undisturbed; then, in each repetition, one of the four (the coordinator is among them) gets SIGKILL, or SIGSTOP, at
a random step, the job has to end by itself within 60 s and name the cause, and the same run continues on 4 devices in
one process. The rows of every step must be those of the undisturbed run, bit by bit, and the losses within 1e-6 at step
1 and 1e-4 up to step 20 (relative, float32). Exits with 1 where they are not. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
STEPS, PROCESSES, ROWS = 20, 4, 8
HOOK = """
import hashlib, json, os, sys
if "train" in sys.orig_argv and "NOTES" in os.environ:
    from mimo_jax.data.loader import RowLoader
    original = RowLoader.__next__
    argv = sys.orig_argv
    me = argv[argv.index("--process") + 1] if "--process" in argv else "0"

    def noted(self):
        batch = original(self)
        if not self.one_pass:
            rows = [hashlib.sha256(b"".join(x[i].tobytes() for x in batch)).hexdigest() for i in range(len(batch[0]))]
            with open(os.environ["NOTES"] + "." + me, "a") as file:
                file.write(json.dumps([self.step, rows]) + chr(10))
        return batch

    RowLoader.__next__ = noted
"""


def make_job(folder: Path) -> list[str]:
    """Writes shards; returns the flags of the job."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in rng.integers(2, 9, 60)]
    lines = [" ".join(words[i] for i in rng.integers(0, 60, 12)) for _ in range(1500)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    corpus, model, shards = (str(folder / name) for name in ("corpus.txt", "text.model", "shards"))
    cli = [sys.executable, "-m", "mimo_jax.cli"]
    for verb in (
        ["text-tokenizer", "train", corpus, "--vocab-size", "300", "--out", model],
        ["data", "ingest-text", corpus, "--split", "line", "--text-tokenizer", model, "--out", shards],
    ):
        subprocess.run([*cli, *verb], check=True, stdout=subprocess.DEVNULL)
    settings = {
        "data.text_tokenizer": model,
        "data.sources.text.path": shards,
        "data.validation.text.path": shards,
        "data.rows": ROWS,
        "data.row_length": 64,
        "data.block_documents": 100,
        "mesh.fsdp": 2,
        "run.steps": STEPS,
        "run.log_every": 1,
        "run.eval_every": STEPS,
        "run.eval_batches": 1,
        "run.checkpoint_every": 3,
    }
    return ["--config", f"{ROOT / 'configs' / 'text.py'}:tiny", *(f"--config.{k}={v}" for k, v in settings.items())]


def launch(folder: Path, workdir: Path, job: list[str], processes: int, devices: int) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "NOTES": str(workdir / "rows"),
        "PYTHONPATH": os.pathsep.join([str(folder / "hook"), str(ROOT)]),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mimo_jax.cli", "launch", "local", "--processes", str(processes), *job]
    command += ["--restarts", "0", "--workdir", str(workdir)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen[str], code: int | None = 0) -> str:
    errors = job.communicate(timeout=600)[1]
    assert code is None or job.returncode == code, errors
    return errors


def noted(workdir: Path, process: int = 0) -> list[list]:
    path = workdir / f"rows.{process}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows_of(workdir: Path) -> tuple[dict[int, list[str]], bool]:
    """Hashes of the rows of each step, and whether a step that was read again had the same."""
    parts: dict[tuple[int, int], str] = {}
    same = True
    for process in range(PROCESSES):
        for step, rows in noted(workdir, process):
            for i, row in enumerate(rows):
                # The processes deal the rows in order: a batch in one process is that of all, one after another.
                place = process * len(rows) + i
                same &= parts.setdefault((step, place), row) == row
    return {step: [parts.get((step, i), "") for i in range(ROWS)] for step in range(1, STEPS + 1)}, same


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; emptied")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    options = parser.parse_args()
    folder, draw = options.folder.absolute(), random.Random(options.seed)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "hook").mkdir(parents=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    job = make_job(folder)
    finish(launch(folder, folder / "whole", job, PROCESSES, 8))
    wanted, reference = rows_of(folder / "whole")[0], losses(folder / "whole")
    assert len(reference) == STEPS and all(all(rows) for rows in wanted.values())

    print(f"{'':>3} process  step  s until ended  cause named  rows equal  largest loss difference (step 1, all)")
    good = True
    victims = [*range(PROCESSES)] * options.repetitions
    for repetition in range(options.repetitions):
        workdir, victim, step = folder / f"run-{repetition}", victims[repetition], draw.randint(2, STEPS - 3)
        launcher = launch(folder, workdir, job, PROCESSES, 8)
        while len(noted(workdir, victim)) < step:
            assert launcher.poll() is None, finish(launcher)
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[victim]), signal.Signals[f"SIG{options.signal}"])
        begin = time.monotonic()
        errors = finish(launcher, None)
        seconds = time.monotonic() - begin
        causes = [line for line in errors.splitlines() if line.startswith("launch: process")]
        named = bool(causes) and (
            options.signal == "STOP" or f"process {victim} of 4 was ended by SIGKILL" in causes[0]
        )
        finish(launch(folder, workdir, job, 1, 4))
        rows, same = rows_of(workdir)
        found = losses(workdir)
        apart = {s: abs(found[s] - reference[s]) / reference[s] for s in reference}
        fine = same and rows == wanted
        print(
            f"{repetition + 1:>3} {victim:>7} {step:>5} {seconds:>14.1f}  {'yes' if named else 'NO':>11}"
            f"  {'yes' if fine else 'NO':>10}  {apart[1]:.1e}, {max(apart.values()):.1e}",
            flush=True,
        )
        if options.signal == "STOP":
            print("   ", *causes, sep="\n    ")
        good &= launcher.returncode not in (0, 2) and seconds < 60 and named and fine
        good &= apart[1] <= 1e-6 and max(apart.values()) <= 1e-4
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
