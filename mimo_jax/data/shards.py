"""Shard sets: a folder of ArrayRecord files with RVQ codes or text, described by `manifest.json`.

    manifest.json                              what is inside; written last, so a folder without it is not finished
    speech-train.array_record-00000-of-00004   records (`mimo_jax.data.records`), one to a group: random access
    dataset_info.json, features.json           what `tfds.builder_from_directory(folder)` reads
    lengths-<text tokenizer>.npz               lengths of every record in that tokenizer's tokens (`index_shards`)
    skipped.jsonl                              the inputs that were left out, and why

Every file is written beside its place and renamed into it. Checksums of the shards are in the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import threading
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimo_jax.atomic import atomic_write, sync_folder
from mimo_jax.data.records import (
    DataError,
    Record,
    count_words,
    decode_record,
    encode_record,
    features,
    segment_frames,
    segment_pieces,
)

FORMAT = 1
MANIFEST = "manifest.json"
_INDEX_FORMAT = 1
_SPLIT = "train"  # TFDS wants a split name; a shard set has one split, whatever it is used for
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically. Raises DataError: the file cannot be written (read-only folder, full disk)."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror})") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class ShardFile:
    """One ArrayRecord file of a set. `bytes` is its size."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardSetInfo:
    """Contents of `manifest.json`."""

    kind: str  # `speech`, `text` or `conversation`
    codebook_sizes: tuple[int, ...]  # sizes of the stored RVQ levels; empty for text
    frame_rate: float  # RVQ frames per second; 0 for text
    tokenizer: str  # fingerprint of the audio tokenizer; empty for text
    records: int
    hours: float  # of audio
    # Records that have a text, a caption, an instruction, segments; conversations of each format.
    counts: Mapping[str, int]
    skipped: Mapping[str, int]  # inputs left out, by reason
    shards: tuple[ShardFile, ...]  # the files, in order
    options: Mapping[str, Any] = field(default_factory=dict)  # settings of the ingest that decide what is stored
    format: int = FORMAT

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()


def shard_name(kind: str, index: int, count: int) -> str:
    """File name of a shard, as TFDS expects it."""
    return f"{kind}-{_SPLIT}.array_record-{index:05d}-of-{count:05d}"


