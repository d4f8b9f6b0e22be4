"""Training losses of the language model, target by target, and the gradients of all parameters."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AudioLMConfig, ComputeConfig, LMLossConfig
from mimo_jax.interop.published import to_published
from mimo_jax.models.audio_lm import AudioLM
from mimo_jax.parity.harness import Case
from mimo_jax.parity.language_model import cached_lm
from mimo_jax.parity.sequences import read_ids
from mimo_jax.rows import LMRows
from mimo_jax.training.lm_loss import lm_loss, means, target_losses


class ToolkitAudioLM(AudioLM):
    """As the released fine-tuning toolkit trains: the text embedding of `<|empty|>` is added to every patch."""

    def embed_text(self, text_BL: jax.Array) -> jax.Array:
        return jnp.asarray(self.llm.embedding)[text_BL].astype(self.compute.dtype)


VARIANTS = {"official_embeds": AudioLM, "toolkit_embeds": ToolkitAudioLM}


def training(case: Case) -> None:
    """Both variants of a training batch."""
    config, params = cached_lm(case.folder.parent / "model")
    inputs = case.inputs("inputs.npz")
    meta = json.loads(str(inputs["meta"]))
    labels = inputs["labels"][:, 0, :: config.group_size]
    rows = training_rows(inputs["input_ids"], labels, inputs["attention_mask"], config, meta["empty_loss_weight"])
    weights = tuple(float(w) for w in meta["weights"].split("-"))
    if not rows.audio_weights_BC.any():  # then the toolkit's loss is the text term alone
        weights = (weights[0], *[0.0] * config.num_channels)
    loss = LMLossConfig(text_weight=weights[0], channel_weights=weights[1:])
    for variant, model_class in VARIANTS.items():
        if case.names(f"{variant}/"):
            _variant(case, variant, model_class(config, ComputeConfig()), params, rows, labels, loss)


def training_rows(
    ids: np.ndarray, labels_BL: np.ndarray, valid_BL: np.ndarray, config: AudioLMConfig, empty_weight: float
) -> LMRows:
    """Rows of the reference's batch `ids` [B, 1 + R, L * G], weighted as its trainer weighs text `labels_BL`."""
    B, L = valid_BL.shape
    groups = [read_ids(row, config) for row in ids]
    text_BL = np.where(valid_BL != 0, np.stack([g.text_T for g in groups]), 0).astype(np.int32)
    is_patch_BL = (text_BL == config.empty_id) & (valid_BL != 0)
    slots = int(is_patch_BL.sum(1).max())
    patches = np.zeros((B, slots, config.group_size, config.num_channels), np.int32)
    at_BC = np.full((B, slots), L, np.int32)
    audio_weights_BC = np.zeros((B, slots), np.float32)
    for b, group in enumerate(groups):
        at = np.flatnonzero(is_patch_BL[b])
        patches[b, : len(at)], at_BC[b, : len(at)] = group.codes_TGR[at], at
        audio_weights_BC[b, : len(at)] = labels_BL[b, at] == config.empty_id
    text_weights = np.where(labels_BL == -100, 0, np.where(labels_BL == config.empty_id, empty_weight, 1))
    return LMRows(
        text_BL=text_BL,
        patches_BCGR=patches,
        patch_positions_BC=at_BC,
        segment_ids_BL=valid_BL.astype(np.int32),
        positions_BL=np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)),
        task_ids_BL=np.zeros((B, L), np.uint8),
        text_weights_BL=text_weights.astype(np.float32),
        audio_weights_BC=audio_weights_BC,
    )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _losses(model: AudioLM, params: Any, rows: LMRows, loss: LMLossConfig) -> tuple[Any, ...]:
    """Total, sums, gradient, cross-entropy of each text target [B, L] and of each code [B, C, G, R]."""
    step = jax.value_and_grad(lambda p: lm_loss(model, p, rows, loss), has_aux=True)
    (value, sums), gradient = step(params)
    text_BL = target_losses(model, params, rows, loss).text_BL
    before_BC1 = jnp.maximum(rows.patch_positions_BC - 1, 0)[..., None]
    h_BCD = jnp.take_along_axis(model.apply({"params": params}, rows), before_BC1, axis=1)
    B, C, G, R = rows.patches_BCGR.shape
    patches_NGR = rows.patches_BCGR.reshape(B * C, G, R)
    logits_R = model.apply({"params": params}, h_BCD.reshape(B * C, -1), patches_NGR, method="patch_logits")
    codes = [
        -jnp.take_along_axis(jax.nn.log_softmax(x), patches_NGR[..., r, None], axis=-1)[..., 0]
        for r, x in enumerate(logits_R)
    ]
    return value, sums, gradient, text_BL, jnp.stack(codes, -1).reshape(B, C, G, R)


def _variant(
    case: Case, name: str, model: AudioLM, params: Any, rows: LMRows, labels_BL: np.ndarray, loss: LMLossConfig
) -> None:
    value, sums, gradient, text_BL, codes_BCGR = jax.device_get(_losses(model, params, rows, loss))
    metrics = {key: np.float32(x) for key, x in means(model, sums, loss).items()}

    def check(array: str, actual: Any) -> None:
        case.check(f"{name}/{array}", actual)

    # The first group has no predecessor: item arrays begin at the second.
    targets_BL = labels_BL[:, 1:]
    check("text_target", targets_BL)
    check("text_item_loss", np.where(targets_BL == -100, 0, text_BL[:, 1:]))
    check("text_ce_mean_nonempty", metrics["text/word_ce"])
    check("text_ce_mean_empty", metrics["text/empty_ce"])
    check("text_ce_count_nonempty", np.int64(sums.word_count))
    check("text_ce_count_empty", np.int64(sums.empty_count))
    check("text_ce_mean_all_targets", (sums.word_ce + sums.empty_ce) / (sums.word_count + sums.empty_count))
    check("text_loss_toolkit", metrics["text/ce"])
    trained_BC = rows.audio_weights_BC > 0
    terms = [metrics["text/ce"]]
    for r in range(model.config.num_channels):
        terms.append(metrics[f"channel/{r}/ce"])
        check(f"audio_ce_mean_ch{r}", terms[-1])
        check(f"audio_item_loss_ch{r}", codes_BCGR[trained_BC][..., r])
        check(f"audio_target_ch{r}", rows.patches_BCGR[trained_BC][..., r].astype(np.int64))
    check("terms_text_then_channels", np.stack(terms))
    check("weighted_loss_toolkit", value)
    weights = np.array([loss.text_weight, *loss.channel_weights])
    used = weights > 0
    check("recombined", np.float32((weights[used] * np.stack(terms)[used]).sum() / weights.sum()))

    gradients = to_published(gradient, model.config)
    for parameter, x in gradients.items():
        check(f"grad/{parameter}", x)
    squares = [np.square(x, dtype=np.float64).sum() for x in gradients.values()]
    check("grad_global_norm", np.sqrt(sum(squares)))
    check("params_without_grad", np.array([sum(s == 0 for s in squares)]))
