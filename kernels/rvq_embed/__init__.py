"""Sum of the embeddings of a patch's RVQ codes, with the delay pattern folded in."""

from mimo_jax.kernels.rvq_embed.op import rvq_embed

__all__ = ["rvq_embed"]
