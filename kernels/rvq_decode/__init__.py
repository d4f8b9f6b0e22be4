"""The sum of the codebook entries that RVQ codes name."""

from mimo_jax.kernels.rvq_decode.op import rvq_decode

__all__ = ["rvq_decode"]
