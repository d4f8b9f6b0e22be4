"""Ingest: resumable, atomic, tolerant of broken files up to a limit, and clear about everything else."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.builders import CharTokenizer, HashCodec, write_wavs

from mimo_jax.data.ingest import ingest_audio, ingest_text
from mimo_jax.data.manifest import Manifest, ManifestError
from mimo_jax.data.records import DataError, Segment
from mimo_jax.data.shards import MANIFEST, ShardSet, load_index

TESTS = Path(__file__).resolve().parents[1]
RUN = """
import resource, sys
sys.path.insert(0, {tests!r})
from data_pipeline.builders import HashCodec
from mimo_jax.data.ingest import ingest_audio
from mimo_jax.data.records import DataError
{before}
try:
    ingest_audio({manifest!r}, HashCodec(delay={delay}), {out!r}, records_per_shard=4)
except DataError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def command(manifest: Path, out: Path, delay: float = 0.0, before: str = "") -> list[str]:
    code = RUN.format(tests=str(TESTS), manifest=str(manifest), out=str(out), delay=delay, before=before)
    return [sys.executable, "-c", code]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def wavs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wavs(tmp_path_factory.mktemp("wavs"), 22)


def test_ingest_writes_every_field_and_the_codes_of_every_clip(tmp_path: Path) -> None:
    from mimo_jax.audio.files import load_audio

    manifest = write_wavs(tmp_path, 3)
    line = {
        "audio": "000.wav", "id": "first", "text": " Good morning. ", "language": "en", "speaker": "anna",
        "caption": "a bird", "instruction": "cheerful",
        "segments": [{"start": 0, "end": 0.1, "text": "Good"}], "voice": "x",
    }  # fmt: skip
    manifest.write_text(json.dumps(line) + "\n\n" + json.dumps({"audio": str(tmp_path / "001.wav")}) + "\n")
    codec = HashCodec()
    shards = ingest_audio(manifest, codec, tmp_path / "out", progress=False)
    assert shards is not None
    first, second = shards
    assert (first.id, first.text, first.language, first.speaker) == ("first", "Good morning.", "en", "anna")
    assert (first.caption, first.instruction) == ("a bird", "cheerful")
    assert first.segments == (Segment(0.0, np.float32(0.1), "Good"),) and second.id == str(tmp_path / "001.wav")
    expected = codec.encode([load_audio(tmp_path / "000.wav"), load_audio(tmp_path / "001.wav")])
    np.testing.assert_array_equal(first.codes_MR, expected[0])
    np.testing.assert_array_equal(second.codes_MR, expected[1])
    info = shards.info
    assert info.tokenizer == codec.fingerprint and info.codebook_sizes == codec.config.rvq.codebook_sizes
    assert info.frame_rate == 25.0 and info.counts == {"text": 1, "caption": 1, "instruction": 1, "segments": 1}
    assert info.hours == pytest.approx((0.3 + 0.6) / 3600)


@pytest.mark.parametrize("kills", [1, 3])
def test_a_killed_ingest_that_is_started_again_gives_the_same_bytes(wavs: Path, tmp_path: Path, kills: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(wavs, whole), check=True, capture_output=True)
    rng = np.random.default_rng(kills)
    for kill in range(kills):
        process = subprocess.Popen(command(wavs, killed, delay=0.05), stderr=subprocess.DEVNULL)
        # Wait for a shard beyond those of the run before, so that every kill falls into writing.
        deadline = time.monotonic() + 30
        while len(list(killed.glob("*.array_record-*"))) <= kill and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the ingest finished before it was killed"
        assert not (killed / MANIFEST).exists()
        with pytest.raises(DataError, match="not finished"):
            ShardSet(killed)
    out = subprocess.run(command(wavs, killed), check=True, capture_output=True, text=True)
    assert contents(killed) == contents(whole)
    assert "22/22" in out.stderr and "skipped" in out.stderr and "ETA" in out.stderr


