"""Linear probes: how much of what is said can be read off the codes of a frozen audio tokenizer, by a linear map.

    mimo-jax eval probe phones --audio-tokenizer runs/tokenizer --train data/train.jsonl --test data/validation.jsonl \\
        --phones data/debian/phones.jsonl
    mimo-jax eval probe words --audio-tokenizer runs/a2t-{0,1,2} --against runs/plain-{0,1,2} \\
        --train data/words/train.jsonl --test data/words/held-out-voices.jsonl

N clips, E examples, M RVQ frames (25 Hz), R levels, F features, D width of a codebook entry, S pairs of runs, X draws.

**Phones**: an example is an RVQ frame, its class the phone at the centre of the frame. Frame m stands for the four mel
frames 4m .. 4m + 3, which are centred at samples 960 m + 0, 240, 480, 720; so its centre is 960 m + 360 samples, 40 m +
15 ms (between the centre of what the encoder's convolutions see, + 10 ms, and that of what the decoder makes of it,
+ 20 ms). Silence (`pau`) is left out unless asked for: it is common and easy.

**Words**: an example is a spoken word, its class the word. Its time is cut into equal parts, three by default; the
features are the means over the frames whose centre lies in each part (the nearest frame, where there is none), so the
order of sounds counts.

**Features**: `codes`: one-hot codes of the first levels, for phones also those of the neighbouring frames; a linear map
of them is a sum of learnt table rows, as a language model reads them. `vectors`: the sum of the codebook entries
instead, standardised on the training side.

Classes are the labels that occur at least `MIN_COUNT` times on the training side; other labels are left out on both
sides and counted. The strength of the penalty is chosen on every fifth clip of the training side; the test side is seen
once, at the end. Intervals are over the clips of the test side (and over runs, see `compare`); they do not hold the
variation of the training side.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse
import scipy.stats

from mimo_jax.audio.files import load_audio
from mimo_jax.config import AudioTokenizerConfig
from mimo_jax.data.manifest import Manifest
from mimo_jax.data.records import Segment
from mimo_jax.evals.intervals import LEVEL, Interval, bootstrap, mean_interval, resampling_weights
from mimo_jax.evals.softmax_regression import Features, fit_chosen
from mimo_jax.models.tokenizer.codec import Codec

SILENCE = "pau"
MIN_COUNT = 5  # examples of the training side that a class needs
_JUDGE_EVERY = 5  # every so manieth clip of the training side chooses the penalty

Task = Literal["phones", "words"]


class ProbeError(ValueError):
    """A probe cannot be made of these files. The message names the file and what was expected."""


@dataclass(frozen=True)
class Settings:
    """What is probed."""

    task: Task
    features: Literal["codes", "vectors"] = "codes"
    levels: int = 8  # the first so many, as the language model reads
    context: int = 1  # phones: neighbouring frames on each side
    parts: int = 3  # words: pieces of a word's time
    keep_silence: bool = False  # phones: silence is a class


@dataclass(frozen=True)
class Clip:
    """A recording and what is said when; a segment's text is a label."""

    audio: Path
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Side:
    """The labelled clips of a manifest."""

    manifest: Path
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Examples:
    """Features and classes of one side."""

    x_EF: Features
    y_E: np.ndarray  # class, int
    clip_E: np.ndarray  # index of the clip, int


@dataclass(frozen=True)
class ProbeResult:
    """A probe of one tokenizer on the test side."""

    correct_N: np.ndarray  # examples of each clip that were told right, float64
    count_N: np.ndarray  # examples of each clip, float64
    accuracy: Interval  # over examples; clips are drawn
    train_accuracy: float
    penalty: float
    tried: dict[float, float]  # penalty -> cross-entropy in nats on the judging part of the training side
    iterations: int  # of the last fit
    converged: bool
    seconds: float  # all fits


# ----------------------------------------------------------------------------------------------------------
# Labels


def phone_side(manifest: str | Path, phones: str | Path, keep_silence: bool = False) -> Side:
    """The clips of a manifest that a file of phones (`mimo-jax prepare debian` writes one) has labels for.

    Raises:
        ManifestError: one of the files is missing or wrong.
        ProbeError: none of the clips has labels.
    """
    labels = {
        _place(entry.audio): tuple(s for s in entry.segments if keep_silence or s.text != SILENCE)
        for entry in Manifest(phones)
    }
    found = [
        Clip(entry.audio, labels[_place(entry.audio)]) for entry in Manifest(manifest) if _place(entry.audio) in labels
    ]
    clips = tuple(clip for clip in found if clip.segments)
    if not clips:
        raise ProbeError(f"{phones}: expected phones of recordings in {manifest}, found none of them")
    return Side(Path(manifest), clips)