def write_shard(path: Path, records: Iterable[Record]) -> ShardFile:
    """Writes one ArrayRecord file and renames it into its place when it is complete.

    Raises:
        DataError: the file cannot be written; nothing of it is left.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # a worker started twice writes its own
    count = 0
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for record in records:
                writer.write(encode_record(record))
                count += 1
        finally:
            # A writer that is not closed would flush from its destructor, after its file was removed.
            writer.close()
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        info = ShardFile(path.name, count, temporary.stat().st_size, file_sha256(temporary))
        os.replace(temporary, path)
        sync_folder(path.parent)
        return info
    except RuntimeError as error:  # what the writer raises for every failed open, write and close
        raise DataError(f"{path}: cannot write the shard ({_reason(error)})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot write the shard ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):  # the folder went read-only or away: the reason is already being reported
            temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """The middle of `write() failed: File too large; writing PATH; ...`."""
    return str(error).split(";")[0].removeprefix("write() failed: ").removeprefix("open() failed: ")


def commit(folder: Path, info: ShardSetInfo) -> None:
    """Writes the TFDS metadata and then `manifest.json`: from here on the folder is a shard set."""
    import tensorflow_datasets as tfds

    split = tfds.core.SplitInfo(
        name=_SPLIT,
        shard_lengths=[s.records for s in info.shards],
        num_bytes=sum(s.bytes for s in info.shards),
        filename_template=tfds.core.ShardedFileTemplate(
            template=_TEMPLATE, data_dir=folder, dataset_name=info.kind, split=_SPLIT, filetype_suffix="array_record"
        ),
    )
    try:
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features(info.num_levels, info.kind == "conversation"),
            split_infos=[split],
            filename_template=_TEMPLATE,
            version="1.0.0",
            check_data=False,
            description=f"{info.kind}, codebooks {list(info.codebook_sizes)} at {info.frame_rate} Hz",
        )
    except OSError as error:
        raise DataError(f"{folder}: cannot write the TFDS metadata ({error.strerror})") from None
    write_file(folder / MANIFEST, info.to_json())


# ----------------------------------------------------------------------------------------------------------
# Reading


class ShardSet:
    """An open shard set: `len(shards)`, `shards[i]`, `shards.read([i, j, ...])`. Safe to read from several threads.

    Attributes:
        path: its folder.
        info: its manifest.
        fingerprint: first 16 hexadecimal digits of the SHA-256 of the manifest, so of all that is stored.

    Args:
        verify: also read every shard and compare its SHA-256.

    Raises:
        DataError: the set is not finished, of another format, or a shard is missing, truncated or damaged.
    """

    def __init__(self, path: str | Path, verify: bool = False):
        self.path = Path(path)
        self.info, self.fingerprint = read_manifest(self.path)
        for shard in self.info.shards:
            file = self.path / shard.file
            if not file.is_file():
                raise DataError(f"{file}: this shard is missing")
            if file.stat().st_size != shard.bytes:
                got = f"{file.stat().st_size}: the shard is truncated or was replaced"
                raise DataError(f"{file}: expected {shard.bytes} bytes, got {got}")
            if verify and file_sha256(file) != shard.sha256:
                raise DataError(f"{file}: the contents do not match the SHA-256 in {MANIFEST}")
        self._files = [s for s in self.info.shards if s.records]
        self._ends = np.cumsum([s.records for s in self._files])
        self._readers: list[Any] = [None] * len(self._files)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.info.records

    def __getitem__(self, index: int) -> Record:
        return self.read([index])[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 256):
            yield from self.read(range(start, min(start + 256, len(self))))

    def read(self, indices: Sequence[int]) -> list[Record]:
        """Reads records by their numbers. Raises DataError: a record is damaged; the message names the shard."""
        indices = [int(i) for i in indices]
        if not indices:
            return []
        if min(indices) < 0 or max(indices) >= len(self):
            raise IndexError(f"{self.path}: records {min(indices)}..{max(indices)} of {len(self)}")
        places: dict[int, list[int]] = {}  # shard -> positions in `indices`
        for k, shard in enumerate(np.searchsorted(self._ends, indices, side="right").tolist()):
            places.setdefault(shard, []).append(k)
        data: dict[int, bytes] = {}
        for shard, ks in places.items():
            first = int(self._ends[shard]) - self._files[shard].records
            try:
                data.update(zip(ks, self._reader(shard).read([indices[k] - first for k in ks]), strict=True))
            except (RuntimeError, ValueError, IndexError) as error:
                file = self.path / self._files[shard].file
                raise DataError(f"{file}: cannot read, the shard is damaged ({error})") from None
        levels = self.info.num_levels
        return [decode_record(data[k], levels, f"{self.path}: record {i}") for k, i in enumerate(indices)]

    def _reader(self, shard: int) -> Any:
        """The reader of a shard, opened on first use: a set may have thousands and a process may need few of them."""
        with self._lock:
            if self._readers[shard] is None:
                from array_record.python.array_record_module import ArrayRecordReader

                expected = self._files[shard]
                reader = ArrayRecordReader(str(self.path / expected.file), "readahead_buffer_size:0")
                if reader.num_records() != expected.records:
                    raise ValueError(f"expected {expected.records} records, got {reader.num_records()}")
                self._readers[shard] = reader
            return self._readers[shard]


def read_manifest(folder: str | Path) -> tuple[ShardSetInfo, str]:
    """Reads the manifest of a shard set without looking at the shards.

    Returns:
        Its contents, and the fingerprint of the set.

    Raises:
        DataError: there is none, or it is of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}: not a shard set, or its ingest has not finished") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror})") from None
    try:
        values = json.loads(data)
        found = values.get("format")
        if found != FORMAT:
            raise DataError(f"{path}: format: expected {FORMAT}, got {found!r}")
        values["shards"] = tuple(ShardFile(**s) for s in values["shards"])
        values["codebook_sizes"] = tuple(values["codebook_sizes"])
        info = ShardSetInfo(**values)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the manifest of a shard set ({error})") from None
    if info.records != sum(s.records for s in info.shards):
        raise DataError(f"{path}: records: expected the sum over the shards, got {info.records}")
    return info, hashlib.sha256(data).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------
# Lengths


class IndexEntry(NamedTuple):
    """Lengths of one record: RVQ frames, tokens of its texts; of each segment tokens, words, first and last frame.

    Of a conversation, `text` counts all tokens, `conversation` is the number of its format, from 1, and the segments
    are its recordings, in the order in which they are heard.
    """

    frames: int
    text: int
    caption: int
    instruction: int
    conversation: int
    segment_tokens: list[int]
    segment_words: list[int]
    segment_starts: list[int]
    segment_ends: list[int]


