"""Starts the processes of a training job on this machine, says why one failed, and starts them all again.

A process that loses another ends too, sooner or later: JAX aborts it. Going on is a matter of the last checkpoint, so
the supervisor restarts the whole job; the same command continues from there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mimo_jax.config import ConfigError

_USAGE = 2  # exit code of a command that would fail again
_FINISH_SECONDS = 10.0  # that the other processes get to end by themselves once one has failed
_LONG_RUN_SECONDS = 1800.0  # after an attempt of such a length, restarts are counted anew
# Becomes the command, which the kernel sends SIGTERM should the supervisor die, however (PR_SET_PDEATHSIG is 1).
_WITH_SUPERVISOR = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
if os.getppid() != int(sys.argv[1]):
    sys.exit("launch: the supervisor is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def supervise(command: Sequence[str], processes: int, restarts: int, logs: Path, stop_seconds: float = 180.0) -> int:
    """Runs a job to its end.

    Args:
        command: a `mimo-jax train` command line; with several processes it gets `--coordinator`, `--processes` and
            `--process`.
        processes: how many to start. Process 0 prints; the others write to `logs`/process-I.log.
        restarts: how often the job may be started again without having run for half an hour in between. Wrong usage,
            settings or data (exit code 2) is never tried again, nor is a job that was stopped by a signal to the
            supervisor, which is passed on.
        logs: folder, made if missing.
        stop_seconds: how long the processes have after such a signal, to finish the step and save.

    Returns:
        The exit code of the job: 0, or that of the process that failed first.

    Raises:
        ConfigError: the GPUs here cannot be shared out evenly.
    """
    logs.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        begin = time.monotonic()
        code, stopped = _run(command_lines(command, processes), logs, stop_seconds)
        if code == 0 or stopped or code == _USAGE:
            return code
        attempt = 1 if time.monotonic() - begin > _LONG_RUN_SECONDS else attempt + 1
        if attempt > restarts:
            return code
        _say(f"starting all again from the last checkpoint (restart {attempt} of {restarts})")
        time.sleep(min(60.0, 2.0 ** (attempt - 1) - 1))


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def command_lines(command: Sequence[str], processes: int) -> list[tuple[list[str], dict[str, str]]]:
    """Of each process of a job here: its command line, and what its environment has beside that of this process.

    With several, each gets its share of the GPUs: of those in CUDA_VISIBLE_DEVICES, or of all.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    if processes == 1:
        return [(list(command), {})]
    gpus = _gpus()
    if len(gpus) % processes:
        raise ConfigError(f"--processes={processes}: expected a divisor of the {len(gpus)} GPUs here")
    share = len(gpus) // processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        (
            [*command, "--coordinator", address, "--processes", str(processes), "--process", str(i)],
            {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} if share else {},
        )
        for i in range(processes)
    ]


def _gpus() -> list[str]:
    """GPUs that JAX would see here, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return []
        named = ",".join(done.stdout.split())
    gpus = [word.strip() for word in named.split(",")]
    return list(itertools.takewhile(lambda gpu: gpu not in ("", "-1"), gpus))  # CUDA, too, stops at what is no GPU


def _run(lines: Sequence[tuple[list[str], dict[str, str]]], logs: Path, stop_seconds: float) -> tuple[int, bool]:
    """One attempt: its exit code, and whether a signal to the supervisor ended it."""
    first: int | None = None  # the process that failed first
    deadline = math.inf
    with _signals() as received, _jobs(lines, logs) as jobs:
        while any(job.poll() is None for job in jobs):
            if first is None and (failed := _failed(jobs)):
                first = failed[0]
                if not received:
                    _say(_cause(jobs, first, logs))
                    deadline = time.monotonic() + _FINISH_SECONDS
            if received and received[-1] is not None:
                _send(jobs, received[-1])
                received.append(None)
                deadline = time.monotonic() + stop_seconds
            if time.monotonic() > deadline:
                for i, job in enumerate(jobs):
                    if job.poll() is None:
                        _say(f"process {i} of {len(jobs)} does not end by itself: killed")
                        job.kill()
                        job.wait()
            time.sleep(0.1)
        failed = _failed(jobs)
        if first is None and failed:
            first = failed[0]
            if not received:
                _say(_cause(jobs, first, logs))
        code = 0 if first is None else jobs[first].returncode
    return (128 - code if code < 0 else code), bool(received)


def _failed(jobs: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Processes that failed, the likeliest cause first: one that was killed, then one that gave up. One that JAX
    aborted has lost another one."""
    codes = {i: job.returncode for i, job in enumerate(jobs) if job.poll() not in (None, 0)}
    return sorted(codes, key=lambda i: (codes[i] == -signal.SIGABRT, codes[i] > 0))


def _cause(jobs: Sequence[subprocess.Popen[bytes]], i: int, logs: Path) -> str:
    code = jobs[i].returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if code == -signal.SIGABRT and len(jobs) > 1:
        how += " (so JAX ends those who lose another process, or get no sign of life from it)"
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        how = f"was stopped by {signal.Signals(code - 128).name}"
    return f"process {i} of {len(jobs)} {how}" + (f" (see {logs / f'process-{i}.log'})" if i else "")


@contextlib.contextmanager
def _jobs(lines: Sequence[tuple[list[str], dict[str, str]]], logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of an attempt; none is left when the block ends."""
    jobs: list[subprocess.Popen[bytes]] = []
    try:
        for i, (command, extra) in enumerate(lines):
            if sys.platform == "linux":
                command = [sys.executable, "-I", "-S", "-c", _WITH_SUPERVISOR, str(os.getpid()), *command]
            environment = {**os.environ, **extra}
            # In sessions of their own: Ctrl-C in the terminal reaches the supervisor alone, which passes it on once.
            with (logs / f"process-{i}.log").open("ab") if i else contextlib.nullcontext() as log:
                jobs.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        yield jobs
    finally:
        _send(jobs, signal.SIGKILL)
        for job in jobs:
            job.wait()


@contextlib.contextmanager
def _signals() -> Iterator[list[int | None]]:
    """Yields the list of SIGTERM and Ctrl-C as they come."""
    received: list[int | None] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, lambda got, _: received.append(got)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _send(jobs: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for job in jobs:
        if job.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, number)
