"""Losses of the audio tokenizer's second stage: 1 reconstruction + 1 adversarial + 2 feature matching; hinge loss for
the discriminators (report section 2.1).

K discriminators, J feature maps of one of them, I scales of the reconstruction loss. Everything is
gathered as sums over the places that lie inside clips (`AdversarialSums`), and means are taken at the end: a batch
split over devices gives one value, and sums of several batches give the loss of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mimo_jax.config import AdversarialLossConfig
from mimo_jax.models.tokenizer.discriminators import Outputs


class Scores(NamedTuple):
    """What the discriminators said of real rows or of reconstructed ones: sums over the places inside clips."""

    logits_K: jax.Array
    hinge_K: jax.Array  # max(0, 1 - logit) for real rows, max(0, 1 + logit) for others
    correct_K: jax.Array  # places with the right sign
    places_K: jax.Array


class AdversarialSums(NamedTuple):
    """Sums over a batch. Those of several batches are added leaf by leaf."""

    mel_I: jax.Array  # L1 distance, as in `tokenizer_loss`
    mel_frames_I: jax.Array
    real: Scores
    fake: Scores
    features: tuple[jax.Array, ...]  # of each discriminator, L1 of its maps [J]: mean over channels, sum over places
    feature_places: tuple[jax.Array, ...]
    code_counts: tuple[jax.Array, ...]  # for each level, how often each entry was chosen


def scores(outputs: Outputs, inside: Outputs, real: bool) -> Scores:
    """Sums of the logits and of the hinge loss of real rows, or of reconstructed (fake) ones."""
    sign = 1.0 if real else -1.0

    def of_one(logits: jax.Array, inside: jax.Array) -> list[jax.Array]:
        hinge, correct = jnp.maximum(0.0, 1.0 - sign * logits), (sign * logits > 0).astype(logits.dtype)
        return [jnp.sum(jnp.where(inside, x, 0)) for x in (logits, hinge, correct, jnp.ones_like(logits))]

    columns = [of_one(j.logits_BHW, places.logits_BHW) for j, places in zip(outputs, inside, strict=True)]
    return Scores(*(jnp.stack(column) for column in zip(*columns, strict=True)))


def feature_sums(real: Outputs, fake: Outputs, inside: Outputs) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """L1 distances of the maps [J] of each discriminator, mean over channels and summed over places; and the places.

    The real ones are targets: no gradient passes through them.
    """

    def of_map(true: jax.Array, fake: jax.Array, inside_BHW: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = jnp.promote_types(true.dtype, jnp.float32)
        distance_BHW = jnp.abs(fake.astype(wide) - jax.lax.stop_gradient(true).astype(wide)).mean(axis=-1)
        return jnp.sum(jnp.where(inside_BHW, distance_BHW, 0)), jnp.sum(inside_BHW.astype(wide))

    sums, places = [], []
    for a, b, where in zip(real, fake, inside, strict=True):
        maps = [of_map(*x) for x in zip(a.features, b.features, where.features, strict=True)]
        sums.append(jnp.stack([x for x, _ in maps]))
        places.append(jnp.stack([n for _, n in maps]))
    return tuple(sums), tuple(places)


def hinge_loss(real: Scores, fake: Scores) -> jax.Array:
    """Loss of the discriminators: hinge on both sides, mean over places and discriminators."""
    return jnp.mean(_mean(real.hinge_K, real.places_K) + _mean(fake.hinge_K, fake.places_K))


def adversarial_loss(fake: Scores) -> jax.Array:
    """Hinge loss of the generator: -D, mean over places and discriminators."""
    return -jnp.mean(_mean(fake.logits_K, fake.places_K))


def feature_loss(sums: Sequence[jax.Array], places: Sequence[jax.Array]) -> jax.Array:
    """Mean L1 of feature maps: each discriminator weighs the same, and so does each map of one."""
    return jnp.mean(jnp.stack([jnp.mean(_mean(s_J, n_J)) for s_J, n_J in zip(sums, places, strict=True)]))


def mel_loss(mel_I: jax.Array, frames_I: jax.Array) -> jax.Array:
    """Sum over the scales of the mean distance of a frame."""
    return jnp.sum(_mean(mel_I, frames_I))


def _mean(sums: jax.Array, counts: jax.Array) -> jax.Array:
    return sums / jnp.maximum(counts, 1)


def loss_terms(sums: AdversarialSums, loss: AdversarialLossConfig, names: Sequence[str]) -> dict[str, jax.Array]:
    """Losses and what the discriminators think, from sums.

    Returns:
        `loss` of the generator and its terms `mel`, `adversarial`, `feature`; `discriminator`, the discriminators'
        loss; and for each of them `NAME/real`, `NAME/fake` (mean logits), `NAME/margin` (their difference) and
        `NAME/accuracy` (0.5 if it cannot tell).
    """
    mel = mel_loss(sums.mel_I, sums.mel_frames_I)
    adversarial = adversarial_loss(sums.fake)
    feature = feature_loss(sums.features, sums.feature_places)
    total = loss.mel_weight * mel + loss.adversarial_weight * adversarial + loss.feature_weight * feature
    terms = {"loss": total, "mel": mel, "adversarial": adversarial, "feature": feature}
    terms["discriminator"] = hinge_loss(sums.real, sums.fake)
    real_K, fake_K = (_mean(side.logits_K, side.places_K) for side in (sums.real, sums.fake))
    correct_K = _mean(sums.real.correct_K + sums.fake.correct_K, sums.real.places_K + sums.fake.places_K)
    for k, name in enumerate(names):
        terms |= {f"{name}/real": real_K[k], f"{name}/fake": fake_K[k]}
        terms |= {f"{name}/margin": real_K[k] - fake_K[k], f"{name}/accuracy": correct_K[k]}
    return terms | {"margin": jnp.mean(real_K - fake_K), "accuracy": jnp.mean(correct_K)}