def test_finished_shards_are_not_made_again(wavs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"records_per_shard": 4, "progress": False}
    assert ingest_audio(wavs, HashCodec(), out, worker=(0, 2), **options) is None
    made = {p: p.stat().st_mtime_ns for p in out.glob("*.array_record-*")}
    assert len(made) == 3
    damaged = min(made)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    shards = ingest_audio(wavs, HashCodec(), out, **options)
    assert shards is not None and len(ShardSet(out, verify=True)) == 22
    again = {p for p, at in made.items() if p.stat().st_mtime_ns != at}
    assert again == {damaged}, "only the damaged shard is made again"


def test_workers_share_a_folder_and_the_last_one_commits(wavs: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    ingest_audio(wavs, HashCodec(), one, records_per_shard=4, progress=False)
    results = [
        ingest_audio(wavs, HashCodec(), many, records_per_shard=4, worker=(i, 3), progress=False) for i in (2, 0, 1)
    ]
    assert [r is None for r in results] == [True, True, False]
    assert contents(one) == contents(many)


def test_a_complete_set_is_left_alone_and_other_settings_are_refused(wavs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ingest_audio(wavs, HashCodec(), out, progress=False)
    before = contents(out)
    assert len(ingest_audio(wavs, HashCodec(), out, progress=False) or []) == 22
    with pytest.raises(DataError, match="tokenizer 'aaaa000011112222', now it is 'ffff'"):
        ingest_audio(wavs, HashCodec("ffff"), out, progress=False)
    with pytest.raises(DataError, match="records_per_shard 1024, now it is 7"):
        ingest_audio(wavs, HashCodec(), out, records_per_shard=7, progress=False)
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="other files"):
        ingest_audio(wavs, HashCodec(), tmp_path / "mine", progress=False)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"x"}


