"""Loss of the audio tokenizer's first stage: 10 A2T + 1 reconstruction + 1 commitment (report section 2.1).

B rows, S samples, T mel frames (100 Hz), M RVQ frames, U text tokens, D width of the text decoder, R levels, I the
three scales of the reconstruction loss, W frames of one scale. Everything is gathered as sums over the batch
(`TokenizerLossSums`), and means are taken at the end: so a packed row, a padded one and a batch split over devices give
one value, and sums of several batches give the loss of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.audio.features import LOG_FLOOR, MEL_SCALES, frame_mel, mel_scale_config
from mimo_jax.config import (
    A2TConfig,
    AudioTokenizerConfig,
    ComputeConfig,
    MelConfig,
    MelLossConfig,
    TokenizerLossConfig,
)
from mimo_jax.models.tokenizer import audio_tokenizer, rvq
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.segments import same_segment, shift
from mimo_jax.models.tokenizer.text_decoder import TextDecoder
from mimo_jax.rows import TokenizerRows
from mimo_jax.training.cross_entropy import cross_entropy


class TokenizerLossSums(NamedTuple):
    """Sums over a batch. Those of several batches are added leaf by leaf."""

    a2t: jax.Array  # cross-entropy * weight, nats
    a2t_weight: jax.Array
    a2t_correct: jax.Array  # weight of the tokens predicted right
    a2t_clips: jax.Array  # clips with text
    mel_I: jax.Array  # L1 distance, summed over frames; over bins as `mel_reduction` says
    mel_frames_I: jax.Array
    commitment_R: jax.Array  # squared error, mean over the width, summed over vectors
    vectors_R: jax.Array
    code_counts: tuple[jax.Array, ...]  # for each level, how often each entry was chosen
    dead_R: jax.Array  # entries that were found dead


def loss_terms(sums: TokenizerLossSums, loss: TokenizerLossConfig) -> dict[str, jax.Array]:
    """The loss and its terms from sums: `loss`, `a2t`, `mel`, `commitment`, `a2t_accuracy`, `mel_5` to `mel_7`."""
    mel_I = sums.mel_I / jnp.maximum(sums.mel_frames_I, 1)
    denominator = sums.a2t_weight if loss.a2t_reduction == "mean" else sums.a2t_clips
    a2t = sums.a2t / jnp.where(denominator > 0, denominator, 1)
    weight = jnp.where(sums.a2t_weight > 0, sums.a2t_weight, 1)
    commitment = jnp.mean(sums.commitment_R / jnp.maximum(sums.vectors_R, 1))
    mel = jnp.sum(mel_I)
    total = loss.a2t_weight * a2t + loss.mel_weight * mel + loss.commitment_weight * commitment
    scales = {f"mel_{i}": mel_I[n] for n, i in enumerate(MEL_SCALES)}
    terms = {"loss": total, "a2t": a2t, "mel": mel, "commitment": commitment}
    return terms | {"a2t_accuracy": sums.a2t_correct / weight} | scales


def tokenizer_loss(
    model: AudioTokenizer,
    text_decoder: TextDecoder,
    params: dict[str, Any],
    codebook: rvq.Codebook,
    rows: TokenizerRows,
    loss: TokenizerLossConfig,
    rng: jax.Array | None = None,
    taps: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[TokenizerLossSums, rvq.Codebook]]:
    """Loss of a batch of packed rows, and (sums, codebook after the step).

    Args:
        text_decoder: the decoder of the A2T objective; not run when the rows have no room for text (U = 0).
        params: {"audio_tokenizer": ..., "text_decoder": ...}.
        rng: random key of the step, for quantiser dropout and dead codes. None evaluates: all levels are used, and the
            codebook stays.
        taps: from `make_taps`; see `term_norms`.
    """
    variables = {"params": params["audio_tokenizer"], "codebook": codebook}
    out = model.apply(variables, rows, rng is not None, rng, taps)
    a2t = dict.fromkeys(("a2t", "a2t_weight", "a2t_correct", "a2t_clips"), jnp.zeros((), out.squared_error_R.dtype))
    if rows.text_BU.shape[1] > 0:
        h_BUD = text_decoder.apply(
            {"params": params["text_decoder"]},
            out.quantized_BMD if taps is None else out.quantized_BMD + taps["text"],
            out.segment_ids_BM,
            rows.text_BU,
            rows.text_segment_ids_BU,
            rows.text_positions_BU,
        )
        head = params["text_decoder"]["head"]
        a2t = _a2t_sums(*cross_entropy(h_BUD, head, rows.text_targets_BU, text_decoder.compute.logits_chunk), rows)
    mel_I, mel_frames_I = mel_distance(out.wav_BS, rows, model.config, loss)
    sums = TokenizerLossSums(
        **a2t,
        mel_I=mel_I,
        mel_frames_I=mel_frames_I,
        commitment_R=out.squared_error_R,
        vectors_R=out.vectors_R,
        code_counts=out.code_counts,
        dead_R=out.dead_R,
    )
    return loss_terms(sums, loss)["loss"], (sums, out.codebook)


def make_taps(config: AudioTokenizerConfig, rows: TokenizerRows, dtype: Any) -> dict[str, jax.Array]:
    """Zeros [B, M, D] for the three places where the terms of the loss meet: see `term_norms`."""
    batch, frames = rows.segment_ids_BT.shape
    shape = (batch, frames // config.mel_frames_per_code, config.encoder.d_model)
    return {name: jnp.zeros(shape, dtype) for name in ("input", "decoder", "text")}


def term_norms(gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Norm of the gradient of each term, weight included, where all of them meet: at the quantiser.

    Says which term moves the encoder, at no cost: the gradients with respect to the taps are computed anyway. What
    arrives at the quantiser's input comes from the decoder, from the text decoder, and, the rest, from the commitment.
    """
    mel, a2t = gradients["decoder"], gradients["text"]
    terms = {"mel": mel, "a2t": a2t, "commitment": gradients["input"] - mel - a2t}
    return {f"term_norm/{name}": jnp.sqrt(jnp.sum(jnp.square(x))) for name, x in terms.items()}


