"""The English sentences and short texts that ship with the package, written for it.

`sentences.txt` has one sentence of 8 to 16 words a line, for speech; `texts.txt` one text of two to four sentences a
line, for text-only training. No sentence occurs in both.
"""

from __future__ import annotations

from importlib import resources


def sentences() -> list[str]:
    """The sentences for speech, in file order."""
    return _lines("sentences.txt")


def texts() -> list[str]:
    """The short texts, in file order."""
    return _lines("texts.txt")


def _lines(name: str) -> list[str]:
    content = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return [line for line in content.splitlines() if line]
