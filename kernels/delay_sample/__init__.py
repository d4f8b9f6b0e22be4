"""One step of the patch decoder's sampling, for all channels at once."""

from mimo_jax.kernels.delay_sample.op import delay_sample

__all__ = ["delay_sample"]
