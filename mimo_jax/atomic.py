"""Whole files written so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to a temporary file beside `path`, flushes it to disk and renames it; missing folders are made.

    Raises:
        OSError: the folder cannot be written or the disk is full. An existing file at `path` is then unchanged.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
