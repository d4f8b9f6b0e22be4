"""Rows of the audio tokenizer: clips, crops and text where they belong; broken audio counted; exact resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_pipeline.builders import CharTokenizer, write_wavs

from mimo_jax import presets
from mimo_jax.audio.files import load_audio
from mimo_jax.audio.packing import num_codes, pack_clips
from mimo_jax.config import AudioDataConfig, ConfigError, RunConfig, TokenizerTrainConfig
from mimo_jax.data.records import DataError
from mimo_jax.data.tokenizer_rows import tokenizer_loader
from mimo_jax.rows import TokenizerRows

CHARS = CharTokenizer()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wavs(tmp_path_factory.mktemp("wavs"), 20)  # 0.3, 0.6, 0.9 s


def job(manifest: Path, validation: Path | None = None, **changes: Any) -> TokenizerTrainConfig:
    a2t = dataclasses.replace(presets.a2t_decoder("tiny"), vocab_size=CHARS.vocab_size)
    data = {"rows": 6, "row_codes": 64, "row_text": 48, "max_seconds": 0.7, "block_documents": 16} | changes
    data = {
        "manifest": str(manifest),
        "validation": str(validation or manifest),
        "text_tokenizer": "characters",
        **data,
    }
    return TokenizerTrainConfig(
        model=presets.audio_tokenizer("tiny"),
        a2t=a2t,
        data=AudioDataConfig(**data),
        run=RunConfig(steps=5),
        learning_rate=1e-3,
    )


def open_loader(cfg: TokenizerTrainConfig, split: str = "train", index: int = 0, count: int = 1, **options: Any):
    return tokenizer_loader(cfg, split, CHARS, process_index=index, process_count=count, **options)


def same(a: TokenizerRows, b: TokenizerRows) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_rows_hold_whole_clips_with_their_text_and_crops_without(manifest: Path) -> None:
    cfg = job(manifest)
    loader = open_loader(cfg)
    whole = {f"clip number {i}": load_audio(manifest.parent / f"{i:03d}.wav") for i in range(20) if i % 3 < 2}
    longer = [load_audio(manifest.parent / f"{i:03d}.wav") for i in range(20) if i % 3 == 2]
    texts, starts = set(), set()
    for rows in itertools.islice(loader, 6):
        assert (
            rows.wav_BS.shape == (6, 64 * 960)
            and rows.segment_ids_BT.shape == (6, 256)
            and rows.text_BU.shape == (6, 48)
        )
        assert [str(a.dtype) for a in rows] == ["float32", "int32", "int32", "int32", "int32", "int32", "float32"]
        for b in range(6):
            ids_T, ids_U = rows.segment_ids_BT[b], rows.text_segment_ids_BU[b]
            for segment in np.unique(ids_T[ids_T > 0]).tolist():
                first = int(np.flatnonzero(ids_T == segment)[0])
                frames = int((ids_T == segment).sum())
                here = ids_U == segment
                assert first % 4 == 0 and here.sum() == rows.text_weights_BU[b][here].sum()
                if not here.any():  # a crop of 0.7 s
                    clip = rows.wav_BS[b, first * 240 + 480 :][: int(0.7 * 24_000)]
                    assert frames == 71
                    matches = [
                        s
                        for w in longer
                        for s in range(len(w) - len(clip) + 1)
                        if w[s] == clip[0] and np.array_equal(w[s : s + len(clip)], clip)
                    ]
                    assert len(matches) == 1
                    starts.add(matches[0])
                    continue
                text = CHARS.decode(rows.text_BU[b][here].tolist())
                inputs, targets = rows.text_BU[b][here], rows.text_targets_BU[b][here]
                assert inputs[0] == 1 and targets[-1] == 1 and np.array_equal(inputs[1:], targets[:-1])
                alone, ids = pack_clips([whole[text]], cfg.model)
                np.testing.assert_array_equal(rows.wav_BS[b, first * 240 :][: alone.shape[1]], alone[0])
                assert frames == int((ids > 0).sum())
                codes = num_codes(len(whole[text]), cfg.model)
                assert rows.text_positions_BU[b][here].tolist() == list(range(codes, codes + len(inputs)))
                texts.add(text)
            assert not rows.text_weights_BU[b][ids_U == 0].any()
    loader.close()
    assert texts == set(whole) and len(starts) > 5, "crops begin at drawn places"


def test_the_stream_resumes_and_is_shared_by_processes(manifest: Path) -> None:
    cfg = job(manifest)
    whole = list(itertools.islice(open_loader(cfg), 8))
    loader = open_loader(cfg)
    next(loader)
    next(loader)
    state = json.loads(json.dumps(loader.state()))
    again = open_loader(cfg)
    again.restore(state)
    assert all(same(a, b) for a, b in zip(whole[2:], again, strict=False))
    for count in (2, 3):
        parts = [open_loader(cfg, index=i, count=count) for i in range(count)]
        for batch in whole[:3]:
            got = [next(p) for p in parts]
            assert same(batch, TokenizerRows(*(np.concatenate(c) for c in zip(*got, strict=True))))
    other = open_loader(job(manifest, max_seconds=0.8))
    assert other.fingerprint != loader.fingerprint, "training refuses to go on with other crops"


def test_validation_is_one_pass_that_can_be_repeated(manifest: Path) -> None:
    loader = open_loader(job(manifest), "validation")
    first = list(loader)
    assert all(same(a, b) for a, b in zip(first, loader, strict=True))
    clips = sum(int(r.segment_ids_BT.max(axis=1).sum()) for r in first)
    assert clips == 20


def test_texts_that_do_not_fit_are_left_out_and_their_clips_kept(manifest: Path) -> None:
    loader = open_loader(job(manifest, row_text=5), "validation")
    rows = list(loader)
    assert sum(int(r.segment_ids_BT.max(axis=1).sum()) for r in rows) == 20
    assert not any(r.text_weights_BU.any() for r in rows)


def test_audio_that_breaks_while_training_leaves_its_slot_empty_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_wavs(tmp_path, 6)
    cfg = job(manifest)
    loader = open_loader(cfg, "validation", max_broken=0.34)
    (tmp_path / "001.wav").write_bytes(b"")
    whole = (tmp_path / "003.wav").read_bytes()
    (tmp_path / "003.wav").write_bytes(whole[: len(whole) // 2])
    rows = list(loader)
    present = {
        s
        for r in rows
        for b in range(6)
        for s in zip([b] * 99, np.unique(r.segment_ids_BT[b]).tolist(), strict=False)
        if s[1]
    }
    assert len(present) == 4
    assert capsys.readouterr().err.count("data: left out:") == 2
    list(loader)
    assert not capsys.readouterr().err, "a file is reported once"
    for i in (0, 2):
        (tmp_path / f"{i:03d}.wav").unlink()
    with pytest.raises(DataError, match=r"3 recordings cannot be used .*more than 2 allowed"):
        list(loader)


def test_a_recording_that_is_not_as_long_as_the_manifest_says_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_wavs(tmp_path, 2)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0]["duration"], lines[1]["duration"] = 0.3, 0.4  # the second is 0.6 s
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (rows,) = open_loader(job(manifest), "validation")
    assert int((rows.segment_ids_BT.max(axis=1) > 0).sum()) == 1
    assert "001.wav: truncated or changed: expected 0.40 s, got 0.60 s" in capsys.readouterr().err


def test_broken_files_without_a_duration_are_found_before_training(tmp_path: Path) -> None:
    manifest = write_wavs(tmp_path, 3)
    (tmp_path / "000.wav").unlink()
    assert sum(int(r.segment_ids_BT.max(axis=1).sum()) for r in open_loader(job(manifest), "validation")) == 2
    (tmp_path / "001.wav").write_bytes(b"")
    with pytest.raises(DataError, match="2 recordings cannot be used"):
        open_loader(job(manifest))


def test_rows_too_short_for_the_longest_clip_are_refused(manifest: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.row_codes: expected at least 252"):
        open_loader(job(manifest, max_seconds=10.0))
