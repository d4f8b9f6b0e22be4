"""Language-model loss: equal to the reference, packed = alone, accumulated = whole, and no logits of a whole row."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import lm_cases

from mimo_jax.config import LMLossConfig, MeshConfig
from mimo_jax.sharding import make_mesh
from mimo_jax.training.cross_entropy import cross_entropy
from mimo_jax.training.lm_loss import LMLossSums, lm_loss, loss_totals, means, target_losses, total_loss

LOSS = LMLossConfig(channel_weights=(12.0, 8.0, 6.0))
DOCUMENTS = list(lm_cases.DOCUMENTS)
# The same documents packed into two rows, and each in a row of its own (the longest without any padding).
PACKED = lm_cases.rows([DOCUMENTS[:3], DOCUMENTS[3:]], 30, 13)
UNPACKED = lm_cases.rows([[d] for d in DOCUMENTS], 12, 7)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=lm_cases.QUICK)
def _run(model, params, rows, totals=None, loss=LOSS):
    """Loss, its sums, and the gradient. Jitted once for all tests, as compiling is slow."""
    step = jax.value_and_grad(lambda params: lm_loss(model, params, rows, loss, totals), has_aux=True)
    (value, sums), gradient = step(params)
    return value, sums, gradient


_targets = jax.jit(
    lambda model, params, rows: target_losses(model, params, rows, LOSS),
    static_argnums=0,
    compiler_options=lm_cases.QUICK,
)


def _flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


# ----------------------------------------------------------------------------------------------------------
# Against the reference


# ----------------------------------------------------------------------------------------------------------
# Packing


def _by_document(model, params, rows):
    """Losses of the weighted targets as float64, in the order of `DOCUMENTS`: text, then audio."""
    targets = _targets(model, params, rows)
    used = np.asarray(rows.patch_positions_BC) < rows.text_BL.shape[1]
    text = np.asarray(targets.text_BL)[np.asarray(targets.text_weights_BL) > 0]
    audio = np.asarray(targets.channels_BCR)[used & (np.asarray(targets.channel_weights_BC) > 0)]
    return np.concatenate([text, audio.ravel()]).astype(np.float64)


def test_packed_rows_have_the_loss_and_gradients_of_their_documents():
    packed32, unpacked32 = (_run(lm_cases.MODEL, lm_cases.params(), rows) for rows in (PACKED, UNPACKED))
    with jax.enable_x64(True):
        packed, unpacked = (_run(lm_cases.MODEL64, lm_cases.params64(), rows) for rows in (PACKED, UNPACKED))
    np.testing.assert_allclose(packed[0], unpacked[0], rtol=1e-9)
    for name, a, b in zip(LMLossSums._fields, packed[1], unpacked[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=name)
    for a, b in zip(jax.tree.leaves(packed[2]), jax.tree.leaves(unpacked[2]), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-9 * np.linalg.norm(b)
    # In float32, packing may move a loss or the gradient by no more than 4 times what rounding moves it.
    of_packed, of_unpacked = (_by_document(lm_cases.MODEL, lm_cases.params(), rows) for rows in (PACKED, UNPACKED))
    with jax.enable_x64(True):
        exact = _by_document(lm_cases.MODEL64, lm_cases.params64(), UNPACKED)
    rounding = np.abs(of_unpacked - exact).max()
    assert 0 < rounding < 1e-4
    assert np.abs(of_packed - of_unpacked).max() <= 4 * rounding
    rounding = np.linalg.norm(_flat(unpacked32[2]) - _flat(unpacked[2]))
    assert np.linalg.norm(_flat(packed32[2]) - _flat(unpacked32[2])) <= 4 * rounding


def test_nothing_is_predicted_across_documents():
    """The first position of a document is no target, whatever weight its row gives it."""
    full = PACKED._replace(
        text_weights_BL=np.ones_like(PACKED.text_weights_BL), audio_weights_BC=np.ones_like(PACKED.audio_weights_BC)
    )
    targets = _targets(lm_cases.MODEL, lm_cases.params(), full)
    first = (full.positions_BL == 0) | (full.segment_ids_BL == 0)
    np.testing.assert_array_equal(targets.text_weights_BL, ~first)
    at, L = full.patch_positions_BC, full.text_BL.shape[1]
    no_target = np.concatenate([first, np.ones((len(first), 1), bool)], 1)[np.arange(len(at))[:, None], at]
    np.testing.assert_array_equal(targets.channel_weights_BC, ~no_target)
    assert no_target.sum() > (at == L).sum()


# ----------------------------------------------------------------------------------------------------------
# Sums, totals, parts


def test_accumulated_micro_batches_equal_the_whole_batch():
    with jax.enable_x64(True):
        params = lm_cases.params64()
        value, _, gradient = _run(lm_cases.MODEL64, params, PACKED)
        totals = loss_totals(PACKED)
        parts = [
            _run(lm_cases.MODEL64, params, jax.tree.map(lambda x, i=i: x[i : i + 1], PACKED), totals) for i in (0, 1)
        ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], value, rtol=1e-12)
    np.testing.assert_allclose(_flat(parts[0][2]) + _flat(parts[1][2]), _flat(gradient), atol=1e-13)


def test_sums_reproduce_the_loss_and_split_by_task():
    value, sums, _ = _run(lm_cases.MODEL, lm_cases.params(), PACKED)
    targets = _targets(lm_cases.MODEL, lm_cases.params(), PACKED)
    np.testing.assert_allclose(total_loss(lm_cases.MODEL, sums, LOSS), value, rtol=1e-6)
    np.testing.assert_allclose(means(lm_cases.MODEL, sums, LOSS)["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(sums.task_word_ce_K.sum(), sums.word_ce, rtol=1e-5)
    np.testing.assert_allclose(sums.task_channel_ce_KR.sum(0), sums.channel_ce_R, rtol=1e-5)
    assert sums.task_word_count_K.sum() == sums.word_count > 0
    assert sums.task_audio_count_K.sum() == sums.audio_count > 0
    # Row 1 holds one document, of task 2.
    alone = np.asarray(targets.channels_BCR)[1][np.asarray(targets.channel_weights_BC)[1] > 0].sum(0)
    np.testing.assert_allclose(sums.task_channel_ce_KR[2], alone, rtol=1e-5)
    assert np.isnan(means(lm_cases.MODEL, sums, LOSS)["task/asr/word_ce"])


def test_stage_one_leaves_the_patch_decoder_alone():
    loss = dataclasses.replace(LOSS, text_weight=1.0, channel_weights=(0.0, 0.0, 0.0))
    without = {k: v for k, v in lm_cases.params().items() if k != "patch_decoder"}
    value, sums, gradient = _run(lm_cases.MODEL, without, PACKED, None, loss)
    np.testing.assert_allclose(value, sums.text_loss / sums.text_weight, rtol=1e-6)
    assert sums.audio_count == 0 and not sums.channel_ce_R.any()
    assert np.abs(gradient["patch_encoder"]["embedding"]).max() > 0


def test_rows_without_any_target_give_zero_and_finite_gradients():
    nothing = lm_cases.rows([[], []], 30, 13)
    value, sums, gradient = _run(lm_cases.MODEL, lm_cases.params(), nothing)
    assert value == 0 and sums.text_weight == 0 and np.isfinite(_flat(gradient)).all()


def test_empty_rows_of_the_tables_never_get_a_gradient():
    rows = jax.tree.map(np.copy, PACKED)
    rows.patches_BCGR[0, 1, 1, :] = lm_cases.CONFIG.codebook_sizes
    gradient = _run(lm_cases.MODEL, lm_cases.params(), rows)[2]
    table = gradient["patch_encoder"]["embedding"]
    last = np.cumsum(lm_cases.CONFIG.audio_vocab_sizes) - 1
    assert not table[last].any() and table.any()
    assert not gradient["llm"]["embedding"][lm_cases.CONFIG.empty_id].any()


# ----------------------------------------------------------------------------------------------------------
# Chunked cross-entropy


@pytest.mark.parametrize("chunk", [1, 56, 84, 1000])
def test_chunked_cross_entropy_equals_log_softmax(chunk):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        h, kernel = rng.standard_normal((2, 7, 5)), rng.standard_normal((5, 11))
        targets = rng.integers(0, 11, (2, 7))

        def plain(h, kernel):
            logs = jax.nn.log_softmax(h @ kernel)
            return -jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]

        ce, correct = jax.jit(cross_entropy, static_argnums=3)(h, kernel, targets, chunk)
        np.testing.assert_allclose(ce, plain(h, kernel), rtol=1e-12)
        np.testing.assert_array_equal(correct, (h @ kernel).argmax(-1) == targets)
        weights = rng.standard_normal((2, 7))
        chunked = jax.jit(jax.grad(lambda *x: (weights * cross_entropy(*x, targets, chunk)[0]).sum(), (0, 1)))(
            h, kernel
        )
        whole = jax.grad(lambda *x: (weights * plain(*x)).sum(), (0, 1))(h, kernel)
        for a, b in zip(chunked, whole, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2), (2, 1, 2)])
def test_cross_entropy_on_a_mesh_equals_one_device(sizes):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        h, kernel = rng.standard_normal((4, 6, 8)), rng.standard_normal((8, 600))
        targets = rng.integers(0, 600, (4, 6))
        weights = rng.standard_normal((4, 6))

        def loss(h, kernel):  # chunks of 128 columns, the last of which overlaps
            return (weights * cross_entropy(h, kernel, targets, 1000)[0]).sum()

        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        expected = step(h, kernel)
        with jax.set_mesh(make_mesh(MeshConfig(*sizes), jax.devices()[:4])):
            found = jax.jit(jax.value_and_grad(loss, (0, 1)))(h, kernel)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_cross_entropy_never_holds_the_logits_of_a_row():
    h = jax.ShapeDtypeStruct((1, 4096, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((16, 32_768), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    gradient = jax.jit(jax.grad(lambda h, k, t: cross_entropy(h, k, t, 256 * 32_768)[0].sum(), (0, 1)))
    compiled = gradient.lower(h, kernel, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 32_768 * 4 / 4


def test_weight_totals_are_exact():
    """XLA on CPU adds so many one after the other, and rounds equal weights in the same direction."""
    B, L = 16, 64
    rows = jax.tree.map(lambda x: np.repeat(x, B, 0), lm_cases.rows([DOCUMENTS[:1]], L, L))
    weights = np.where(np.random.default_rng(0).random((B, L)) < 0.5, 0.1, 1).astype(np.float32)
    rows = rows._replace(
        segment_ids_BL=np.ones((B, L), np.int32),
        text_weights_BL=weights,
        patch_positions_BC=np.tile(np.arange(L, dtype=np.int32), (B, 1)),
        audio_weights_BC=weights,
    )
    for total in jax.jit(loss_totals)(rows):
        np.testing.assert_allclose(total, weights[:, 1:].sum(dtype=np.float64), rtol=3e-7)