def spoil(folder: Path) -> None:
    """Five kinds of broken audio in a folder of `write_wavs`."""
    import soundfile

    whole = (folder / "001.wav").read_bytes()
    (folder / "001.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "003.wav").write_bytes(b"")
    (folder / "005.wav").unlink()
    soundfile.write(folder / "007.wav", np.zeros(100), 24_000)
    (folder / "009.wav").write_bytes(b"not audio at all, but long enough to be looked at" * 9)


def test_broken_files_are_counted_by_reason_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_wavs(tmp_path / "wavs", 22)
    spoil(tmp_path / "wavs")
    shards = ingest_audio(manifest, HashCodec(), tmp_path / "out", max_skipped=0.3, records_per_shard=4)
    assert shards is not None and len(shards) == 17
    assert shards.info.skipped == {
        "truncated": 1,
        "empty file": 1,
        "no such audio file": 1,
        "too short": 1,
        "unreadable": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [Path(s["name"]).name for s in listed] == ["001.wav", "003.wav", "005.wav", "007.wav", "009.wav"]
    assert capsys.readouterr().err.count("ingest: skipped:") == 5
    assert "001.wav" not in {r.id for r in shards}


def test_too_many_broken_files_end_the_ingest_and_a_larger_limit_goes_on(tmp_path: Path) -> None:
    manifest = write_wavs(tmp_path / "wavs", 22)
    spoil(tmp_path / "wavs")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"3 of 22 inputs cannot be used .*more than the 2 .*005\.wav"):
        ingest_audio(manifest, HashCodec(), out, max_skipped=0.1, records_per_shard=4, progress=False)
    kept = contents(out)
    assert any(name.startswith("speech-train") for name in kept) and not any(name.endswith(".tmp") for name in kept)
    shards = ingest_audio(manifest, HashCodec(), out, max_skipped=0.5, records_per_shard=4, progress=False)
    assert shards is not None and len(shards) == 17


def test_one_broken_file_is_never_fatal_alone_but_nothing_usable_is(tmp_path: Path) -> None:
    manifest = write_wavs(tmp_path / "wavs", 3)
    (tmp_path / "wavs" / "001.wav").unlink()
    shards = ingest_audio(manifest, HashCodec(), tmp_path / "out", max_skipped=0.0, progress=False)
    assert shards is not None and len(shards) == 2
    alone = write_wavs(tmp_path / "alone", 1)
    (tmp_path / "alone" / "000.wav").unlink()
    with pytest.raises(DataError, match="none of the 1 inputs"):
        ingest_audio(alone, HashCodec(), tmp_path / "none", progress=False)


def test_segments_beyond_the_audio_are_counted(tmp_path: Path) -> None:
    manifest = write_wavs(tmp_path / "wavs", 2)
    bad = {"audio": "000.wav", "segments": [{"start": 5.0, "end": 6.0, "text": "late"}]}
    manifest.write_text(manifest.read_text() + json.dumps(bad) + "\n")
    shards = ingest_audio(manifest, HashCodec(), tmp_path / "out", progress=False)
    assert shards is not None and shards.info.skipped == {"segments beyond the end": 1}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{broken", ":3: expected one JSON object"),
        ('["a.wav"]', ":3: expected a JSON object, got list"),
        ('{"text": "x"}', ":3: audio: expected the path"),
        ('{"audio": 5}', ":3: audio: expected a string"),
        ('{"audio": "a\\u0000.wav"}', ":3: audio: expected the path"),
        ('{"audio": "a.wav", "duration": ' + "9" * 400 + "}", ":3: duration: expected seconds"),
        ('{"audio": "a.wav", "duration": ' + "9" * 5000 + "}", ":3: expected one JSON object"),
        ("[" * 100_000, ":3: expected one JSON object"),
        ('{"audio": "a.wav", "text": ["x"]}', ":3: text: expected a string"),
        ('{"audio": "a.wav", "text": "\\ud800"}', ":3: text: expected text without"),
        ('{"audio": "a.wav", "duration": -1}', ":3: duration: expected seconds"),
        ('{"audio": "a.wav", "segments": {}}', None),
        ('{"audio": "a.wav", "segments": "x"}', ":3: segments: expected a list"),
        ('{"audio": "a.wav", "segments": [{"start": 1, "end": 0, "text": "x"}]}', r":3: segments\[0\].end: expected"),
        (
            '{"audio": "a.wav", "segments": [{"start": NaN, "end": 0, "text": "x"}]}',
            r":3: segments\[0\].start: expected",
        ),
        ('{"audio": "a.wav", "segments": [{"start": 0, "end": 1}]}', r":3: segments\[0\].text: expected a string"),
    ],
)
def test_a_wrong_manifest_line_is_named_before_any_work(
    wavs: Path, tmp_path: Path, line: str, expected: str | None
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join([json.dumps({"audio": str(wavs.parent / "000.wav")}), "", line]) + "\n")
    if expected is None:
        assert Manifest(manifest)[1].segments == ()
        return
    with pytest.raises(ManifestError, match=expected):
        ingest_audio(manifest, HashCodec(), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"threads": 0}, {"max_skipped": float("nan")}, {"max_skipped": -1.0}])
def test_an_impossible_setting_is_named(wavs: Path, tmp_path: Path, setting: dict[str, float]) -> None:
    with pytest.raises(DataError, match=f"^{next(iter(setting))}: expected"):
        ingest_audio(wavs, HashCodec(), tmp_path / "out", progress=False, **setting)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_missing_or_empty_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.jsonl: cannot read"):
        Manifest(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ManifestError, match="at least one line"):
        Manifest(tmp_path / "empty.jsonl")


