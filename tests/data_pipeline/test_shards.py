"""Records, shard sets and their lengths: TFDS opens them, and damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.builders import CharTokenizer, random_codes, random_record, write_set

from mimo_jax.data.records import (
    DataError,
    Record,
    Segment,
    count_words,
    decode_record,
    encode_record,
    features,
    segment_frames,
    segment_pieces,
)
from mimo_jax.data.shards import MANIFEST, ShardSet, index_path, index_shards, load_index, record_entry, write_shard


def equal(a: Record, b: Record) -> bool:
    same = (a.id, a.text, a.language, a.speaker, a.caption, a.instruction) == (
        b.id, b.text, b.language, b.speaker, b.caption, b.instruction
    )  # fmt: skip
    times = [(s.text, np.float32(s.start), np.float32(s.end)) for s in a.segments]
    same = same and times == [(s.text, s.start, s.end) for s in b.segments]
    return same and bool(np.array_equal(a.codes_MR, b.codes_MR)) and np.float32(a.duration) == b.duration


@pytest.fixture(scope="module")
def records() -> list[Record]:
    rng = np.random.default_rng(0)
    some = [random_record(rng, f"r{i}") for i in range(40)]
    return [
        *some,
        Record(id="größe", codes_MR=random_codes(rng, 3), text="naïve 漢字", segments=(Segment(0, 0.1, "漢字"),)),
    ]


@pytest.fixture
def shards(tmp_path: Path, records: list[Record]) -> Path:
    return write_set(tmp_path / "set", records)


def test_records_come_back_as_they_were_written(shards: Path, records: list[Record]) -> None:
    opened = ShardSet(shards, verify=True)
    assert len(opened) == 41
    assert all(equal(a, b) for a, b in zip(records, opened, strict=True))
    order = [40, 3, 17, 3, 0]
    assert [r.id for r in opened.read(order)] == [records[i].id for i in order]
    assert opened[2].codes_MR.dtype == np.uint16


def test_tfds_reads_the_bytes_and_writes_the_same_message(records: list[Record]) -> None:
    from tensorflow_datasets.proto import tf_example_pb2

    connector = features(20)
    for record in records[:5]:
        values = {
            k: getattr(record, k) for k in ("id", "text", "language", "speaker", "caption", "instruction", "duration")
        }
        times = {k: np.asarray([getattr(s, k) for s in record.segments], np.float32) for k in ("start", "end")}
        values |= {"codes": record.codes_MR, "segments": {**times, "text": [s.text for s in record.segments]}}
        theirs = tf_example_pb2.Example.FromString(connector.serialize_example(values))
        assert theirs == tf_example_pb2.Example.FromString(encode_record(record))


def test_a_shard_set_opens_with_tfds_and_without_tensorflow(shards: Path, tmp_path: Path) -> None:
    text = write_set(tmp_path / "text", [Record(id=f"t{i}", text=f"line {i}") for i in range(5)], shards=2)
    code = """
import sys, tensorflow_datasets as tfds
speech = tfds.builder_from_directory(sys.argv[1]).as_data_source()["train"]
last = speech[40]
print(len(speech), last["id"].decode(), last["text"].decode(), last["codes"].shape[1], last["codes"].dtype)
text = tfds.builder_from_directory(sys.argv[2]).as_data_source()["train"]
print(len(text), text[4]["text"].decode(), text[4]["codes"].shape)
print("tensorflow" in sys.modules)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(shards), str(text)], capture_output=True, text=True, check=True
    )
    assert out.stdout.split("\n")[:3] == ["41 größe naïve 漢字 20 uint16", "5 line 4 (0, 1)", "False"]


def test_an_empty_shard_is_part_of_a_set(tmp_path: Path, records: list[Record]) -> None:
    folder = write_set(tmp_path / "set", records[:3], shards=5)
    assert [s.records for s in ShardSet(folder).info.shards] == [1, 1, 1, 0, 0]
    assert [r.id for r in ShardSet(folder)] == ["r0", "r1", "r2"]


def first_shard(folder: Path) -> Path:
    return folder / ShardSet(folder).info.shards[0].file


def test_an_unfinished_set_is_refused(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    with pytest.raises(DataError, match="not finished"):
        ShardSet(shards)


def test_a_truncated_shard_is_refused_by_name(shards: Path) -> None:
    file = first_shard(shards)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{file.name}: expected .* bytes"):
        ShardSet(shards)


def test_a_missing_shard_is_refused_by_name(shards: Path) -> None:
    file = first_shard(shards)
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name}: this shard is missing"):
        ShardSet(shards)


def test_a_replaced_shard_is_found_by_its_checksum_and_when_read(shards: Path) -> None:
    file = first_shard(shards)
    file.write_bytes(bytes(len(file.read_bytes())))
    opened = ShardSet(shards)
    with pytest.raises(DataError, match="SHA-256"):
        ShardSet(shards, verify=True)
    with pytest.raises(DataError, match=file.name):
        opened[0]
    assert opened[40].id == "größe", "the other shards can still be read"


