"""Rows of the language model: shard sets → documents → packed `LMRows`, ready for a training step.

B rows, L positions, C patch budget, G frames of a patch, R channels.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mimo_jax.config import AudioLMConfig, LayoutWeights, LMTrainConfig, SourceConfig
from mimo_jax.data import packing
from mimo_jax.data.hashing import hash_arrays, uniform
from mimo_jax.data.layouts import CONVERSATION, INTERLEAVED, TASKS, Document, Layouts, SpeechSpan, piece_lengths
from mimo_jax.data.loader import RowLoader
from mimo_jax.data.plan import DocumentRef, Documents, RowPlan
from mimo_jax.data.records import DataError
from mimo_jax.data.shards import ShardSet, ShardSetInfo, load_index, read_manifest
from mimo_jax.rows import LMRows

_SAMPLE = 2048  # records from which a source's mean document length is taken


class ShardSource:
    """One shard set as a source of documents: chooses layouts, knows lengths, reads and fills.

    Args:
        tokenizer: text tokenizer, whose lengths index the set must have.

    Raises:
        DataError: no record can take any of the source's layouts, or the set has no lengths for the tokenizer.
    """

    def __init__(self, name: str, config: SourceConfig, shards: ShardSet, layouts: Layouts, tokenizer: Any):
        self.name, self.weight, self.changes, self.shards = name, config.weight, config.changes, shards
        self._layouts = layouts
        self._index = load_index(shards, tokenizer)
        shares = np.asarray(dataclasses.astuple(config.layouts), np.float64)
        wanted = layouts.eligible(self._index) & (shares > 0)
        talks = self._index.conversation > 0
        if left_out := int((talks & ~layouts.eligible(self._index).any(axis=1)).sum()):
            print(
                f"data source {name!r} ({shards.path}): {left_out} of {int(talks.sum())} conversations are longer than "
                f"a row ({layouts.row_length} positions, {layouts.row_patches} patches) and are left out",
                file=sys.stderr,
            )
        self.records = np.flatnonzero(wanted.any(axis=1))
        if not len(self.records):
            asked = ", ".join(t for t, share in zip(TASKS, shares, strict=True) if share > 0) or "none"
            where = f"data source {name!r} ({shards.path})"
            raise DataError(f"{where}: none of its {len(shards)} records can take a layout of this source ({asked})")
        self._chances = np.cumsum(wanted * shares, axis=1)  # [N, tasks], not normalised
        sample = self.records[:: max(1, len(self.records) // _SAMPLE)]
        lengths = self.documents(sample, hash_arrays(0, sample)).lengths
        self.mean_length = float(lengths[:, 0].sum() / len(sample))

    def draw_tasks(self, records: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Layout of each record under its key, drawn among those it is eligible for: int64 [n]."""
        chances = self._chances[records]
        # The product may round up to the total, which no layout has.
        draw = np.minimum(uniform(hash_arrays(keys, 1)) * chances[:, -1], np.nextafter(chances[:, -1], 0))
        return (draw[:, None] >= chances).sum(axis=1)

    def documents(self, records: np.ndarray, keys: np.ndarray) -> Documents:
        """Layouts and lengths of records (see `PlanSource`); spans are planned only where lengths need them."""
        tasks = self.draw_tasks(records, keys)
        lengths = np.zeros((len(records), 2), np.int64)
        for task in np.unique(tasks).tolist():
            if task != INTERLEAVED:
                here = tasks == task
                lengths[here] = self._layouts.whole_lengths(task, self._index, records[here])
        fits = (lengths <= (self._layouts.row_length, self._layouts.row_patches)).all(axis=1)
        simple = (tasks != INTERLEAVED) & fits
        whole = np.flatnonzero(simple)
        owners: list[int] = []
        pieces: list[int] = []
        rest: list[tuple[int, int]] = []
        for i in np.flatnonzero(~simple).tolist():
            planned = self._layouts.document_lengths(int(tasks[i]), self._index.entry(int(records[i])), int(keys[i]))
            owners += [i] * len(planned)
            pieces += range(len(planned))
            rest += planned
        owner = np.concatenate([whole, np.asarray(owners, np.int64)])
        return Documents(
            owner,
            tasks[owner],
            np.concatenate([np.zeros(len(whole), np.int64), np.asarray(pieces, np.int64)]),
            np.concatenate([lengths[whole], np.asarray(rest, np.int64).reshape(-1, 2)]),
        )

    def read(self, refs: Sequence[DocumentRef]) -> list[Document]:
        """Reads and fills documents of this source."""
        records = self.shards.read([r.record for r in refs])
        documents = []
        for ref, record in zip(refs, records, strict=True):
            if ref.task >= CONVERSATION:
                lengths = self._layouts.whole_lengths(ref.task, self._index, np.asarray([ref.record]))
                expected = tuple(lengths[0].tolist())
                document = self._layouts.conversation(ref.task, record)
            else:
                piece = self._layouts.plan(ref.task, self._index.entry(ref.record), ref.key)[ref.piece]
                expected = piece_lengths(piece)
                document = self._layouts.fill(ref.task, piece, record)
            if (document.num_positions, document.num_patches) != expected:
                where = f"{self.shards.path}: record {ref.record}"
                raise DataError(f"{where}: its lengths are not those of the lengths index")
            documents.append(document)
        return documents


