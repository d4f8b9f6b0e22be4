"""Residual vector quantiser: learning rules, revival, dropout, statistics, and the released code's goldens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config import RVQConfig
from mimo_jax.models.tokenizer import rvq

DIM = 6
_train = jax.jit(rvq.train_quantize, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def _config(**changes) -> RVQConfig:
    base = RVQConfig(codebook_sizes=(16, 8, 8), dead_code_threshold=0.0, dropout_probability=0.0, kmeans_iterations=20)
    return dataclasses.replace(base, **changes)


def _codebook(config: RVQConfig, seed: int = 0) -> rvq.Codebook:
    rng = np.random.default_rng(seed)
    return {
        rvq.level_name(i): rvq.level_from_entries(
            jnp.asarray(rng.normal(size=(k, DIM)) * 0.6**i, jnp.float32),
            jnp.asarray(rng.uniform(2, 9, k), jnp.float32),
            config.epsilon,
        )
        for i, k in enumerate(config.codebook_sizes)
    }


def _assert_close(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def _vectors(n: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, DIM)), jnp.float32)


def test_of_equally_near_entries_the_lowest_is_chosen():
    entries = jnp.array([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(rvq.nearest(jnp.array([[0.0, 0.0], [2.0, 0.0]]), entries), [1, 1])


def test_codes_are_the_greedy_nearest_entries_and_decode_to_their_sum():
    config, x = _config(), _vectors(40)
    book = _codebook(config)
    codes = np.asarray(rvq.quantize(book, x))
    residual, total = np.asarray(x, np.float64), np.zeros((40, DIM))
    for i in range(3):
        entries = np.asarray(rvq.entries(book[rvq.level_name(i)]), np.float64)
        best = ((residual[:, None] - entries) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(codes[:, i], best)
        residual, total = residual - entries[best], total + entries[best]
    np.testing.assert_allclose(rvq.dequantize(book, jnp.asarray(codes)), total, atol=1e-6)
    first_two = rvq.quantize(book, x, num_levels=2)
    np.testing.assert_array_equal(first_two, codes[:, :2])


def test_training_and_inference_choose_the_same_codes():
    config, x = _config(), _vectors(40)
    out = _train(config, _codebook(config), x, jnp.ones(40, bool), key=jax.random.key(0))
    np.testing.assert_array_equal(out.codes_NR, rvq.quantize(_codebook(config), x))


def test_padding_contributes_to_nothing():
    config, x = _config(dead_code_threshold=2.0), _vectors(40)
    mask = jnp.arange(40) % 3 > 0
    kept = _train(config, _codebook(config), x[mask], jnp.ones(int(mask.sum()), bool))
    masked = _train(config, _codebook(config), jnp.where(mask[:, None], x, 1e3), mask)
    np.testing.assert_array_equal(masked.codes_NR[mask], kept.codes_NR)
    assert not np.asarray(masked.codes_NR)[~np.asarray(mask)].any()
    for name in ("squared_error_R", "vectors_R", "code_counts"):
        _assert_close(getattr(masked, name), getattr(kept, name))


def test_dropped_levels_contribute_to_neither_sum_codes_commitment_nor_statistics():
    config, x, key = _config(), _vectors(60), jax.random.key(3)
    levels = jnp.where(jnp.arange(60) < 25, 1, 3)
    all_ones = jnp.ones(60, bool)
    out = _train(config, _codebook(config), x, all_ones, levels, key)
    full = _train(config, _codebook(config), x, all_ones, None, key)
    deep = _train(config, _codebook(config), x[25:], all_ones[25:], None, key)
    entries = rvq.entries(_codebook(config)["level_00"])
    np.testing.assert_allclose(out.quantized_ND[:25], entries[out.codes_NR[:25, 0]], atol=1e-6)
    np.testing.assert_allclose(out.quantized_ND[25:], full.quantized_ND[25:], atol=1e-6)
    assert not np.asarray(out.codes_NR[:25, 1:]).any()
    np.testing.assert_array_equal(out.vectors_R, [60, 35, 35])
    np.testing.assert_allclose(out.squared_error_R[0], full.squared_error_R[0], rtol=1e-6)
    np.testing.assert_allclose(out.squared_error_R[1:], deep.squared_error_R[1:], rtol=1e-5)
    for i, name in enumerate(("level_00", "level_01", "level_02")):
        other = full if i == 0 else deep
        np.testing.assert_array_equal(out.code_counts[i], other.code_counts[i])
        np.testing.assert_allclose(out.codebook[name]["code_sum"], other.codebook[name]["code_sum"], atol=1e-5)


def test_a_level_that_no_vector_reached_keeps_its_state():
    config, book = _config(dead_code_threshold=5.0), _codebook(_config())
    out = _train(config, book, _vectors(30), jnp.ones(30, bool), jnp.ones(30, jnp.int32), jax.random.key(0))
    for name in ("level_01", "level_02"):
        np.testing.assert_array_equal(out.codebook[name]["count"], book[name]["count"])
        np.testing.assert_array_equal(out.codebook[name]["code_sum"], book[name]["code_sum"])
    assert not np.array_equal(out.codebook["level_00"]["count"], book["level_00"]["count"])


def test_quantiser_dropout_is_one_draw_for_a_segment_and_has_the_stated_share():
    config = _config(dropout_probability=0.5)
    ids = jnp.broadcast_to(jnp.repeat(jnp.arange(50), 4), (80, 200))
    levels = np.asarray(rvq.draw_levels(config, ids, jax.random.key(0)))[:, 4:].reshape(80, 49, 4)
    assert (levels == levels[..., :1]).all()
    shares = [(levels[..., 0] == n).mean() for n in (1, 2, 3)]
    np.testing.assert_allclose(shares, [1 / 6, 1 / 6, 4 / 6], atol=0.03)
    everything = rvq.draw_levels(_config(dropout_probability=0.0), ids, jax.random.key(0))
    assert (np.asarray(everything) == 3).all()


def _dead_code_run(write_codebook_only: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Level 0 has a dead entry far away; returns where it is after one and after five more steps, and its count."""
    config = _config(codebook_sizes=(4,), dead_code_threshold=2.0)
    centres = np.array([[0.0] * DIM, [4.0] * DIM, [-4.0] * DIM], np.float32)
    entries = np.concatenate([centres[:1], centres[:1] + 0.1, centres[1:2], np.full((1, DIM), 90.0)]).astype(np.float32)
    counts = jnp.array([50.0, 50.0, 50.0, 1.0])
    book = {"level_00": rvq.level_from_entries(jnp.asarray(entries), counts, config.epsilon)}
    rng = np.random.default_rng(0)
    places = []
    for step in range(6):
        x = np.repeat(centres, 40, axis=0) + 0.05 * rng.normal(size=(120, DIM)).astype(np.float32)
        before = book
        out = _train(config, book, jnp.asarray(x), jnp.ones(120, bool), None, jax.random.key(step))
        book = out.codebook
        if write_codebook_only:  # the released code: sum and count, which the next step reads, stay
            sums = rvq.moving_average(before["level_00"], *_statistics(before, x, config), config.ema_decay)
            book = {"level_00": rvq.level_from_sums(sums, config.epsilon)}
        places.append(np.asarray(rvq.entries(book["level_00"]))[3])
    return places[0], places[-1], float(book["level_00"]["count"][3])