def word_side(manifest: str | Path) -> Side:
    """The clips of a manifest that have word times; words in lower case, without punctuation.

    Raises:
        ManifestError: the file is missing or wrong.
        ProbeError: no clip has `segments`.
    """
    clips = []
    for entry in Manifest(manifest):
        words = [dataclasses.replace(s, text=_word(s.text)) for s in entry.segments]
        kept = tuple(word for word in words if word.text and word.end > word.start)
        if kept:
            clips.append(Clip(entry.audio, kept))
    if not clips:
        raise ProbeError(f"{manifest}: expected clips with `segments`, the times of words; none has any")
    return Side(Path(manifest), tuple(clips))


def _place(audio: Path) -> Path:
    return audio.resolve()


def _word(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum() or c in "' -").strip("' -")


def choose_classes(labels: Sequence[Sequence[str]], manifest: str | Path) -> tuple[str, ...]:
    """The labels that are frequent enough to be classes, in alphabetical order; those of all examples of each clip.

    Raises:
        ProbeError: there are fewer than two.
    """
    counts = Counter(label for of_clip in labels for label in of_clip if label)
    classes = tuple(sorted(label for label, count in counts.items() if count >= MIN_COUNT))
    if len(classes) < 2:
        raise ProbeError(f"{manifest}: expected two labels that occur {MIN_COUNT} times, got {len(classes)}")
    return classes


def example_labels(clip: Clip, num_codes: int, config: AudioTokenizerConfig, task: Task) -> list[str]:
    """The label of each example of a clip: of its frames ("" for none), or of its words."""
    if task == "words":
        return [s.text for s in clip.segments]
    return labels_at(clip.segments, frame_centres(num_codes, config))


def frame_centres(num_codes: int, config: AudioTokenizerConfig) -> np.ndarray:
    """When RVQ frames are, in seconds, float64 [M]: the middle of the centres of their mel frames (see the module)."""
    hop, per_code = config.mel.hop_length, config.mel_frames_per_code
    return (np.arange(num_codes) * per_code + (per_code - 1) / 2) * hop / config.mel.sample_rate


def labels_at(segments: Sequence[Segment], times_M: np.ndarray) -> list[str]:
    """The label of the segment that each time lies in (start included, end not), "" where there is none."""
    starts = np.array([s.start for s in segments])
    found = np.searchsorted(starts, times_M, side="right") - 1
    return [segments[i].text if i >= 0 and t < segments[i].end else "" for i, t in zip(found, times_M, strict=True)]


def part_frames(segment: Segment, parts: int, centres_M: np.ndarray) -> list[np.ndarray]:
    """Frames of each of the equal parts of a segment: those centred in it, or else the nearest one; int [>= 1] each."""
    edges = np.linspace(segment.start, segment.end, parts + 1)
    found = []
    for start, end in itertools.pairwise(edges):
        inside = np.flatnonzero((centres_M >= start) & (centres_M < end))
        found.append(inside if len(inside) else np.array([np.argmin(np.abs(centres_M - (start + end) / 2))]))
    return found


# ----------------------------------------------------------------------------------------------------------
# Features


def one_hot(codes_MR: np.ndarray, sizes: Sequence[int]) -> scipy.sparse.csr_array:
    """One-hot codes of R levels side by side: float32 [M, F], F the sum of the sizes."""
    num, levels = codes_MR.shape
    columns_MR = codes_MR.astype(np.int64) + np.cumsum([0, *sizes[:-1]])
    ends = np.arange(num + 1) * levels
    ones = np.ones(columns_MR.size, np.float32)
    return scipy.sparse.csr_array((ones, columns_MR.ravel(), ends), shape=(num, int(np.sum(sizes))))


def example_features(
    base_MF: Features, clip: Clip, centres_M: np.ndarray, settings: Settings, examples: Sequence[int]
) -> Features:
    """Features of the chosen examples of a clip from those of its frames: of neighbours, or means over parts of words.

    Both are linear: what stands side by side is A @ base, A [examples, M] a choice of neighbours (none outside the
    clip: zeros) or a mean.
    """
    chosen, num = np.asarray(examples), len(centres_M)
    operators = []
    if settings.task == "phones":
        for k in range(-settings.context, settings.context + 1):
            operators.append(scipy.sparse.eye_array(num, k=k, format="csr", dtype=np.float32)[chosen])
    else:
        frames = [part_frames(clip.segments[i], settings.parts, centres_M) for i in chosen]
        for part in range(settings.parts):
            of_part = [f[part] for f in frames]
            ends = np.cumsum([0, *map(len, of_part)])
            means = np.concatenate([np.full(len(f), 1.0 / len(f), np.float32) for f in of_part])
            operators.append(scipy.sparse.csr_array((means, np.concatenate(of_part), ends), shape=(len(chosen), num)))
    if isinstance(base_MF, np.ndarray):
        return np.concatenate([a @ base_MF for a in operators], axis=1)
    return scipy.sparse.hstack([a @ base_MF for a in operators], format="csr")