def empty_row(row_length: int, row_patches: int, model: AudioLMConfig) -> LMRows:
    """A row that holds nothing: padding is `<|empty|>` and empty codes, whose embeddings are zero."""
    unused = np.asarray(model.codebook_sizes, np.uint16)  # the id after the last code means "empty"
    return LMRows(
        text_BL=np.full(row_length, model.empty_id, np.int32),
        patches_BCGR=np.broadcast_to(unused, (row_patches, model.group_size, model.num_channels)).copy(),
        patch_positions_BC=np.full(row_patches, row_length, np.int32),
        segment_ids_BL=np.zeros(row_length, np.int32),
        positions_BL=np.zeros(row_length, np.int32),
        task_ids_BL=np.zeros(row_length, np.uint8),
        text_weights_BL=np.zeros(row_length, np.float32),
        audio_weights_BC=np.zeros(row_patches, np.float32),
    )


def assemble_row(
    documents: Sequence[Document], row_length: int, row_patches: int, model: AudioLMConfig, empty_weight: float
) -> LMRows:
    """Puts documents into a row, in order, as segments 1, 2, ...

    Args:
        documents: at most `row_length` positions and `row_patches` patches in all.
        empty_weight: weight of a text target that is `<|empty|>` (`LMLossConfig.empty_weight`).

    Returns:
        LMRows without the batch axis. The first position of a document is never a target.

    Raises:
        ValueError: the documents do not fit.
    """
    row = empty_row(row_length, row_patches, model)
    position = patch = 0
    for segment, document in enumerate(documents, 1):
        first = position
        for span in document.spans:
            here = slice(position, position + len(span))
            slots = slice(patch, patch + (len(span) if isinstance(span, SpeechSpan) else 0))
            if here.stop > row_length or slots.stop > row_patches:
                raise ValueError(f"row of {row_length} positions and {row_patches} patches: its documents do not fit")
            if isinstance(span, SpeechSpan):
                row.patches_BCGR[slots] = span.patches_NGR
                row.patch_positions_BC[slots] = np.arange(position, here.stop)
                row.audio_weights_BC[slots] = np.arange(position, here.stop) > first if span.target else 0.0
                row.text_weights_BL[here] = empty_weight if span.target else 0.0
            else:
                row.text_BL[here] = span.ids
                row.text_weights_BL[here] = span.target
            position, patch = here.stop, slots.stop
        here = slice(first, position)
        row.segment_ids_BL[here] = segment
        row.positions_BL[here] = np.arange(position - first)
        row.task_ids_BL[here] = document.task
        row.text_weights_BL[first : first + 1] = 0
    return row