def _statistics(book: rvq.Codebook, x: np.ndarray, config: RVQConfig) -> tuple[jax.Array, jax.Array]:
    chosen = jax.nn.one_hot(rvq.nearest(jnp.asarray(x), rvq.entries(book["level_00"])), 4)
    return chosen.T @ x, chosen.sum(0)


def test_a_revived_code_is_a_vector_of_the_batch_and_survives_the_next_steps():
    first, last, count = _dead_code_run(write_codebook_only=False)
    assert min(np.abs(first - c).max() for c in (0.0, 4.0, -4.0)) < 0.3
    assert min(np.abs(last - c).max() for c in (0.0, 4.0, -4.0)) < 0.3
    assert count >= 2.0
    _, overwritten, _ = _dead_code_run(write_codebook_only=True)
    assert overwritten.min() > 50.0, "the released write order should lose the revived code, or this test shows nothing"


def test_revival_draws_distinct_vectors_of_the_mask_and_leaves_live_codes_alone():
    level = {"code_sum": jnp.full((6, DIM), 7.0), "count": jnp.array([9.0, 0.1, 9.0, 0.1, 0.1, 9.0])}
    x, mask = _vectors(20), jnp.arange(20) >= 12
    new = rvq.revive_dead_codes(level, x, mask, 2.0, jax.random.key(0))
    np.testing.assert_array_equal(new["count"], [9, 2, 9, 2, 2, 9])
    np.testing.assert_array_equal(np.asarray(new["code_sum"])[[0, 2, 5]], 7.0)
    drawn = np.asarray(new["code_sum"])[[1, 3, 4]] / 2.0
    rows = [int(np.abs(np.asarray(x) - d).sum(1).argmin()) for d in drawn]
    np.testing.assert_allclose(drawn, np.asarray(x)[rows], rtol=1e-6)
    assert len(set(rows)) == 3 and min(rows) >= 12
    nothing = rvq.revive_dead_codes(level, x, jnp.zeros(20, bool), 2.0, jax.random.key(0))
    np.testing.assert_array_equal(nothing["count"], level["count"])