def make_examples(
    side: Side,
    codes: Sequence[np.ndarray],
    labels: Sequence[Sequence[str]],
    classes: Sequence[str],
    codec: Codec,
    settings: Settings,
) -> Examples:
    """Features and classes of one side.

    Args:
        codes: of each clip, integers [M, >= levels].
        labels: of the examples of each clip, as `example_labels` gives them.

    Raises:
        ProbeError: no example is of one of the classes.
    """
    sizes = codec.config.rvq.codebook_sizes[: settings.levels]
    index = {label: i for i, label in enumerate(classes)}
    x: list[Any] = []
    y: list[int] = []
    clips: list[int] = []
    for number, (clip, clip_codes, clip_labels) in enumerate(zip(side.clips, codes, labels, strict=True)):
        codes_MR = clip_codes[:, : settings.levels]
        examples = [i for i, label in enumerate(clip_labels) if label in index]
        if examples:
            base_MF = codec.dequantize(codes_MR) if settings.features == "vectors" else one_hot(codes_MR, sizes)
            centres_M = frame_centres(len(codes_MR), codec.config)
            x.append(example_features(base_MF, clip, centres_M, settings, examples))
            y += [index[clip_labels[i]] for i in examples]
            clips += [number] * len(examples)
    if not x:
        raise ProbeError(f"{side.manifest}: expected some of the labels {', '.join(classes[:5])}, ...; found none")
    x_EF = np.concatenate(x) if settings.features == "vectors" else scipy.sparse.vstack(x, format="csr")
    return Examples(x_EF, np.array(y), np.array(clips))


# ----------------------------------------------------------------------------------------------------------
# Probes


def probe(train: Examples, test: Examples, num_classes: int, num_clips: int) -> ProbeResult:
    """Fits on the training side and measures on the test side of `num_clips` clips."""
    started = time.perf_counter()
    if isinstance(train.x_EF, np.ndarray):  # standardised, so that one penalty suits all features
        mean_F, scale_F = train.x_EF.mean(axis=0), train.x_EF.std(axis=0)
        scale_F[scale_F == 0] = 1.0
        train = dataclasses.replace(train, x_EF=(train.x_EF - mean_F) / scale_F)
        test = dataclasses.replace(test, x_EF=(test.x_EF - mean_F) / scale_F)
    else:  # codes that do not occur in training have no weight
        occurring = np.unique(train.x_EF.indices)
        train = dataclasses.replace(train, x_EF=train.x_EF[:, occurring])
        test = dataclasses.replace(test, x_EF=test.x_EF[:, occurring])
    judge_E = train.clip_E % _JUDGE_EVERY == _JUDGE_EVERY - 1
    if not judge_E.any() or judge_E.all():
        raise ProbeError(f"training side: expected at least {_JUDGE_EVERY} labelled clips")
    classifier, tried = fit_chosen(train.x_EF, train.y_E, num_classes, judge_E)
    correct_E = (classifier.predict(test.x_EF) == test.y_E).astype(np.float64)
    correct_N = np.bincount(test.clip_E, correct_E, num_clips)
    count_N = np.bincount(test.clip_E, minlength=num_clips).astype(np.float64)
    return ProbeResult(
        correct_N,
        count_N,
        _accuracy(correct_N, count_N),
        float((classifier.predict(train.x_EF) == train.y_E).mean()),
        classifier.penalty,
        tried,
        classifier.iterations,
        classifier.converged,
        time.perf_counter() - started,
    )


def majority(train: Examples, test: Examples, num_clips: int) -> Interval:
    """Accuracy of always saying the class that is the commonest on the training side."""
    commonest = int(np.bincount(train.y_E).argmax())
    correct_N = np.bincount(test.clip_E, (test.y_E == commonest).astype(np.float64), num_clips)
    return _accuracy(correct_N, np.bincount(test.clip_E, minlength=num_clips).astype(np.float64))


def _accuracy(correct_N: np.ndarray, count_N: np.ndarray) -> Interval:
    used = count_N > 0  # a clip without examples could be all that a draw holds
    return mean_interval(correct_N[used], count_N[used])


