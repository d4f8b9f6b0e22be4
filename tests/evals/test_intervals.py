"""Bootstrap intervals: they cover, they pair, and they weigh by frames."""

from __future__ import annotations

import numpy as np
import pytest

from mimo_jax.evals.intervals import bootstrap, mean_interval, resampling_weights


def test_mean_weighs_utterances_by_their_frames():
    interval = mean_interval(np.array([10.0, 1.0]), np.array([10.0, 1.0]) * 2)
    assert interval.value == pytest.approx(0.5)
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for trial in range(100):
        interval = mean_interval(generator.normal(3.0, 1.0, 60), np.ones(60), seed=trial)
        covered += interval.low <= 3.0 <= interval.high
        assert 0.3 < interval.high - interval.low < 0.75  # 4 * 1 / sqrt(60) = 0.52
    assert 88 <= covered <= 99


def test_equal_seeds_pair_two_statistics():
    np.testing.assert_array_equal(resampling_weights(7, 3), resampling_weights(7, 3))
    values = np.random.default_rng(0).normal(0, 100, 50)
    difference = bootstrap(lambda w: (w @ (values + 1.0) - w @ values) / w.sum(axis=1), 50)
    assert difference.low == pytest.approx(1.0) and difference.high == pytest.approx(1.0)


def test_every_draw_has_as_many_utterances_as_the_sample():
    weights = resampling_weights(9)
    assert (weights.sum(axis=1) == 9).all() and (weights[0] == 1).all() and (weights[1:] != 1).any()


def test_no_utterance_is_an_error():
    with pytest.raises(ValueError, match="at least one utterance"):
        resampling_weights(0)