class LengthIndex(NamedTuple):
    """Lengths of all N records of a shard set, with which documents are planned and packed without reading them.

    The `segment_*` arrays hold the segments of all records one after another; those of record i are
    `segment_offsets[i] : segment_offsets[i + 1]`.
    """

    frames: np.ndarray  # int32 [N], RVQ frames
    text: np.ndarray  # int32 [N], tokens
    caption: np.ndarray  # int32 [N], tokens
    instruction: np.ndarray  # int32 [N], tokens
    conversation: np.ndarray  # int32 [N], 0 where it is none
    segment_offsets: np.ndarray  # int64 [N + 1]
    segment_tokens: np.ndarray  # int32 [segments]
    segment_words: np.ndarray  # int32 [segments]
    segment_starts: np.ndarray  # int32 [segments], first RVQ frame
    segment_ends: np.ndarray  # int32 [segments], RVQ frame after the last

    def entry(self, record: int) -> IndexEntry:
        """Lengths of one record."""
        own = slice(self.segment_offsets[record], self.segment_offsets[record + 1])
        segments = (self.segment_tokens, self.segment_words, self.segment_starts, self.segment_ends)
        return IndexEntry._make([*(int(lengths[record]) for lengths in self[:5]), *(x[own].tolist() for x in segments)])


def index_path(folder: str | Path, tokenizer: Any) -> Path:
    """Where the lengths index of a shard set for a text tokenizer is."""
    return Path(folder) / f"lengths-{tokenizer.fingerprint}.npz"


def record_entry(record: Record, tokenizer: Any, frame_rate: float) -> IndexEntry:
    """Lengths of one record under a text tokenizer; pieces are tokenised one by one, so lengths add up."""

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text)) if text else 0

    if record.conversation:
        from mimo_jax.data import conversations  # which needs what is above

        spans = conversations.render(record, tokenizer, 1, 1)
        text = sum(len(s) for s in spans) - sum(last - first for first, last in conversations.audio_frames(record))
        heard = conversations.audio_frames(record)
        starts, ends = map(list, zip(*heard, strict=True)) if len(record.codes_MR) else ([], [])
        nothing = [0] * len(starts)
        form = conversations.record_format(record) + 1
        return IndexEntry(len(record.codes_MR), text, 0, 0, form, nothing, nothing, starts, ends)
    pieces = segment_pieces(record)
    starts, ends = segment_frames(record, frame_rate)
    return IndexEntry(
        frames=len(record.codes_MR),
        text=tokens(record.text),
        caption=tokens(record.caption),
        instruction=tokens(record.instruction),
        conversation=0,
        segment_tokens=[tokens(p) for p in pieces],
        segment_words=[count_words(p) for p in pieces],
        segment_starts=starts,
        segment_ends=ends,
    )


def index_shards(path: str | Path, tokenizer: Any, progress: bool = False) -> LengthIndex:
    """Computes and stores the lengths index of a shard set; an index that is there and fits is only loaded.

    Raises:
        DataError: the set cannot be read or the index cannot be written.
    """
    shards = ShardSet(path)
    if index_path(path, tokenizer).is_file():
        try:
            return load_index(shards, tokenizer)
        except DataError as error:
            print(f"index: {error}; computing it anew", file=sys.stderr)
    scalars: list[tuple[int, ...]] = []
    segments: list[tuple[int, int, int, int]] = []
    offsets = [0]
    for i, record in enumerate(shards):
        entry = record_entry(record, tokenizer, shards.info.frame_rate)
        scalars.append(entry[:5])
        segments.extend(zip(*entry[5:], strict=True))
        offsets.append(len(segments))
        if progress and (i + 1) % 50_000 == 0:
            print(f"index: {i + 1}/{len(shards)} records", file=sys.stderr)
    records_N5, segments_N4 = np.asarray(scalars, np.int32), np.asarray(segments, np.int32).reshape(-1, 4)
    columns = [*np.ascontiguousarray(records_N5.T), np.asarray(offsets, np.int64), *np.ascontiguousarray(segments_N4.T)]
    index = LengthIndex(*columns)
    buffer = io.BytesIO()
    np.savez(buffer, format=np.int32(_INDEX_FORMAT), shards=np.str_(shards.fingerprint), **index._asdict())
    write_file(index_path(path, tokenizer), buffer.getvalue())
    return index


def load_index(shards: ShardSet, tokenizer: Any) -> LengthIndex:
    """Loads the lengths index of an open shard set.

    Raises:
        DataError: there is none for this text tokenizer, or it belongs to other shards.
    """
    path = index_path(shards.path, tokenizer)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = dict(arrays)
    except FileNotFoundError:
        raise DataError(
            f"{shards.path}: no lengths for text tokenizer {tokenizer.fingerprint}; make them with "
            f"`mimo-jax data index {shards.path} --text-tokenizer FILE`"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot read the lengths index ({error})") from None
    if int(values.pop("format", 0)) != _INDEX_FORMAT or str(values.pop("shards", "")) != shards.fingerprint:
        advice = "delete it and make it again"
        raise DataError(f"{path}: this lengths index belongs to other shards or another version; {advice}")
    values.setdefault("conversation", np.zeros(len(shards), np.int32))  # indices from before there were any
    if set(values) != set(LengthIndex._fields) or len(values["frames"]) != len(shards):
        raise DataError(f"{path}: expected the lengths of {len(shards)} records")
    return LengthIndex(**values)
