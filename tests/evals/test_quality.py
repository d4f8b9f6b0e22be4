"""Metrics of a pair of waves against closed forms and against what the original packages give."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from evals.voice import clip, voice

from mimo_jax.config import ConfigError
from mimo_jax.evals import quality
from mimo_jax.evals.quality import COLUMNS, METRICS, Source, Unmeasurable, check_metrics, si_sdr, stft_distance

RNG = np.random.default_rng(0)
SPEECH = clip()  # 24 kHz


def need_packages(*names):
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def test_si_sdr_of_a_scaled_clip_with_orthogonal_noise_is_the_ratio_of_energies():
    time = np.arange(24_000) / 24_000
    signal, noise = np.sin(2 * np.pi * 100 * time), np.sin(2 * np.pi * 333 * time)
    assert si_sdr(signal, 0.2 * signal + 0.02 * noise) == pytest.approx(20.0, abs=1e-6)
    assert si_sdr(signal, -3.0 * signal + 3.0 * noise) == pytest.approx(0.0, abs=1e-6)


def test_infinite_si_sdr_is_left_out():
    for decoded in (SPEECH, 0.5 * SPEECH, 0.0 * SPEECH):
        with pytest.raises(Unmeasurable):
            si_sdr(SPEECH, decoded)
    with pytest.raises(Unmeasurable, match="source is silent"):
        si_sdr(0.0 * SPEECH, SPEECH)


def test_stft_distance_is_zero_for_the_same_and_known_for_half_and_for_silence():
    noise = RNG.normal(0, 0.2, 24_000)
    assert stft_distance(noise, noise) == (0.0, 0.0)
    convergence, magnitude = stft_distance(noise, noise / 2)
    assert convergence == pytest.approx(0.5) and magnitude == pytest.approx(np.log(2), abs=1e-3)
    assert stft_distance(noise, 0 * noise)[0] == pytest.approx(1.0)
    assert stft_distance(noise, -noise) == pytest.approx((0.0, 0.0))
    with pytest.raises(Unmeasurable):
        stft_distance(0 * noise, noise)


def test_stft_distance_of_a_clip_shorter_than_a_window():
    assert stft_distance(SPEECH[:100], SPEECH[:100]) == (0.0, 0.0)


def test_a_clip_against_itself_has_the_best_value_of_every_metric():
    need_packages("pesq", "pystoi", "resemblyzer")
    values, left_out = Source(SPEECH, 24_000).measure(SPEECH)
    assert values["pesq_nb"] == pytest.approx(4.549, abs=1e-3) and values["pesq_wb"] == pytest.approx(4.644, abs=1e-3)
    assert values["stoi"] == pytest.approx(1.0) and values["speaker_similarity"] == pytest.approx(1.0)
    assert values["mel"] == values["stft"] == 0.0
    assert left_out == {"si_sdr": "the reconstruction is the source"}


def test_more_noise_is_worse_by_every_metric():
    need_packages("pesq", "pystoi", "resemblyzer")
    source = Source(SPEECH, 24_000)
    noise = RNG.normal(size=len(SPEECH))
    measured = [source.measure(SPEECH + level * noise)[0] for level in (0.001, 0.01, 0.1)]
    for name, column in COLUMNS.items():
        if name in measured[0]:
            values = [m[name] if column.more_is_better else -m[name] for m in measured]
            assert values == sorted(values, reverse=True) and values[0] > values[-1], name


def test_output_is_cut_or_filled_up_to_the_length_of_the_source():
    source = Source(SPEECH, 24_000, ("mel", "si-sdr"))
    noisy = SPEECH + RNG.normal(0, 0.01, len(SPEECH))
    assert source.measure(np.concatenate([noisy, np.ones(960)]))[0] == source.measure(noisy)[0]
    short = source.measure(noisy[:-2000])[0]
    assert short == source.measure(np.concatenate([noisy[:-2000], np.zeros(2000)]))[0] != source.measure(noisy)[0]


def test_what_cannot_be_measured_is_left_out_with_the_reason():
    need_packages("pesq", "pystoi", "resemblyzer")
    both = {"pesq_nb", "pesq_wb"}
    short = SPEECH[6000:8000]
    values, left_out = Source(short, 24_000).measure(short + 0.01)
    assert "mel" in values and "1/4 of a second" in left_out["pesq_wb"] and "STOI" in left_out["stoi"]
    values, left_out = Source(SPEECH, 24_000).measure(np.zeros(len(SPEECH)))
    assert left_out["pesq_wb"] == left_out["stoi"] == "the reconstruction is silent" and not both & values.keys()
    values, left_out = Source(np.zeros(24_000), 24_000).measure(SPEECH)
    assert left_out["speaker_similarity"] == "the source is silent" and "mel" in values
    values, left_out = Source(SPEECH, 24_000).measure(np.full(len(SPEECH), np.nan))
    assert not values and set(left_out.values()) == {"a sample is not finite"}
    assert Source(SPEECH[:1], 24_000).measure(SPEECH[:1] + 1)[0].keys() <= COLUMNS.keys()


def test_pesq_of_a_long_recording_is_a_mean_over_pieces_and_does_not_crash():
    need_packages("pesq")
    # 150 utterances at once overrun the arrays of the C code.
    burst = np.concatenate([RNG.normal(0, 0.1, 3_200), np.zeros(3_200)])
    reference = np.tile(burst, 75 * 2).astype(np.float32)
    decoded = reference + RNG.normal(0, 0.003, len(reference)).astype(np.float32)
    value = quality.pesq(reference, decoded, 8_000)
    pieces = [quality.pesq(reference[i : i + 160_000], decoded[i : i + 160_000], 8_000) for i in (0, 160_000)]
    assert value == pytest.approx(np.mean(pieces), abs=0.3)


def test_dnsmos_is_that_of_the_package():
    need_packages("onnxruntime", "speechmos")
    from mimo_jax.evals.dnsmos import dnsmos

    # From speechmos 0.0.1.1 with librosa 1.0.0, `dnsmos.run(wav, 16000)`.
    for samples, expected in (
        (40_000, (1.26542, 1.33372, 1.26857, 2.49187)),
        (200_000, (1.29932, 1.38487, 1.30067, 2.60626)),
    ):
        found = dnsmos(voice(samples))
        names = ("dnsmos_overall", "dnsmos_signal", "dnsmos_background", "dnsmos_p808")
        assert [found[name] for name in names] == pytest.approx(expected, abs=2e-4)


def test_unknown_metrics_and_missing_packages_are_named_before_any_work(monkeypatch):
    with pytest.raises(ConfigError, match=r"--metrics: expected some of mel, .*, got 'sdr'"):
        check_metrics(["sdr"])

    def missing(name):
        raise quality.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(quality.importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pesq needs the package pesq: pip install 'mimo-jax\[eval\]'"):
        check_metrics(["pesq"])
    with pytest.raises(ConfigError, match=r"speechmos: pip install 'mimo-jax\[dnsmos\]'"):
        check_metrics(["dnsmos"])
    assert set(check_metrics(["mel", "stft", "si-sdr"])) == {"numpy"}


def test_every_quantity_belongs_to_one_metric():
    assert sum(map(len, METRICS.values())) == len(COLUMNS)
