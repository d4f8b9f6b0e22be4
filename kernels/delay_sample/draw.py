"""The draw of `delay_sample`, in operations that JAX, Mosaic and Triton all have.

Nothing is sorted: the score that top-k or top-p ends at is found bit by bit, and the drawn id by halving. Each step of
either is one masked sum over the row.

Axes: N rows (each a channel of a request), L ids of a row.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_LOWEST = np.iinfo(np.int32).min


class Run(NamedTuple):
    """Neighbouring channels of one size, which are drawn together."""

    first: int  # the first of them
    channels: int  # how many
    size: int  # ids of each, "empty" included
    start: int  # column where the first begins


class Pattern(NamedTuple):
    """Which channels there are, and when they are active."""

    sizes: tuple[int, ...]
    delays: tuple[int, ...]
    group_size: int

    @property
    def starts(self) -> list[int]:
        """Column where each channel begins."""
        return list(itertools.accumulate(self.sizes[:-1], initial=0))

    @property
    def runs(self) -> Iterator[Run]:
        first = 0
        for size, group in itertools.groupby(self.sizes):
            channels = len(list(group))
            yield Run(first, channels, size, self.starts[first])
            first += channels

    @property
    def most_active(self) -> int:
        """Channels that are active at once, at most."""
        return max(sum(d <= step < d + self.group_size for d in self.delays) for step in self.delays)

    def cost(self, logits_BV: jax.Array, width: int, row_bytes: int) -> dict[str, int]:
        """What a kernel does where all rules are used: a `CostEstimate`.

        A step of a search compares, chooses and adds for each column. Of the table, `row_bytes` are read per code.
        """
        B, V = logits_BV.shape
        steps = sum(run.channels * run.size * 2 * (32 + run.size.bit_length()) for run in self.runs)
        small = 2 * len(self.sizes) + 3 + width  # numbers of 4 bytes: bits and codes, params, embedding
        moved = logits_BV.nbytes + B * (4 * small + self.most_active * row_bytes)
        return dict(flops=3 * B * steps, transcendentals=2 * B * V, bytes_accessed=moved)

    def active(self, channel: int, step: jax.Array) -> jax.Array:
        """bool scalar."""
        return (step >= self.delays[channel]) & (step < self.delays[channel] + self.group_size)

    def any_active(self, run: Run, step: jax.Array) -> jax.Array:
        """bool scalar."""
        return functools.reduce(jnp.logical_or, (self.active(run.first + i, step) for i in range(run.channels)))


class Rules(NamedTuple):
    """Which rules some request uses, so that nobody pays for the others: bool scalars."""

    draws: jax.Array  # a temperature above 0
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def of(cls, temperature_B: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> Rules:
        draws_B = temperature_B > 0
        return cls(jnp.any(draws_B), jnp.any(draws_B & (top_k_B > 0)), jnp.any(draws_B & (top_p_B > 0)))


def uniform(bits: jax.Array) -> jax.Array:
    """float32 multiples of 2^-24 in [0, 1), from uint32."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def keep(
    logits_NL: jax.Array,
    size: int,
    temperature_N1: jax.Array,
    top_k_N1: jax.Array,
    top_p_N1: jax.Array,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    """Temperature, top-k and top-p; arguments as in `draw`.

    Returns:
        Scores float32 [N, L], divided by the temperature (where it is 0, undivided), and bool [N, L], which of them
        stay.
    """
    ids_NL = jax.lax.broadcasted_iota(jnp.int32, logits_NL.shape, 1)
    divisor_N1 = jnp.where(temperature_N1 > 0, temperature_N1, 1.0)
    scores_NL = jnp.where(ids_NL < size, logits_NL.astype(jnp.float32) / divisor_N1, -jnp.inf)
    keys_NL = _keys(scores_NL)
    lowest_N1 = jnp.full_like(top_k_N1, _LOWEST)

    def kth() -> jax.Array:
        """Key of the k-th largest score."""
        k_N1 = jnp.minimum(top_k_N1, size).astype(jnp.float32)
        key_N1 = _largest_key(lambda key_N1: _sum(keys_NL >= key_N1, 1.0) >= k_N1, lowest_N1)
        return jnp.where(top_k_N1 > 0, key_N1, _LOWEST)

    kept_NL = keys_NL >= jax.lax.cond(rules.top_k, kth, lambda: lowest_N1)

    def nucleus() -> tuple[jax.Array, jax.Array]:
        """Key of the least score of the nucleus, and the first id with that score that is part of it."""
        top_N1 = jnp.max(scores_NL, axis=1, keepdims=True)
        mass_NL = jnp.where(kept_NL, jnp.exp(scores_NL - top_N1), 0.0)
        limit_N1 = (1.0 - top_p_N1) * _sum(True, mass_NL)
        key_N1 = _largest_key(lambda key_N1: _sum(keys_NL < key_N1, mass_NL) <= limit_N1, lowest_N1)
        key_N1 = jnp.minimum(key_N1, _keys(top_N1))  # the best always stays
        tied_NL = keys_NL == key_N1
        last_N1 = jnp.max(jnp.where(tied_NL, ids_NL, 0), axis=1, keepdims=True)

        def split() -> jax.Array:
            below_N1, tied_mass_NL = _sum(keys_NL < key_N1, mass_NL), jnp.where(tied_NL, mass_NL, 0.0)

            def stays(id_N1: jax.Array) -> jax.Array:
                return below_N1 + _sum(ids_NL <= id_N1, tied_mass_NL) > limit_N1

            return _lowest_id(stays, last_N1, size)

        first_N1 = jax.lax.cond(jnp.max(_sum(tied_NL, 1.0), initial=0.0) > 1, split, lambda: last_N1)
        return jnp.where(top_p_N1 > 0, key_N1, _LOWEST), first_N1

    key_N1, first_N1 = jax.lax.cond(rules.top_p, nucleus, lambda: (lowest_N1, jnp.zeros_like(lowest_N1)))
    return scores_NL, kept_NL & ((keys_NL > key_N1) | ((keys_NL == key_N1) & (ids_NL >= first_N1)))


