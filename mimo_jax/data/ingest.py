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
import functools
import hashlib
import itertools
import json
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

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
from mimo_jax.progress import Meter

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

    @classmethod
    def of(cls, result: Record | Skip) -> _Tally:
        if isinstance(result, Skip):
            return cls(inputs=1, skipped=[result])
        counts = Counter(k for k in _COUNTED if getattr(result, k))
        if result.conversation:
            counts[CONVERSATION_FORMATS[record_format(result)]] = 1
        return cls(1, 1, result.duration, counts)

    def add(self, other: _Tally) -> None:
        self.inputs += other.inputs
        self.records += other.records
        self.seconds += other.seconds
        self.counts += other.counts
        self.skipped += other.skipped


class Options(TypedDict, total=False):
    """What any ingest may be told."""

    text_tokenizer: Any  # also compute the lengths index for it
    records_per_shard: int  # inputs that one shard takes; 1024 by default, 16384 documents of text
    # Share of the inputs that may be left out because they cannot be used, 0.05 by default; one always may.
    max_skipped: float
    worker: tuple[int, int]  # (i, n): make only every n-th shard, from i on; all by default
    progress: bool  # report on stderr, as by default


def ingest_audio(
    manifest: str | Path, codec: Any, out: str | Path, *, threads: int = 2, **options: Unpack[Options]
) -> ShardSet | None:
    """Tokenises the recordings of a manifest into a shard set.

    Args:
        codec: audio tokenizer: `encode(list of float32 [S]) -> list of uint16 [M, R]`, `config`, `fingerprint`.
        out: folder of the set; new, or one that the same ingest has begun.
        threads: threads that decode audio.

    Returns:
        The finished set, or None if other workers have shards left to make.

    Raises:
        ManifestError: a line of the manifest is wrong (before anything is written).
        DataError: the folder holds something else, too many inputs were left out, or the folder cannot be written;
            shards that were finished stay and the same call goes on from there.
    """
    lines = Manifest(manifest)
    if lines.unused_fields and options.get("progress", True):
        print(f"ingest: {lines.path}: fields without a meaning here: {', '.join(lines.unused_fields)}", file=sys.stderr)
    return _ingest_codes("speech", lines, lambda entries, encode: encode(entries), codec, out, threads, options)


def ingest_conversations(
    conversations: str | Path, codec: Any, out: str | Path, *, threads: int = 2, **options: Unpack[Options]
) -> ShardSet | None:
    """Tokenises the recordings of conversations into a shard set, each once per shard; otherwise as `ingest_audio`.

    A conversation of which a recording cannot be used is left out.

    Args:
        codec, out, threads, options: as for `ingest_audio`.
    """
    join = functools.partial(_conversation_records, num_levels=codec.config.rvq.num_levels)
    return _ingest_codes("conversation", Conversations(conversations), join, codec, out, threads, options)


def ingest_text(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    split: Literal["paragraph", "line", "file"] = "paragraph",
    language: str = "",
    **options: Unpack[Options],
) -> ShardSet | None:
    """Makes a shard set of text documents; documents that are not UTF-8 are left out.

    Args:
        files: UTF-8 text files, or JSONL files (suffix `.jsonl`) whose lines have `text` and may have `id`, `language`.
        out: folder of the set; new, or one that the same ingest has begun.
        split: documents of a text file: separated by blank lines, one a line, or the whole file.
        language: language tag of documents that do not have their own.

    Returns:
        The finished set, or None if other workers have shards left to make.

    Raises:
        ManifestError: a line of a JSONL file is wrong (before anything is written).
        DataError: as `ingest_audio`, or there is no document.
    """
    corpus = _TextCorpus([Path(f) for f in files], split, language)
    if not len(corpus):
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: expected at least one document")
    settings = {"kind": "text", "corpus": corpus.sha256, "split": split, "language": language}
    options.setdefault("records_per_shard", 16_384)
    return _Ingest(out, settings, len(corpus), corpus.read, **options).run()


# ----------------------------------------------------------------------------------------------------------
# Audio

_Encode = Callable[[Iterable[ManifestEntry]], Iterator[Record | Skip]]


