"""Comparison with the reference implementation, array by array: `mimo-jax parity FOLDER`."""