def test_a_full_disk_ends_with_a_clear_error_and_damages_nothing(wavs: Path, tmp_path: Path) -> None:
    # No process may write a file beyond the limit, which fails in the writer as a full disk does.
    out = tmp_path / "out"
    assert ingest_audio(wavs, HashCodec(), out, records_per_shard=4, worker=(0, 3), progress=False) is None
    before = contents(out)
    full = command(wavs, out, before="resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))")
    done = subprocess.run(full, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write the shard (File too large)" in done.stderr
    after = contents(out)
    assert {k: after[k] for k in before} == before and not any(k.endswith(".tmp") for k in after)
    shards = ingest_audio(wavs, HashCodec(), out, records_per_shard=4, progress=False)
    assert shards is not None and len(ShardSet(out, verify=True)) == 22
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


def test_a_failing_disk_while_committing_leaves_an_unfinished_set(
    wavs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from mimo_jax import atomic

    def full(path: object, content: bytes) -> None:
        if str(path).endswith(MANIFEST):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)  # type: ignore[arg-type]

    real = atomic.atomic_write
    monkeypatch.setattr("mimo_jax.data.shards.atomic_write", full)
    with pytest.raises(DataError, match="No space left on device"):
        ingest_audio(wavs, HashCodec(), tmp_path / "out", progress=False)
    monkeypatch.undo()
    with pytest.raises(DataError, match="not finished"):
        ShardSet(tmp_path / "out")
    assert len(ingest_audio(wavs, HashCodec(), tmp_path / "out", progress=False) or []) == 22


def test_a_read_only_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders cannot be entered by another user
        folder = Path(name)
        manifest = write_wavs(folder, 1)
        out = folder / "out"
        out.mkdir(mode=0o555)
        folder.chmod(0o755)
        # Root may write anywhere, so it becomes somebody else first.
        before = "import os\nif os.geteuid() == 0: os.seteuid(65534)"
        done = subprocess.run(command(manifest, out, before=before), capture_output=True, text=True)
        assert done.returncode == 2 and f"{out}: cannot use this folder (Permission denied)" in done.stderr, done.stderr


def test_text_documents_by_line_paragraph_file_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"text": "vier", "language": "de", "id": "x"}\n{"text": "five"}\n')
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    expected = {"paragraph": ["one\ntwo", "three"], "line": ["one", "two", "three"], "file": ["one\ntwo\n\n\nthree"]}
    for split, texts in expected.items():
        shards = ingest_text(
            files, tmp_path / split, split=split, language="en", text_tokenizer=CharTokenizer(), progress=False
        )  # type: ignore[arg-type]
        assert shards is not None
        records = list(shards)
        assert [r.text for r in records] == [*texts, "vier", "five"]
        assert (records[0].id, records[-2].id, records[-1].id) == ("a.txt:1", "x", "b.jsonl:2")
        assert [r.language for r in records[-2:]] == ["de", "en"]
        assert load_index(shards, CharTokenizer()).text.tolist() == [len(t) for t in [*texts, "vier", "five"]]
        assert shards.info.kind == "text" and shards.info.tokenizer == ""


def test_text_that_is_not_utf8_is_counted_and_wrong_jsonl_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe\nbetter\n")
    shards = ingest_text([tmp_path / "a.txt"], tmp_path / "out", split="line", progress=False)
    assert shards is not None and [r.text for r in shards] == ["good", "better"]
    assert shards.info.skipped == {"not UTF-8": 1}
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"texts": "y"}\n')
    with pytest.raises(ManifestError, match=r"b\.jsonl:2: text: expected"):
        ingest_text([tmp_path / "b.jsonl"], tmp_path / "other", progress=False)
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(ManifestError, match=r"d\.jsonl:1: text: expected a string without lone surrogates"):
        ingest_text([tmp_path / "d.jsonl"], tmp_path / "other", progress=False)
    (tmp_path / "c.txt").write_text("\n\n")
    with pytest.raises(DataError, match="at least one document"):
        ingest_text([tmp_path / "c.txt"], tmp_path / "other", progress=False)
    with pytest.raises(DataError, match=r"gone\.txt: cannot read"):
        ingest_text([tmp_path / "gone.txt"], tmp_path / "other", progress=False)