def _ingest_codes(
    kind: str,
    lines: Manifest | Conversations,
    make: Callable[[Iterator[Any], _Encode], Iterator[Record | Skip]],
    codec: Any,
    out: str | Path,
    threads: int,
    options: Options,
) -> ShardSet | None:
    """A set of what `make` gives for some lines and the function that encodes recordings."""
    if threads <= 0:
        raise DataError(f"threads: expected a positive integer, got {threads}")
    config = codec.config
    settings = {
        "kind": kind,
        "manifest": lines.sha256,
        "tokenizer": codec.fingerprint,
        "codebook_sizes": list(config.rvq.codebook_sizes),
        "frame_rate": config.frame_rate,
        "resampler": config.resampler,
    }

    def read(start: int, stop: int) -> Iterator[Record | Skip]:
        with ThreadPoolExecutor(threads) as pool:
            encode = functools.partial(_encode, codec=codec, pool=pool, ahead=2 * threads + 2)
            yield from make(lines.read(start, stop), encode)

    return _Ingest(out, settings, len(lines), read, **options).run()


def _conversation_records(
    conversations: Iterator[Conversation], encode: _Encode, num_levels: int
) -> Iterator[Record | Skip]:
    waiting: deque[Conversation] = deque()
    done: dict[str, Record | Skip] = {}

    def recordings() -> Iterator[ManifestEntry]:
        asked: set[str] = set()
        for conversation in conversations:
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
            seconds = sum(c.duration for c in clips)
            yield broken or make_record(conversation, [c.codes_MR for c in clips], seconds, num_levels)

    for result in encode(recordings()):
        done[result.name if isinstance(result, Skip) else result.id] = result
        yield from complete()
    yield from complete()


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
        expected = f"segments: expected times up to {len(wav) / rate:.2f} s, got {end:.2f}"
        return Skip(name, "segments beyond the end", f"{name}: {expected}")
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
        shape = list(codes_MR.shape)
        raise DataError(f"{entry.audio}: expected codes that fit codebooks {list(sizes)}, got some of shape {shape}")
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
        for which, places in itertools.groupby(self._places[start:stop].tolist(), key=lambda place: place[0]):
            path = self._files[which]
            with open(path, "rb") as file:
                for _, first, last, line in places:
                    file.seek(first)
                    yield self._record(path, line, file.read(last - first))

    def _record(self, path: Path, line: int, data: bytes) -> Record | Skip:
        name, language = f"{path.name}:{line}", self._language
        try:
            if path.suffix == ".jsonl":
                values = self._from_json(path, line, data)
                text, name = values["text"], values.get("id") or name
                language = values.get("language") or language
            else:
                text = data.decode()
        except UnicodeDecodeError as error:
            return Skip(name, "not UTF-8", f"{path}:{line}: expected UTF-8 ({error.reason})")
        return Record(id=name, text=text.strip().replace("\r\n", "\n"), language=language)

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


