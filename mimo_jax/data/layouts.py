"""Layouts: how a record becomes a document of the language model (`spec`, table "Token layouts", pre-training).

    text           text EOT
    continuation   `<Spe>:` S(a) EOT
    interleaved    `[Int]:` spans of text and S(a), alternating, EOT
    asr            `[Int]:` S(a) `\\n` text EOT
    tts            `[Int]:` text `\\n` Stream(text, a) EOT
    caption        `[Int]:` S(a) `\\n` caption EOT
    instruct_tts   `[Int]:` text `(` instruction `)\\n` Stream(text, a) EOT

    S(a)            = `<|sosp|>` patches `<|eosp|>`
    Stream(text, a) = `<|sostm|>`, then 5 text tokens and 5 patches in turn, `<|eot|>` after the last text token; what
                      is left of the longer follows alone; `<|eostm|>`
    EOT             = `<|endoftext|>`

Every quoted piece is tokenised on its own and codes are padded to whole patches by repeating the last frame, so the
length of a document follows from the lengths index alone. A document is first planned as spans (which tokens, which
patches) from an IndexEntry and only then filled from the record; planning and filling cannot disagree on lengths.

A document longer than a row is cut between two tokens or patches. The next piece begins with the prefix again, and
inside S(a) or Stream also with `<|sosp|>` or `<|sostm|>`.

L row length in positions, C patch budget of a row, G frames of a patch, R channels of the model, M RVQ frames.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mimo_jax.config import LayoutWeights
from mimo_jax.data.hashing import hash_ints
from mimo_jax.data.records import DataError, Record, segment_pieces
from mimo_jax.data.shards import IndexEntry, LengthIndex

TASKS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(LayoutWeights))
TEXT, CONTINUATION, INTERLEAVED, ASR, TTS, CAPTION, INSTRUCT_TTS, CONVERSATION = range(8)  # and the formats after it
CONVERSATION_FORMATS = tuple(name.removeprefix("sft_") for name in TASKS[CONVERSATION:])

PREFIX_MIXED, PREFIX_SPEECH, NEWLINE, OPEN_INSTRUCTION, CLOSE_INSTRUCTION = "[Int]:", "<Spe>:", "\n", "(", ")\n"
STREAM_GROUP = 5  # text tokens, and patches, of one turn of a stream
TEXT_WORDS, SPEECH_WORDS = (10, 30), (5, 15)  # shortest and longest span of an interleaved document, in words


class Span(NamedTuple):
    """A run of tokens or patches of a planned document."""

    # `ids` for given ids, `speech` for frames of the record, else the text that the tokens come from.
    kind: Literal["ids", "speech", "text", "caption", "instruction", "segments"]
    # The ids; or (first, last) frame for speech and (first, last) segment for segments, exclusive.
    source: tuple[int, ...]
    start: int  # first token or patch of the source that belongs to the run
    stop: int  # the one after the last
    target: bool = True  # whether its positions are predicted
    glued: bool = False  # never the beginning of a piece (a closing token: it stays with what it closes)
    context: tuple[Span, ...] = ()  # spans with which a piece begins that is cut inside or before this span


Piece = tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class TextSpan:
    """A run of text tokens of a document: int32 ids."""

    ids: np.ndarray
    target: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class SpeechSpan:
    """A run of patches of a document: uint16 [patches, G, R]."""

    patches_NGR: np.ndarray
    target: bool

    def __len__(self) -> int:
        return len(self.patches_NGR)


@dataclass(frozen=True, eq=False)
class Document:
    """What stands in a row as one segment: spans in order, and the layout (index into `TASKS`) it was made by."""

    task: int
    spans: tuple[TextSpan | SpeechSpan, ...]

    @property
    def num_positions(self) -> int:
        return sum(map(len, self.spans))

    @property
    def num_patches(self) -> int:
        return sum(len(s) for s in self.spans if isinstance(s, SpeechSpan))


def piece_lengths(piece: Piece) -> tuple[int, int]:
    """(positions, patches) of a planned piece."""
    patches = sum(s.stop - s.start for s in piece if s.kind == "speech")
    return sum(s.stop - s.start for s in piece), patches


class Layouts:
    """Plans and fills documents for one text tokenizer, model and row size.

    Args:
        num_channels: RVQ channels R that the model reads; deeper levels of a record are left out.
        row_length: positions L of a row, the longest piece.
        row_patches: patch budget C of a row, the most patches of a piece.
        target_conditioning: whether what conditions a document (before the transcript of asr and caption, before the
            stream of tts and instruct_tts) is predicted too.

    Raises:
        DataError: a row is too short to hold any cut document.
    """

    def __init__(
        self,
        tokenizer: Any,
        group_size: int,
        num_channels: int,
        row_length: int,
        row_patches: int,
        target_conditioning: bool = True,
    ):
        self._tokenizer, self._group, self._channels = tokenizer, group_size, num_channels
        self.row_length, self.row_patches = row_length, row_patches
        self._target_conditioning = target_conditioning
        special = tokenizer.special
        self._eot = (special["<|endoftext|>"],)
        self._sosp, self._eosp = (special["<|sosp|>"],), (special["<|eosp|>"],)
        self._sostm, self._eostm = (special["<|sostm|>"],), (special["<|eostm|>"],)
        self._end_of_stream_text = (special["<|eot|>"],)
        self._mixed, self._speech, self._newline, self._open, self._close = (
            tuple(tokenizer.encode(t))
            for t in (PREFIX_MIXED, PREFIX_SPEECH, NEWLINE, OPEN_INSTRUCTION, CLOSE_INSTRUCTION)
        )
        shortest = max(len(self._mixed), len(self._speech)) + 8
        if row_length < shortest:
            needed = f"at least {shortest} positions (prefix, opening and closing tokens)"
            raise DataError(f"data.row_length: expected {needed}, got {row_length}")

    # Lengths ----------------------------------------------------------------------------------------------

    def eligible(self, index: LengthIndex) -> np.ndarray:
        """Which records can take which layout: bool [N, tasks]. Without a patch budget, only those without speech.

        A conversation takes its own format, if it fits a row: it is never cut.
        """
        text, speech = index.text > 0, (index.frames > 0) & (self.row_patches > 0)
        segments = np.diff(index.segment_offsets)
        tokens = np.concatenate([[0], np.cumsum(index.segment_tokens, dtype=np.int64)])[index.segment_offsets]
        timed = speech & (segments >= 2) & (np.diff(tokens) > 0)
        columns = {
            TEXT: text,
            CONTINUATION: speech,
            INTERLEAVED: timed,
            ASR: speech & text,
            TTS: speech & text,
            CAPTION: speech & (index.caption > 0),
            INSTRUCT_TTS: speech & text & (index.instruction > 0),
        }
        pretraining = np.stack([columns[i] for i in range(CONVERSATION)], axis=1) & (index.conversation == 0)[:, None]
        lengths = self.whole_lengths(CONVERSATION, index, np.arange(len(index.frames)))
        fits = (lengths <= (self.row_length, self.row_patches)).all(axis=1)
        formats = index.conversation[:, None] == np.arange(1, len(CONVERSATION_FORMATS) + 1)
        return np.concatenate([pretraining, formats & fits[:, None]], axis=1)

    def whole_lengths(self, task: int, index: LengthIndex, records: np.ndarray) -> np.ndarray:
        """Lengths of uncut documents: int64 [n, 2] (positions, patches). Any layout but `interleaved`."""
        lengths = (index.text, index.caption, index.instruction)
        text, caption, instruction = (np.asarray(a[records], np.int64) for a in lengths)
        if task >= CONVERSATION:
            each = -(-(index.segment_ends.astype(np.int64) - index.segment_starts) // self._group)
            before = np.concatenate([[0], np.cumsum(each)])[index.segment_offsets]
            patches = np.diff(before)[records]
            return np.stack([text + patches, patches], axis=1)
        patches = -(-np.asarray(index.frames[records], np.int64) // self._group)
        mixed, newline = len(self._mixed), len(self._newline)
        stream = text + patches + 3  # begin, end, end of text
        if task == TEXT:
            return np.stack([text + 1, np.zeros_like(text)], axis=1)
        positions = {
            CONTINUATION: lambda: len(self._speech) + patches + 3,
            ASR: lambda: mixed + patches + 2 + newline + text + 1,
            TTS: lambda: mixed + text + newline + stream + 1,
            CAPTION: lambda: mixed + patches + 2 + newline + caption + 1,
            INSTRUCT_TTS: lambda: mixed + text + len(self._open) + instruction + len(self._close) + stream + 1,
        }[task]()
        return np.stack([positions, patches], axis=1)

    def document_lengths(self, task: int, entry: IndexEntry, key: int) -> list[tuple[int, int]]:
        """(positions, patches) of every piece that a record becomes, without reading the record.

        Args:
            task: layout, an index into `TASKS`.
            key: random key of the document, from which an interleaved one draws its spans.
        """
        return [piece_lengths(piece) for piece in self.plan(task, entry, key)]

    # Planning ---------------------------------------------------------------------------------------------

    def plan(self, task: int, entry: IndexEntry, key: int) -> list[Piece]:
        """The pieces of a document, each at most L positions and C patches long. Arguments as `document_lengths`."""
        return self._cut(self._spans(task, entry, key))

    def _spans(self, task: int, entry: IndexEntry, key: int) -> list[Span]:
        given = self._target_conditioning  # whether conditioning spans are targets
        end = Span("ids", self._eot, 0, 1, glued=True)
        if task == TEXT:
            return [Span("text", (), 0, entry.text), end]
        if task == CONTINUATION:
            prefix = self._ids(self._speech)
            return [prefix, *self._enclosed(prefix, 0, entry.frames, True), end]
        if task == INTERLEAVED:
            prefix = self._ids(self._mixed)
            spans = [prefix]
            for speech, first, last in self._interleave(entry, key):
                if speech:
                    spans += self._enclosed(prefix, entry.segment_starts[first], entry.segment_ends[last - 1], True)
                else:
                    tokens = sum(entry.segment_tokens[first:last])
                    spans.append(Span("segments", (first, last), 0, tokens, context=(prefix,)))
            return [*spans, end]
        prefix = self._ids(self._mixed, target=given)
        follow = (prefix,)
        if task in (ASR, CAPTION):
            length = entry.text if task == ASR else entry.caption
            answer = Span("text" if task == ASR else "caption", (), 0, length, context=follow)
            newline = self._ids(self._newline, target=given, context=follow)
            return [prefix, *self._enclosed(prefix, 0, entry.frames, given), newline, answer, end]
        question = [prefix, Span("text", (), 0, entry.text, target=given, context=follow)]
        if task == INSTRUCT_TTS:
            instruction = Span("instruction", (), 0, entry.instruction, target=given, context=follow)
            question += [
                self._ids(self._open, target=given, context=follow),
                instruction,
                self._ids(self._close, target=given, context=follow),
            ]
        else:
            question.append(self._ids(self._newline, target=given, context=follow))
        return [*question, *self._stream(prefix, entry), end]

    def _ids(self, ids: tuple[int, ...], target: bool = True, context: tuple[Span, ...] = ()) -> Span:
        return Span("ids", ids, 0, len(ids), target, context=context)

    def _num_patches(self, frames: int) -> int:
        return -(-frames // self._group)

    def _enclosed(self, prefix: Span, first: int, last: int, target: bool) -> list[Span]:
        """S(a) of frames first..last."""
        begin = Span("ids", self._sosp, 0, 1, target, context=(prefix,))
        context = (prefix, begin._replace(context=()))
        speech = Span("speech", (first, last), 0, self._num_patches(last - first), target, context=context)
        return [begin, speech, Span("ids", self._eosp, 0, 1, target, glued=True)]

    def _stream(self, prefix: Span, entry: IndexEntry) -> list[Span]:
        """Stream(text, a)."""
        begin = Span("ids", self._sostm, 0, 1, context=(prefix,))
        context = (prefix, begin._replace(context=()))
        spans, text, patch, patches = [begin], 0, 0, self._num_patches(entry.frames)
        while text < entry.text or patch < patches:
            if text < entry.text:
                stop = min(text + STREAM_GROUP, entry.text)
                spans.append(Span("text", (), text, stop, context=context))
                text = stop
                if text == entry.text:
                    spans.append(Span("ids", self._end_of_stream_text, 0, 1, glued=True))
            if patch < patches:
                stop = min(patch + STREAM_GROUP, patches)
                spans.append(Span("speech", (0, entry.frames), patch, stop, context=context))
                patch = stop
        return [*spans, Span("ids", self._eostm, 0, 1, glued=True)]

    def _interleave(self, entry: IndexEntry, key: int) -> list[tuple[bool, int, int]]:
        """Draws the spans of an interleaved document: (is speech, first segment, segment after the last).

        A span takes whole segments until it has the drawn number of words, one fewer where that would exceed the
        longest span. A record that a single span would swallow is cut in the middle, so that both modalities occur.
        """
        words = [0, *itertools.accumulate(entry.segment_words)]
        count = len(entry.segment_words)
        speech = bool(hash_ints(key, 0) & 1)
        spans: list[tuple[bool, int, int]] = []
        first = 0
        while first < count:
            low, high = SPEECH_WORDS if speech else TEXT_WORDS
            wanted = low + hash_ints(key, len(spans) + 1) % (high - low + 1)
            last = min(max(bisect.bisect_left(words, words[first] + wanted), first + 1), count)
            if words[last] - words[first] > high and last - first > 1:
                last -= 1
            if first == 0 and last == count:
                last = min(max(bisect.bisect_left(words, words[count] / 2), 1), count - 1)
            audible = entry.segment_ends[last - 1] > entry.segment_starts[first]
            spans.append((speech and audible, first, last))
            first, speech = last, not speech
        return spans

    def _cut(self, spans: Sequence[Span]) -> list[Piece]:
        """Cuts a document into pieces that fit a row."""
        spans = [s for s in spans if s.stop > s.start]
        pieces: list[Piece] = []
        piece: list[Span] = []
        positions = patches = 0
        # Closing tokens that must find room behind the last token or patch of a span.
        closing = [
            sum(1 for _ in itertools.takewhile(lambda s: s.glued, spans[i + 1 :])) if not s.glued else 0
            for i, s in enumerate(spans)
        ]
        for span, reserve in zip(spans, closing, strict=True):
            start = span.start
            while start < span.stop:
                left = span.stop - start
                room = self.row_length - positions
                if span.kind == "speech":
                    room = min(room, self.row_patches - patches)
                if left <= room and left + reserve <= self.row_length - positions:
                    take = left
                else:
                    take = min(room, left - 1 if reserve else left)
                if take > 0:
                    piece.append(span._replace(start=start, stop=start + take))
                    start += take
                    positions += take
                    patches += take if span.kind == "speech" else 0
                if start < span.stop:
                    pieces.append(tuple(piece))
                    piece = list(span.context)
                    positions, patches = sum(s.stop - s.start for s in piece), 0
        return [*pieces, tuple(piece)]

    # Filling ----------------------------------------------------------------------------------------------

    def fill(self, task: int, piece: Piece, record: Record) -> Document:
        """Turns a planned piece into a document by tokenising the record's texts and slicing its codes.

        Raises:
            DataError: the record is not the one that was planned with.
        """
        speech: dict[tuple[int, ...], np.ndarray] = {}
        texts: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        spans: list[TextSpan | SpeechSpan] = []
        for span in piece:
            if span.kind == "speech":
                if span.source not in speech:
                    speech[span.source] = self.patches(record.codes_MR, *span.source)
                spans.append(SpeechSpan(speech[span.source][span.start : span.stop], span.target))
                continue
            if span.kind == "ids":
                ids: Sequence[int] = span.source
            else:
                name = (span.kind, span.source)
                if name not in texts:
                    texts[name] = self._tokens(span, record)
                ids = texts[name]
            if span.stop > len(ids):
                raise DataError(
                    f"record {record.id!r}: {span.kind}: expected at least {span.stop} tokens, got {len(ids)}: "
                    "the lengths index is not of this record"
                )
            spans.append(TextSpan(np.asarray(ids[span.start : span.stop], np.int32), span.target))
        return Document(task, tuple(spans))

    def conversation(self, task: int, record: Record) -> Document:
        """The document of a conversation, whole. Raises DataError: the record is none."""
        from mimo_jax.data import conversations  # which needs what is above

        return Document(task, conversations.render(record, self._tokenizer, self._group, self._channels))

    def patches(self, codes_MR: np.ndarray, first: int, last: int) -> np.ndarray:
        """Patches of frames first..last: uint16 [patches, G, R], the last frame repeated to fill the last patch."""
        codes = codes_MR[first:last, : self._channels]
        missing = -len(codes) % self._group
        if missing:
            codes = np.concatenate([codes, np.repeat(codes[-1:], missing, axis=0)])
        return codes.reshape(-1, self._group, self._channels)

    def _tokens(self, span: Span, record: Record) -> list[int]:
        if span.kind == "segments":
            first, last = span.source
            return [i for piece in segment_pieces(record)[first:last] if piece for i in self._tokenizer.encode(piece)]
        return self._tokenizer.encode(getattr(record, span.kind))
