"""Linear probes: labels meet the right frames, the features are what they say, and comparisons pair what they claim."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest

from mimo_jax import cli, presets
from mimo_jax.audio.files import save_wav
from mimo_jax.data.records import Segment
from mimo_jax.evals import probes
from mimo_jax.evals.intervals import Interval
from mimo_jax.evals.probes import (
    Clip,
    ProbeError,
    ProbeResult,
    Settings,
    Side,
    compare,
    example_features,
    frame_centres,
    labels_at,
    one_hot,
    part_frames,
    phone_side,
    run_probes,
    word_side,
)

CONFIG = presets.audio_tokenizer("tiny")
CONFIG = dataclasses.replace(CONFIG, rvq=dataclasses.replace(CONFIG.rvq, codebook_sizes=(8, 16, 16)))
SECONDS = 2.0
FRAMES = 51  # RVQ frames of 2 s: 201 mel frames


class WaveCodec:
    """A codec whose first code is the level of the wave at the frame's beginning, of 8 steps; the others are noise."""

    config = CONFIG
    fingerprint = "wave"

    def encode(self, wavs: Sequence[np.ndarray], num_levels: int | None = None) -> list[np.ndarray]:
        made = []
        for wav in wavs:
            num = -(-(len(wav) // 240 + 1) // 4)
            codes_MR = np.random.default_rng(int(1e6 * np.abs(wav).sum())).integers(0, 16, (num, 3))
            codes_MR[:, 0] = np.round(np.pad(wav, (0, 960), mode="edge")[: num * 960 : 960] * 10)
            made.append(codes_MR[:, :num_levels].astype(np.uint16))
        return made

    def dequantize(self, codes_MR: np.ndarray) -> np.ndarray:
        return np.eye(8, dtype=np.float32)[codes_MR[:, 0] % 8]


def corpus(folder, num: int, seed: int, shuffle: bool = False):
    """Clips whose phone is the level of the wave, held for 2 to 6 frames; a manifest and its phones (or words)."""
    generator = np.random.default_rng(seed)
    manifest, phones = [], []
    for i in range(num):
        ids_M = np.repeat(generator.integers(0, 6, FRAMES), generator.integers(2, 7, FRAMES))[:FRAMES]
        ids_M[-1] = ids_M[-2]  # of which the wave has no sample
        wav = np.repeat(ids_M, 960)[: int(SECONDS * 24_000)] / 10
        save_wav(folder / f"{seed}-{i}.wav", wav.astype(np.float32), 24_000)
        said = generator.permutation(ids_M) if shuffle else ids_M
        edges = np.flatnonzero(np.diff(said)) + 1
        starts, ends = [0, *edges], [*edges, FRAMES]
        segments = [
            {"start": round(0.04 * a, 4), "end": round(0.04 * b, 4), "text": "pau" if said[a] == 0 else f"p{said[a]}"}
            for a, b in zip(starts, ends, strict=True)
        ]
        manifest.append({"audio": f"{seed}-{i}.wav"})
        phones.append({"audio": f"{seed}-{i}.wav", "segments": segments})
    for name, lines in (("manifest", manifest), ("phones", phones)):
        (folder / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / f"manifest-{seed}.jsonl", folder / f"phones-{seed}.jsonl"


# ----------------------------------------------------------------------------------------------------------
# Labels and features


def test_a_frame_has_the_label_at_the_middle_of_its_mel_frames():
    centres_M = frame_centres(4, CONFIG)
    np.testing.assert_allclose(centres_M, [0.015, 0.055, 0.095, 0.135])  # (0 + 10 + 20 + 30) / 4 ms, then every 40
    segments = [Segment(0.0, 0.055, "a"), Segment(0.055, 0.09, "b"), Segment(0.1, 1.0, "c")]
    assert labels_at(segments, centres_M) == ["a", "b", "", "c"]  # a start belongs to the segment, an end does not
    assert labels_at([Segment(0.02, 0.06, "late")], centres_M) == ["", "late", "", ""]


def test_parts_of_a_word_are_equal_in_time_and_never_empty():
    centres_M = frame_centres(20, CONFIG)
    parts = part_frames(Segment(0.0, 0.36, "word"), 3, centres_M)
    assert [list(p) for p in parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    short = part_frames(Segment(0.05, 0.074, "a"), 3, centres_M)
    assert [list(p) for p in short] == [[1], [1], [1]]
    beyond = part_frames(Segment(5.0, 5.1, "late"), 2, centres_M)
    assert [list(p) for p in beyond] == [[19], [19]]


def test_features_of_a_frame_are_its_codes_and_its_neighbours_in_columns_of_their_own():
    codes_MR = np.array([[0, 1], [2, 0], [1, 1]], np.uint16)
    base = one_hot(codes_MR, (3, 2))
    np.testing.assert_array_equal(base.toarray(), [[1, 0, 0, 0, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]])
    clip, centres_M = Clip(CONFIG, ()), frame_centres(3, CONFIG)
    x = example_features(base, clip, centres_M, Settings("phones", context=1), [0, 2]).toarray()
    zero = np.zeros(5)
    np.testing.assert_array_equal(x, [[*zero, *base.toarray()[0], *base.toarray()[1]],
                                      [*base.toarray()[1], *base.toarray()[2], *zero]])  # fmt: skip
    dense = example_features(base.toarray(), clip, centres_M, Settings("phones", context=1), [0, 2])
    np.testing.assert_array_equal(dense, x)


def test_features_of_a_word_are_means_over_its_parts():
    base = one_hot(np.array([[0], [1], [1], [2]], np.uint16), (3,))
    clip = Clip(CONFIG, (Segment(0.0, 0.04, "x"), Segment(0.0, 0.16, "y")))
    x = example_features(base, clip, frame_centres(4, CONFIG), Settings("words", parts=2), [1])
    np.testing.assert_allclose(x.toarray(), [[0.5, 0.5, 0, 0, 0.5, 0.5]])


# ----------------------------------------------------------------------------------------------------------
# Whole probes


@pytest.mark.parametrize("features", ["codes", "vectors"])
def test_phones_that_the_first_code_tells_are_told(tmp_path, features):
    train, test = corpus(tmp_path, 12, 0), corpus(tmp_path, 4, 1)
    settings = Settings("phones", features, levels=2, context=0)
    report = run_probes(settings, phone_side(*train), phone_side(*test), ["run"], [], lambda run: WaveCodec())
    assert report.classes == ("p1", "p2", "p3", "p4", "p5")  # silence is left out
    assert report.results["run"].accuracy.value > 0.99 and report.majority.value < 0.5
    assert report.left_out == 0 and report.examples[1] == report.results["run"].count_N.sum()
    kept = phone_side(*train, keep_silence=True), phone_side(*test, keep_silence=True)
    report = run_probes(settings, *kept, ["run"], [], lambda run: WaveCodec())
    assert "pau" in report.classes and report.examples[1] == 4 * FRAMES


def test_shuffled_labels_are_told_no_better_than_by_chance(tmp_path):
    train, test = corpus(tmp_path, 12, 0, shuffle=True), corpus(tmp_path, 4, 1, shuffle=True)
    sides = phone_side(*train), phone_side(*test)
    report = run_probes(Settings("phones", levels=2), *sides, ["run"], [], lambda run: WaveCodec())
    assert report.results["run"].accuracy.value < report.majority.value + 0.12


def test_words_are_told_and_the_report_is_whole(tmp_path):
    (_, train), (_, test) = corpus(tmp_path, 12, 0), corpus(tmp_path, 4, 1)
    report = run_probes(Settings("words", levels=1), word_side(train), word_side(test), ["a", "b"], ["a", "c"],
                        lambda run: WaveCodec())  # fmt: skip
    assert report.results["a"].accuracy.value > 0.95 and report.classes == ("p1", "p2", "p3", "p4", "p5", "pau")
    assert report.comparison is not None and report.comparison.mean == Interval(0.0, 0.0, 0.0)
    record = json.loads(json.dumps(report.to_json()))
    assert set(record["runs"]) == {"a", "b", "c"} and len(record["comparison"]["pairs"]) == 2
    assert sum(record["runs"]["a"]["correct"]) <= sum(record["test"]["count"]) == record["test"]["examples"]
    assert "mean difference" in str(report) and "majority class" in str(report)


def test_the_test_side_chooses_nothing(tmp_path):
    train, test, other = (phone_side(*corpus(tmp_path, n, seed)) for n, seed in ((12, 0), (4, 1), (4, 2)))
    first, second = (
        run_probes(Settings("phones", levels=2), train, side, ["run"], [], lambda run: WaveCodec()).results["run"]
        for side in (test, other)
    )
    assert first.tried == second.tried and first.penalty == second.penalty
    assert first.train_accuracy == second.train_accuracy


# ----------------------------------------------------------------------------------------------------------
# Comparison


def result(correct_N, count_N) -> ProbeResult:
    correct_N, count_N = np.asarray(correct_N, np.float64), np.asarray(count_N, np.float64)
    return ProbeResult(correct_N, count_N, Interval(0, 0, 0), 0.0, 1.0, {}, 1, True, 0.0)


def test_runs_pair_in_order_and_on_the_same_clips():
    generator = np.random.default_rng(0)
    hard_N = generator.integers(10, 60, 40)  # clips differ much more than runs do
    first = [result(hard_N + 8 + seed, np.full(40, 100)) for seed in range(3)]
    second = [result(hard_N + 3 + seed, np.full(40, 100)) for seed in range(3)]
    found = compare(first, second)
    assert [round(pair.value, 6) for pair in found.pairs] == [0.05] * 3
    assert found.mean.low == pytest.approx(0.05) and found.mean.high == pytest.approx(0.05)
    crossed = compare(first, second[::-1])
    assert [round(pair.value, 6) for pair in crossed.pairs] == [0.03, 0.05, 0.07]
    assert crossed.mean.value == pytest.approx(0.05) and crossed.mean.low < 0.04
    assert crossed.student is not None and crossed.student.low == pytest.approx(
        0.05 - 4.3027 * 0.02 / np.sqrt(3), abs=1e-4
    )
    assert compare(first[:1], second[:1]).student is None


def test_interval_of_the_mean_covers_as_often_as_it_says_over_clips_and_seeds():
    generator, covered = np.random.default_rng(0), 0
    for trial in range(20):
        by_run = generator.normal(0.0, 1.0, 6)
        gains = [result(5 + g + generator.normal(0, 3, 50), np.ones(50)) for g in by_run]
        found = compare(gains, [result(np.zeros(50), np.ones(50))] * 6, seed=trial)
        covered += found.mean.low <= 5.0 <= found.mean.high
    assert 16 <= covered <= 20


def test_other_examples_or_numbers_of_runs_do_not_compare():
    with pytest.raises(ValueError, match="as many runs on both sides, got 2 and 1"):
        compare([result([1], [2])] * 2, [result([1], [2])])
    with pytest.raises(ValueError, match="same examples"):
        compare([result([1], [2])], [result([1], [3])])


# ----------------------------------------------------------------------------------------------------------
# Errors


def test_files_that_do_not_fit_are_named(tmp_path):
    (manifest, phones), (other, other_phones) = corpus(tmp_path, 6, 0), corpus(tmp_path, 2, 1)
    with pytest.raises(ProbeError, match=r"phones-1.jsonl: expected phones of recordings in .*manifest-0.jsonl"):
        phone_side(manifest, other_phones)
    with pytest.raises(ProbeError, match=r"manifest-0.jsonl: expected clips with `segments`"):
        word_side(manifest)
    train, test = phone_side(manifest, phones), phone_side(other, other_phones)
    run = dict(runs=["run"], against=[], load=lambda run: WaveCodec())
    with pytest.raises(ProbeError, match=r"manifest-0.jsonl: expected no recording of"):
        run_probes(Settings("phones"), train, train, **run)
    with pytest.raises(ProbeError, match=r"run: expected --levels of 1..3, got 4"):
        run_probes(Settings("phones", levels=4), train, test, **run)
    strange = tuple(dataclasses.replace(c, segments=(Segment(0, 1, "?"),)) for c in test.clips)
    with pytest.raises(ProbeError, match=r"manifest-1.jsonl: expected some of the labels p1, p2, p3"):
        run_probes(Settings("phones", levels=2), train, Side(test.manifest, strange), **run)
    rare = Side(train.manifest, (Clip(train.clips[0].audio, (Segment(0.0, 0.1, "x"),)),))
    with pytest.raises(ProbeError, match=r"manifest-0.jsonl: expected two labels that occur 5 times, got 0"):
        run_probes(Settings("phones", levels=2), rare, test, **run)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    (manifest, _), (other, _) = corpus(tmp_path, 2, 0), corpus(tmp_path, 2, 1)
    sides = ["--train", str(manifest), "--test", str(other), "--audio-tokenizer", str(tmp_path / "run")]

    def error_of(*words: str) -> str:
        assert cli.main(["eval", "probe", *words]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "--phones: expected the file of phone labels" in error_of("phones", *sides)
    missing = str(tmp_path / "none.jsonl")
    assert "none.jsonl: cannot read the manifest" in error_of("phones", *sides, "--phones", missing)
    assert "--against: expected as many runs as --audio-tokenizer (1), got 2" in error_of(
        "words", *sides, "--against", "a", "b"
    )
    assert "expected clips with `segments`" in error_of("words", *sides)


def test_intervals_are_described_where_they_are_printed():
    assert "paired bootstrap over test clips" in probes.INTERVALS and "degrees of freedom" in probes.INTERVALS