class _Ingest:
    """One call: checks the folder, makes the worker's shards that are missing, commits when there are all.

    Args:
        settings: what decides the contents; `kind` and, of codes, `codebook_sizes`, `frame_rate` and `tokenizer`.
        read: (start, stop) -> a record or the reason that there is none for each of these inputs.
    """

    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, Any],
        inputs: int,
        read: Callable[[int, int], Iterator[Record | Skip]],
        *,
        text_tokenizer: Any = None,
        records_per_shard: int = 1024,
        max_skipped: float = 0.05,
        worker: tuple[int, int] = (0, 1),
        progress: bool = True,
    ) -> None:
        if records_per_shard <= 0:
            raise DataError(f"records_per_shard: expected a positive integer, got {records_per_shard}")
        if not 0 <= worker[0] < worker[1]:
            raise DataError(f"worker: expected (i, n) with 0 <= i < n, got {worker}")
        if not 0 <= max_skipped <= 1:
            raise DataError(f"max_skipped: expected a share from 0 to 1, got {max_skipped}")
        self._out, self._inputs, self._read = Path(out), inputs, read
        self._settings = {**settings, "records_per_shard": records_per_shard}
        self._text_tokenizer, self._progress, self._worker = text_tokenizer, progress, worker
        self._per_shard, self._count = records_per_shard, -(-inputs // records_per_shard)
        self._allowed = max(1, int(max_skipped * inputs))
        self._total = _Tally()  # of the worker's shards, the one in the making included
        self._meter = Meter(inputs, self._line, progress)

    def run(self) -> ShardSet | None:
        """The finished set, or None if other workers have shards left to make."""
        out = self._out
        if self._prepare():
            print(f"ingest: {out} is complete", file=sys.stderr)
        else:
            mine = range(self._worker[0], self._count, self._worker[1])
            for index in mine:
                if (finished := self._finished(index)) is not None:
                    self._total.add(finished[1])
                    self._meter.resume(finished[1].inputs)
            self._check_skips()
            for index in mine:
                if self._finished(index, quick=True) is None:
                    self._make_shard(index)
            self._meter.say()
            if not self._commit_if_complete():
                return None
        if self._text_tokenizer is not None:
            index_shards(out, self._text_tokenizer, self._progress)
        return ShardSet(out)

    def _prepare(self) -> bool:
        """Makes the folder or checks that this ingest began it; True if it is complete."""
        out, settings = self._out, self._settings
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
                self._clean()
                return True
            (out / _WORK).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot use this folder ({error.strerror})") from None
        write_file(out / _WORK / "settings.json", _json(settings))
        return False

    def _make_shard(self, index: int) -> None:
        tally = _Tally()
        start = index * self._per_shard

        def records() -> Iterator[Record]:
            for result in self._read(start, min(start + self._per_shard, self._inputs)):
                one = _Tally.of(result)
                tally.add(one)
                self._total.add(one)
                if isinstance(result, Skip):
                    if self._progress and len(self._total.skipped) <= _SHOWN_SKIPS:
                        print(f"ingest: skipped: {result.message}", file=sys.stderr)
                    self._meter.step()
                    self._check_skips()
                else:
                    self._meter.step()
                    yield result

        shard = write_shard(self._shard(index), records())
        note = {"settings": self._settings, "shard": dataclasses.asdict(shard), **vars(tally)}
        write_file(self._note(index), _json(note | {"skipped": [dataclasses.asdict(s) for s in tally.skipped]}))

    def _check_skips(self) -> None:
        skips = self._total.skipped
        if len(skips) > self._allowed:
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(s.reason for s in skips).most_common())
            raise DataError(
                f"{self._out}: {len(skips)} of {self._inputs} inputs cannot be used ({reasons}), more than the "
                f"{self._allowed} that max_skipped allows; the last one: {skips[-1].message}"
            )

    def _shard(self, index: int) -> Path:
        return self._out / shard_name(str(self._settings["kind"]), index, self._count)

    def _note(self, index: int) -> Path:
        return self._out / _WORK / f"{index:05d}.json"

    def _finished(self, index: int, quick: bool = False) -> tuple[ShardFile, _Tally] | None:
        """What the note on a finished shard says, if the shard is there as it has it; `quick` trusts the contents."""
        path = self._shard(index)
        try:
            note = json.loads(self._note(index).read_bytes())
            shard, settings = ShardFile(**note.pop("shard")), note.pop("settings")
            tally = _Tally(**note)
            tally.counts, tally.skipped = Counter(tally.counts), [Skip(**s) for s in note["skipped"]]
            same = settings == self._settings and shard.file == path.name and path.stat().st_size == shard.bytes
            if same and (quick or file_sha256(path) == shard.sha256):
                return shard, tally
            self._note(index).unlink(missing_ok=True)  # the shard was damaged since: make it again
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _commit_if_complete(self) -> bool:
        out, settings = self._out, self._settings
        if (out / MANIFEST).is_file():  # another worker was faster
            return True
        finished = [f for index in range(self._count) if (f := self._finished(index, quick=True)) is not None]
        if missing := self._count - len(finished):
            print(f"ingest: {out}: {missing} of {self._count} shards are left to other workers", file=sys.stderr)
            return False
        total = _Tally()
        for _, tally in finished:
            total.add(tally)
        if not total.records:
            last = total.skipped[-1].message
            raise DataError(f"{out}: none of the {total.inputs} inputs could be used; the last one: {last}")
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
        self._clean()
        return True

    def _clean(self) -> None:
        """Removes what only an unfinished set needs. Never fatal: the set is complete."""
        shutil.rmtree(self._out / _WORK, ignore_errors=True)
        for leftover in (*self._out.glob("*.tmp"), *self._out.glob(".*.tmp")):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)

    def _line(self, done: float, rate: float) -> str:
        audio = f", {self._total.seconds / 3600:.2f} h" if self._total.seconds else ""
        skipped = len(self._total.skipped)
        return f"ingest: {self._out}: {done:.0f}/{self._inputs}{audio}, {skipped} skipped, {rate:.1f}/s"


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, sort_keys=True) + "\n").encode()
