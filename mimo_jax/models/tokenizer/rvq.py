"""Residual vector quantiser, learned by exponential moving averages in sum form.

N vectors, D width of a vector, K entries of a level, R levels. A level keeps its entries, the moving sum of the vectors
that each entry was chosen for and their moving count. An update writes sum and count, and then the entries as sum /
count (counts Laplace-smoothed). So an entry that is replaced by writing its sum and count stays replaced, which writing
the entries alone would not achieve: the next moving average would bring the old one back. All arithmetic is float32
(float64 for float64 vectors), and the distances run at the highest matmul precision, since codes depend on it.

Source: report section 2.1 and the released code, except the sum form.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mimo_jax.config import RVQConfig
from mimo_jax.kernels.dispatch import Implementation
from mimo_jax.kernels.rvq_decode import rvq_decode
from mimo_jax.kernels.rvq_encode import rvq_encode
from mimo_jax.kernels.rvq_encode.reference import at_least_float32, nearest

Level = dict[str, jax.Array]  # entries [K, D], code_sum [K, D], count [K]
Codebook = dict[str, Level]

_HIGHEST = jax.lax.Precision.HIGHEST


class QuantizerOutput(NamedTuple):
    """One training or evaluation pass. The sums run over all vectors of the batch that reached a level.

    Attributes:
        quantized_ND: sum of the chosen entries; its gradient with respect to the input is the identity.
        codes_NR: int32; 0 where a level was not reached or the vector is padding.
        squared_error_R: sum over vectors of mean((entry - residual)^2) over D; differentiable in the input.
        vectors_R: number of vectors that reached a level.
        code_counts: for each level, how often each entry was chosen: [K].
        codebook: the state after the update.
        dead_R: entries of each level whose moving count fell below the threshold, before any revival; 0 in evaluation.
    """

    quantized_ND: jax.Array
    codes_NR: jax.Array
    squared_error_R: jax.Array
    vectors_R: jax.Array
    code_counts: tuple[jax.Array, ...]
    codebook: Codebook
    dead_R: jax.Array


def level_name(level: int) -> str:
    """Name of a level (counted from 0) in the codebook collection."""
    return f"level_{level:02d}"


def smoothed_counts(count_K: jax.Array, epsilon: float) -> jax.Array:
    """Laplace-smoothed counts with the same total: (n + eps) / (sum n + K eps) * sum n."""
    total = jnp.sum(count_K)
    return (count_K + epsilon) / (total + count_K.shape[0] * epsilon) * total


def entries(level: Level) -> jax.Array:
    """The codebook [K, D] of a level, at least float32 (a published one may be stored in bfloat16)."""
    return at_least_float32(level["entries"])


def level_from_sums(sums: Level, epsilon: float) -> Level:
    """The state whose codebook follows from `code_sum` and `count`."""
    entries_KD = sums["code_sum"] / smoothed_counts(sums["count"], epsilon)[:, None]
    return {"entries": entries_KD, "code_sum": sums["code_sum"], "count": sums["count"]}


def level_from_entries(entries_KD: jax.Array, count_K: jax.Array, epsilon: float) -> Level:
    """The state whose codebook is `entries_KD` at counts `count_K` (positive)."""
    code_sum_KD = entries_KD * smoothed_counts(count_K, epsilon)[:, None]
    return {"entries": entries_KD, "code_sum": code_sum_KD, "count": count_K}


def random_level(size: int, width: int, epsilon: float, key: jax.Array, dtype: Any = jnp.float32) -> Level:
    """Normal entries with counts of 1: what a codebook is before `init_codebooks` has seen a batch."""
    return level_from_entries(jax.random.normal(key, (size, width), dtype), jnp.ones((size,), dtype), epsilon)


def quantize(
    codebook: Codebook, x_ND: jax.Array, num_levels: int | None = None, implementation: Implementation = "auto"
) -> jax.Array:
    """Codes int32 [N, R] of the first `num_levels` levels (all by default); see `rvq_encode`."""
    return rvq_encode(x_ND, _all_entries(codebook), num_levels, implementation, sums=False).codes_NR


def dequantize(codebook: Codebook, codes_NR: jax.Array, implementation: Implementation = "auto") -> jax.Array:
    """Sum of the entries that the codes name, over the R >= 1 levels that they have: [N, D]; see `rvq_decode`."""
    return rvq_decode(codes_NR, _all_entries(codebook), implementation)


def _all_entries(codebook: Codebook) -> list[jax.Array]:
    return [codebook[level_name(i)]["entries"] for i in range(len(codebook))]


def draw_levels(config: RVQConfig, segment_ids_BM: jax.Array, key: jax.Array) -> jax.Array:
    """Quantiser dropout: the number of levels of each segment, the same at all its positions: int32 [B, M].

    A segment keeps all levels, or, with `dropout_probability`, a number drawn evenly from 1..R. Decoding from the first
    levels alone then is what the decoder was trained for.
    """
    shape = (segment_ids_BM.shape[0], segment_ids_BM.shape[1] + 1)
    key_drop, key_levels = jax.random.split(key)
    dropped = jax.random.bernoulli(key_drop, config.dropout_probability, shape)
    levels = jax.random.randint(key_levels, shape, 1, config.num_levels + 1)
    return jnp.take_along_axis(jnp.where(dropped, levels, config.num_levels), segment_ids_BM, axis=1)


def train_quantize(
    config: RVQConfig,
    codebook: Codebook,
    x_ND: jax.Array,
    mask_N: jax.Array,
    levels_N: jax.Array | None = None,
    key: jax.Array | None = None,
) -> QuantizerOutput:
    """Quantises with the codebook as it is, and updates the codebook from what was chosen.

    Args:
        config: the quantiser.
        codebook: state before the step.
        x_ND: vectors, padding included; float.
        mask_N: bool, False at padding, which contributes to nothing.
        levels_N: int32 number of levels of each vector (quantiser dropout); all by default.
        key: random key for the replacement of dead codes; None leaves the codebook as it is (evaluation).

    Returns:
        See `QuantizerOutput`. Every sum is over the whole batch, so on a mesh it is global.
    """
    x_ND = at_least_float32(x_ND)
    residual_ND, total_ND = x_ND, jnp.zeros_like(x_ND)
    codes, errors, reached, counts, dead, updated = [], [], [], [], [], {}
    for i in range(config.num_levels):
        level = codebook[level_name(i)]
        entries_KD = jax.lax.stop_gradient(entries(level))
        active_N = mask_N if levels_N is None else mask_N & (levels_N > i)
        active_N1 = active_N[:, None]
        input_ND = jax.lax.stop_gradient(residual_ND)
        code_N = nearest(input_ND, entries_KD)
        chosen_ND = jnp.where(active_N1, entries_KD[code_N], 0.0)

        error_N = jnp.mean((chosen_ND - residual_ND) ** 2, axis=1)
        errors.append(jnp.sum(jnp.where(active_N, error_N, 0.0)))
        reached.append(jnp.sum(active_N.astype(x_ND.dtype)))
        codes.append(jnp.where(active_N, code_N, 0))

        chosen_NK = jax.nn.one_hot(code_N, entries_KD.shape[0], dtype=x_ND.dtype) * active_N1
        counts.append(jnp.sum(chosen_NK, axis=0))
        if key is None:
            updated[level_name(i)] = level
            dead.append(jnp.zeros((), x_ND.dtype))
        else:
            sums_KD = jnp.matmul(chosen_NK.T, input_ND, precision=_HIGHEST)
            moved = moving_average(level, sums_KD, counts[-1], config.ema_decay)
            key_level = jax.random.fold_in(key, i)
            # A level that no vector reached (dropout, an empty batch) keeps its state.
            kept = reached[-1] == 0
            low = jnp.sum((moved["count"] < config.dead_code_threshold).astype(x_ND.dtype))
            dead.append(jnp.where(kept, 0, low))
            if revives(config):
                moved = revive_dead_codes(moved, input_ND, active_N, config.dead_code_threshold, key_level)
            moved = level_from_sums(moved, config.epsilon)
            updated[level_name(i)] = {name: jnp.where(kept, level[name], moved[name]) for name in level}

        total_ND = total_ND + chosen_ND
        # As published, the residual handed on is the straight-through value, so that later levels' commitment does
        # not reach the encoder.
        residual_ND = residual_ND - chosen_ND
        if config.commitment == "first" or config.reference_quirks:
            residual_ND = jax.lax.stop_gradient(residual_ND)

    return QuantizerOutput(
        quantized_ND=x_ND + jax.lax.stop_gradient(total_ND - x_ND),
        codes_NR=jnp.stack(codes, axis=1),
        squared_error_R=jnp.stack(errors),
        vectors_R=jnp.stack(reached),
        code_counts=tuple(counts),
        codebook=updated,
        dead_R=jnp.stack(dead),
    )


def revives(config: RVQConfig) -> bool:
    """Whether dead codes come back. What the released code does for it is undone by its own moving average."""
    return config.revival == "batch" and not config.reference_quirks


def moving_average(level: Level, sums_KD: jax.Array, counts_K: jax.Array, decay: float) -> Level:
    """A level's sums and counts, moved towards those of a batch; its entries are left out."""
    return {
        "code_sum": decay * level["code_sum"] + (1.0 - decay) * sums_KD,
        "count": decay * level["count"] + (1.0 - decay) * counts_K,
    }


