"""Ingest: recordings, conversations or text files → a shard set (`mimo_jax.data.shards`).

The inputs are dealt to shards by number, so a shard's contents depend on nothing but the inputs and the settings. Each
shard is written beside its place, renamed, and then noted in `.ingest/`; a restart makes only what is missing, and what
a killed run leaves behind is never mistaken for a shard. Several workers (`worker=(i, n)`) can fill one folder;
whichever finishes last writes `manifest.json`.

S samples, M RVQ frames, R RVQ levels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mimo_jax.config import AudioTokenizerConfig
from mimo_jax.data.conversations import Conversation, Conversations, make_record, record_format
from mimo_jax.data.layouts import CONVERSATION_FORMATS
from mimo_jax.data.manifest import Manifest, ManifestEntry, ManifestError, is_text, parse_line
from mimo_jax.data.records import DataError, Record
from mimo_jax.data.shards import (
    MANIFEST,
    ShardFile,
    ShardSet,
    ShardSetInfo,
    commit,
    file_sha256,
    index_shards,
    shard_name,
    write_file,
    write_shard,
)

_WORK = ".ingest"
_SHOWN_SKIPS = 10
_COUNTED = ("text", "caption", "instruction", "segments")  # fields of a record


@dataclass(frozen=True)
class Skip:
    """An input that is left out: which one, the class of the fault, and the whole message."""

    name: str
    reason: str
    message: str


@dataclass
class _Tally:
    """What one shard, or all of them, hold and left out."""

    inputs: int = 0
    records: int = 0
    seconds: float = 0.0
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    skipped: list[Skip] = dataclasses.field(default_factory=list)

    def add(self, other: _Tally) -> None:
        self.inputs += other.inputs
        self.records += other.records
        self.seconds += other.seconds
        self.counts += other.counts
        self.skipped += other.skipped


def ingest_audio(
    manifest: str | Path,
    codec: Any,
    out: str | Path,
    *,
    text_tokenizer: Any = None,
    records_per_shard: int = 1024,
    max_skipped: float = 0.05,
    worker: tuple[int, int] = (0, 1),
    threads: int = 2,
    progress: bool = True,
) -> ShardSet | None:
    """Tokenises the recordings of a manifest into a shard set.

    Args:
        manifest: JSONL manifest (`mimo_jax.data.manifest`).
        codec: audio tokenizer: `encode(list of float32 [S]) -> list of uint16 [M, R]`, `config`, `fingerprint`.
        out: folder of the set; new, or one that the same ingest has begun.
        text_tokenizer: also compute the lengths index for it.
        records_per_shard: lines of the manifest that one shard takes.
        max_skipped: share of the lines that may be left out because their audio cannot be used; one always may.
        worker: (i, n): make only every n-th shard, from i on.
        threads: threads that decode audio.
        progress: report on stderr.

    Returns:
        The finished set, or None if other workers have shards left to make.

    Raises:
        ManifestError: a line of the manifest is wrong (before anything is written).
        DataError: the folder holds something else, too many inputs were left out, or the folder cannot be written;
            shards that were finished stay and the same call goes on from there.
    """
    if threads <= 0:
        raise DataError(f"threads: expected a positive integer, got {threads}")
    lines = Manifest(manifest)
    if lines.unused_fields and progress:
        print(f"ingest: {lines.path}: fields without a meaning here: {', '.join(lines.unused_fields)}", file=sys.stderr)
    config = codec.config
    settings = {
        "kind": "speech",
        "manifest": lines.sha256,
        "tokenizer": codec.fingerprint,
        "codebook_sizes": list(config.rvq.codebook_sizes),
        "frame_rate": config.frame_rate,
        "resampler": config.resampler,
        "records_per_shard": records_per_shard,
    }

    def make(start: int, stop: int) -> Iterator[Record | Skip]:
        with ThreadPoolExecutor(threads) as pool:
            yield from _encode(lines.read(start, stop), codec, pool, 2 * threads + 2)

    return _make_set(Path(out), settings, len(lines), make, max_skipped, worker, text_tokenizer, progress)


def ingest_conversations(
    conversations: str | Path,
    codec: Any,
    out: str | Path,
    *,
    text_tokenizer: Any = None,
    records_per_shard: int = 1024,
    max_skipped: float = 0.05,
    worker: tuple[int, int] = (0, 1),
    threads: int = 2,
    progress: bool = True,
) -> ShardSet | None:
    """Tokenises the recordings of conversations into a shard set, each once per shard; arguments as `ingest_audio`.

    A conversation of which a recording cannot be used is left out.

    Args:
        conversations: file in the template (`mimo_jax.data.conversations`).
    """
    if threads <= 0:
        raise DataError(f"threads: expected a positive integer, got {threads}")
    lines = Conversations(conversations)
    config = codec.config
    settings = {
        "kind": "conversation",
        "manifest": lines.sha256,
        "tokenizer": codec.fingerprint,
        "codebook_sizes": list(config.rvq.codebook_sizes),
        "frame_rate": config.frame_rate,
        "resampler": config.resampler,
        "records_per_shard": records_per_shard,
    }

    def make(start: int, stop: int) -> Iterator[Record | Skip]:
        waiting: deque[Conversation] = deque()
        done: dict[str, Record | Skip] = {}

        def recordings() -> Iterator[ManifestEntry]:
            asked: set[str] = set()
            for conversation in lines.read(start, stop):
                waiting.append(conversation)
                for path in conversation.audio:
                    if path not in asked:
                        asked.add(path)
                        yield ManifestEntry(audio=Path(path), id=path)

        def complete() -> Iterator[Record | Skip]:
            while waiting and all(path in done for path in waiting[0].audio):
                conversation = waiting.popleft()
                parts = [done[path] for path in conversation.audio]
                broken = next((p for p in parts if isinstance(p, Skip)), None)
                clips = [p for p in parts if isinstance(p, Record)]
                yield broken or make_record(
                    conversation, [c.codes_MR for c in clips], sum(c.duration for c in clips), config.rvq.num_levels
                )

        with ThreadPoolExecutor(threads) as pool:
            for result in _encode(recordings(), codec, pool, 2 * threads + 2):
                done[result.name if isinstance(result, Skip) else result.id] = result
                yield from complete()
        yield from complete()

    return _make_set(Path(out), settings, len(lines), make, max_skipped, worker, text_tokenizer, progress)


def ingest_text(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    split: Literal["paragraph", "line", "file"] = "paragraph",
    language: str = "",
    text_tokenizer: Any = None,
    records_per_shard: int = 16_384,
    max_skipped: float = 0.05,
    worker: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> ShardSet | None:
    """Makes a shard set of text documents.

    Args:
        files: UTF-8 text files, or JSONL files (suffix `.jsonl`) whose lines have `text` and may have `id`, `language`.
        out: folder of the set; new, or one that the same ingest has begun.
        split: documents of a text file: separated by blank lines, one a line, or the whole file.
        language: language tag of documents that do not have their own.
        text_tokenizer: also compute the lengths index for it.
        records_per_shard: documents of one shard.
        max_skipped: share of the documents that may be left out because they are not UTF-8; one always may.
        worker: (i, n): make only every n-th shard, from i on.
        progress: report on stderr.

    Returns:
        The finished set, or None if other workers have shards left to make.

    Raises:
        ManifestError: a line of a JSONL file is wrong (before anything is written).
        DataError: as `ingest_audio`, or there is no document.
    """
    corpus = _TextCorpus([Path(f) for f in files], split, language)
    if not len(corpus):
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: expected at least one document")
    settings = {
        "kind": "text",
        "corpus": corpus.sha256,
        "split": split,
        "language": language,
        "records_per_shard": records_per_shard,
    }
    return _make_set(Path(out), settings, len(corpus), corpus.read, max_skipped, worker, text_tokenizer, progress)


# ----------------------------------------------------------------------------------------------------------
# Audio


def _encode(
    entries: Iterable[ManifestEntry], codec: Any, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Record | Skip]:
    """Decodes ahead in `pool` and encodes; one result for each entry, in order."""
    waiting: deque[tuple[ManifestEntry, Future[np.ndarray | Skip]]] = deque()

    def result() -> Record | Skip:
        entry, future = waiting.popleft()
        wav = future.result()
        return wav if isinstance(wav, Skip) else _record(entry, wav, codec)

    for entry in entries:
        waiting.append((entry, pool.submit(_load, entry, codec.config)))
        if len(waiting) > ahead:
            yield result()
    while waiting:
        yield result()


def _load(entry: ManifestEntry, config: AudioTokenizerConfig) -> np.ndarray | Skip:
    from mimo_jax.audio.files import AudioError, load_audio

    name, rate, shortest = str(entry.audio), config.mel.sample_rate, config.mel.n_fft // 2 + 1
    try:
        wav = load_audio(entry.audio, rate, config.resampler)
    except AudioError as error:
        return Skip(name, fault(str(error)), str(error))
    if len(wav) < shortest:
        return Skip(name, "too short", f"{name}: expected at least {shortest} samples at {rate} Hz, got {len(wav)}")
    end = entry.segments[-1].end if entry.segments else 0.0
    if end > len(wav) / rate + 0.5:
        return Skip(
            name,
            "segments beyond the end",
            f"{name}: segments: expected times up to {len(wav) / rate:.2f} s, got {end:.2f}",
        )
    return wav


_FAULTS = (
    "too short",
    "no such audio file",
    "empty file",
    "truncated",
    "sample rate",
    "finite",
    "no samples",
    "cannot be read",
)


def fault(message: str) -> str:
    """Class of an audio error, for counting."""
    return next((f for f in _FAULTS if f in message), "unreadable")


def _record(entry: ManifestEntry, wav: np.ndarray, codec: Any) -> Record:
    sizes = codec.config.rvq.codebook_sizes
    codes_MR = np.asarray(codec.encode([wav])[0])
    if codes_MR.ndim != 2 or codes_MR.shape[1] != len(sizes) or (codes_MR.max(axis=0, initial=0) >= sizes).any():
        raise DataError(
            f"{entry.audio}: the audio tokenizer gave codes of shape {list(codes_MR.shape)} "
            f"that do not fit codebooks {list(sizes)}"
        )
    return Record(
        id=entry.id,
        codes_MR=np.ascontiguousarray(codes_MR, np.uint16),
        text=entry.text,
        language=entry.language,
        speaker=entry.speaker,
        caption=entry.caption,
        instruction=entry.instruction,
        segments=entry.segments,
        duration=len(wav) / codec.config.mel.sample_rate,
    )


# ----------------------------------------------------------------------------------------------------------
# Text


class _TextCorpus:
    """Documents of text files by number; keeps only where they are."""

    def __init__(self, files: list[Path], split: str, language: str):
        self._files, self._language = files, language
        places: list[tuple[int, int, int, int]] = []  # file, first byte, byte after the last, line
        digest = hashlib.sha256()
        for i, path in enumerate(files):
            try:
                with open(path, "rb") as file:
                    contents = hashlib.sha256()
                    for start, stop, line, data in _documents(file, path, split, contents):
                        if path.suffix == ".jsonl":
                            self._from_json(path, line, data)
                        places.append((i, start, stop, line))
                    digest.update(f"{path.name} {contents.hexdigest()}\n".encode())
            except OSError as error:
                raise DataError(f"{path}: cannot read ({error.strerror})") from None
        self._places = np.asarray(places, np.int64).reshape(-1, 4)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Iterator[Record | Skip]:
        opened, file = -1, None
        try:
            for which, first, last, line in self._places[start:stop].tolist():
                path = self._files[which]
                if which != opened:
                    if file:
                        file.close()
                    file, opened = open(path, "rb"), which  # noqa: SIM115  (kept open from document to document)
                assert file is not None
                file.seek(first)
                data = file.read(last - first)
                name = f"{path.name}:{line}"
                try:
                    if path.suffix == ".jsonl":
                        values = self._from_json(path, line, data)
                        text, name, language = (
                            values["text"],
                            values.get("id") or name,
                            values.get("language") or self._language,
                        )
                    else:
                        text, language = data.decode(), self._language
                    yield Record(id=name, text=text.strip().replace("\r\n", "\n"), language=language)
                except UnicodeDecodeError as error:
                    yield Skip(name, "not UTF-8", f"{path}:{line}: expected UTF-8 ({error.reason})")
        finally:
            if file:
                file.close()

    @staticmethod
    def _from_json(path: Path, line: int, data: bytes) -> Mapping[str, str]:
        values = parse_line(path, line, data)
        for name in ("text", "id", "language"):
            value = values.get(name, "")
            if not isinstance(value, str) or not is_text(value):
                raise ManifestError(f"{path}:{line}: {name}: expected a string without lone surrogates, got {value!r}")
        if not values.get("text", "").strip():
            raise ManifestError(f"{path}:{line}: text: expected a string that is not empty, got {values.get('text')!r}")
        return values


def _documents(file: Any, path: Path, split: str, digest: Any) -> Iterator[tuple[int, int, int, bytes]]:
    """Yields (first byte, byte after the last, line number, bytes) of each document."""
    by_line = path.suffix == ".jsonl" or split == "line"
    start = stop = line = 0
    parts: list[bytes] = []
    position = 0
    for number, data in enumerate(file, 1):
        digest.update(data)
        blank = not data.strip()
        if parts and (by_line or (blank and split == "paragraph")):
            yield start, stop, line, b"".join(parts)
            parts = []
        if not blank:
            if not parts:
                start, line = position, number
            stop = position + len(data)
        if not blank or parts:
            parts.append(data)
        position += len(data)
    if parts:
        yield start, stop, line, b"".join(parts)


# ----------------------------------------------------------------------------------------------------------
# Shards: dealing, restarting, committing


def _make_set(
    out: Path,
    settings: Mapping[str, Any],
    inputs: int,
    make: Callable[[int, int], Iterator[Record | Skip]],
    max_skipped: float,
    worker: tuple[int, int],
    text_tokenizer: Any,
    progress: bool,
) -> ShardSet | None:
    per_shard = int(settings["records_per_shard"])
    if per_shard <= 0:
        raise DataError(f"records_per_shard: expected a positive integer, got {per_shard}")
    if not 0 <= worker[0] < worker[1]:
        raise DataError(f"worker: expected (i, n) with 0 <= i < n, got {worker}")
    if not 0 <= max_skipped <= 1:
        raise DataError(f"max_skipped: expected a share from 0 to 1, got {max_skipped}")
    if _prepare(out, settings):
        print(f"ingest: {out} is complete", file=sys.stderr)
    else:
        count = -(-inputs // per_shard)
        allowed = max(1, int(max_skipped * inputs))
        meter = _Meter(str(out), inputs, progress)
        total = _Tally()
        for index in range(worker[0], count, worker[1]):
            finished = _finished(out, settings, index, count)
            if finished is not None:
                total.add(finished[1])
                meter.resume(finished[1])
        _check_skips(out, total, allowed, inputs)
        for index in range(worker[0], count, worker[1]):
            if _sidecar(out, index).is_file() and _finished(out, settings, index, count, quick=True) is not None:
                continue
            start = index * per_shard
            _make_shard(
                out, settings, index, count, make(start, min(start + per_shard, inputs)), total, allowed, inputs, meter
            )
        meter.finish()
        if not _commit_if_complete(out, settings, count):
            return None
    if text_tokenizer is not None:
        index_shards(out, text_tokenizer, progress)
    return ShardSet(out)


def _prepare(out: Path, settings: Mapping[str, Any]) -> bool:
    """Makes the folder or checks that this ingest began it; True if it is complete."""
    try:
        if out.is_dir() and any(out.iterdir()):
            if (out / MANIFEST).is_file():
                known: Mapping[str, Any] = ShardSet(out).info.options
            elif (out / _WORK / "settings.json").is_file():
                known = json.loads((out / _WORK / "settings.json").read_bytes())
            elif all(p.name == _WORK for p in out.iterdir()):
                known = settings  # killed before its first file was in place
            else:
                raise DataError(f"{out}: expected a new folder or one that this ingest began; it holds other files")
            for key in sorted({*known, *settings}):
                if known.get(key) != settings.get(key):
                    raise DataError(
                        f"{out}: this folder was begun with {key} {known.get(key)!r}, "
                        f"now it is {settings.get(key)!r}; use another folder or remove it"
                    )
        if (out / MANIFEST).is_file():
            _clean(out)
            return True
        (out / _WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot use this folder ({error.strerror})") from None
    write_file(out / _WORK / "settings.json", _json(settings))
    return False


def _make_shard(
    out: Path,
    settings: Mapping[str, Any],
    index: int,
    count: int,
    results: Iterator[Record | Skip],
    total: _Tally,
    allowed: int,
    inputs: int,
    meter: _Meter,
) -> None:
    tally = _Tally()

    def records() -> Iterator[Record]:
        for result in results:
            tally.inputs += 1
            meter.step(result)
            if isinstance(result, Skip):
                tally.skipped.append(result)
                _check_skips(out, total, allowed, inputs, tally.skipped)
                continue
            tally.records += 1
            tally.seconds += result.duration
            tally.counts.update(k for k in _COUNTED if getattr(result, k))
            if result.conversation:
                tally.counts[CONVERSATION_FORMATS[record_format(result)]] += 1
            yield result

    shard = write_shard(out / shard_name(str(settings["kind"]), index, count), records())
    skipped = [dataclasses.asdict(s) for s in tally.skipped]
    note: dict[str, Any] = {
        "settings": settings,
        "shard": dataclasses.asdict(shard),
        "skipped": skipped,
        "counts": dict(tally.counts),
    }
    note |= {"inputs": tally.inputs, "records": tally.records, "seconds": tally.seconds}
    write_file(_sidecar(out, index), _json(note))
    total.add(tally)


def _check_skips(out: Path, total: _Tally, allowed: int, inputs: int, more: Sequence[Skip] = ()) -> None:
    skips = [*total.skipped, *more]
    if len(skips) > allowed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(s.reason for s in skips).most_common())
        raise DataError(
            f"{out}: {len(skips)} of {inputs} inputs cannot be used ({reasons}), more than the {allowed} that "
            f"max_skipped allows; the last one: {skips[-1].message}"
        )


def _sidecar(out: Path, index: int) -> Path:
    return out / _WORK / f"{index:05d}.json"


def _finished(
    out: Path, settings: Mapping[str, Any], index: int, count: int, quick: bool = False
) -> tuple[ShardFile, _Tally] | None:
    """What the note on a finished shard says, if the shard is there as the note has it; `quick` trusts the contents."""
    try:
        note = json.loads(_sidecar(out, index).read_bytes())
        shard = ShardFile(**note["shard"])
        tally = _Tally(
            note["inputs"],
            note["records"],
            note["seconds"],
            Counter(note["counts"]),
            [Skip(**s) for s in note["skipped"]],
        )
        path = out / shard_name(str(settings["kind"]), index, count)
        same = note["settings"] == settings and shard.file == path.name and path.stat().st_size == shard.bytes
        if same and (quick or file_sha256(path) == shard.sha256):
            return shard, tally
        _sidecar(out, index).unlink(missing_ok=True)  # the shard was damaged since: make it again
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _commit_if_complete(out: Path, settings: Mapping[str, Any], count: int) -> bool:
    if (out / MANIFEST).is_file():  # another worker was faster
        return True
    found = [_finished(out, settings, index, count, quick=True) for index in range(count)]
    finished = [f for f in found if f is not None]
    if len(finished) < count:
        print(f"ingest: {out}: {count - len(finished)} of {count} shards are left to other workers", file=sys.stderr)
        return False
    total = _Tally()
    for _, tally in finished:
        total.add(tally)
    if not total.records:
        raise DataError(
            f"{out}: none of the {total.inputs} inputs could be used; the last one: {total.skipped[-1].message}"
        )
    if total.skipped:
        write_file(out / "skipped.jsonl", b"".join(_json(dataclasses.asdict(s)) for s in total.skipped))
    info = ShardSetInfo(
        kind=str(settings["kind"]),
        codebook_sizes=tuple(settings.get("codebook_sizes", ())),
        frame_rate=settings.get("frame_rate", 0.0),
        tokenizer=settings.get("tokenizer", ""),
        records=total.records,
        hours=total.seconds / 3600,
        counts={k: total.counts[k] for k in (*_COUNTED, *sorted(set(total.counts) - set(_COUNTED)))},
        skipped=dict(sorted(Counter(s.reason for s in total.skipped).items())),
        shards=tuple(shard for shard, _ in finished),
        options=settings,
    )
    commit(out, info)
    _clean(out)
    return True


def _clean(out: Path) -> None:
    """Removes what only an unfinished set needs. Never fatal: the set is complete."""
    shutil.rmtree(out / _WORK, ignore_errors=True)
    for leftover in (*out.glob("*.tmp"), *out.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            leftover.unlink(missing_ok=True)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=True) + "\n").encode()


class _Meter:
    """Progress on stderr: inputs done, audio, rate, time left; the first skipped inputs by name."""

    def __init__(self, name: str, inputs: int, on: bool, every: float = 5.0):
        self._name, self._inputs, self._on, self._every = name, inputs, on, every
        self._done = self._here = self._skipped = 0
        self._seconds = 0.0
        self._start = self._last = time.monotonic()

    def resume(self, tally: _Tally) -> None:
        self._done += tally.inputs
        self._skipped += len(tally.skipped)
        self._seconds += tally.seconds

    def step(self, result: Record | Skip) -> None:
        self._done += 1
        self._here += 1
        if isinstance(result, Skip):
            self._skipped += 1
            if self._on and self._skipped <= _SHOWN_SKIPS:
                print(f"ingest: skipped: {result.message}", file=sys.stderr)
        else:
            self._seconds += result.duration
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._print(now)

    def finish(self) -> None:
        self._print(time.monotonic())

    def _print(self, now: float) -> None:
        if not self._on:
            return
        rate = self._here / max(now - self._start, 1e-9)
        left = (self._inputs - self._done) / rate if rate else 0.0
        audio = f", {self._seconds / 3600:.2f} h" if self._seconds else ""
        print(
            f"ingest: {self._name}: {self._done}/{self._inputs}{audio}, {self._skipped} skipped, "
            f"{rate:.1f}/s, ETA {int(left // 60)}:{int(left % 60):02d}",
            file=sys.stderr,
        )
