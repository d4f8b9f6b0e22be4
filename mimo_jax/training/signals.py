"""Ending a run in time: on a signal, and when it hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax


class StopSignal:
    """SIGTERM and Ctrl-C ask the run to stop where it next asks; a second signal ends the process as usual.

    Where it does not ask within `grace_seconds` (it compiles, for example), the process ends with code 128 + signal:
    what is on disk stays intact, and the last complete checkpoint is the one to go on from.

    With several processes nothing is caught here: JAX's preemption service has a handler of SIGTERM of its own, which
    tells all processes, and replacing it would leave them deaf to the signal.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.signal: int | None = None
        self._grace, self._settled = grace_seconds, False
        self._timer: threading.Timer | None = None
        self._asked = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        with contextlib.suppress(ValueError):  # not in the main thread: then nobody can send us signals
            for number in numbers:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        self.signal = number
        self._restore()
        if not self._settled:
            self._timer = threading.Timer(self._grace, self._end, (number,))
            self._timer.daemon = True
            self._timer.start()

    def _end(self, number: int) -> None:
        text = f"stopped by a signal; no step ended within {self._grace:g} s. The last complete checkpoint is intact"
        print(text, file=sys.stderr, flush=True)
        os._exit(128 + number)

    def _restore(self) -> None:
        while self._old:
            signal.signal(*self._old.popitem())

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ValueError):
            self._restore()
        if self._timer is not None:
            self._timer.cancel()

    def requested(self) -> bool:
        """Whether to stop now. All processes ask equally often, and all get the same answer."""
        self._asked += 1
        if jax.process_count() > 1 and self.signal is None:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.signal = signal.SIGTERM
        if self.signal is not None and self._timer is not None:
            self._timer.cancel()
        return self.signal is not None

    def settle(self) -> None:
        """All steps are done: what is left, writing the last checkpoint, may take the time that it takes."""
        self._settled = True
        if self._timer is not None:
            self._timer.cancel()


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