def revive_dead_codes(level: Level, x_ND: jax.Array, mask_N: jax.Array, threshold: float, key: jax.Array) -> Level:
    """Replaces entries whose count is below `threshold` by vectors drawn from the batch without replacement.

    It does so in sums and counts. A replaced entry gets count = threshold and sum = threshold * vector: as if it had
    long been chosen just often enough to live. With fewer vectors than entries, vectors are used again. Nothing changes
    when `mask_N` is all False.
    """
    vectors_KD = _draw_vectors(x_ND, mask_N, level["count"].shape[0], key)
    dead_K = (level["count"] < threshold) & jnp.any(mask_N)
    return {
        "code_sum": jnp.where(dead_K[:, None], threshold * vectors_KD, level["code_sum"]),
        "count": jnp.where(dead_K, threshold, level["count"]),
    }


def kmeans(x_ND: jax.Array, mask_N: jax.Array, centroids_KD: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Lloyd's algorithm. A cluster without vectors keeps its centroid.

    Args:
        x_ND: vectors.
        mask_N: bool, False at padding.
        centroids_KD: start.
        iterations: number of assignments and of updates, at least 1.

    Returns:
        Centroids [K, D], and the counts [K] of the last assignment (before the last update).
    """

    def body(_, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        means_KD = state[0]
        chosen_NK = jax.nn.one_hot(nearest(x_ND, means_KD), means_KD.shape[0], dtype=x_ND.dtype) * mask_N[:, None]
        counts_K = jnp.sum(chosen_NK, axis=0)
        sums_KD = jnp.matmul(chosen_NK.T, x_ND, precision=_HIGHEST)
        return jnp.where(counts_K[:, None] > 0, sums_KD / jnp.maximum(counts_K, 1.0)[:, None], means_KD), counts_K

    counts_K = jnp.zeros((centroids_KD.shape[0],), x_ND.dtype)
    return jax.lax.fori_loop(0, iterations, body, (centroids_KD, counts_K))


@functools.partial(jax.jit, static_argnames=("config", "size"))
def _init_level(
    config: RVQConfig, size: int, x_ND: jax.Array, mask_N: jax.Array, key: jax.Array
) -> tuple[Level, jax.Array]:
    start_KD = _draw_vectors(x_ND, mask_N, size, key)
    means_KD, counts_K = kmeans(x_ND, mask_N, start_KD, config.kmeans_iterations)
    return started_level(config, means_KD, counts_K), x_ND - means_KD[nearest(x_ND, means_KD)]


def started_level(config: RVQConfig, means_KD: jax.Array, counts_K: jax.Array) -> Level:
    """The first state of a level, from the result of `kmeans`."""
    if config.reference_quirks:
        return {"entries": means_KD, "code_sum": means_KD, "count": counts_K}
    # An empty cluster needs a positive weight to keep its centroid; the first step may then find it dead.
    return level_from_entries(means_KD, jnp.maximum(counts_K, 1.0), config.epsilon)


def init_codebooks(config: RVQConfig, z_ND: jax.Array, mask_N: jax.Array, key: jax.Array) -> Codebook:
    """k-means start: the levels in sequence, each on what the levels before it leave over of a first batch.

    Args:
        config: the quantiser.
        z_ND: encoder outputs, padding included.
        mask_N: bool, False at padding.
        key: random key for the starting centroids, which are vectors of the batch.

    Returns:
        The codebook collection. Sums are centroid * count (the released code stores the centroid itself as the sum,
        which shrinks every codebook at its first update).
    """
    residual_ND = at_least_float32(z_ND)
    codebook = {}
    for i, size in enumerate(config.codebook_sizes):
        level, residual_ND = _init_level(config, size, residual_ND, mask_N, jax.random.fold_in(key, i))
        codebook[level_name(i)] = level
    return codebook


def usage_and_perplexity(code_counts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Share of the entries in use and perplexity of the codes of each level: two arrays [R].

    Args:
        code_counts: counts [K] of each level, summed over as many batches as wanted. A level without counts has
            perplexity 1.
    """
    used = jnp.stack([jnp.mean((counts > 0).astype(counts.dtype)) for counts in code_counts])
    perplexity = []
    for counts_K in code_counts:
        share_K = counts_K / jnp.maximum(jnp.sum(counts_K), 1.0)
        perplexity.append(jnp.exp(-jnp.sum(share_K * jnp.log(jnp.where(share_K > 0, share_K, 1.0)))))
    return used, jnp.stack(perplexity)


def _draw_vectors(x_ND: jax.Array, mask_N: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """Vectors [size, D] drawn without replacement from those in the mask; used again in turn where there are fewer."""
    priority_N = jnp.where(mask_N, jax.random.uniform(key, mask_N.shape), -1.0)
    drawn = jax.lax.top_k(priority_N, min(size, mask_N.shape[0]))[1]  # those in the mask first, in random order
    available = jnp.clip(jnp.sum(mask_N), 1, drawn.shape[0])
    return x_ND[drawn[jnp.arange(size) % available]]
