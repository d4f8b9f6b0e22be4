"""Compiler flags of each kind of accelerator, in one place.

They let communication run beside computation. JAX reads them when it starts its devices, so they are put into the
environment before that; a flag that the user has set there stays as it is.

Sources: github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py (TPU); docs.jax.dev,
gpu_performance_tips, and github.com/NVIDIA/JAX-Toolbox, GPU_performance.md (GPU).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, MutableMapping

# Read by libtpu alone, from LIBTPU_INIT_ARGS.
TPU: Mapping[str, str] = {
    # Communication is begun as early, and awaited as late, as the program allows.
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    # Weights are gathered beside matrix products. Not inside them (xla_tpu_enable_async_collective_fusion): compilers
    # for other generations than v5e refuse that, and which one it is cannot be known here.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Sums of gradients between slices: one after another, behind the layers that are still to come.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

# Read by every XLA, from XLA_FLAGS; one that does not know a flag ends the process.
GPU: Mapping[str, str] = {
    # As above.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # The weights of the next layer are gathered, and gradients of the last one summed, beside a layer of the scan.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
}

# Matrix products over `tensor` are cut, so that each part is sent while the next one is computed (collective matmul).
TPU_TENSOR: Mapping[str, str] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "0"}
GPU_TENSOR: Mapping[str, str] = {
    "xla_gpu_threshold_for_windowed_einsum_mib": "0",
    "xla_gpu_multi_streamed_windowed_einsum": "true",
}


def tpu_flags(tensor: bool, given: str = "") -> dict[str, str]:
    """The flags for TPUs, but for those that `given` names (a value of LIBTPU_INIT_ARGS)."""
    named = _named(given)
    return {k: v for k, v in {**TPU, **(TPU_TENSOR if tensor else {})}.items() if k not in named}


def set_flags(environment: MutableMapping[str, str], tensor: bool) -> None:
    """Adds the flags of the accelerators that JAX is installed for.

    Args:
        environment: `os.environ`, before JAX starts its devices. JAX_PLATFORMS=cpu there means that none are added.
        tensor: whether matrix products are cut over a mesh axis.
    """
    if environment.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return
    if importlib.util.find_spec("libtpu"):
        _add(environment, "LIBTPU_INIT_ARGS", tpu_flags(tensor))
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        _add(environment, "XLA_FLAGS", {**GPU, **(GPU_TENSOR if tensor else {})})


def _add(environment: MutableMapping[str, str], variable: str, flags: Mapping[str, str]) -> None:
    given = environment.get(variable, "")
    named = _named(given)
    environment[variable] = " ".join([*given.split(), *(f"--{k}={v}" for k, v in flags.items() if k not in named)])


def _named(given: str) -> set[str]:
    return {word.removeprefix("--").partition("=")[0] for word in given.split()}
