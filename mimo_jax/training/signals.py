"""Ending a run in time: on a signal, and when it hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the key-value store of the coordination service has no public name

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_END = b"\0"  # no signal has this number
_POLL_SECONDS = 1.0  # how soon a process learns that another one got a signal
_TALK_SECONDS = 0.1  # the same while they agree on where to stop
_COORDINATOR_SECONDS = 3.0  # process 0 stays so much longer: JAX aborts the others once it is gone
_NOTICE = "mimo_jax/stop/notice"
_created = itertools.count()


class StopSignal:
    """SIGTERM and Ctrl-C ask the run to stop where it next asks; a second signal ends the process at once.

    Where it does not stop within `grace_seconds` (it compiles, for example), the process ends with code 128 + signal:
    what is on disk stays intact, and the last complete checkpoint is the one to go on from.

    A thread of its own reads the signals, because the main thread runs no handler while it compiles. With several
    processes, the one that got a signal tells the others through the coordination service; all say how often they have
    asked by then, and all stop at the first time that none of them has got to yet. (JAX's preemption service does the
    same for SIGTERM, but tells nobody who does not ask; it is to be off.)

    Attributes:
        signal: what the run stops for, once `requested` has said so.
        grace_seconds: see above; may be changed.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.signal: int | None = None
        self.grace_seconds = grace_seconds
        self._key = f"mimo_jax/stop/{next(_created)}"
        self._number: int | None = None  # what was received, by any process
        self._own = 0  # signals that this process received
        self._asked, self._stop_at = 0, 0
        self._lock, self._agreed = threading.Lock(), threading.Event()
        self._deadline = math.inf
        self._settled = False
        self._old: dict[int, Any] = {}
        self._client: Any = None
        self.find_others()

    def find_others(self) -> None:
        """To be called once `jax.distributed.initialize` is done; before that, nobody else is told anything."""
        state = distributed.global_state
        self._client = state.client if state.num_processes > 1 else None

    def __enter__(self) -> StopSignal:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        with contextlib.suppress(ValueError):  # not in the main thread: then nobody can send us signals
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in _NUMBERS:
                self._old[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._writer.send(_END)
        self._thread.join()
        self._reader.close()
        self._writer.close()
        if self._client is not None:
            self._say_asked()  # whoever is still at it need not wait for us

    def requested(self) -> bool:
        """Whether to stop now. All processes ask equally often, and all get the same answer."""
        with self._lock:
            self._asked += 1
            if self._number is None:
                return False
        if self._client is not None:
            self._agreed.wait()  # for ever: the deadline ends the process if another one never answers
            if self._asked < self._stop_at:
                return False
        with self._lock:
            self.signal, self._deadline = self._number, math.inf
        return True

    def settle(self) -> None:
        """All steps are done: what is left, writing the last checkpoint, may take the time that it takes."""
        with self._lock:
            self._settled, self._deadline = True, math.inf

    def _handle(self, number: int, frame: Any) -> None:
        if self._client is None:  # a process alone stops where it next asks, however late the thread is
            self._number = self._number or number

    # ------------------------------------------------------------------------------------------------------
    # In the thread

    def _watch(self) -> None:
        while True:
            talking = self._number is not None and not self._settled
            ready, _, _ = select.select([self._reader], [], [], _TALK_SECONDS if talking else _POLL_SECONDS)
            received = self._reader.recv(64) if ready else b""
            for number in received:
                if number in _NUMBERS:
                    self._receive(number)
            if _END[0] in received:
                return
            if self._client is not None:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone: JAX ends this one too
                    self._talk()
            if time.monotonic() > self._deadline:
                what = f"no step ended within {self.grace_seconds:g} s" if self.grace_seconds else "no step had begun"
                self._end(f"{what}. The last complete checkpoint is intact")

    def _receive(self, number: int) -> None:
        self._own += 1
        if self._client is None:
            self._number = self._number or number
        else:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has said so before
                self._client.key_value_set(_NOTICE, str(number))
        if self._own > 1:
            self._number = self._number or number
            self._end("a second one ended it at once")
        self._wait_no_longer_than_grace()

    def _wait_no_longer_than_grace(self) -> None:
        first = self._client is not None and distributed.global_state.process_id == 0
        deadline = time.monotonic() + self.grace_seconds + _COORDINATOR_SECONDS * first
        with self._lock:
            if self.signal is None and not self._settled:
                self._deadline = min(self._deadline, deadline)

    def _talk(self) -> None:
        """Learns that some process got a signal, and agrees with all others on the call of `requested` to stop at."""
        if self._number is None:
            if (notice := self._get(_NOTICE)) is None:
                return
            with self._lock:  # from here on `requested` waits for the agreement
                self._number = int(notice)
            self._say_asked()
            self._wait_no_longer_than_grace()
        if self._agreed.is_set():
            return
        if distributed.global_state.process_id == 0:
            asked = self._client.key_value_dir_get(f"{self._key}/asked/")
            if len(asked) == distributed.global_state.num_processes:
                stop_at = max(int(count) for _, count in asked) + 1
                self._client.key_value_set(f"{self._key}/stop_at", str(stop_at))
        if (decided := self._get(f"{self._key}/stop_at")) is not None:
            self._stop_at = int(decided)
            self._agreed.set()

    def _say_asked(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # said before
            key = f"{self._key}/asked/{distributed.global_state.process_id}"
            self._client.key_value_set(key, str(self._asked))

    def _get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None

    def _end(self, why: str) -> NoReturn:
        number = self._number or signal.SIGTERM
        print(f"stopped by {signal.Signals(number).name}; {why}", file=sys.stderr, flush=True)
        os._exit(128 + number)


_active: list[StopSignal] = []


@contextlib.contextmanager
def stop_signal(grace_seconds: float) -> Iterator[StopSignal]:
    """Yields the StopSignal of the block around this one, with this grace time, or else a new one."""
    if _active:
        stop = _active[0]
        before, stop.grace_seconds = stop.grace_seconds, grace_seconds
        stop.find_others()
        try:
            yield stop
        finally:
            stop.grace_seconds = before
        return
    with StopSignal(grace_seconds) as stop:
        _active.append(stop)
        try:
            yield stop
        finally:
            _active.clear()


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Yields a function to call on every sign of life; a silence of so many seconds ends the process.

    The stacks of all threads are then written to stderr and the code is 1, so that a supervisor starts the run again. 0
    seconds is no watchdog.
    """

    def beat() -> None:
        if seconds:  # 2 is stderr
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    beat()
    try:
        yield beat
    finally:
        faulthandler.cancel_dump_traceback_later()