def lm_loader(
    cfg: LMTrainConfig,
    split: str = "train",
    tokenizer: Any = None,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> RowLoader:
    """Opens the rows of a language-model job.

    Args:
        split: `train`: endless, mixed by the sources' weights; `validation`: every record of the held-out sets once,
            layouts drawn by a seed of their own, in an order that never changes.
        tokenizer: text tokenizer; loaded from `cfg.data.text_tokenizer` when not given.
        process_index: which part of each global batch to read; JAX's process by default.

    Returns:
        Loader of `LMRows` with leading axis `cfg.data.rows / process_count`.

    Raises:
        DataError: a shard set is damaged, of another audio tokenizer than the others or of other codebook sizes than
            the model's, has no lengths for the text tokenizer, or holds nothing for the layouts asked of it; or the
            text tokenizer is not the model's.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split: expected train or validation, got {split!r}")
    train = split == "train"
    data, model = cfg.data, cfg.model
    if tokenizer is None:
        from mimo_jax.text.tokenizers import load_text_tokenizer

        tokenizer = load_text_tokenizer(data.text_tokenizer)
    check_text_tokenizer(tokenizer, model, data.text_tokenizer)

    rows = (data.row_length, data.row_patches, data.target_conditioning)
    layouts = Layouts(tokenizer, model.group_size, model.num_channels, *rows)
    configs = {name: c for name, c in (data.sources if train else data.validation).items() if c.used}
    if not configs:
        sets = "sources" if train else "validation"
        raise DataError(f"data.{sets}: expected at least one shard set with a positive weight")
    sources, audio_tokenizer = [], ("", "")
    for name, config in sorted(configs.items()):
        shards = ShardSet(config.path)
        audio_tokenizer = check_codes(name, config, shards.info, model, audio_tokenizer)
        sources.append(ShardSource(name, config, shards, layouts, tokenizer))

    if train:  # what the run validates on has to be of the same codes; found out now and not at the first validation
        for name, config in sorted(data.validation.items()):
            audio_tokenizer = check_codes(name, config, read_manifest(config.path)[0], model, audio_tokenizer)
    capacities = (data.row_length, data.row_patches)
    # Held-out rows must not change with the seed of the run.
    plan = RowPlan(sources, capacities, data.block_documents, cfg.run.seed if train else 0, one_pass=not train)

    def make_row(refs: list[DocumentRef]) -> LMRows:
        documents: list[Document | None] = [None] * len(refs)
        for i, source in enumerate(sources):
            places = [k for k, ref in enumerate(refs) if ref.source == i]
            for k, document in zip(places, source.read([refs[k] for k in places]), strict=True):
                documents[k] = document
        return assemble_row([d for d in documents if d is not None], *capacities, model, cfg.loss.empty_weight)

    fingerprint = {
        "sources": {s.name: s.shards.fingerprint for s in sources},
        "settings": {s.name: [configs[s.name].weight, *_shares(configs[s.name].layouts)] for s in sources},
        "text_tokenizer": tokenizer.fingerprint,
        "audio_tokenizer": audio_tokenizer[0],
        "model": [model.empty_id, model.group_size, list(model.codebook_sizes)],
        "rows": [data.rows, data.row_length, data.row_patches],
        "block_documents": data.block_documents,
        "packing": packing.VERSION,
        "target_conditioning": data.target_conditioning,
        "empty_weight": cfg.loss.empty_weight,
        "seed": cfg.run.seed if train else 0,
    }
    empty = empty_row(*capacities, model)
    deal = (process_index, process_count, cfg.run.data_threads)
    return RowLoader(plan, make_row, empty, data.rows, fingerprint, *deal, one_pass=not train)


def _shares(layouts: LayoutWeights) -> tuple[float, ...]:
    """Weights of the layouts; those of conversations only if there are any, as runs from before there were."""
    shares = dataclasses.astuple(layouts)
    return shares if any(shares[CONVERSATION:]) else shares[:CONVERSATION]


def check_text_tokenizer(tokenizer: Any, model: AudioLMConfig, name: str) -> None:
    """Raises DataError if a text tokenizer does not fit a model's vocabulary."""
    empty = tokenizer.special["<|empty|>"]
    if empty != model.empty_id:
        raise DataError(f"{name}: <|empty|>: expected id {model.empty_id} (model.empty_id), got {empty}")
    if tokenizer.vocab_size > model.vocab_size:
        expected = f"at most {model.vocab_size} ids (model.vocab_size)"
        raise DataError(f"{name}: expected {expected}, got {tokenizer.vocab_size}")


def check_codes(
    name: str, config: SourceConfig, info: ShardSetInfo, model: AudioLMConfig, known: tuple[str, str]
) -> tuple[str, str]:
    """Checks that a shard set's codes are ones the model reads and of the same audio tokenizer as the other sets'.

    Args:
        config: its settings; where text is the only layout, codes are not looked at.
        known: (audio tokenizer fingerprint, source name) of the sets before, or two empty strings.

    Returns:
        `known`, or this set's if there was none.

    Raises:
        DataError: they are not; the message names the sets.
    """
    speech = any(share for task, share in dataclasses.asdict(config.layouts).items() if task != "text")
    if info.kind == "text" or not speech:
        return known
    channels = model.num_channels
    if info.codebook_sizes[:channels] != model.codebook_sizes:
        raise DataError(
            f"data source {name!r} ({config.path}): expected codebooks that begin with {list(model.codebook_sizes)} "
            f"(model.codebook_sizes), got {list(info.codebook_sizes)}"
        )
    fingerprint, other = known
    if fingerprint and fingerprint != info.tokenizer:
        raise DataError(
            f"data source {name!r} ({config.path}): its codes are of audio tokenizer {info.tokenizer}, "
            f"those of source {other!r} of {fingerprint}: make the shards with one tokenizer"
        )
    return info.tokenizer, name
