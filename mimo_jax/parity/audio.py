"""Resampling."""

from __future__ import annotations

from mimo_jax.audio.sinc import resample_sinc
from mimo_jax.parity.harness import Case


def resampling(case: Case) -> None:
    """`out_A_from_B` is `in_B` at A Hz."""
    inputs = case.inputs("resample_inputs.npz")
    for name in case.names("out_"):
        target, source = name.split("_from_")
        case.check(f"out_{name}", resample_sinc(inputs[f"in_{source}"], int(source), int(target)))
