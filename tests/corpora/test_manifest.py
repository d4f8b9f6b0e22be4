"""Joining manifests: the new file points at the same recordings, and nothing is lost or taken twice."""

from __future__ import annotations

import json

import pytest

from mimo_jax.corpora.manifest import CorpusError, join_manifests
from mimo_jax.data.manifest import Manifest, ManifestError


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return path


def test_joined_paths_lead_to_the_same_recordings(tmp_path):
    a = write(tmp_path / "a/train.jsonl", {"audio": "wav/1.wav", "duration": 2.0, "mine": [1]})
    b = write(tmp_path / "b/c/train.jsonl", {"audio": "../1.wav", "text": "да"}, {"audio": "/far/2.wav", "duration": 1})
    out = tmp_path / "new" / "all.jsonl"
    assert join_manifests([a, b], out) == (3, 3.0)
    assert [json.loads(line)["audio"] for line in out.read_text().splitlines()] == [
        "../a/wav/1.wav", "../b/1.wav", "/far/2.wav",
    ]  # fmt: skip
    before = [e.audio.resolve() for m in (a, b) for e in Manifest(m)]
    assert [e.audio.resolve() for e in Manifest(out)] == before
    assert json.loads(out.read_text().splitlines()[0])["mine"] == [1] and "да" in out.read_text()


def test_a_recording_in_two_manifests_is_an_error_that_names_it(tmp_path):
    a, b = write(tmp_path / "a.jsonl", {"audio": "x/1.wav"}), write(tmp_path / "x/b.jsonl", {"audio": "1.wav"})
    with pytest.raises(CorpusError, match=r"b.jsonl:1: .*x/1.wav is in .*a.jsonl already"):
        join_manifests([a, b], tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_no_source_is_overwritten_and_a_broken_one_is_named(tmp_path):
    a = write(tmp_path / "a.jsonl", {"audio": "1.wav"})
    with pytest.raises(CorpusError, match="expected a new file"):
        join_manifests([a], tmp_path / "." / "a.jsonl")
    with pytest.raises(ManifestError, match=r"b.jsonl:1: audio: expected"):
        join_manifests([a, write(tmp_path / "b.jsonl", {"text": "no audio"})], tmp_path / "c.jsonl")
