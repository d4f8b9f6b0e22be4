"""Rows of the language model: what stands in them, the same stream after a restart and on any number of processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_pipeline.builders import ALL_LAYOUTS, SIZES, CharTokenizer, random_codes, random_record, tiny_model, write_set

from mimo_jax.config import LayoutWeights, LMTrainConfig, SourceConfig
from mimo_jax.config_files import to_json
from mimo_jax.data.layouts import ASR, CONVERSATION, TASKS, Document, Layouts, SpeechSpan, TextSpan
from mimo_jax.data.lm_rows import assemble_row, lm_loader
from mimo_jax.data.records import DataError, Record
from mimo_jax.data.shards import ShardSet, index_shards, record_entry
from mimo_jax.data.show import render_row, show_rows
from mimo_jax.rows import LMRows
from mimo_jax.training.checkpoint import CheckpointError, check_same_run

CHARS = CharTokenizer()


def with_data(cfg: LMTrainConfig, **changes: Any) -> LMTrainConfig:
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))


def open_loader(
    corpus: SimpleNamespace, split: str = "train", index: int = 0, count: int = 1, cfg: LMTrainConfig | None = None
):
    return lm_loader(cfg or corpus.cfg, split, corpus.tokenizer, process_index=index, process_count=count)


def take(loader: Any, count: int) -> list[LMRows]:
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def same(a: LMRows, b: LMRows) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_row_holds_its_documents_and_nothing_else() -> None:
    model = tiny_model(CHARS)
    patches = random_codes(np.random.default_rng(0), 12)[:, :8].reshape(3, 4, 8)
    first = Document(
        3,
        (
            TextSpan(np.asarray([101, 4], np.int32), True),
            SpeechSpan(patches, True),
            TextSpan(np.asarray([5, 1], np.int32), True),
        ),
    )
    second = Document(0, (TextSpan(np.asarray([102, 103], np.int32), True), TextSpan(np.asarray([1], np.int32), False)))
    row = assemble_row([first, second], 12, 5, model, 0.01)
    assert row.text_BL.tolist() == [101, 4, 6, 6, 6, 5, 1, 102, 103, 1, 6, 6]
    assert row.segment_ids_BL.tolist() == [1] * 7 + [2] * 3 + [0] * 2
    assert row.positions_BL.tolist() == [*range(7), 0, 1, 2, 0, 0]
    assert row.task_ids_BL.tolist() == [3] * 7 + [0] * 5
    np.testing.assert_array_equal(row.text_weights_BL, np.float32([0, 1, 0.01, 0.01, 0.01, 1, 1, 0, 1, 0, 0, 0]))
    assert row.patch_positions_BC.tolist() == [2, 3, 4, 12, 12]
    assert row.audio_weights_BC.tolist() == [1, 1, 1, 0, 0]
    np.testing.assert_array_equal(row.patches_BCGR[:3], patches)
    assert (row.patches_BCGR[3:] == np.asarray(SIZES[:8])).all(), "unused slots hold the empty code of each channel"
    dtypes = [str(a.dtype) for a in row]
    assert dtypes == ["int32", "uint16", "int32", "int32", "int32", "uint8", "float32", "float32"]
    with pytest.raises(ValueError, match="do not fit"):
        assemble_row([first, second], 9, 5, model, 0.01)
    with pytest.raises(ValueError, match="do not fit"):
        assemble_row([first, second], 12, 2, model, 0.01)


def check_rows(rows: LMRows, cfg: LMTrainConfig) -> None:
    """What every batch must fulfil, whatever is in it."""
    length, empty = cfg.data.row_length, cfg.model.empty_id
    for b in range(len(rows.text_BL)):
        row = LMRows(*(a[b] for a in rows))
        real = row.segment_ids_BL > 0
        slots = row.patch_positions_BC < length
        assert (np.diff(row.patch_positions_BC[slots]) > 0).all() and not slots[int(slots.sum()) :].any()
        assert set(row.patch_positions_BC[slots].tolist()) == set(
            np.flatnonzero(real & (row.text_BL == empty)).tolist()
        )
        assert (row.patches_BCGR[slots] < np.asarray(cfg.model.codebook_sizes)).all()
        assert (
            (row.text_BL[~real] == empty).all()
            and not row.text_weights_BL[~real].any()
            and not row.audio_weights_BC[~slots].any()
        )
        for segment in range(1, int(row.segment_ids_BL.max(initial=0)) + 1):
            here = np.flatnonzero(row.segment_ids_BL == segment)
            assert (np.diff(here) == 1).all() and row.positions_BL[here].tolist() == list(range(len(here)))
            assert len(set(row.task_ids_BL[here].tolist())) == 1 and row.text_weights_BL[here[0]] == 0


def test_batches_are_well_formed_and_hold_every_layout(corpus: SimpleNamespace) -> None:
    tasks: set[int] = set()
    for rows in take(open_loader(corpus), 12):
        assert rows.text_BL.shape == (6, 256) and rows.patches_BCGR.shape == (6, 160, 4, 8)
        check_rows(rows, corpus.cfg)
        tasks |= set(rows.task_ids_BL[rows.segment_ids_BL > 0].tolist())
    assert tasks == set(range(CONVERSATION))


def test_rows_hold_the_documents_of_the_records(corpus: SimpleNamespace) -> None:
    """Every continuation in the rows is, patch for patch, the codes of some record."""
    only = {"speech": SourceConfig(str(corpus.speech), 1.0, LayoutWeights(continuation=1))}
    cfg = with_data(corpus.cfg, sources=only)
    known = {}
    layouts = Layouts(corpus.tokenizer, 4, 8, 256, 160)
    for record in ShardSet(corpus.speech):
        known[layouts.patches(record.codes_MR, 0, len(record.codes_MR)).tobytes()] = record.id
    found = set()
    for rows in take(open_loader(corpus, cfg=cfg), 10):
        for b in range(6):
            for segment in range(1, int(rows.segment_ids_BL[b].max()) + 1):
                slots = [
                    c
                    for c, p in enumerate(rows.patch_positions_BC[b])
                    if p < 256 and rows.segment_ids_BL[b, p] == segment
                ]
                found.add(known[np.ascontiguousarray(rows.patches_BCGR[b, slots]).tobytes()])
    assert len(found) > 100


def test_the_stream_is_a_function_of_the_seed(corpus: SimpleNamespace) -> None:
    first, again = take(open_loader(corpus), 6), take(open_loader(corpus), 6)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = dataclasses.replace(corpus.cfg, run=dataclasses.replace(corpus.cfg.run, seed=4))
    assert not same(first[0], take(open_loader(corpus, cfg=other), 1)[0])
    unthreaded = dataclasses.replace(corpus.cfg, run=dataclasses.replace(corpus.cfg.run, data_threads=0))
    assert all(same(a, b) for a, b in zip(first, take(open_loader(corpus, cfg=unthreaded), 6), strict=True))


@pytest.mark.parametrize("stop", [1, 7, 23])
def test_a_restored_loader_continues_with_the_same_batches(corpus: SimpleNamespace, stop: int) -> None:
    whole = take(open_loader(corpus), stop + 5)
    interrupted = open_loader(corpus)
    for _ in range(stop):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.state()))
    interrupted.close()
    assert state["step"] == stop and all(isinstance(v, int) for v in state.values())
    restored = open_loader(corpus)
    restored.restore(state)
    assert restored.step == stop
    assert all(same(a, b) for a, b in zip(whole[stop:], take(restored, 5), strict=True))
    back = open_loader(corpus)
    position = back.state()
    first = next(back)
    back.restore(position)
    assert same(first, next(back)), "a loader can be put back"
    back.close()


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_batches_of_one(corpus: SimpleNamespace, count: int) -> None:
    whole = take(open_loader(corpus), 9)
    parts = [open_loader(corpus, index=i, count=count) for i in range(count)]
    for step, batch in enumerate(whole):
        got = [next(p) for p in parts]
        assert same(batch, LMRows(*(np.concatenate(column) for column in zip(*got, strict=True))))
        states = [p.state() for p in parts]
        assert all(s == states[0] for s in states)
        if step == 4:  # continue on another number of processes
            resumed = open_loader(corpus)
            resumed.restore(states[0])
            assert same(next(resumed), whole[5])
            resumed.close()
    for part in parts:
        part.close()
    with pytest.raises(DataError, match="multiple of the number of processes"):
        open_loader(corpus, index=0, count=4)


def changing(
    corpus: SimpleNamespace, speech: tuple = ((6_000, 0.2),), text: tuple = ((9_000, 0.9),), **more: Any
) -> Any:
    """The job of the corpus with weights that change; a step has 4 rows of 256 positions."""
    sources = corpus.cfg.data.sources
    changed = {
        "speech": dataclasses.replace(sources["speech"], changes=speech),
        "text": dataclasses.replace(sources["text"], changes=text),
        **more,
    }
    return with_data(corpus.cfg, sources=changed, rows=4, block_documents=10)


def test_processes_and_restarts_make_no_difference_where_weights_change(corpus: SimpleNamespace) -> None:
    cfg = changing(corpus)
    whole = take(open_loader(corpus, cfg=cfg), 16)
    for count in (1, 2, 4):
        state: dict[str, Any] | None = None
        for begin, end in ((0, 4), (4, 7), (7, 9), (9, 10), (10, 16)):
            parts = [open_loader(corpus, index=i, count=count, cfg=cfg) for i in range(count)]
            for part in parts:
                if state is not None:
                    part.restore(json.loads(json.dumps(state)))
            for step in range(begin, end):
                got = [next(p) for p in parts]
                assert same(whole[step], LMRows(*(np.concatenate(column) for column in zip(*got, strict=True)))), step
            states = [p.state() for p in parts]
            assert all(s == states[0] for s in states)
            state = states[0]
            for part in parts:
                part.close()
        assert state is not None and len(state["phases"]) == 2
    assert "phases" not in open_loader(corpus).state(), "as runs without changes always saved it"


def test_only_changes_that_are_still_to_come_may_be_edited(corpus: SimpleNamespace) -> None:
    cfg = changing(corpus)
    loader = open_loader(corpus, cfg=cfg)
    meta = {"config": json.loads(to_json(cfg)), "data_fingerprint": loader.fingerprint, "tokens": 7 * 1024}
    more = dataclasses.replace(cfg.data.sources["text"], path=str(corpus.held), weight=0.0, changes=((9_000, 1.0),))
    for allowed in (
        cfg,
        changing(corpus, text=()),
        changing(corpus, text=((8_000, 0.1),)),
        changing(corpus, more=more),
    ):
        check_same_run(meta, allowed, open_loader(corpus, cfg=allowed).fingerprint, "run")
    early = dataclasses.replace(more, changes=((7_000.0, 1.0),))
    for refused, message in (
        (
            changing(corpus, speech=((6_000, 0.3),)),
            r"sources\.speech\.changes, .*7,168.*was \[\[6000.0, 0.2\]\] and is",
        ),
        (changing(corpus, speech=()), r"sources\.speech\.changes, .*was \[\[6000.0, 0.2\]\] and is \[\] now"),
        (changing(corpus, text=((7_168.0, 0.9),)), r"sources\.text\.changes, .*is \[\[7168.0, 0.9\]\] now"),
        (changing(corpus, more=early), r"sources\.more\.changes.*was None and is \[\[7000.0, 1.0\]\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_same_run(meta, refused, open_loader(corpus, cfg=refused).fingerprint, "run")
    for _ in range(7):
        next(loader)
    edited = open_loader(corpus, cfg=changing(corpus, text=((8_000, 0.1),)))
    edited.restore(loader.state())
    assert same(next(edited), next(loader)), "nothing has changed yet"
    edited.close()
    loader.close()


def test_validation_is_one_pass_in_an_order_that_never_changes(corpus: SimpleNamespace) -> None:
    loader = open_loader(corpus, "validation")
    first = list(loader)
    assert all(same(a, b) for a, b in zip(first, loader, strict=True)), "iter() starts anew"
    other = dataclasses.replace(corpus.cfg, run=dataclasses.replace(corpus.cfg.run, seed=99))
    assert all(same(a, b) for a, b in zip(first, open_loader(corpus, "validation", cfg=other), strict=True))
    loader.close()
    for rows in first:
        assert rows.text_BL.shape == (6, 256)
        check_rows(rows, corpus.cfg)
    rows = first[-1]
    assert not rows.segment_ids_BL[-1].any(), "the last batch is filled up with empty rows"
    documents = sum(int(r.segment_ids_BL.max(axis=1).sum()) for r in first)
    plan = open_loader(corpus, "validation").plan
    refs = [d for i in range(plan.num_rows()) for d in plan.row(i)]
    assert len(refs) == documents and {d.record for d in refs} == set(range(23))
    parts = [open_loader(corpus, "validation", i, 2) for i in range(2)]
    for batch, *got in zip(first, *parts, strict=True):
        assert same(batch, LMRows(*(np.concatenate(column) for column in zip(*got, strict=True))))


def test_text_alone_needs_no_patches(corpus: SimpleNamespace) -> None:
    sources = {"text": SourceConfig(str(corpus.text), 1.0, LayoutWeights(text=1))}
    text_only = dataclasses.replace(corpus.cfg.loss, text_weight=1.0, channel_weights=(0.0,) * 8)
    cfg = with_data(dataclasses.replace(corpus.cfg, loss=text_only), sources=sources, row_patches=0)
    (rows,) = take(open_loader(corpus, cfg=cfg), 1)
    assert rows.patches_BCGR.shape == (6, 0, 4, 8) and rows.audio_weights_BC.shape == (6, 0)
    assert (rows.segment_ids_BL > 0).mean() > 0.8


def test_weights_are_shares_of_positions(corpus: SimpleNamespace) -> None:
    cfg = with_data(
        corpus.cfg,
        sources={
            n: dataclasses.replace(
                s, layouts=LayoutWeights(text=1) if n == "text" else dataclasses.replace(ALL_LAYOUTS, text=0)
            )
            for n, s in corpus.cfg.data.sources.items()
        },
    )
    counts = np.zeros(2)
    for rows in take(open_loader(corpus, cfg=cfg), 60):
        real = rows.segment_ids_BL > 0
        counts += [(real & (rows.task_ids_BL > 0)).sum(), (real & (rows.task_ids_BL == 0)).sum()]
    np.testing.assert_allclose(counts / counts.sum(), [0.7, 0.3], atol=0.03)


def test_layouts_are_drawn_by_their_weights_and_anew_each_epoch(corpus: SimpleNamespace) -> None:
    loader = open_loader(corpus)
    drawn: dict[tuple[int, int], set[int]] = {}
    tasks = []
    for i in range(300):
        for ref in loader.plan.row(i):
            drawn.setdefault((ref.source, ref.record), set()).add(ref.task)
            tasks.append(ref.task if ref.source == 0 else -1)
    assert np.mean([len(v) > 1 for k, v in drawn.items() if k[0] == 0]) > 0.5
    assert tasks.count(ASR) > 0.08 * sum(t >= 0 for t in tasks)
    block, _ = loader.plan.locate(300)
    assert all(loader.plan.taken(i, block) > len(s.records) for i, s in enumerate(loader.plan.sources))


def test_a_checkpoint_of_other_data_is_refused_by_the_entry_that_differs(corpus: SimpleNamespace) -> None:
    saved = json.loads(json.dumps(open_loader(corpus).fingerprint))
    changes = {
        "rows": with_data(corpus.cfg, rows=12),
        r"settings\.text": with_data(
            corpus.cfg,
            sources={
                **corpus.cfg.data.sources,
                "text": dataclasses.replace(corpus.cfg.data.sources["text"], weight=0.5),
            },
        ),
        r"sources\.speech": with_data(
            corpus.cfg,
            sources={
                **corpus.cfg.data.sources,
                "speech": dataclasses.replace(corpus.cfg.data.sources["speech"], path=str(corpus.held)),
            },
        ),
        "seed": dataclasses.replace(corpus.cfg, run=dataclasses.replace(corpus.cfg.run, seed=8)),
    }
    for name, cfg in changes.items():
        meta = {"config": json.loads(to_json(cfg)), "data_fingerprint": saved}
        with pytest.raises(CheckpointError, match=f"the data changed: {name} was"):
            check_same_run(meta, cfg, open_loader(corpus, cfg=cfg).fingerprint, "run")
    same = {"config": json.loads(to_json(corpus.cfg)), "data_fingerprint": saved}
    check_same_run(same, corpus.cfg, open_loader(corpus).fingerprint, "run")
    with pytest.raises(DataError, match="data position"):
        open_loader(corpus).restore({"step": 1})
    with pytest.raises(DataError, match="data position"):
        open_loader(corpus).restore({"step": 1, "block": 3, "block_row": 900})


def test_shards_of_another_tokenizer_or_codebook_are_refused_by_name(corpus: SimpleNamespace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    other = write_set(tmp_path / "other", [random_record(rng, "a", 50, 0)], 1, tokenizer="bbbb")
    index_shards(other, corpus.tokenizer)
    both = {**corpus.cfg.data.sources, "zother": SourceConfig(str(other), 1.0, ALL_LAYOUTS)}
    with pytest.raises(DataError, match=r"'zother' .*tokenizer bbbb, those of source 'speech' of aaaa"):
        open_loader(corpus, cfg=with_data(corpus.cfg, sources=both))
    held = {"held": SourceConfig(str(other), 1.0, ALL_LAYOUTS)}
    with pytest.raises(DataError, match=r"'held' .*tokenizer bbbb, those of source 'speech' of aaaa"):
        open_loader(corpus, cfg=with_data(corpus.cfg, validation=held))
    assert open_loader(corpus).fingerprint["audio_tokenizer"] == "aaaa000011112222"
    small = [Record(id="a", codes_MR=random_codes(rng, 40, (64,) * 8), text="x")]
    foreign = write_set(tmp_path / "foreign", small, 1, sizes=(64,) * 8)
    index_shards(foreign, corpus.tokenizer)
    source = {"foreign": SourceConfig(str(foreign), 1.0, ALL_LAYOUTS)}
    with pytest.raises(DataError, match=r"'foreign' .*begin with \[1024, 1024, 128.*got \[64"):
        open_loader(corpus, cfg=with_data(corpus.cfg, sources=source))


def test_a_source_that_can_fill_none_of_its_layouts_is_refused_by_name(corpus: SimpleNamespace, tmp_path: Path) -> None:
    bare = write_set(tmp_path / "bare", [random_record(np.random.default_rng(0), f"r{i}", 50, 3) for i in range(4)], 1)
    index_shards(bare, corpus.tokenizer)
    asks = {"bare": SourceConfig(str(bare), 1.0, LayoutWeights(asr=1, interleaved=1))}
    with pytest.raises(DataError, match=r"'bare' .*none of its 4 records .*\(interleaved, asr\)"):
        open_loader(corpus, cfg=with_data(corpus.cfg, sources=asks))
    also = {"bare": SourceConfig(str(bare), 1.0, LayoutWeights(asr=1, continuation=0.01))}
    (rows,) = take(open_loader(corpus, cfg=with_data(corpus.cfg, sources=also)), 1)
    assert set(rows.task_ids_BL[rows.segment_ids_BL > 0].tolist()) == {TASKS.index("continuation")}
    with pytest.raises(DataError, match="sources: expected at least one"):
        open_loader(corpus, cfg=with_data(corpus.cfg, sources={}))


def test_a_text_tokenizer_that_is_not_the_models_is_refused(corpus: SimpleNamespace) -> None:
    wrong = dataclasses.replace(corpus.cfg, model=dataclasses.replace(corpus.cfg.model, empty_id=7))
    with pytest.raises(DataError, match=r"<\|empty\|>: expected id 7"):
        open_loader(corpus, cfg=wrong)
    small = dataclasses.replace(corpus.cfg, model=dataclasses.replace(corpus.cfg.model, vocab_size=100))
    with pytest.raises(DataError, match="at most 100 ids"):
        open_loader(corpus, cfg=small)
    with pytest.raises(DataError, match="no lengths for text tokenizer"):
        lm_loader(
            dataclasses.replace(corpus.cfg, model=tiny_model(CHARS)), "train", CHARS, process_index=0, process_count=1
        )


def test_a_shard_that_is_damaged_while_training_is_named(corpus: SimpleNamespace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = write_set(tmp_path / "set", [random_record(rng, f"r{i}") for i in range(30)], 1)
    index_shards(folder, corpus.tokenizer)
    cfg = with_data(corpus.cfg, sources={"set": SourceConfig(str(folder), 1.0, ALL_LAYOUTS)})
    loader = open_loader(corpus, cfg=cfg)
    shard = folder / ShardSet(folder).info.shards[0].file
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match=shard.name):
        next(loader)
    loader.close()


@pytest.mark.parametrize("layout", TASKS[:CONVERSATION])
def test_show_renders_each_layout_with_tokens_patches_and_weights(corpus: SimpleNamespace, layout: str) -> None:
    text = show_rows(corpus.cfg, "train", 2, layout, corpus.tokenizer)
    assert text.count("row ") == 2 and f"({layout})" in text
    assert {t for t in TASKS if f"({t})" in text} == {layout}
    assert "<|endoftext|>" in text and "[text 1]" in text
    assert ("speech  patches" in text and "text 0.01, audio 1" in text) == (layout != "text")


def test_show_renders_the_row_that_the_model_reads() -> None:
    record = Record(id="x", codes_MR=random_codes(np.random.default_rng(0), 8), text="hi")
    layouts = Layouts(CHARS, 4, 8, 64, 64)
    (piece,) = layouts.plan(ASR, record_entry(record, CHARS, 25.0), 0)
    row = assemble_row([layouts.fill(ASR, piece, record)], 20, 4, tiny_model(CHARS), 0.01)
    lines = render_row(row, CHARS).splitlines()
    c = record.codes_MR[0]
    assert lines[0] == "14/20 positions, 2/4 patches, 1 documents"
    assert lines[1] == "  document 1 (asr): positions 0..13, 14 long, 2 patches"
    assert lines[2].split() == ["0..0", "text", "[", "ids", "191", "[text", "0]"]
    assert "I|n|t|]|:|<|sosp|>   ids 173 210 216 193 158 4   [text 1]" in lines[3]
    assert (
        f"speech  patches 0..1 (8 RVQ frames), first frame: {c[0]} {c[1]} {c[2]} {c[3]} ...   [text 0.01, audio 1]"
        in lines[4]
    )
    assert "<|eosp|>|\\n|h|i|<|endoftext|>" in lines[5]
    assert lines[6] == "  padding: 6 positions"


def test_show_names_a_layout_that_no_source_can_make(corpus: SimpleNamespace) -> None:
    only = {"text": corpus.cfg.data.sources["text"]}
    with pytest.raises(DataError, match=r"'text' .*\(asr\)"):
        show_rows(with_data(corpus.cfg, sources=only), "train", 1, "asr", corpus.tokenizer)
    with pytest.raises(DataError, match="layout: expected one of text, continuation"):
        show_rows(corpus.cfg, "train", 1, "dialogue", corpus.tokenizer)
