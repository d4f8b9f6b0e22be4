"""What stands between two steps of the patch decoder: codes drawn from the logits, and embedded for the next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mimo_jax.kernels.delay_sample import reference
from mimo_jax.kernels.delay_sample.draw import Pattern
from mimo_jax.kernels.dispatch import Implementation, chosen, if_cut
from mimo_jax.sharding import BATCH_AXES, mesh_that_divides


def delay_sample(
    logits_BV: jax.Array,
    bits_BR: jax.Array,
    step: jax.Array | int,
    table_VE: jax.Array,
    params: tuple[jax.Array, jax.Array, jax.Array],
    *,
    sizes: Sequence[int],
    delays: Sequence[int],
    group_size: int,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Draws the codes of one step of every request, and sums up their embeddings.

    Channel r is active if `delays[r] <= step < delays[r] + group_size`. An active channel draws by the published rules
    (`mimo_jax.generation.sampling`): temperature, top-k, top-p, and only then is its last id ("empty") taken away;
    where that takes all, and at temperature 0, the best other id comes out. The draw inverts the cumulative
    distribution: the lowest id i with mass(0..i) > u * mass, u being the upper 24 bits of the channel's number.

    Args:
        logits_BV: the logits of all channels side by side, V = sum of `sizes`. Scores are float32, as published.
        bits_BR: uint32, one random number for each channel.
        step: int32 scalar, may be traced.
        table_VE: the embeddings of the channels one below the other. Under a mesh, kernels want it whole and B is cut
            over the batch axes.
        params: temperature (float32), top-k (int32; 0 is off) and top-p (float32; 0 is off) of the requests, each [B].
        sizes: ids of each channel, "empty" included: at least 2.
        delays: steps by which each channel is late.
        group_size: frames of a patch.
        implementation: the kernels take float32 and bfloat16; whatever else comes goes to plain JAX.

    Returns:
        Codes int32 [B, R], 0 for inactive channels; and the sum [B, E] of the rows of the active ones, float32 (float64
        for a float64 table).

    Raises:
        ValueError: shapes do not fit.
    """
    pattern = Pattern(tuple(sizes), tuple(delays), group_size)
    B, R = logits_BV.shape[0], len(pattern.sizes)
    fits = (
        logits_BV.shape == (B, sum(pattern.sizes))
        and table_VE.shape[:-1] == logits_BV.shape[1:]
        and bits_BR.shape == (B, R)
        and [x.shape for x in params] == [(B,)] * 3
    )
    if not fits:
        raise ValueError(
            f"delay_sample: expected logits [B, {sum(pattern.sizes)}], bits [B, {R}], a table of {sum(pattern.sizes)} "
            f"rows and three params [B], got {logits_BV.shape}, {bits_BR.shape}, {table_VE.shape} and "
            f"{[x.shape for x in params]}"
        )
    if len(pattern.delays) != R or min(pattern.sizes, default=0) < 2:
        raise ValueError(f"delay_sample: expected sizes of at least 2, each with its delay, got {sizes} and {delays}")

    wide = {logits_BV.dtype, table_VE.dtype} - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
    mesh = mesh_that_divides(batch=B)
    which = "xla" if wide or B == 0 else if_cut(chosen(implementation), mesh)
    run: Callable[..., Any] = reference.delay_sample
    if which == "triton":
        from mimo_jax.kernels.delay_sample import gpu

        run = gpu.delay_sample
    elif which != "xla":
        from mimo_jax.kernels.delay_sample import tpu

        def run(*arguments: Any) -> Any:
            return tpu.delay_sample(*arguments, interpret=which == "interpret")

    def body(*arguments: Any) -> Any:
        return run(*arguments, pattern)

    if mesh is not None and which != "xla":
        batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        specs = (batch, batch, whole, whole, (batch,) * 3)
        body = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(batch, batch), check_vma=False)
    return body(logits_BV, bits_BR, jnp.asarray(step, jnp.int32), table_VE, tuple(params))
