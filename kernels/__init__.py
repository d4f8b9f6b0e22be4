"""Pallas kernels, imported as `mimo_jax.kernels`."""
