"""One record of a shard set: the RVQ codes of a clip, or a text document, and what is known about it.

Records are stored as `tf.train.Example` messages with the feature names and types that tensorflow-datasets expects
(`features`), so a shard set opens with TFDS alone. They are read and written here with the message class itself, which
is several times faster than going through the TFDS feature connectors; a test holds both sides equal.

M RVQ frames, R RVQ levels.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class DataError(ValueError):
    """Data on disk is not what it has to be. The message names the file, the field and what was expected."""


@dataclass(frozen=True)
class Segment:
    """A word or phrase of a transcript and when it is spoken, in seconds from the start of the clip."""

    start: float
    end: float
    text: str


@dataclass(frozen=True, eq=False)
class Record:
    """A clip of speech or a text document. Strings that are not known are empty."""

    id: str  # name of the record, unique in its shard set
    # uint16 [frames, levels]; no frames for a text document.
    codes_MR: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.uint16))
    text: str = ""  # transcript of the clip, or the document
    language: str = ""  # language tag as the manifest gives it
    speaker: str = ""  # speaker name as the manifest gives it
    caption: str = ""  # description of what is heard
    instruction: str = ""  # description of the speaking style
    segments: tuple[Segment, ...] = ()  # timed pieces of the transcript, in order
    duration: float = 0.0  # seconds
    conversation: str = ""  # JSON of a conversation (`data.conversations`), whose recordings the codes are


_IMPORTING = threading.Lock()
_TEXTS = ("id", "text", "language", "speaker", "caption", "instruction")


def features(num_levels: int, conversations: bool = False) -> Any:
    """TFDS features of a shard set with `num_levels` RVQ levels (0 for text; stored as one column of no rows)."""
    import tensorflow_datasets as tfds

    packed = tfds.features.Encoding.BYTES
    times = functools.partial(tfds.features.Tensor, shape=(None,), dtype=np.float32, encoding=packed)
    return tfds.features.FeaturesDict(
        {
            **{name: tfds.features.Text() for name in (*_TEXTS, *(["conversation"] if conversations else []))},
            "codes": tfds.features.Tensor(shape=(None, max(num_levels, 1)), dtype=np.uint16, encoding=packed),
            "duration": np.float32,
            "segments": {"start": times(), "end": times(), "text": tfds.features.Sequence(tfds.features.Text())},
        }
    )


@functools.cache
def _example() -> Any:
    """The message class. TFDS imports lazily and not safely from several threads at once, as loaders have."""
    with _IMPORTING:
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2.Example


def encode_record(record: Record) -> bytes:
    """Serialises a record (little-endian arrays). Raises DataError: the codes are not uint16 [frames, levels]."""
    codes = record.codes_MR
    if codes.dtype != np.uint16 or codes.ndim != 2:
        got = f"{codes.dtype} {list(codes.shape)}"
        raise DataError(f"record {record.id!r}: codes: expected uint16 [frames, levels], got {got}")
    example = _example()()
    feature = example.features.feature
    for name in _TEXTS:
        feature[name].bytes_list.value.append(getattr(record, name).encode())
    if record.conversation:
        feature["conversation"].bytes_list.value.append(record.conversation.encode())
    feature["codes"].bytes_list.value.append(codes.astype("<u2").tobytes())
    feature["duration"].float_list.value.append(record.duration)
    starts = np.asarray([s.start for s in record.segments], "<f4")
    ends = np.asarray([s.end for s in record.segments], "<f4")
    feature["segments/start"].bytes_list.value.append(starts.tobytes())
    feature["segments/end"].bytes_list.value.append(ends.tobytes())
    feature["segments/text"].bytes_list.value.extend(s.text.encode() for s in record.segments)
    return example.SerializeToString(deterministic=True)


def decode_record(data: bytes, num_levels: int, where: str = "record") -> Record:
    """Reads what `encode_record` wrote.

    Args:
        num_levels: RVQ levels of the shard set (0 for text).

    Raises:
        DataError: a feature is missing or has the wrong size.
    """
    feature = _example().FromString(data).features.feature
    try:
        texts = {name: feature[name].bytes_list.value[0].decode() for name in _TEXTS}
        codes = np.frombuffer(feature["codes"].bytes_list.value[0], "<u2").astype(np.uint16, copy=False)
        starts = np.frombuffer(feature["segments/start"].bytes_list.value[0], "<f4")
        ends = np.frombuffer(feature["segments/end"].bytes_list.value[0], "<f4")
        pieces = [t.decode() for t in feature["segments/text"].bytes_list.value]
        return Record(
            **texts,
            codes_MR=codes.reshape(-1, max(num_levels, 1)),
            segments=tuple(Segment(*s) for s in zip(starts.tolist(), ends.tolist(), pieces, strict=True)),
            duration=feature["duration"].float_list.value[0],
            conversation=b"".join(feature["conversation"].bytes_list.value).decode(),
        )
    except (IndexError, ValueError) as error:
        raise DataError(f"{where}: not a record with {num_levels} RVQ levels ({error})") from None


# ----------------------------------------------------------------------------------------------------------
# What the layouts need to know about segments. Functions of the record alone: the lengths index and the reader agree.

# Scripts that are written without spaces: each character counts as a word and none is put between pieces.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_SEGMENT_MARGIN = 0.5  # seconds of audio kept around a span that no neighbouring segment claims


def count_words(text: str) -> int:
    """Words of a text: runs without white space; in scripts written without spaces, characters."""
    return sum(1 for _ in _WORD.finditer(text))


def segment_pieces(record: Record) -> list[str]:
    """Text of each segment with what separates it from the one before, so that the pieces join to running text.

    Where the segments are found in the transcript in order, the pieces are cut from the transcript (spacing and
    punctuation between two segments go to the later one, what follows the last segment to the last). Otherwise a space
    is put between two segments unless either side of the border is a script without spaces.
    """
    texts = [s.text.strip() for s in record.segments]
    spans, position = [], 0
    for text in texts:
        found = record.text.find(text, position)
        if found < 0:
            break
        position = found + len(text)
        spans.append(position)
    if texts and len(spans) == len(texts) and record.text:
        # Text that belongs to no segment must not be attributed to one: only spacing and punctuation may lie between.
        starts = [0, *spans[:-1]]
        gaps = [record.text[a : b - len(t)] for a, b, t in zip(starts, spans, texts, strict=True)]
        gaps.append(record.text[spans[-1] :])
        if not any(c.isalnum() for gap in gaps for c in gap):
            cuts = [0, *spans[:-1], len(record.text)]
            return [record.text[a:b] for a, b in itertools.pairwise(cuts)]
    pieces = []
    for i, text in enumerate(texts):
        joined = (
            i == 0
            or not text
            or not texts[i - 1]
            or re.match(rf"[{_UNSPACED}]", text)
            or re.search(rf"[{_UNSPACED}]$", texts[i - 1])
        )
        pieces.append(text if joined else " " + text)
    return pieces


def segment_frames(record: Record, frame_rate: float) -> tuple[list[int], list[int]]:
    """First and last (exclusive) RVQ frame of each segment: the border between two lies in the middle of their gap.

    A segment never takes more than 0.5 s that lies outside its own times, and frames never overlap.
    """
    frames, segments = len(record.codes_MR), record.segments
    starts: list[int] = []
    ends: list[int] = []
    for i, segment in enumerate(segments):
        before = (segments[i - 1].end + segment.start) / 2 if i else 0.0
        after = (segment.end + segments[i + 1].start) / 2 if i + 1 < len(segments) else np.inf
        start = round(max(before, segment.start - _SEGMENT_MARGIN, 0.0) * frame_rate)
        end = round(min(after, segment.end + _SEGMENT_MARGIN, frames / frame_rate) * frame_rate)
        start = min(max(start, ends[-1] if ends else 0), frames)
        starts.append(start)
        ends.append(min(max(end, start), frames))
    return starts, ends
