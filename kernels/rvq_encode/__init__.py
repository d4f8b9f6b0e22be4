"""Residual vector quantisation: the nearest entry of each level, of what the levels before it leave over."""

from mimo_jax.kernels.rvq_encode.op import rvq_encode

__all__ = ["rvq_encode"]
