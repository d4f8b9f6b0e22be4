"""Samplers of the text head and of the patch decoder.

B requests, V vocabulary entries. Every setting is an array over requests, so that one compiled step serves requests
with different settings, and every request has a key of its own, so that its draws do not depend on its neighbours.

Source: released inference code (temperature, then top-k, then top-p, then the removal of ids); settings of
`spec/mimo_audio.md` section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import Checked

Array = jax.Array


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """How one request draws its ids."""

    temperature: float = 1.0  # scores are divided by it; 0 is greedy (the other settings then change nothing)
    top_k: int = 0  # only scores that reach the k-th largest stay, ties included; 0 keeps all
    # Of the ascending cumulative probability, what is at most 1 - top_p goes; the best always stays. 1 drops only what
    # underflows to zero, 0 turns the rule off.
    top_p: float = 0.0

    def __post_init__(self) -> None:
        self._require(0 <= self.temperature < np.inf, "temperature", "a non-negative number")
        self._require(0 <= self.top_k < 2**31, "top_k", "an integer in 0..2^31-1")
        self._require(0 <= self.top_p <= 1, "top_p", "a number in [0, 1]")


GREEDY = SamplingConfig(temperature=0.0)
DEFAULT_TEXT = SamplingConfig(temperature=0.6, top_k=50, top_p=0.95)
TTS_TEXT = SamplingConfig(temperature=0.6, top_p=1.0)
DIALOGUE_TEXT = SamplingConfig(temperature=0.6, top_p=0.95)
UNDERSTANDING_TEXT = SamplingConfig(temperature=0.3, top_p=0.95)
CHAT_TEXT = SamplingConfig(temperature=0.4, top_p=0.95)
PATCHES = SamplingConfig(temperature=0.9, top_p=0.95)


class SamplingParams(NamedTuple):
    """`SamplingConfig` of B requests as arrays: float32, int32, float32, each [B]."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array


def sampling_params(configs: Sequence[SamplingConfig]) -> SamplingParams:
    """Stacks the settings of B requests."""
    return SamplingParams(
        jnp.asarray([c.temperature for c in configs], jnp.float32),
        jnp.asarray([c.top_k for c in configs], jnp.int32),
        jnp.asarray([c.top_p for c in configs], jnp.float32),
    )


def process_logits(logits_BV: Array, params: SamplingParams) -> Array:
    """Applies temperature, top-k and top-p; what they drop becomes -inf.

    Args:
        params: settings; requests of temperature 0 keep their scores undivided.

    Returns:
        float32 [B, V].
    """
    temperature_B = jnp.where(params.temperature_B > 0, params.temperature_B, 1.0)
    scores_BV = logits_BV.astype(jnp.float32) / temperature_B[:, None]
    size = scores_BV.shape[-1]
    order_BV = jnp.argsort(scores_BV, axis=-1)  # ascending and stable: the order in which top-p drops
    ascending_BV = jnp.take_along_axis(scores_BV, order_BV, axis=-1)

    k_B = jnp.where(params.top_k_B > 0, jnp.minimum(params.top_k_B, size), size)
    kth_B1 = jnp.take_along_axis(ascending_BV, (size - k_B)[:, None], axis=-1)
    ascending_BV = jnp.where(ascending_BV >= kth_B1, ascending_BV, -jnp.inf)

    cumulative_BV = jnp.cumsum(jax.nn.softmax(ascending_BV, axis=-1), axis=-1)
    top_p_B1 = params.top_p_B[:, None]
    dropped_BV = (cumulative_BV <= 1.0 - top_p_B1) & (top_p_B1 > 0) & (jnp.arange(size) < size - 1)
    ascending_BV = jnp.where(dropped_BV, -jnp.inf, ascending_BV)
    return jnp.put_along_axis(jnp.zeros_like(scores_BV), order_BV, ascending_BV, axis=-1, inplace=False)


def sample(keys_B: Array, logits_BV: Array, params: SamplingParams, removed_BV: Array | None = None) -> Array:
    """Draws one id per request.

    The removal comes after the other rules, as published. Where it takes the whole nucleus away (the published sampler
    fails there), the best remaining id is taken.

    Args:
        keys_B: one typed key per request.
        params: settings; temperature 0 takes the best remaining id.
        removed_BV: bool, ids that must not come out; [V] or [1, V] serves all requests. None removes nothing.

    Returns:
        int32 [B].
    """
    logits_BV = logits_BV.astype(jnp.float32)
    allowed_BV = logits_BV if removed_BV is None else jnp.where(removed_BV, -jnp.inf, logits_BV)
    best_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        processed_BV = jnp.where(jnp.isneginf(allowed_BV), -jnp.inf, process_logits(logits_BV, params))
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, processed_BV).astype(jnp.int32)
        usable_B = jnp.any(processed_BV > -jnp.inf, axis=-1) & (params.temperature_B > 0)
        return jnp.where(usable_B, drawn_B, best_B)

    # A greedy batch does not pay for the sort of the vocabulary.
    return jax.lax.cond(jnp.any(params.temperature_B > 0), draw, lambda: best_B)