def test_a_flipped_byte_spoils_its_record_only(tmp_path: Path, records: list[Record]) -> None:
    folder = write_set(tmp_path / "set", records, shards=1)
    file = first_shard(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    opened, spoiled = ShardSet(folder), []
    for i, record in enumerate(records):
        try:
            read = opened[i]
        except DataError as error:
            spoiled.append(str(error))
        else:
            assert equal(record, read)
    assert len(spoiled) == 1 and file.name in spoiled[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "not the manifest"), ('{"format": 99}', "expected 1, got 99"), ("[]", "not the manifest")],
)
def test_a_manifest_of_another_kind_is_refused(shards: Path, text: str, expected: str) -> None:
    (shards / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=expected):
        ShardSet(shards)


def test_codes_of_a_wrong_type_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="uint16"):
        write_shard(tmp_path / "x", [Record(id="a", codes_MR=np.zeros((3, 8), np.int32))])
    assert not list(tmp_path.iterdir()), "nothing is left of a shard that failed"


def test_a_record_with_another_number_of_levels_is_refused() -> None:
    with pytest.raises(DataError, match="20 RVQ levels"):
        decode_record(encode_record(Record(id="a", codes_MR=np.zeros((3, 7), np.uint16))), 20)


def test_the_index_holds_the_lengths_of_every_record(shards: Path, records: list[Record]) -> None:
    tokenizer = CharTokenizer()
    built = index_shards(shards, tokenizer)
    loaded = load_index(ShardSet(shards), tokenizer)
    for name, array in built._asdict().items():
        np.testing.assert_array_equal(array, getattr(loaded, name))
        assert array.dtype == (np.int64 if name == "segment_offsets" else np.int32)
    for i, record in enumerate(ShardSet(shards)):
        assert loaded.entry(i) == record_entry(record, tokenizer, 25.0)
    assert loaded.entry(40).segment_words == [2]


def test_an_index_of_other_shards_or_tokenizers_is_refused(shards: Path, tmp_path: Path, records: list[Record]) -> None:
    tokenizer = CharTokenizer()
    with pytest.raises(DataError, match="mimo-jax data index"):
        load_index(ShardSet(shards), tokenizer)
    index_shards(shards, tokenizer)
    other = write_set(tmp_path / "other", records[:20])
    shutil.copy(index_path(shards, tokenizer), index_path(other, tokenizer))
    with pytest.raises(DataError, match="other shards"):
        load_index(ShardSet(other), tokenizer)
    assert len(index_shards(other, tokenizer).frames) == 20, "a wrong index is made anew"
    path = index_path(shards, tokenizer)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read"):
        load_index(ShardSet(shards), tokenizer)


def test_segment_pieces_join_to_the_transcript_where_they_can() -> None:
    def pieces(text: str, *segments: str) -> list[str]:
        return segment_pieces(
            Record(id="x", text=text, segments=tuple(Segment(i, i + 1, s) for i, s in enumerate(segments)))
        )

    assert pieces("Hello, big world!", "Hello", "big", "world") == ["Hello", ", big", " world!"]
    assert pieces("", "hello", "big", "world") == ["hello", " big", " world"]
    assert pieces("other words entirely", "hello", "world") == ["hello", " world"]
    assert pieces("Hello, very big world!", "Hello", "big", "world") == ["Hello", " big", " world"], "unspoken words"
    assert pieces("", "漢", "字") == ["漢", "字"]
    assert count_words("two words, 漢字") == 4


def test_segment_borders_lie_between_segments_and_never_overlap() -> None:
    segments = (Segment(0.4, 1.0, "a"), Segment(1.2, 2.0, "b"), Segment(1.9, 2.4, "c"), Segment(5.0, 6.0, "d"))
    starts, ends = segment_frames(Record(id="x", codes_MR=np.zeros((200, 1), np.uint16), segments=segments), 25.0)
    assert starts == [0, 28, 49, 112] and ends == [28, 49, 72, 162]
    short, last = segment_frames(Record(id="x", codes_MR=np.zeros((30, 1), np.uint16), segments=segments), 25.0)
    assert max(last) <= 30 and all(a <= b for a, b in zip(short, last, strict=True))


def test_the_manifest_is_plain_json_with_what_the_set_holds(shards: Path) -> None:
    values = json.loads((shards / MANIFEST).read_text())
    assert values["codebook_sizes"] == [1024, 1024, *[128] * 18]
    assert values["records"] == 41 and values["frame_rate"] == 25.0 and values["tokenizer"] == "aaaa000011112222"
    assert all(len(s["sha256"]) == 64 and s["records"] and s["bytes"] for s in values["shards"])
