"""What a language model has learnt about speech: held-out cross-entropy of each RVQ channel, against two references.

The unigram reference knows how often each code occurs in the training set and nothing else. The control is the model
itself with a wrong context: it predicts the same patches, but what it has heard before them is another utterance. A
model that uses its context is below both.

N utterances, X contexts, C patches of a row, G frames of a patch, R channels, L positions, D width, K entries of a
codebook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mimo_jax.config import AudioLMConfig, ComputeConfig
from mimo_jax.data.layouts import CONTINUATION, Layouts, SpeechSpan
from mimo_jax.data.lm_rows import assemble_row
from mimo_jax.data.records import Record
from mimo_jax.data.shards import record_entry
from mimo_jax.evals.intervals import Interval, bootstrap, mean_interval
from mimo_jax.models.audio_lm import AudioLM
from mimo_jax.rows import LMRows

_FRAME_RATE = 25.0  # only the times of segments depend on it, and continuation documents have none


@dataclass(frozen=True)
class ChannelEntropies:
    """Cross-entropies in nats, summed over the frames of each utterance."""

    model_NR: np.ndarray
    control_NR: np.ndarray  # of the model with other utterances as its context, mean over them
    unigram_NR: np.ndarray  # of the add-one-smoothed unigram of the training codes
    frames_N: np.ndarray

    def mean(self, which: str, channel: int) -> Interval:
        """Mean over frames of `model`, `control` or `unigram`, in nats."""
        return mean_interval(getattr(self, f"{which}_NR")[:, channel], self.frames_N)

    def reduction(self, channel: int) -> Interval:
        """Share by which the model is below the unigram: 1 - model / unigram, a paired comparison."""
        model_N, unigram_N = self.model_NR[:, channel], self.unigram_NR[:, channel]
        return bootstrap(lambda w: 1.0 - (w @ model_N) / (w @ unigram_N), len(model_N))

    def control_gap(self, channel: int | None = None) -> Interval:
        """Nats a frame by which the wrong context is worse, a paired comparison: of a channel, or summed over all."""
        gap_NR = self.control_NR - self.model_NR
        return mean_interval(gap_NR.sum(axis=1) if channel is None else gap_NR[:, channel], self.frames_N)


def unigrams(records: Iterable[Record], codebook_sizes: Sequence[int]) -> list[np.ndarray]:
    """Add-one-smoothed log probabilities [K] of the codes of each channel."""
    counts = [np.ones(size) for size in codebook_sizes]
    for record in records:
        for channel, size in enumerate(codebook_sizes):
            counts[channel] += np.bincount(record.codes_MR[:, channel], minlength=size)
    return [np.log(c / c.sum()) for c in counts]


def channel_entropies(
    config: AudioLMConfig,
    compute: ComputeConfig,
    params: Any,
    tokenizer: Any,
    training: Iterable[Record],
    held_out: Sequence[Record],
    row_length: int,
    row_patches: int,
    batch: int = 8,
    contexts: int = 4,
) -> ChannelEntropies:
    """Measures a model on held-out utterances, each alone in its row as a speech-continuation document.

    Frames that only fill up the last patch are not counted. An utterance longer than a row is cut as in training.

    Args:
        training: records whose codes make the unigram.
        held_out: at least two utterances of speech.
        contexts: other utterances that each one gets as its context in turn, fewer if there are not so many.

    Raises:
        ValueError: fewer than two held-out utterances.
    """
    if len(held_out) < 2:
        raise ValueError(f"held_out: expected at least two utterances, got {len(held_out)}")
    layouts = Layouts(tokenizer, config.group_size, config.num_channels, row_length, row_patches)
    # Utterance, row, contexts [X, C, G, R], what counts: bool [C, G].
    pieces: list[tuple[int, LMRows, np.ndarray, np.ndarray]] = []
    contexts = min(contexts, len(held_out) - 1)
    for n, record in enumerate(held_out):
        others = [held_out[(n + x) % len(held_out)] for x in range(1, contexts + 1)]
        wrong_X = [layouts.patches(other.codes_MR, 0, len(other.codes_MR)) for other in others]
        done = 0
        for piece in layouts.plan(CONTINUATION, record_entry(record, tokenizer, _FRAME_RATE), 0):
            document = layouts.fill(CONTINUATION, piece, record)
            row = assemble_row([document], row_length, row_patches, config, 1.0)
            patches = sum(len(s.patches_NGR) for s in document.spans if isinstance(s, SpeechSpan))
            context_XCGR = np.stack([row.patches_BCGR] * contexts)
            for context_CGR, wrong_CGR in zip(context_XCGR, wrong_X, strict=True):
                context_CGR[:patches] = wrong_CGR[np.arange(patches) % len(wrong_CGR)]
            frame_CG = (np.arange(row_patches)[:, None] + done) * config.group_size + np.arange(config.group_size)
            counted_CG = (np.arange(row_patches)[:, None] < patches) & (frame_CG < len(record.codes_MR))
            pieces.append((n, row, context_XCGR, counted_CG))
            done += patches

    score = _scorer(config, compute)
    shape = (len(held_out), config.num_channels)
    model_NR, control_NR, unigram_NR = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    log_unigrams = unigrams(training, config.codebook_sizes)
    for start in range(0, len(pieces), batch):
        chosen = pieces[start : start + batch]
        # The last batch is filled up with copies of its last row, so that one program serves all.
        _, rows, wrongs, _ = zip(*chosen, *[chosen[-1]] * (batch - len(chosen)), strict=True)
        stacked = LMRows(*map(np.stack, zip(*rows, strict=True)))
        stacked = stacked._replace(patches_BCGR=stacked.patches_BCGR.astype(np.int32))
        right = np.asarray(score(params, stacked, stacked.patches_BCGR), np.float64)
        contexts_XBCGR = np.stack(wrongs, axis=1).astype(np.int32)
        scores = [np.asarray(score(params, stacked, context_BCGR), np.float64) for context_BCGR in contexts_XBCGR]
        wrong = np.mean(scores, axis=0)
        for b, (n, _, _, counted_CG) in enumerate(chosen):
            model_NR[n] += right[b][counted_CG].sum(axis=0)
            control_NR[n] += wrong[b][counted_CG].sum(axis=0)
    for n, record in enumerate(held_out):
        unigram_NR[n] = [-log_unigrams[r][record.codes_MR[:, r]].sum() for r in range(config.num_channels)]
    frames_N = np.asarray([len(record.codes_MR) for record in held_out], np.float64)
    return ChannelEntropies(model_NR, control_NR, unigram_NR, frames_N)


@functools.lru_cache(maxsize=8)
def _scorer(config: AudioLMConfig, compute: ComputeConfig) -> Callable[[Any, LMRows, np.ndarray], jax.Array]:
    model = AudioLM(config, compute)

    @jax.jit
    def score(params: Any, rows: LMRows, context_BCGR: jax.Array) -> jax.Array:
        """Cross-entropies [B, C, G, R] of the patches of `rows`, after having heard those of `context_BCGR`."""
        variables = {"params": params}
        h_BLD = model.apply(variables, rows._replace(patches_BCGR=context_BCGR))
        before_BC = jnp.clip(rows.patch_positions_BC - 1, 0, h_BLD.shape[1] - 1)
        h_BCD = jnp.take_along_axis(h_BLD, before_BC[..., None], axis=1)
        true_NGR = rows.patches_BCGR.reshape(-1, config.group_size, config.num_channels)
        logits = model.apply(variables, h_BCD.reshape(-1, h_BCD.shape[-1]), true_NGR, method="patch_logits")
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits_NGV.astype(jnp.float32), true_NGR[..., r])
            for r, logits_NGV in enumerate(logits)
        ]
        return jnp.stack(losses, axis=-1).reshape(rows.patches_BCGR.shape)

    return score
