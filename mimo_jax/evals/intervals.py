"""Bootstrap intervals over utterances. N utterances, X draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Interval:
    """A statistic and its bootstrap interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def resampling_weights(num: int, seed: int = 0) -> np.ndarray:
    """How often each of `num` utterances is drawn: float64 [1 + X, N]. Row 0 is the sample itself, all ones.

    The same weights for two statistics make their comparison a paired one.
    """
    if num < 1:
        raise ValueError("bootstrap: expected at least one utterance")
    drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1.0 / num), size=DRAWS)
    return np.concatenate([np.ones((1, num)), drawn]).astype(np.float64)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], num: int, seed: int = 0) -> Interval:
    """Interval of a statistic of `num` weighted utterances, which maps weights [1 + X, N] to values [1 + X].

    Percentiles of the draws, shifted to have the value as their mean. Without the shift, statistics that are biased
    under resampling would lie outside their own interval: a draw repeats utterances, so it holds fewer different codes
    and has a lower perplexity than the sample.
    """
    values = np.asarray(statistic(resampling_weights(num, seed)), np.float64)
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + values[0] - values[1:].mean()
    return Interval(float(values[0]), float(low), float(high))


def mean_interval(totals_N: np.ndarray, counts_N: np.ndarray, seed: int = 0) -> Interval:
    """Interval of sum(totals) / sum(counts): the mean over frames, with utterances as the unit that is drawn."""
    return bootstrap(lambda w: (w @ totals_N) / (w @ counts_N), len(totals_N), seed)
