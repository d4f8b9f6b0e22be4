"""How far a long job is, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Meter:
    """Prints a line every few seconds.

    Args:
        line: (amount done, amount per second) -> what to print before the time that is left.
    """

    def __init__(self, total: float, line: Callable[[float, float], str], on: bool = True, every: float = 5.0) -> None:
        self._total, self._line, self._on, self._every = total, line, on, every
        self._done = self._before = 0.0
        self._start = self._last = time.monotonic()

    def resume(self, amount: float) -> None:
        """Counts work that was done before, so not in this time."""
        self._done += amount
        self._before += amount

    def step(self, amount: float = 1.0) -> None:
        """Counts work; prints if it is time to."""
        self._done += amount
        if time.monotonic() - self._last >= self._every:
            self.say()

    def say(self) -> None:
        """Prints now."""
        self._last = time.monotonic()
        rate = (self._done - self._before) / max(self._last - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        if self._on:
            print(f"{self._line(self._done, rate)}, ETA {clock(left)}", file=sys.stderr)


def clock(seconds: float) -> str:
    """`4s`, `2m05s`, `3h07m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
