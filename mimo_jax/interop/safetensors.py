"""Safetensors files, read and written piece by piece: no tensor need be in memory as a whole.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, first and last byte
behind the header) and the tensors, row-major, little-endian. Several files are joined by `NAME.index.json`, whose
`weight_map` says which file holds a tensor. Reads and writes are `pread` and `pwrite`: pages of a mapped file would
count as memory of the process.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mimo_jax.atomic import atomic_write

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, as the reference reader has it
_ALIGNMENT = 8
_MAX_CALL = 1 << 30  # bytes of one system call, which Linux limits to 2 GiB

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsError(ValueError):
    """A file is not a safetensors file, or holds other tensors than expected. The message names file and tensor."""


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of one file, by name.

    Raises:
        SafetensorsError: the header is not one, is longer than `MAX_HEADER`, or does not describe the file's bytes
            exactly: each once, and all of them.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            got = f"{size} bytes that announce a header of {length}"
            raise SafetensorsError(f"{path}: expected a safetensors file, got {got}")
        try:
            values = json.loads(file.read(length))
            values.pop("__metadata__", None)
            entries = {str(name): _entry(path, 8 + length, value) for name, value in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise SafetensorsError(f"{path}: expected a safetensors header, got an unreadable one: {error!r}") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise SafetensorsError(f"{path}: tensor {name}: expected to begin at byte {end}, begins at {entry.start}")
        end += entry.nbytes
    if end != size:
        raise SafetensorsError(f"{path}: expected {end} bytes, as its header says, got {size}")
    return entries


def _entry(path: Path, offset: int, value: Mapping[str, Any]) -> Entry:
    first, last = (int(n) for n in value["data_offsets"])
    entry = Entry(path, DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"]), offset + first)
    if min((first, *entry.shape), default=0) < 0 or last - first != entry.nbytes:
        raise ValueError(f"{value['dtype']} {entry.shape} does not fill bytes {first} to {last}")
    return entry


class Reader:
    """All tensors of a folder, one file or several joined by an index."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Reads the headers.

        Raises:
            SafetensorsError: a file or the index is damaged, or they contradict each other.
            FileNotFoundError: the folder holds no safetensors, or not all files that the index names.
        """
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            self.entries = self._indexed(self.folder / INDEX)
        elif (self.folder / SINGLE).is_file():
            self.entries = read_header(self.folder / SINGLE)
        else:
            raise FileNotFoundError(f"{self.folder}: expected {SINGLE} or {INDEX}")
        self._files = {path: os.open(path, os.O_RDONLY) for path in {e.file for e in self.entries.values()}}

    def _indexed(self, index: Path) -> dict[str, Entry]:
        try:
            where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            if other := [name for name in where.values() if not isinstance(name, str)]:
                raise TypeError(f"expected names of files, got {other[0]!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SafetensorsError(f"{index}: expected a JSON object with a weight_map: {error!r}") from None
        entries: dict[str, Entry] = {}
        for name in sorted(set(where.values())):
            if Path(name).name != name:
                raise SafetensorsError(f"{index}: expected names of files beside it, got {name!r}")
            for tensor, entry in read_header(self.folder / name).items():
                if where.get(tensor) != name:
                    raise SafetensorsError(f"{entry.file}: tensor {tensor}: the index has it in {where.get(tensor)}")
                entries[tensor] = entry
        if missing := sorted(set(where) - set(entries)):
            raise SafetensorsError(f"{self.folder / where[missing[0]]}: tensor {missing[0]}: in the index, not here")
        return entries

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop of a tensor's first axis (all by default), as a new array in the stored dtype."""
        entry = self.entries[name]
        if not entry.shape:
            out, first = np.empty((), entry.dtype), entry.start
        else:
            stop = entry.shape[0] if stop is None else stop
            out = np.empty((stop - start, *entry.shape[1:]), entry.dtype)
            first = entry.start + start * (entry.nbytes // max(entry.shape[0], 1))
        view = memoryview(out.reshape(-1).view(np.uint8))
        done = 0
        while done < len(view):
            count = os.preadv(self._files[entry.file], [view[done : done + _MAX_CALL]], first + done)
            if count == 0:
                raise SafetensorsError(f"{entry.file}: tensor {name}: the file ends within it")
            done += count
        return out

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer:
    """Files of a given content, whose bytes may then be written in any order."""

    def __init__(
        self, folder: str | os.PathLike[str], tensors: Mapping[str, tuple[np.dtype, Sequence[int]]], shard_bytes: int
    ) -> None:
        """Creates the file or files and writes their headers.

        Args:
            tensors: dtype and shape of each tensor, in the order they are to have.
            shard_bytes: a file is closed before a tensor that would make it larger; one file where all fit.

        Raises:
            SafetensorsError: the format has no name for a dtype.
        """
        folder = Path(folder)
        shards: list[list[str]] = []
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
        room = 0
        for name, size in sizes.items():
            if not shards or size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(name)
            room -= size
        count = len(shards)
        files = [SINGLE] if count < 2 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._entries: dict[str, Entry] = {}
        self._files: dict[Path, int] = {}
        for file, names in zip(files, shards or [[]], strict=True):
            self._create(folder / file, {name: tensors[name] for name in names})
        if count > 1:
            weight_map = {name: entry.file.name for name, entry in sorted(self._entries.items())}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            atomic_write(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _create(self, path: Path, tensors: Mapping[str, tuple[np.dtype, Sequence[int]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            if dtype not in _NAMES:
                raise SafetensorsError(f"{path}: tensor {name}: the format has no name for dtype {dtype}")
            first, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        offset = 8 + len(text)
        self._entries |= {name: _entry(path, offset, header[name]) for name in tensors}
        self._files[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.truncate(self._files[path], offset + end)
        os.pwrite(self._files[path], len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, rows: np.ndarray, start: int = 0) -> None:
        """Writes rows of a tensor, from row `start` of its first axis on.

        Raises:
            SafetensorsError: dtype or shape are not those announced.
        """
        entry = self._entries[name]
        if rows.dtype != entry.dtype or rows.shape[1:] != entry.shape[1:] or rows.ndim != len(entry.shape):
            expected, got = f"{entry.dtype} {entry.shape}", f"{rows.dtype} {rows.shape}"
            raise SafetensorsError(f"{entry.file}: tensor {name}: expected {expected}, got {got}")
        first = entry.start + (start * (entry.nbytes // max(entry.shape[0], 1)) if entry.shape else 0)
        view = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        done = 0
        while done < len(view):
            done += os.pwrite(self._files[entry.file], view[done : done + _MAX_CALL], first + done)

    def close(self) -> None:
        """Puts the files on disk and closes them."""
        while self._files:
            file = self._files.popitem()[1]
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save(folder: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], shard_bytes: int = 5 * 10**9) -> None:
    """Writes whole arrays; see `Writer`."""
    with Writer(folder, {name: (x.dtype, x.shape) for name, x in tensors.items()}, shard_bytes) as writer:
        for name, x in tensors.items():
            writer.write(name, x)


def describe(names: Iterable[str], limit: int = 5) -> str:
    """The first few of many complaints, and how many there are beyond."""
    names = list(names)
    more = f"; and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(names[:limit]) + more
