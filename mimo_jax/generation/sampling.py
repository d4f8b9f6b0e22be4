"""Samplers of the text head and of the patch decoder.

B requests, V vocabulary entries. Every setting is an array over requests, so that one compiled step serves requests
with different settings, and every request has a key of its own, so that its draws do not depend on its neighbours.

Source: released inference code (temperature, then top-k, then top-p, then the removal of ids); settings of
`spec/mimo_audio.md` section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import Checked
from mimo_jax.kernels.delay_sample.draw import Rules, draw, keep, uniform

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
    rules = Rules.of(jnp.ones_like(params.temperature_B), params.top_k_B, params.top_p_B)
    scores_BV, kept_BV = keep(logits_BV, logits_BV.shape[-1], *_columns(params), rules)
    return jnp.where(kept_BV, scores_BV, -jnp.inf)


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
    removed = jnp.zeros((), bool) if removed_BV is None else removed_BV
    allowed_BV = jnp.broadcast_to(~removed, logits_BV.shape)
    u_B1 = uniform(jax.vmap(jax.random.bits)(keys_B))[:, None]
    size = logits_BV.shape[-1]
    return draw(logits_BV, size, u_B1, *_columns(params), Rules.of(*params), allowed_BV)[:, 0]


def _columns(params: SamplingParams) -> Iterator[Array]:
    return (x[:, None] for x in params)
