"""Samplers: the published rules, number by number, and draws that a request's neighbours cannot change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config import ConfigError
from mimo_jax.generation.sampling import GREEDY, SamplingConfig, process_logits, sample, sampling_params


def _removed(size, ids):
    return np.isin(np.arange(size), ids)[None]


def test_draws_follow_the_processed_distribution():
    logits = jnp.asarray([2.0, 1.0, 0.0, -1.0, 3.0, -30.0])
    config = SamplingConfig(temperature=0.8, top_k=4, top_p=0.97)
    removed = _removed(6, [4])
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    tokens = sample(keys, jnp.tile(logits, (draws, 1)), sampling_params([config] * draws), removed)
    share = np.bincount(np.asarray(tokens), minlength=6) / draws
    processed = np.asarray(process_logits(logits[None], sampling_params([config])))[0]
    expected = np.asarray(jax.nn.softmax(jnp.where(removed[0], -jnp.inf, processed)))
    np.testing.assert_allclose(share, expected, atol=0.015)
    assert share[[3, 4, 5]].tolist() == [0, 0, 0]


def test_top_k_keeps_every_tie_of_the_kth_score():
    logits = jnp.asarray([[1.0, 2.0, 2.0, 3.0, 2.0, 0.0]])
    kept = np.isfinite(np.asarray(process_logits(logits, sampling_params([SamplingConfig(top_k=2)]))))[0]
    assert kept.tolist() == [False, True, True, True, True, False]


def test_settings_of_one_request_do_not_touch_another():
    logits = jax.random.normal(jax.random.key(2), (3, 50))
    configs = [GREEDY, SamplingConfig(0.7, top_k=5), SamplingConfig(1.3, top_p=0.8)]
    keys = jax.random.split(jax.random.key(3), 3)
    together = sample(keys, logits, sampling_params(configs))
    alone = [sample(keys[i : i + 1], logits[i : i + 1], sampling_params(configs[i : i + 1]))[0] for i in range(3)]
    assert together.tolist() == [int(x) for x in alone]
    assert int(together[0]) == int(jnp.argmax(logits[0]))


def test_removing_the_whole_nucleus_takes_the_best_remaining_id():
    logits = jnp.asarray([[9.0, 1.0, 2.0, 0.0]])
    config = sampling_params([SamplingConfig(temperature=1.0, top_k=1)])
    assert sample(jax.random.split(jax.random.key(0), 1), logits, config, _removed(4, [0])).tolist() == [2]


@pytest.mark.parametrize("size", [1, 2, 5, 128])
def test_any_id_may_be_the_best(size):
    best = jnp.arange(size)
    keys, greedy = jax.random.split(jax.random.key(0), size), sampling_params([GREEDY] * size)
    np.testing.assert_array_equal(sample(keys, jax.nn.one_hot(best, size), greedy), best)


@pytest.mark.parametrize("config", [GREEDY, SamplingConfig(0.8, top_k=2, top_p=0.9)], ids=["greedy", "drawn"])
def test_removed_ids_do_not_come_out_of_logits_that_are_no_numbers(config):
    logits = jnp.asarray([[jnp.nan] * 4, [jnp.inf] * 4, [-jnp.inf] * 4, [jnp.nan, 1.0, 2.0, 3.0]])
    keys, settings = jax.random.split(jax.random.key(0), 4), sampling_params([config] * 4)
    for one in range(4):
        ids = sample(keys, logits, settings, ~_removed(4, [one]))
        assert ids.tolist() == [one] * 4


@pytest.mark.parametrize(
    "values",
    [dict(temperature=-0.1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=1.5), dict(top_p=-0.1)],
)
def test_impossible_settings_are_refused_by_name(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        SamplingConfig(**values)
