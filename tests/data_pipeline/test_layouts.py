"""The seven layouts to the token, and lengths that are exact without the record."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from data_pipeline.builders import CharTokenizer, random_codes, random_record, tiny_model

from mimo_jax.data.hashing import hash_ints
from mimo_jax.data.layouts import (
    ASR,
    CAPTION,
    CONTINUATION,
    CONVERSATION,
    INSTRUCT_TTS,
    INTERLEAVED,
    SPEECH_WORDS,
    TASKS,
    TEXT,
    TEXT_WORDS,
    TTS,
    Layouts,
    SpeechSpan,
    TextSpan,
    piece_lengths,
)
from mimo_jax.data.lm_rows import assemble_row
from mimo_jax.data.records import DataError, Record, Segment
from mimo_jax.data.shards import LengthIndex, record_entry

CHARS = CharTokenizer()
EOT, SOSP, EOSP, EMPTY, SOSTM, EOSTM, END_TEXT = (
    CHARS.special[t]
    for t in ("<|endoftext|>", "<|sosp|>", "<|eosp|>", "<|empty|>", "<|sostm|>", "<|eostm|>", "<|eot|>")
)
INT, SPE = CHARS.encode("[Int]:"), CHARS.encode("<Spe>:")


def clip(frames: int = 9, **fields: object) -> Record:
    return Record(id="clip", codes_MR=random_codes(np.random.default_rng(0), frames), **fields)  # type: ignore[arg-type]


def flat(record: Record, task: int, key: int = 0, length: int = 4096, **options: bool) -> list[int | str]:
    """Ids of a document in order, `p0`, `p1`, ... for its patches."""
    layouts = Layouts(CHARS, 4, 8, length, length, **options)
    (piece,) = layouts.plan(task, record_entry(record, CHARS, 25.0), key)
    out: list[int | str] = []
    patches = 0
    for span in layouts.fill(task, piece, record).spans:
        if isinstance(span, SpeechSpan):
            out += [f"p{patches + i}" for i in range(len(span.patches_NGR))]
            patches += len(span.patches_NGR)
        else:
            out += span.ids.tolist()
    return out


def index_of(records: list[Record], tokenizer: object = CHARS) -> LengthIndex:
    entries = [record_entry(r, tokenizer, 25.0) for r in records]
    segments = [np.concatenate([np.asarray(e[k], np.int32) for e in entries]).astype(np.int32) for k in range(5, 9)]
    offsets = np.cumsum([0, *(len(e.segment_tokens) for e in entries)])
    return LengthIndex(*(np.asarray([e[k] for e in entries], np.int32) for k in range(5)), offsets, *segments)


def test_text_layout_is_text_and_end_of_text() -> None:
    assert flat(Record(id="t", text="ab"), TEXT) == [197, 198, 1]


def test_continuation_layout_is_speech_prefix_and_enclosed_patches() -> None:
    assert SPE == [160, 183, 212, 201, 162, 158]
    assert flat(clip(), CONTINUATION) == [160, 183, 212, 201, 162, 158, 4, "p0", "p1", "p2", 5, 1]


def test_asr_layout_is_speech_newline_transcript() -> None:
    assert INT == [191, 173, 210, 216, 193, 158]
    assert flat(clip(text="hi"), ASR) == [191, 173, 210, 216, 193, 158, 4, "p0", "p1", "p2", 5, 110, 204, 205, 1]


def test_caption_layout_is_speech_newline_caption() -> None:
    assert flat(clip(text="no", caption="hm"), CAPTION) == [*INT, SOSP, "p0", "p1", "p2", EOSP, 110, 204, 209, EOT]


def test_tts_layout_streams_five_and_five_and_the_longer_goes_on_alone() -> None:
    text = CHARS.encode("abcdefg")
    longer_text = [*INT, *text, 110, SOSTM, *text[:5], "p0", "p1", "p2", *text[5:], END_TEXT, EOSTM, EOT]
    assert flat(clip(9, text="abcdefg"), TTS) == longer_text
    patches = [f"p{i}" for i in range(12)]
    longer_speech = [*INT, *text, 110, SOSTM, *text[:5], *patches[:5], *text[5:], END_TEXT, *patches[5:], EOSTM, EOT]
    assert flat(clip(48, text="abcdefg"), TTS) == longer_speech


def test_end_of_stream_text_is_appended_to_a_full_last_group() -> None:
    assert flat(clip(9, text="abcde"), TTS)[-12:] == [
        SOSTM,
        *CHARS.encode("abcde"),
        END_TEXT,
        "p0",
        "p1",
        "p2",
        EOSTM,
        EOT,
    ]


def test_instruct_tts_layout_puts_the_instruction_in_parentheses() -> None:
    got = flat(clip(text="hi", instruction="low"), INSTRUCT_TTS)
    ask = CHARS.encode("hi(low)\n")
    assert got == [*INT, *ask, SOSTM, *CHARS.encode("hi"), END_TEXT, "p0", "p1", "p2", EOSTM, EOT]


def test_interleaved_layout_alternates_and_covers_everything_once() -> None:
    words = [f"w{i}" for i in range(60)]
    segments = tuple(Segment(i * 0.4, i * 0.4 + 0.4, w) for i, w in enumerate(words))
    record = clip(600, text=" ".join(words), segments=segments)
    layouts, entry = Layouts(CHARS, 4, 8, 4096, 4096), record_entry(record, CHARS, 25.0)
    first_modalities = set()
    for key in range(40):
        (piece,) = layouts.plan(INTERLEAVED, entry, key)
        spans = [s for s in piece if s.kind in ("segments", "speech")]
        first_modalities.add(spans[0].kind)
        assert all(a.kind != b.kind for a, b in itertools.pairwise(spans)), "two spans of one modality in a row"
        frame = segment = 0
        for i, span in enumerate(spans):
            low, high = TEXT_WORDS if span.kind == "segments" else SPEECH_WORDS
            if span.kind == "speech":
                assert span.source[0] == frame and span.source[1] % 10 == 0
                count = (span.source[1] - span.source[0]) // 10
            else:
                assert span.source[0] == segment
                count = span.source[1] - span.source[0]
            segment, frame = segment + count, frame + 10 * count
            assert low <= count <= high or i == len(spans) - 1, "a span outside the drawn range"
        assert segment == 60
    assert first_modalities == {"segments", "speech"}


def test_interleaved_golden_ids() -> None:
    segments = (Segment(0.0, 0.2, "ab"), Segment(0.2, 0.4, "cd."))
    record = clip(10, text="Ab cd.", segments=segments)
    record = Record(id="x", codes_MR=record.codes_MR, text="ab cd.", segments=segments)
    texts_first, speech_first = (next(k for k in range(99) if (hash_ints(k, 0) & 1) == side) for side in (0, 1))
    assert flat(record, INTERLEAVED, texts_first) == [*INT, *CHARS.encode("ab"), SOSP, "p0", "p1", EOSP, EOT]
    assert flat(record, INTERLEAVED, speech_first) == [*INT, SOSP, "p0", "p1", EOSP, *CHARS.encode(" cd."), EOT]


def test_codes_are_padded_by_repeating_the_last_frame_and_deeper_levels_are_left_out() -> None:
    record = clip(6)
    patches = Layouts(CHARS, 4, 8, 64, 64).patches(record.codes_MR, 0, 6)
    assert patches.shape == (2, 4, 8) and patches.dtype == np.uint16
    np.testing.assert_array_equal(patches.reshape(8, 8)[:6], record.codes_MR[:, :8])
    np.testing.assert_array_equal(patches[1, 2], record.codes_MR[5, :8])
    np.testing.assert_array_equal(patches[1, 3], record.codes_MR[5, :8])


@pytest.mark.parametrize("limits", [(4096, 4096), (96, 96), (64, 20)])
def test_lengths_from_the_index_are_those_of_the_filled_documents(sentencepiece, limits) -> None:
    rng = np.random.default_rng(5)
    layouts = Layouts(sentencepiece, 4, 8, *limits)
    records = [random_record(rng, f"r{i}", frames=int(rng.integers(1, 300))) for i in range(60)]
    index = index_of(records, sentencepiece)
    eligible = layouts.eligible(index)
    assert (eligible[:, :CONVERSATION].sum(axis=0) > 5).all(), "the random records do not exercise every layout"
    for i, record in enumerate(records):
        for task in np.flatnonzero(eligible[i]).tolist():
            key = hash_ints(i, task)
            lengths = layouts.document_lengths(task, index.entry(i), key)
            pieces = layouts.plan(task, index.entry(i), key)
            documents = [layouts.fill(task, piece, record) for piece in pieces]
            assert [(d.num_positions, d.num_patches) for d in documents] == lengths
            assert all(n <= limits[0] and p <= limits[1] for n, p in lengths)
            if len(lengths) == 1 and task != INTERLEAVED:
                assert layouts.whole_lengths(task, index, np.asarray([i])).tolist() == [list(lengths[0])]
            elif task != INTERLEAVED:
                whole = layouts.whole_lengths(task, index, np.asarray([i]))[0]
                assert whole[0] > limits[0] or whole[1] > limits[1]


def test_a_long_document_is_cut_with_its_prefix_and_opening_repeated() -> None:
    layouts = Layouts(CHARS, 4, 8, 20, 20)
    record = clip(4 * 30)
    pieces = [
        layouts.fill(CONTINUATION, p, record) for p in layouts.plan(CONTINUATION, record_entry(record, CHARS, 25.0), 0)
    ]
    ids = [[i for s in d.spans if isinstance(s, TextSpan) for i in s.ids.tolist()] for d in pieces]
    assert ids == [[*SPE, SOSP], [*SPE, SOSP], [*SPE, SOSP, EOSP, EOT]]
    patches = np.concatenate([s.patches_NGR for d in pieces for s in d.spans if isinstance(s, SpeechSpan)])
    np.testing.assert_array_equal(patches, layouts.patches(record.codes_MR, 0, 120))
    assert [d.num_positions for d in pieces] == [20, 20, 13]


def test_a_cut_never_leaves_closing_tokens_alone_nor_loses_a_token() -> None:
    for frames in range(1, 200, 3):
        record = clip(frames, text="abcdefghijklmnopqrst" * (1 + frames % 3))
        layouts = Layouts(CHARS, 4, 8, 24, 9)
        entry = record_entry(record, CHARS, 25.0)
        for task in (TEXT, CONTINUATION, ASR, TTS):
            pieces = layouts.plan(task, entry, 0)
            speech = sum(s.stop - s.start for p in pieces for s in p if s.kind == "speech")
            text = sum(s.stop - s.start for p in pieces for s in p if s.kind == "text")
            assert speech == (0 if task == TEXT else -(-frames // 4))
            assert text == {TEXT: 1, CONTINUATION: 0, ASR: 1, TTS: 2}[task] * len(record.text)
            for piece in pieces:
                kinds = [s.kind for s in piece]
                assert any(k != "ids" for k in kinds), "a piece of nothing but markers"


def test_conditioning_is_a_target_only_when_asked() -> None:
    record = clip(9, text="hi", caption="hm", instruction="low")
    entry = record_entry(record, CHARS, 25.0)
    expected = {ASR: [2, 1], CAPTION: [2, 1], TTS: None, INSTRUCT_TTS: None}
    for task in expected:
        on, off = (Layouts(CHARS, 4, 8, 512, 512, target_conditioning=flag) for flag in (True, False))
        (piece,) = on.plan(task, entry, 0)
        assert all(s.target for s in piece)
        (piece,) = off.plan(task, entry, 0)
        document = off.fill(task, piece, record)
        model = tiny_model(CHARS)
        row = assemble_row([document], 64, 16, model, 0.01)
        used = int((row.segment_ids_BL > 0).sum())
        if expected[task]:
            assert row.text_weights_BL[: used - 3].sum() == 0 and row.audio_weights_BC.sum() == 0
            assert row.text_weights_BL[used - 3 : used].tolist() == [1, 1, 1]  # two tokens and end of text
        else:
            begin = int(np.flatnonzero(row.text_BL == SOSTM)[0])
            assert row.text_weights_BL[:begin].sum() == 0
            assert (row.text_weights_BL[begin:used] > 0).all() and row.audio_weights_BC.sum() == 3


def test_records_are_eligible_only_for_layouts_they_can_fill() -> None:
    records = [
        Record(id="text", text="x"),
        clip(9),
        clip(9, text="a b", segments=(Segment(0, 0.1, "a"), Segment(0.1, 0.3, "b"))),
        clip(9, text="x", caption="y", instruction="z"),
        clip(9, caption="y", instruction="z"),
    ]
    layouts = Layouts(CHARS, 4, 8, 64, 64)
    got = [{TASKS[t] for t in np.flatnonzero(row)} for row in layouts.eligible(index_of(records))]
    assert got == [
        {"text"},
        {"continuation"},
        {"text", "continuation", "interleaved", "asr", "tts"},
        {"text", "continuation", "asr", "tts", "caption", "instruct_tts"},
        {"continuation", "caption"},
    ]
    only_text = Layouts(CHARS, 4, 8, 64, 0).eligible(index_of(records))
    assert not only_text[:, 1:].any() and only_text[:, 0].sum() == 3


def test_a_record_that_is_not_the_indexed_one_is_refused() -> None:
    layouts = Layouts(CHARS, 4, 8, 64, 64)
    (piece,) = layouts.plan(TEXT, record_entry(Record(id="x", text="four"), CHARS, 25.0), 0)
    with pytest.raises(DataError, match="lengths index"):
        layouts.fill(TEXT, piece, Record(id="x", text="abc"))


def test_a_row_too_short_for_a_prefix_is_refused() -> None:
    with pytest.raises(DataError, match="row_length"):
        Layouts(CHARS, 4, 8, 10, 10)


def test_piece_lengths_count_patches_and_positions() -> None:
    record = clip(9, text="hi")
    layouts = Layouts(CHARS, 4, 8, 64, 64)
    (piece,) = layouts.plan(ASR, record_entry(record, CHARS, 25.0), 0)
    assert piece_lengths(piece) == (6 + 5 + 1 + 2 + 1, 3)