def _a2t_sums(cross_entropy_BU: jax.Array, correct_BU: jax.Array, rows: TokenizerRows) -> dict[str, jax.Array]:
    weights_BU = jnp.where(rows.text_segment_ids_BU > 0, rows.text_weights_BU, 0).astype(cross_entropy_BU.dtype)
    # A clip's text counts once, at its first token.
    first_BU = (rows.text_segment_ids_BU > 0) & ~same_segment(rows.text_segment_ids_BU, 1) & (weights_BU > 0)
    return {
        "a2t": jnp.sum(weights_BU * cross_entropy_BU),
        "a2t_weight": jnp.sum(weights_BU),
        "a2t_correct": jnp.sum(weights_BU * correct_BU),
        "a2t_clips": jnp.sum(first_BU.astype(weights_BU.dtype)),
    }


def mel_distance(
    wav_BS: jax.Array, rows: TokenizerRows, config: AudioTokenizerConfig, loss: MelLossConfig
) -> tuple[jax.Array, jax.Array]:
    """L1 distances of the mel spectrograms of reconstruction and truth, over frames that lie inside one clip.

    Returns:
        Distances summed over frames [I], and numbers of frames [I].
    """
    true_BS, ids_BT = true_wave(rows, config)
    both = jnp.concatenate([wav_BS, true_BS.astype(wav_BS.dtype)])
    distances, frames = [], []
    for scale in MEL_SCALES:
        mel_config = mel_scale_config(scale, config.mel.sample_rate)
        mel = frame_mel(both, mel_config, normalized=True)
        if loss.mel_scale == "log":
            mel = jnp.log(jnp.maximum(mel, LOG_FLOOR))
        made, true = jnp.split(mel, 2)
        distance_BW = jnp.abs(made - jax.lax.stop_gradient(true))
        distance_BW = distance_BW.mean(-1) if loss.mel_reduction == "mean" else distance_BW.sum(-1)
        inside_BW = _frames_inside(ids_BT, config.mel.hop_length, mel_config, distance_BW.shape[1])
        distances.append(jnp.sum(jnp.where(inside_BW, distance_BW, 0)))
        frames.append(jnp.sum(inside_BW.astype(distance_BW.dtype)))
    return jnp.stack(distances), jnp.stack(frames)


def true_wave(rows: TokenizerRows, config: AudioTokenizerConfig) -> tuple[jax.Array, jax.Array]:
    """The recorded wave [B, S] where the reconstruction has its samples, and the clips that they belong to [B, T].

    In the reconstruction, sample 0 of a slot is sample 0 of its clip; in the rows, n_fft / 2 reflected samples stand
    before it. The last mel frame of a clip may be only partly filled by it, so its first hop * (T_i - 1) samples count:
    the ids are 0 elsewhere, and what the wave is there means nothing.
    """
    ids_BT = rows.segment_ids_BT
    return shift(rows.wav_BS, -(config.mel.n_fft // 2)), jnp.where(ids_BT == shift(ids_BT, -1), ids_BT, 0)


def _frames_inside(ids_BT: jax.Array, hop: int, config: MelConfig, count: int) -> jax.Array:
    """Whether the first and the last sample of each frame are in one clip: bool [B, count]."""
    first_W = np.arange(count) * config.hop_length
    last_W = first_W + config.win_length - 1
    last = ids_BT[:, np.minimum(last_W // hop, ids_BT.shape[1] - 1)]
    first = ids_BT[:, first_W // hop]
    return (first > 0) & (first == last) & (last_W // hop < ids_BT.shape[1])


def init_variables(
    model: AudioTokenizerConfig, a2t: A2TConfig, compute: ComputeConfig, key: jax.Array
) -> dict[str, Any]:
    """Random variables of the first stage: {"params": {"audio_tokenizer", "text_decoder"}, "codebook"}.

    Parameters are boxed with their logical axes. Use `jax.eval_shape` for shapes alone.
    """
    key_tokenizer, key_text = jax.random.split(key)
    tokenizer = audio_tokenizer.init_variables(model, compute, key_tokenizer)
    ids = jnp.ones((1, 1), jnp.int32)
    decoder = TextDecoder(a2t, model.encoder.d_model, compute)
    quantized = jnp.zeros((1, 1, model.encoder.d_model), jnp.dtype(compute.param_dtype))
    text = decoder.init(key_text, quantized, ids, ids, ids, ids)
    params = {"audio_tokenizer": tokenizer["params"], "text_decoder": text["params"]}
    return {"params": params, "codebook": tokenizer["codebook"]}
