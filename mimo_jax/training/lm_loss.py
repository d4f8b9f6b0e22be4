"""Losses of the audio language model: weighted text cross-entropy and one cross-entropy per RVQ channel.

    text term   = sum of w * ce / sum of w                              over text targets
    channel r   = sum of a * (sum over frames of ce) / (G * sum of a)   over patch targets
    total       = sum of weight_i * term_i / sum of weight_i

(weights 100-12-8-6-4-2-2-1-1, report section 2.2; `<|empty|>` targets weigh 0.01, a factor that the data pipeline has
already put into the rows). Sums, not means, are handed out, so that means can be taken over devices, accumulation
steps and hosts.

Axes: B rows, L positions, C patch slots, N = B * C patches, G frames of a patch, T steps of the patch decoder, R
channels, K tasks, D LLM width, V text vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mimo_jax.config import LayoutWeights, LMLossConfig
from mimo_jax.models.audio_lm import AudioLM
from mimo_jax.rows import LMRows
from mimo_jax.training.cross_entropy import cross_entropy

NUM_TASKS = len(dataclasses.fields(LayoutWeights))


class LMTargetLosses(NamedTuple):
    """Cross-entropy of every target, in nats; aligned with the targets, as the weights in the rows are.

    What has no predecessor in its own document weighs 0. Channels hold the sum over the G frames of a patch.
    """

    text_BL: jax.Array
    text_weights_BL: jax.Array
    text_correct_BL: jax.Array  # bool: the target is the best guess
    channels_BCR: jax.Array
    channel_weights_BC: jax.Array
    channel_correct_BCR: jax.Array  # int32: frames of the patch whose code is the best guess


class LMLossSums(NamedTuple):
    """Sums over targets; `means` turns them into metrics. Cross-entropies in nats, float32.

    Counts are of targets with a weight above 0, and an audio count is of codes (G per patch) in one channel. "word"
    targets are the text targets that are not `<|empty|>`, "empty" targets those that are.
    """

    text_loss: jax.Array  # sum of w * ce
    text_weight: jax.Array  # sum of w
    word_ce: jax.Array
    word_count: jax.Array
    word_correct: jax.Array
    empty_ce: jax.Array
    empty_count: jax.Array
    empty_correct: jax.Array
    channel_loss_R: jax.Array  # sum of a * (sum over frames of ce)
    audio_weight: jax.Array  # sum of a
    channel_ce_R: jax.Array
    channel_correct_R: jax.Array
    audio_count: jax.Array
    task_word_ce_K: jax.Array
    task_word_count_K: jax.Array
    task_channel_ce_KR: jax.Array
    task_audio_count_K: jax.Array


class LMLossTotals(NamedTuple):
    """Weight sums of the whole batch: what an accumulation step divides by."""

    text_weight: jax.Array
    audio_weight: jax.Array


def loss_totals(rows: LMRows) -> LMLossTotals:
    """Weight sums of a batch, without running the model."""
    text_weights_BL, channel_weights_BC, _ = _weights(rows)
    widest = jnp.result_type(float)  # float32; float64 where that is enabled
    return LMLossTotals(_total_weight(text_weights_BL, widest), _total_weight(channel_weights_BC, widest))


def lm_loss(
    model: AudioLM,
    params: Any,
    rows: LMRows,
    loss: LMLossConfig,
    totals: LMLossTotals | None = None,
    lora: Any = None,
) -> tuple[jax.Array, LMLossSums]:
    """Loss of a batch of packed rows.

    Args:
        model: its compute dtype is that of the forward pass; losses are float32 (float64 for float64).
        params: the "params" collection.
        rows: packed rows. With C = 0 no audio part of the model runs.
        loss: weights. Without any channel weight the patch decoder does not run.
        totals: weight sums to divide by. Micro-batches of an accumulated step pass those of the whole batch, so that
            their losses and gradients add up to those of the batch. By default the sums of these rows.
        lora: the "lora" collection, if there is one (`training.lora`).

    Returns:
        The total (scalar) and the sums it was made of.
    """
    sums = _sum(model, rows, target_losses(model, params, rows, loss, lora))
    return total_loss(model, sums, loss, totals), sums


def total_loss(model: AudioLM, sums: LMLossSums, loss: LMLossConfig, totals: LMLossTotals | None = None) -> jax.Array:
    """Weighted mean of the text term and the channel terms; a term without targets is 0."""
    weights = totals or (sums.text_weight, sums.audio_weight)
    text_weight, audio_weight = (jnp.asarray(w, sums.text_loss.dtype) for w in weights)
    text = _ratio(sums.text_loss, text_weight)
    channels_R = _ratio(sums.channel_loss_R, model.config.group_size * audio_weight)
    weights_R = jnp.asarray(loss.channel_weights, channels_R.dtype)
    return (loss.text_weight * text + (weights_R * channels_R).sum()) / (loss.text_weight + sum(loss.channel_weights))


def means(model: AudioLM, sums: LMLossSums, loss: LMLossConfig) -> dict[str, jax.Array]:
    """Metrics of summed losses: scalars by name, NaN where there was no target.

    `loss`; `text/ce` (weighted as trained), `text/word_ce`, `text/word_accuracy`, `text/empty_ce`,
    `text/empty_accuracy`; `channel/R/ce`, `channel/R/accuracy`; `task/K/word_ce` and `task/K/channel_ce` (mean over
    channels), K by name.
    """
    nan = jnp.nan
    out = {
        "loss": total_loss(model, sums, loss),
        "text/ce": _ratio(sums.text_loss, sums.text_weight, nan),
        "text/word_ce": _ratio(sums.word_ce, sums.word_count, nan),
        "text/word_accuracy": _ratio(sums.word_correct, sums.word_count, nan),
        "text/empty_ce": _ratio(sums.empty_ce, sums.empty_count, nan),
        "text/empty_accuracy": _ratio(sums.empty_correct, sums.empty_count, nan),
    }
    for r in range(model.config.num_channels):
        out[f"channel/{r}/ce"] = _ratio(sums.channel_ce_R[r], sums.audio_count, nan)
        out[f"channel/{r}/accuracy"] = _ratio(sums.channel_correct_R[r], sums.audio_count, nan)
    for k, field in enumerate(dataclasses.fields(LayoutWeights)):
        out[f"task/{field.name}/word_ce"] = _ratio(sums.task_word_ce_K[k], sums.task_word_count_K[k], nan)
        channels = sums.task_channel_ce_KR[k].mean()
        out[f"task/{field.name}/channel_ce"] = _ratio(channels, sums.task_audio_count_K[k], nan)
    return out


def target_losses(model: AudioLM, params: Any, rows: LMRows, loss: LMLossConfig, lora: Any = None) -> LMTargetLosses:
    """Cross-entropy of every target of packed rows; arguments as in `lm_loss`."""
    B, C = rows.patch_positions_BC.shape
    R = model.config.num_channels
    variables = {"params": params} | ({"lora": lora} if lora else {})
    text_weights_BL, channel_weights_BC, previous_BC = _weights(rows)
    h_BLD = model.apply(variables, rows)
    kernel_DV = model.apply(variables, method="text_head_kernel")
    next_BL = jnp.roll(rows.text_BL, -1, axis=1)
    ce_BL, correct_BL = cross_entropy(h_BLD, kernel_DV, next_BL, model.compute.logits_chunk)
    # The hidden state of position i predicts position i + 1; nothing predicts position 0, whose weight is 0.
    ce_BL, correct_BL = jnp.roll(ce_BL, 1, axis=1), jnp.roll(correct_BL, 1, axis=1)
    if C == 0 or not loss.trains_audio:
        channels_BCR = jnp.zeros((B, C, R), ce_BL.dtype)
        nothing = jnp.zeros_like(channel_weights_BC)
        return LMTargetLosses(
            ce_BL, text_weights_BL, correct_BL, channels_BCR, nothing, jnp.zeros((B, C, R), jnp.int32)
        )
    h_BCD = jnp.take_along_axis(h_BLD, previous_BC[..., None], axis=1)
    ce_BCR, hits_BCR = model.apply(variables, h_BCD, rows.patches_BCGR, method="patch_cross_entropy")
    return LMTargetLosses(ce_BL, text_weights_BL, correct_BL, ce_BCR, channel_weights_BC, hits_BCR)


def _weights(rows: LMRows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Target weights without what has no predecessor in its document, and the position before each patch [B, C]."""
    segments_BL, at_BC = rows.segment_ids_BL, rows.patch_positions_BC
    L = segments_BL.shape[1]
    before_BL = jnp.pad(segments_BL[:, :-1], ((0, 0), (1, 0)))
    follows_BL = (segments_BL == before_BL) & (segments_BL != 0)
    used_BC = at_BC < L
    at_BC = jnp.minimum(at_BC, L - 1)
    follows_BC = used_BC & jnp.take_along_axis(follows_BL, at_BC, axis=1)
    text_weights_BL = jnp.where(follows_BL, rows.text_weights_BL, 0)
    return text_weights_BL, jnp.where(follows_BC, rows.audio_weights_BC, 0), jnp.maximum(at_BC - 1, 0)


