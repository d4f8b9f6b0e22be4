"""Starts the processes of a training job on this machine, says why one failed, and starts them all again.

A process that loses another ends too, sooner or later: JAX aborts it. Going on is a matter of the last checkpoint, so
the supervisor restarts the whole job; the same command continues from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

_USAGE = 2  # exit code of a command that would fail again
_FINISH_SECONDS = 20.0  # that the other processes get to end by themselves once one has failed
_KILL_SECONDS = 90.0  # that they get to save and end after SIGTERM: one step and one checkpoint


def supervise(command: Sequence[str], processes: int, restarts: int, logs: Path) -> int:
    """Runs a job to its end.

    Args:
        command: a `mimo-jax train` command line; with several processes it gets `--coordinator`, `--processes` and
            `--process`.
        processes: how many to start. Process 0 prints; the others write to `logs`/process-I.log.
        restarts: how often the job may be started again. Wrong usage or settings (exit code 2) is never tried again,
            nor is a job that was stopped by a signal to the supervisor, which is passed on.
        logs: folder, made if missing.

    Returns:
        The exit code of the job: 0, or that of the process that failed first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for attempt in range(restarts + 1):
        code, cause, stopped = _run(command, processes, logs)
        if code == 0 or stopped:
            return code
        again = code != _USAGE and attempt < restarts
        plan = f"starting all again from the last checkpoint (restart {attempt + 1} of {restarts})" if again else "done"
        print(f"launch: {cause}; {plan}", file=sys.stderr, flush=True)
        if not again:
            break
    return code


def _run(command: Sequence[str], processes: int, logs: Path) -> tuple[int, str, bool]:
    """One attempt: exit code, what happened, and whether a signal to the supervisor ended it."""
    received: list[int] = []
    patience = [(_FINISH_SECONDS, signal.SIGTERM), (_FINISH_SECONDS + _KILL_SECONDS, signal.SIGKILL)]
    with _jobs(command, processes, logs) as jobs, _forwarded(jobs, received):
        failed: list[int] = []
        begin = 0.0
        while any(job.poll() is None for job in jobs):
            now = time.monotonic()
            if not failed:
                failed = [i for i, job in enumerate(jobs) if job.poll() not in (None, 0)]
                begin = now
            elif patience and now - begin > patience[0][0]:
                _send(jobs, patience.pop(0)[1])
            time.sleep(0.1)
        failed = failed or [i for i, job in enumerate(jobs) if job.returncode != 0]
        codes = [job.returncode for job in jobs]
    if not failed:
        return 0, "", False
    # A process that JAX aborted (SIGABRT) has lost another one: that is not the cause.
    first = min(failed, key=lambda i: codes[i] == -signal.SIGABRT)
    code = codes[first]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    where = f" (see {logs / f'process-{first}.log'})" if first else ""
    return (128 - code if code < 0 else code), f"process {first} of {processes} {how}{where}", bool(received)


@contextlib.contextmanager
def _jobs(command: Sequence[str], processes: int, logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of an attempt; none is left when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with contextlib.ExitStack() as files:
        jobs = []
        for i in range(processes):
            flags = ["--coordinator", address, "--processes", str(processes), "--process", str(i)]
            output: IO[bytes] | None = None
            if i:
                output = files.enter_context((logs / f"process-{i}.log").open("ab"))
            full = [*command, *(flags if processes > 1 else [])]
            jobs.append(subprocess.Popen(full, stdout=output, stderr=output and subprocess.STDOUT))
        try:
            yield jobs
        finally:
            _send(jobs, signal.SIGKILL)
            for job in jobs:
                job.wait()


@contextlib.contextmanager
def _forwarded(jobs: Sequence[subprocess.Popen[bytes]], received: list[int]) -> Iterator[None]:
    """Passes SIGTERM and Ctrl-C on to the processes, and notes them."""

    def forward(number: int, frame: object) -> None:
        received.append(number)
        # JAX's preemption service knows SIGTERM only.
        _send(jobs, signal.SIGTERM)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _send(jobs: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for job in jobs:
        if job.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, number)