def draw(
    logits_NL: jax.Array,
    size: int,
    u_N1: jax.Array,
    temperature_N1: jax.Array,
    top_k_N1: jax.Array,
    top_p_N1: jax.Array,
    rules: Rules,
    allowed_NL: jax.Array | None = None,
) -> jax.Array:
    """Draws the code of each row by the rules of `op`.

    Args:
        logits_NL: scores of the ids; what follows the first `size` is padding.
        size: ids.
        u_N1: float32 in [0, 1).
        temperature_N1: settings of each row, like `top_k_N1` and `top_p_N1`.
        rules: those that some row uses.
        allowed_NL: bool, ids that may come out, at least one; by default all but the last, which is "empty".

    Returns:
        int32 [N, 1], an allowed id whatever the logits are.
    """
    ids_NL = jax.lax.broadcasted_iota(jnp.int32, logits_NL.shape, 1)
    if allowed_NL is None:
        allowed_NL = ids_NL < size - 1
    open_NL = jnp.where(allowed_NL, logits_NL.astype(jnp.float32), -jnp.inf)
    is_less_NL = open_NL < jnp.max(open_NL, axis=1, keepdims=True)  # false if it is NaN
    best_N1 = jnp.min(jnp.where(allowed_NL, jnp.where(is_less_NL, size - 1, ids_NL), size - 1), axis=1, keepdims=True)

    def drawn() -> jax.Array:
        scores_NL, kept_NL = keep(logits_NL, size, temperature_N1, top_k_N1, top_p_N1, rules)
        # "empty" has had its share of the nucleus. What is left is weighed anew: beside it, all may have been nothing.
        open_NL = jnp.where(kept_NL & allowed_NL, scores_NL, -jnp.inf)
        mass_NL = jnp.exp(open_NL - jnp.max(open_NL, axis=1, keepdims=True))
        last_N1 = jnp.max(jnp.where(mass_NL > 0, ids_NL, -1), axis=1, keepdims=True)
        target_N1 = u_N1 * _sum(True, mass_NL)
        # These sums never fall from one id to the next, and an id without mass leaves the sum as it was, to the last
        # bit: it cannot be the first to exceed the target.
        drawn_N1 = _lowest_id(lambda id_N1: _sum(ids_NL <= id_N1, mass_NL) > target_N1, last_N1, size)
        return jnp.where((temperature_N1 > 0) & (last_N1 >= 0), drawn_N1, best_N1)

    return jax.lax.cond(rules.draws, drawn, lambda: best_N1)


def _keys(scores: jax.Array) -> jax.Array:
    """int32 in the order of the scores."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)  # the zeros are equal
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _sum(where_NL: jax.Array | bool, x_NL: jax.Array | float) -> jax.Array:
    """float32 [N, 1]."""
    return jnp.sum(jnp.where(where_NL, x_NL, 0.0), axis=1, keepdims=True)


def _largest_key(holds: Callable[[jax.Array], jax.Array], lowest_N1: jax.Array) -> jax.Array:
    """The largest int32 that a condition holds for, which holds for the lowest int32 and up to some number."""

    def body(n: jax.Array, key_N1: jax.Array) -> jax.Array:
        higher_N1 = key_N1 + jax.lax.shift_left(jnp.int32(1), (31 - n).astype(jnp.int32))
        return jnp.where(holds(higher_N1), higher_N1, key_N1)

    return jax.lax.fori_loop(0, 32, body, lowest_N1)


def _lowest_id(holds: Callable[[jax.Array], jax.Array], last_N1: jax.Array, size: int) -> jax.Array:
    """The lowest id of 0..last that a condition holds for, which holds from some id on, the last one included."""

    def body(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_N1, high_N1 = bounds
        middle_N1 = (low_N1 + high_N1) >> 1
        found_N1 = holds(middle_N1)
        return jnp.where(found_N1, low_N1, middle_N1 + 1), jnp.where(found_N1, middle_N1, high_N1)

    return jax.lax.fori_loop(0, (size - 1).bit_length(), body, (jnp.zeros_like(last_N1), last_N1))[1]