def _sum(model: AudioLM, rows: LMRows, t: LMTargetLosses) -> LMLossSums:
    dtype = t.text_BL.dtype
    G, R = model.config.group_size, model.config.num_channels
    trained_BL = t.text_weights_BL > 0
    empty_BL = trained_BL & (rows.text_BL == model.config.empty_id)
    word_BL = trained_BL & ~empty_BL
    trained_BC = t.channel_weights_BC > 0
    at_BC = jnp.minimum(rows.patch_positions_BC, rows.text_BL.shape[1] - 1)
    tasks_BC = jnp.take_along_axis(rows.task_ids_BL, at_BC, axis=1)
    task_BLK = jax.nn.one_hot(rows.task_ids_BL, NUM_TASKS, dtype=dtype) * word_BL[..., None]
    task_BCK = jax.nn.one_hot(tasks_BC, NUM_TASKS, dtype=dtype) * trained_BC[..., None]

    def total(mask: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(mask, x, 0).sum(dtype=dtype)

    def per_channel(mask_BC: jax.Array, x_BCR: jax.Array) -> jax.Array:
        return jnp.where(mask_BC[..., None], x_BCR, 0).reshape(-1, R).sum(0, dtype=dtype)

    return LMLossSums(
        text_loss=total(trained_BL, t.text_weights_BL * t.text_BL),
        text_weight=_total_weight(t.text_weights_BL, dtype),
        word_ce=total(word_BL, t.text_BL),
        word_count=word_BL.sum(dtype=dtype),
        word_correct=total(word_BL, t.text_correct_BL),
        empty_ce=total(empty_BL, t.text_BL),
        empty_count=empty_BL.sum(dtype=dtype),
        empty_correct=total(empty_BL, t.text_correct_BL),
        channel_loss_R=per_channel(trained_BC, t.channel_weights_BC[..., None] * t.channels_BCR),
        audio_weight=_total_weight(t.channel_weights_BC, dtype),
        channel_ce_R=per_channel(trained_BC, t.channels_BCR),
        channel_correct_R=per_channel(trained_BC, t.channel_correct_BCR),
        audio_count=G * trained_BC.sum(dtype=dtype),
        task_word_ce_K=(task_BLK * t.text_BL[..., None]).sum((0, 1)),
        task_word_count_K=task_BLK.sum((0, 1)),
        task_channel_ce_KR=(task_BCK[..., None] * t.channels_BCR[:, :, None]).sum((0, 1)),
        task_audio_count_K=G * task_BCK.sum((0, 1)),
    )


def _total_weight(weights_BX: jax.Array, dtype: Any) -> jax.Array:
    """Sum of weights, many of which are equal and small.

    Added one after the other, as XLA adds few numbers on CPU, each is rounded in the same direction: 3e-6 off after
    1,000. So sums of 32 are added, and sums of those; the barrier keeps XLA from making one sum of all.
    """
    sums_BX = weights_BX.astype(dtype)
    while (X := sums_BX.shape[1]) > 1:
        blocks = jnp.pad(sums_BX, ((0, 0), (0, -X % 32))).reshape(len(sums_BX), -(-X // 32), 32)
        sums_BX = jax.lax.optimization_barrier(blocks.sum(-1))
    return sums_BX.sum()


def _ratio(a: jax.Array, b: jax.Array, empty: float = 0.0) -> jax.Array:
    return jnp.where(b == 0, empty, a / jnp.where(b == 0, 1, b))
