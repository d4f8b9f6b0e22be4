"""Packed rows for a person to read: what `mimo-jax data show` prints.

A row is rendered from its arrays, as the model gets it, not from the documents it was made of.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from mimo_jax.config import LayoutWeights, LMTrainConfig, SourceConfig
from mimo_jax.data.layouts import TASKS
from mimo_jax.data.lm_rows import lm_loader
from mimo_jax.data.records import DataError
from mimo_jax.rows import LMRows

_SHOWN_CODES = 4  # channels of the first frame of a patch range


def show_rows(
    cfg: LMTrainConfig, split: str = "train", count: int = 1, layout: str | None = None, tokenizer: Any = None
) -> str:
    """Renders the first rows of a job's data as plain text.

    Args:
        layout: show documents of this layout only (one of `TASKS`); sources that cannot make it are left out.
        tokenizer: text tokenizer; loaded from the config when not given.

    Raises:
        DataError: as `lm_loader`; or no source can make the layout.
    """
    if tokenizer is None:
        from mimo_jax.text.tokenizers import load_text_tokenizer

        tokenizer = load_text_tokenizer(cfg.data.text_tokenizer)
    if layout is not None:
        cfg = _only(cfg, split, layout, tokenizer)
    parts: list[str] = []
    with lm_loader(cfg, split, tokenizer, process_index=0, process_count=1) as loader:
        for rows in itertools.islice(loader, -(-count // cfg.data.rows)):
            for b in range(len(rows.text_BL)):
                if len(parts) < count and rows.segment_ids_BL[b].any():
                    parts.append(f"row {len(parts)}: {render_row(LMRows(*(a[b] for a in rows)), tokenizer)}")
    return "\n\n".join(parts)


def _only(cfg: LMTrainConfig, split: str, layout: str, tokenizer: Any) -> LMTrainConfig:
    """The job with one layout, and with the sources that can make it."""
    if layout not in TASKS:
        raise DataError(f"layout: expected one of {', '.join(TASKS)}, got {layout!r}")
    train = split == "train"
    kept: dict[str, SourceConfig] = {}
    reason = DataError(f"data.{'sources' if train else 'validation'}: expected at least one shard set")

    def use(sources: dict[str, SourceConfig]) -> LMTrainConfig:
        changes: Any = {"sources" if train else "validation": sources}
        return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))

    for name, source in (cfg.data.sources if train else cfg.data.validation).items():
        source = dataclasses.replace(source, layouts=LayoutWeights(**{layout: 1.0}), weight=source.weight or 1.0)
        try:
            lm_loader(use({name: source}), split, tokenizer, process_index=0, process_count=1).close()
        except DataError as error:
            reason = error
        else:
            kept[name] = source
    if not kept:
        raise reason
    return use(kept)


def render_row(row: LMRows, tokenizer: Any) -> str:
    """Renders one row (LMRows without the batch axis): a line for each run of text or patches, with its weight."""
    length = len(row.text_BL)
    patches = {int(p): c for c, p in enumerate(row.patch_positions_BC) if p < length}
    documents = int(row.segment_ids_BL.max(initial=0))
    used = int((row.segment_ids_BL > 0).sum())
    lines = [f"{used}/{length} positions, {len(patches)}/{len(row.patch_positions_BC)} patches, {documents} documents"]
    for segment in range(1, documents + 1):
        places = np.flatnonzero(row.segment_ids_BL == segment)
        first, last = int(places[0]), int(places[-1])
        here = sum(1 for p in places.tolist() if p in patches)
        name, long = TASKS[int(row.task_ids_BL[first])], f"{len(places)} long, {here} patches"
        lines.append(f"  document {segment} ({name}): positions {first}..{last}, {long}")
        runs = itertools.groupby(places.tolist(), key=lambda p: _kind(row, p, patches))
        for (speech, text_weight, audio_weight), group in runs:
            run = list(group)
            weight = f"text {text_weight:g}" + (f", audio {audio_weight:g}" if speech else "")
            content = _speech(row, run, patches) if speech else _text(row, run, tokenizer)
            lines.append(f"    {run[0]:5d}..{run[-1]:<5d} {content}   [{weight}]")
    if used < length:
        lines.append(f"  padding: {length - used} positions")
    return "\n".join(lines)


def _kind(row: LMRows, place: int, patches: dict[int, int]) -> tuple[bool, float, float]:
    patch = patches.get(place)
    audio = 0.0 if patch is None else float(row.audio_weights_BC[patch])
    return patch is not None, float(row.text_weights_BL[place]), audio


def _speech(row: LMRows, run: list[int], patches: dict[int, int]) -> str:
    numbers = [patches[p] for p in run]
    first = row.patches_BCGR[numbers[0]]
    codes = " ".join(map(str, first[0][:_SHOWN_CODES].tolist()))
    more = " ..." if first.shape[-1] > _SHOWN_CODES else ""
    frames = len(run) * first.shape[0]
    return f"speech  patches {numbers[0]}..{numbers[-1]} ({frames} RVQ frames), first frame: {codes}{more}"


def _text(row: LMRows, run: list[int], tokenizer: Any) -> str:
    ids = [int(row.text_BL[p]) for p in run]
    names = {i: token for token, i in tokenizer.special.items()}
    tokens = "|".join(names.get(i) or tokenizer.token(i).replace("\n", "\\n") for i in ids)
    return f"text    {tokens}   ids {' '.join(map(str, ids))}"