@pytest.mark.parametrize("commitment", ["first", "all"])
def test_gradients_are_straight_through_and_commitment_reaches_the_encoder_as_configured(commitment):
    config, x = _config(commitment=commitment), _vectors(20)
    book, cotangent = _codebook(_config()), _vectors(20, seed=5)

    def quantised(x):
        return jnp.sum(_train(config, book, x, jnp.ones(20, bool)).quantized_ND * cotangent)

    np.testing.assert_allclose(jax.grad(quantised)(x), cotangent, rtol=1e-6)

    def error(x):
        return _train(config, book, x, jnp.ones(20, bool)).squared_error_R

    jacobian = jax.jacrev(error)(x)
    residual, codes = x, rvq.quantize(book, x)
    for i in range(3):
        chosen = rvq.entries(book[rvq.level_name(i)])[codes[:, i]]
        expected = 2 / DIM * (residual - chosen) if i == 0 or commitment == "all" else np.zeros((20, DIM))
        np.testing.assert_allclose(jacobian[i], expected, atol=1e-5)
        residual = residual - chosen


def test_kmeans_start_fits_residuals_level_by_level_and_keeps_centroids_in_sum_form():
    config, x = _config(), _vectors(300)
    mask = jnp.arange(300) < 280
    padded = jnp.where(mask[:, None], x, 1e4)
    book = rvq.init_codebooks(config, padded, mask, jax.random.key(0))
    errors = _train(config, book, padded, mask).squared_error_R
    random = _train(config, _codebook(config), padded, mask).squared_error_R
    assert (np.diff(errors) < 0).all() and (np.asarray(errors) < 0.7 * np.asarray(random)).all()
    for level in book.values():
        assert float(level["count"].min()) >= 1 and np.abs(level["code_sum"]).max() < 1e4
    # A moving average towards the same batch must leave well-fitted entries where they are.
    out = _train(config, book, padded, mask, None, jax.random.key(1))
    before, after = (rvq.entries(b["level_00"]) for b in (book, out.codebook))
    np.testing.assert_allclose(after, before, atol=0.02)


def test_kmeans_start_works_with_fewer_vectors_than_entries():
    config, x = _config(), _vectors(5)
    book = rvq.init_codebooks(config, x, jnp.ones(5, bool), jax.random.key(0))
    errors = _train(config, book, x, jnp.ones(5, bool)).squared_error_R
    np.testing.assert_allclose(errors[0], 0.0, atol=1e-8)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(book))


def test_usage_and_perplexity_of_known_counts():
    counts = (jnp.array([5.0, 5.0, 0.0, 0.0]), jnp.array([9.0, 0.0]), jnp.zeros(4))
    used, perplexity = rvq.usage_and_perplexity(counts)
    np.testing.assert_allclose(used, [0.5, 0.5, 0.0])
    np.testing.assert_allclose(perplexity, [2.0, 1.0, 1.0], rtol=1e-6)


def test_a_batch_split_over_devices_gives_the_global_update():
    config = _config(dead_code_threshold=4.0)
    x, mask, key = _vectors(64), jnp.arange(64) % 5 > 0, jax.random.key(2)
    whole = _train(config, _codebook(config), x, mask, None, key)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    split = _train(config, _codebook(config), jax.device_put(x, rows), jax.device_put(mask, rows), None, key)
    np.testing.assert_array_equal(split.codes_NR, whole.codes_NR)
    for name in ("squared_error_R", "vectors_R", "code_counts", "codebook"):
        _assert_close(getattr(split, name), getattr(whole, name))


# ----------------------------------------------------------------------------------------------------------
# Goldens of the released code

SIZES = (48, 64, 32, 32)
TRAIN = RVQConfig(codebook_sizes=SIZES, dead_code_threshold=0.0, dropout_probability=0.0)


def _golden_state(arrays: dict[str, np.ndarray], prefix: str) -> rvq.Codebook:
    """The golden's own state, whose entries need not be the ratio of sums and counts."""
    names = {"entries": "embed", "code_sum": "embed_avg", "count": "cluster_size"}
    return {
        rvq.level_name(i): {ours: jnp.asarray(arrays[f"{prefix}q{i}_{theirs}"]) for ours, theirs in names.items()}
        for i in range(4)
    }
