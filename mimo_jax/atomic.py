"""Whole files written so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Puts the names in a folder on disk, so that a file renamed into it is there after a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to a temporary file beside `path`, flushes it to disk and renames it; missing folders are made.

    After an OSError the file at `path` is as before, or else complete.
    """
    with atomic_stream(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def atomic_stream(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """`atomic_write` piece by piece: what is written is at `path` once the block has ended without an error."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        sync_folder(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
