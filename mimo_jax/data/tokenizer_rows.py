"""Rows of the audio tokenizer, straight from a JSONL manifest of recordings: decode, crop, pack into `TokenizerRows`.

A row has two budgets: RVQ frames (a clip's slot, `mimo_jax.audio.packing`) and text tokens of the A2T objective.

B rows, S samples, T mel frames, M RVQ frames, U text tokens.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimo_jax.audio.files import AudioError, audio_length, load_audio
from mimo_jax.audio.packing import empty_row, num_codes, slot_codes, write_clip
from mimo_jax.config import AdversarialTrainConfig, AudioTokenizerConfig, ConfigError, TokenizerTrainConfig
from mimo_jax.data import packing
from mimo_jax.data.hashing import hash_arrays, hash_ints
from mimo_jax.data.ingest import fault
from mimo_jax.data.loader import RowLoader
from mimo_jax.data.manifest import Manifest
from mimo_jax.data.plan import DocumentRef, Documents, RowPlan
from mimo_jax.data.records import DataError
from mimo_jax.rows import TokenizerRows
from mimo_jax.text.tokenizers import load_text_tokenizer

_TOLERANCE = 0.1  # seconds by which a recording may differ from the duration that the plan was made with


class BrokenClips:
    """Counts recordings of manifest `name` that cannot be used while training; more than `limit` end the run."""

    def __init__(self, limit: int, name: str):
        self._limit, self._name = limit, name
        self._reasons: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def add(self, record: int, message: str) -> None:
        """Counts a recording once, reports it on stderr; raises DataError beyond the limit."""
        with self._lock:
            if record in self._seen:
                return
            self._seen.add(record)
            self._reasons[fault(message)] += 1
            print(f"data: left out: {message}", file=sys.stderr)
            if len(self._seen) > self._limit:
                counts = ", ".join(f"{n} {reason}" for reason, n in self._reasons.most_common())
                raise DataError(
                    f"{self._name}: {len(self._seen)} recordings cannot be used ({counts}), "
                    f"more than {self._limit} allowed; the last one: {message}"
                )


class ClipSource:
    """A manifest as a source of clips (see `PlanSource`): how long their slots are, and reading them.

    Args:
        manifest: durations that it lacks are read from the files once, here.
        max_seconds: longer recordings are cropped at a drawn place, and then have no text.
        row_text: text tokens of a row; a longer text is left out.
    """

    name, weight = "manifest", 1.0
    changes: tuple[tuple[float, float], ...] = ()

    def __init__(
        self,
        manifest: Manifest,
        config: AudioTokenizerConfig,
        tokenizer: Any,
        max_seconds: float,
        row_text: int,
        broken: BrokenClips,
    ):
        self._manifest, self._config, self._tokenizer, self._broken = manifest, config, tokenizer, broken
        rate = config.mel.sample_rate
        self._longest = int(max_seconds * rate)
        shortest = config.mel.n_fft // 2 + 1  # what reflection at the ends needs
        samples, tokens = np.zeros(len(manifest), np.int64), np.zeros(len(manifest), np.int64)
        for i, entry in enumerate(manifest):
            try:
                samples[i] = round(entry.duration * rate) if entry.duration else audio_length(entry.audio, rate)
            except AudioError as error:
                broken.add(i, str(error))
                continue
            if samples[i] < shortest:
                expected = f"expected at least {shortest} samples at {rate} Hz, got {samples[i]}"
                broken.add(i, f"{entry.audio}: too short: {expected}")
                samples[i] = 0
            text = (entry.text or entry.caption) if row_text else ""
            if text and samples[i] <= self._longest:
                tokens[i] = len(tokenizer.encode(text)) + 1  # and end of text
        tokens[tokens > row_text] = 0
        self._samples, self._tokens = np.minimum(samples, self._longest), tokens
        self.planned_samples = samples
        self.records = np.flatnonzero(samples)
        if not len(self.records):
            raise DataError(f"{manifest.path}: none of its {len(manifest)} recordings can be used")
        slots = {int(n): slot_codes(int(n), config) for n in np.unique(self._samples[self.records])}
        self._slots = np.asarray([slots.get(int(n), 0) for n in self._samples], np.int64)
        self.mean_length = float(self._slots[self.records].mean())

    def documents(self, records: np.ndarray, keys: np.ndarray) -> Documents:
        """One clip for each record."""
        zeros = np.zeros(len(records), np.int64)
        lengths = np.stack([self._slots[records], self._tokens[records]], axis=1)
        return Documents(np.arange(len(records)), zeros, zeros, lengths)

    def slot(self, record: int) -> int:
        """RVQ frames that a record takes in a row."""
        return int(self._slots[record])

    def read(self, ref: DocumentRef) -> tuple[np.ndarray, list[int]] | None:
        """Samples float32 [S] of a clip, cropped if it has to be, and its text tokens; None if it cannot be used."""
        entry, record = self._manifest[ref.record], ref.record
        rate, planned = self._config.mel.sample_rate, int(self.planned_samples[ref.record])
        try:
            wav = load_audio(entry.audio, rate, self._config.resampler)
            if abs(len(wav) - planned) > _TOLERANCE * rate:
                expected = f"expected {planned / rate:.2f} s, got {len(wav) / rate:.2f} s"
                raise AudioError(f"{entry.audio}: truncated or changed: {expected}")
        except AudioError as error:
            self._broken.add(record, str(error))
            return None
        if planned > self._longest:
            start = hash_ints(ref.key, 1) % max(1, len(wav) - self._longest + 1)
            return wav[start : start + self._longest], []
        ids = self._tokenizer.encode(entry.text or entry.caption) if self._tokens[record] else []
        return wav[:planned], ids


def assemble_row(
    clips: Sequence[tuple[np.ndarray, Sequence[int]] | None],
    slots: Sequence[int],
    row_codes: int,
    row_text: int,
    config: AudioTokenizerConfig,
    end_of_text: int,
) -> TokenizerRows:
    """Puts clips into a row of M = `row_codes` and U = `row_text`, in order, as segments 1, 2, ...

    Args:
        clips: samples and text tokens of each clip, or None for one that could not be read: its slot stays empty.
        end_of_text: id that begins the A2T inputs and ends the targets.

    Returns:
        TokenizerRows without the batch axis.
    """
    wav_S, segment_ids_T = empty_row(row_codes, config)
    text, targets, text_segment_ids, text_positions = (np.zeros(row_text, np.int32) for _ in range(4))
    weights = np.zeros(row_text, np.float32)
    start = position = 0
    for segment, (clip, slot) in enumerate(zip(clips, slots, strict=True), 1):
        if clip is not None:
            wav, ids = clip
            write_clip(wav_S, segment_ids_T, start, wav, segment, config)
            if len(ids):
                here = slice(position, position + len(ids) + 1)
                text[here] = [end_of_text, *ids]
                targets[here] = [*ids, end_of_text]
                text_segment_ids[here] = segment
                text_positions[here] = num_codes(len(wav), config) + np.arange(len(ids) + 1)
                weights[here] = 1.0
                position += len(ids) + 1
        start += slot
    return TokenizerRows(wav_S, segment_ids_T, text, targets, text_segment_ids, text_positions, weights)


def tokenizer_loader(
    cfg: TokenizerTrainConfig | AdversarialTrainConfig,
    split: str = "train",
    tokenizer: Any = None,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
    max_broken: float = 0.05,
) -> RowLoader:
    """Opens the rows of a tokenizer job: `TokenizerRows` with leading axis `cfg.data.rows / process_count`.

    Args:
        split: `train`: endless, in an order drawn anew each epoch; `validation`: the held-out manifest once, in an
            order that never changes.
        tokenizer: text tokenizer; loaded from `cfg.data.text_tokenizer` when not given. Rows without room for text
            (`cfg.data.row_text` 0) need none.
        process_index, process_count: which part of each global batch to read; JAX's process by default.
        max_broken: share of the recordings that may turn out unusable; one always may.

    Raises:
        ManifestError: a line of the manifest is wrong.
        DataError: too many recordings cannot be used.
        ConfigError: a clip of `max_seconds` does not fit in a row.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split: expected train or validation, got {split!r}")
    train = split == "train"
    data, config = cfg.data, cfg.model
    if tokenizer is None and data.row_text:
        tokenizer = load_text_tokenizer(data.text_tokenizer)
    if tokenizer is not None and isinstance(cfg, TokenizerTrainConfig) and tokenizer.vocab_size > cfg.a2t.vocab_size:
        expected = f"at most {cfg.a2t.vocab_size} ids (a2t.vocab_size)"
        raise DataError(f"{data.text_tokenizer}: expected {expected}, got {tokenizer.vocab_size}")
    needed = slot_codes(int(data.max_seconds * config.mel.sample_rate), config)
    if needed > data.row_codes:
        raise ConfigError(
            f"data.row_codes: expected at least {needed} RVQ frames for clips of data.max_seconds "
            f"({data.max_seconds} s), got {data.row_codes}"
        )
    manifest = Manifest(data.manifest if train else data.validation)
    broken = BrokenClips(max(1, int(max_broken * len(manifest))), str(manifest.path))
    source = ClipSource(manifest, config, tokenizer, data.max_seconds, data.row_text, broken)
    seed = cfg.run.seed if train else 0
    plan = RowPlan([source], (data.row_codes, data.row_text), data.block_documents, seed, one_pass=not train)
    end_of_text = 0 if tokenizer is None else tokenizer.special["<|endoftext|>"]

    def make_row(refs: list[DocumentRef]) -> TokenizerRows:
        clips, slots = [source.read(ref) for ref in refs], [source.slot(ref.record) for ref in refs]
        return assemble_row(clips, slots, data.row_codes, data.row_text, config, end_of_text)

    fingerprint = {
        "manifest": manifest.sha256[:16],
        # A manifest without durations has them read from the files, which may change under it.
        "samples": f"{int(np.bitwise_xor.reduce(hash_arrays(np.arange(len(manifest)), source.planned_samples))):016x}",
        **({} if tokenizer is None else {"text_tokenizer": tokenizer.fingerprint}),
        "audio": [config.mel.sample_rate, config.mel.n_fft, config.samples_per_code],
        "rows": [data.rows, data.row_codes, data.row_text],
        "max_seconds": data.max_seconds,
        "block_documents": data.block_documents,
        "packing": packing.VERSION,
        "seed": seed,
    }
    deal = (process_index, process_count, cfg.run.data_threads)
    return RowLoader(plan, make_row, make_row([]), data.rows, fingerprint, *deal, one_pass=not train)