@dataclass(frozen=True)
class Comparison:
    """Differences of accuracy, first minus second, of runs that are paired by their order."""

    pairs: tuple[Interval, ...]  # of each pair; clips are drawn, the same for both runs
    mean: Interval  # over pairs; pairs and clips are drawn
    student: Interval | None  # over pairs, from their spread alone (Student's t); None for one pair

    def to_json(self) -> dict[str, Any]:
        return {
            "pairs": [pair.to_json() for pair in self.pairs],
            "mean": self.mean.to_json(),
            "student_t": self.student.to_json() if self.student else None,
            "intervals": INTERVALS,
        }


INTERVALS = (
    f"{LEVEL:.0%}; of a pair: paired bootstrap over test clips; of the mean: each draw takes one resample of the "
    "test clips, common to all runs, and one of the pairs, whose weights are spread by sqrt(S / (S - 1)) so that the "
    "variance between S pairs is unbiased; student_t: t interval of the S differences with S - 1 degrees of freedom"
)


def compare(first: Sequence[ProbeResult], second: Sequence[ProbeResult], seed: int = 0) -> Comparison:
    """Compares runs in pairs (run i of both: the same seed), on the same test clips.

    The interval of the mean crosses two sources of chance: draws resample the clips, once for all runs, since all are
    measured on the same ones, and the pairs. A bootstrap of S values has (S - 1) / S of their variance, which for three
    seeds would be a third too little: so the weights of the pairs are moved away from one by sqrt(S / (S - 1)) (the
    rescaled bootstrap of Rao & Wu, 1988). With one pair only the clips are drawn.

    Raises:
        ValueError: not as many runs on both sides, none, or other test clips.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"expected as many runs on both sides, got {len(first)} and {len(second)}")
    if any(not np.array_equal(a.count_N, b.count_N) for b in second for a in first):
        raise ValueError("expected runs that are measured on the same examples; do their frame rates differ?")
    used = first[0].count_N > 0
    count_N, pairs = first[0].count_N[used], len(first)
    gain_SN = np.stack([(a.correct_N - b.correct_N)[used] for a, b in zip(first, second, strict=True)])

    def of_pair(gain_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda weights_XN: (weights_XN @ gain_N) / (weights_XN @ count_N)

    def of_all(weights_XN: np.ndarray) -> np.ndarray:
        differences_XS = (weights_XN @ gain_SN.T) / (weights_XN @ count_N)[:, None]
        weights_XS = resampling_weights(pairs, seed + 1)
        if pairs > 1:
            weights_XS = 1.0 + (weights_XS - 1.0) * np.sqrt(pairs / (pairs - 1))
        return (differences_XS * weights_XS).mean(axis=1)

    each = tuple(bootstrap(of_pair(gain_N), len(count_N), seed) for gain_N in gain_SN)
    student = None
    if pairs > 1:
        values = np.array([pair.value for pair in each])
        half = scipy.stats.t.ppf((1 + LEVEL) / 2, pairs - 1) * values.std(ddof=1) / np.sqrt(pairs)
        student = Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half))
    return Comparison(each, bootstrap(of_all, len(count_N), seed), student)


# ----------------------------------------------------------------------------------------------------------
# The whole measurement


@dataclass(frozen=True)
class Report:
    """What was probed and what came out."""

    settings: Settings
    train: Side
    test: Side
    classes: tuple[str, ...]
    examples: tuple[int, int]  # of the training and the test side
    left_out: int  # examples of the test side whose label is no class
    majority: Interval
    results: dict[str, ProbeResult]  # by run, in order
    fingerprints: dict[str, str]
    comparison: Comparison | None

    def to_json(self) -> dict[str, Any]:
        runs = {
            run: {
                "fingerprint": self.fingerprints[run],
                "accuracy": result.accuracy.to_json(),
                "train_accuracy": result.train_accuracy,
                "penalty": result.penalty,
                "cross_entropy_by_penalty": {str(k): v for k, v in result.tried.items()},
                "iterations": result.iterations,
                "converged": result.converged,
                "seconds": round(result.seconds, 2),
                "correct": result.correct_N.astype(int).tolist(),
            }
            for run, result in self.results.items()
        }
        return {
            "settings": dataclasses.asdict(self.settings),
            "train": {
                "manifest": str(self.train.manifest),
                "clips": len(self.train.clips),
                "examples": self.examples[0],
            },
            "test": {
                "manifest": str(self.test.manifest),
                "clips": len(self.test.clips),
                "examples": self.examples[1],
                "left_out": self.left_out,
                "count": next(iter(self.results.values())).count_N.astype(int).tolist(),
            },
            "classes": list(self.classes),
            "majority": self.majority.to_json(),
            "runs": runs,
            "comparison": self.comparison.to_json() if self.comparison else None,
        }

    def __str__(self) -> str:
        s = self.settings
        detail = f"{s.context} frames of context" if s.task == "phones" else f"{s.parts} parts"
        lines = [
            f"probe of {s.task}: {s.features} of {s.levels} levels, {detail}; {len(self.classes)} classes, "
            f"{self.examples[0]:,} examples to train on, {self.examples[1]:,} in {len(self.test.clips):,} clips to "
            f"test ({self.left_out:,} of other labels left out)"
        ]
        width = max(len("majority class"), *map(len, self.results))
        for name, accuracy, more in (
            ("majority class", self.majority, ""),
            *(
                (run, r.accuracy, f"  train {r.train_accuracy:.2%}, penalty {r.penalty:g}, {r.seconds:.1f} s")
                for run, r in self.results.items()
            ),
        ):
            lines.append(f"{name:<{width}}  {accuracy.value:7.2%}  [{accuracy.low:.2%}, {accuracy.high:.2%}]{more}")
        if self.comparison is not None:
            rows = [(f"difference, pair {i + 1}", pair) for i, pair in enumerate(self.comparison.pairs)]
            rows.append(("mean difference", self.comparison.mean))
            if self.comparison.student is not None:
                rows.append(("the same, Student's t over pairs", self.comparison.student))
            wide = max(len(name) for name, _ in rows)
            lines += [f"{name:<{wide}}  {v.value:+7.2%}  [{v.low:+.2%}, {v.high:+.2%}]" for name, v in rows]
            lines.append(f"intervals: {INTERVALS}")
        return "\n".join(lines)


def run_probes(
    settings: Settings,
    train: Side,
    test: Side,
    runs: Sequence[str],
    against: Sequence[str],
    load: Callable[[str], Codec],
    progress: Callable[[str, int, int], None] = lambda run, done, total: None,
) -> Report:
    """Probes every run on the same clips and compares `runs` with `against`, if there are any of these.

    Args:
        load: loads the tokenizer of a run; one is held at a time. Recordings are encoded once for each run.
        progress: is told the run, the recordings encoded and those to encode.

    Raises:
        ProbeError: the labels do not do, a recording of both sides, or a tokenizer has too few levels.
        AudioError: a recording cannot be read.
    """
    both = {clip.audio.resolve() for clip in train.clips} & {clip.audio.resolve() for clip in test.clips}
    if both:
        raise ProbeError(f"{test.manifest}: expected no recording of {train.manifest}, got {min(both)}")
    results: dict[str, ProbeResult] = {}
    fingerprints: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    shared: tuple[tuple[int, int], int, Interval] | None = None
    for run in dict.fromkeys((*runs, *against)):
        codec = load(run)
        levels = codec.config.rvq.num_levels
        if not 1 <= settings.levels <= levels:
            raise ProbeError(f"{run}: expected --levels of 1..{levels}, got {settings.levels}")
        clips, split = (*train.clips, *test.clips), len(train.clips)
        codes = _encode(codec, run, settings.levels, clips, progress)
        labels = [example_labels(x, len(c), codec.config, settings.task) for x, c in zip(clips, codes, strict=True)]
        classes = choose_classes(labels[:split], train.manifest)
        learnt = make_examples(train, codes[:split], labels[:split], classes, codec, settings)
        asked = make_examples(test, codes[split:], labels[split:], classes, codec, settings)
        results[run], fingerprints[run] = probe(learnt, asked, len(classes), len(test.clips)), codec.fingerprint
        if shared is None:
            left_out = sum(bool(label) for of_clip in labels[split:] for label in of_clip) - len(asked.y_E)
            shared = (len(learnt.y_E), len(asked.y_E)), left_out, majority(learnt, asked, len(test.clips))
    assert shared is not None
    comparison = compare([results[r] for r in runs], [results[r] for r in against]) if against else None
    return Report(settings, train, test, classes, *shared, results, fingerprints, comparison)


def _encode(
    codec: Codec, run: str, levels: int, clips: Sequence[Clip], progress: Callable[[str, int, int], None]
) -> list[np.ndarray]:
    """Codes [M, R] of the first levels of each clip."""
    codes = []
    for i, clip in enumerate(clips):
        wav = load_audio(clip.audio, codec.config.mel.sample_rate, codec.config.resampler)
        codes.append(next(iter(codec.encode([wav], levels))))
        progress(run, i + 1, len(clips))
    return codes
