"""The residual vector quantiser while it learns."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import RVQConfig
from mimo_jax.kernels.rvq_encode.reference import squared_distances
from mimo_jax.models.tokenizer import rvq
from mimo_jax.parity.harness import Case

# Squared distances in float32 are exact to about this (README of the arrays).
DISTANCE_TOLERANCE = 1e-5


def margins(codebook: rvq.Codebook, z_ND: Any, codes_NR: np.ndarray) -> np.ndarray:
    """Second-best minus best squared distance [N, R] on the way that `codes_NR` take."""
    return np.asarray(_margins(codebook, z_ND, codes_NR))


@jax.jit
def _margins(codebook: rvq.Codebook, residual_ND: jax.Array, codes_NR: jax.Array) -> jax.Array:
    gaps = []
    for r in range(codes_NR.shape[1]):
        entries_KD = rvq.entries(codebook[rvq.level_name(r)])
        best = jax.lax.top_k(-squared_distances(residual_ND, entries_KD), 2)[0]
        gaps.append(best[:, 0] - best[:, 1])
        residual_ND = residual_ND - entries_KD[codes_NR[:, r]]
    return jnp.stack(gaps, axis=1)


def decided(margins_NR: np.ndarray, tolerance: float) -> np.ndarray:
    """bool [N, R]: the codes of each vector before its first margin below the tolerance."""
    return np.logical_and.accumulate(margins_NR > tolerance, axis=1)


def training(case: Case) -> None:
    """Two steps, one evaluation, k-means, and the first step of a codebook that has not been started."""
    inputs = case.inputs("inputs.npz")
    meta = json.loads(str(inputs["meta"]))
    names = {"entries": "embed", "code_sum": "embed_avg", "count": "cluster_size"}
    start = {
        rvq.level_name(i): {ours: jnp.asarray(inputs[f"q{i}_{theirs}"]) for ours, theirs in names.items()}
        for i in range(len(meta["sizes"]))
    }
    config = RVQConfig(tuple(meta["sizes"]), meta["decay"], dead_code_threshold=0.0, reference_quirks=True)

    def run(config: RVQConfig, record: bool) -> rvq.Codebook:
        codebook = start
        for step in range(meta["steps"]):
            x_ND = jnp.asarray(inputs[f"x{step}"])
            if record:
                _before(case, f"step{step}", codebook, x_ND)
            out, commit_grad, straight_grad = _step(config, codebook, x_ND, jnp.asarray(inputs["cotangent"]))
            if record:
                _after(case, f"step{step}", codebook, x_ND, out, commit_grad, straight_grad)
                for i, level in enumerate(out.codebook.values()):
                    for ours, theirs in names.items():
                        case.check(f"step{step}/after/q{i}_{theirs}", level[ours])
            codebook = out.codebook
        return codebook

    end = run(config, record=True)
    for name in case.names("threshold"):
        numbers = re.fullmatch(r"(\d+)_state_equals_threshold(\d+)_state", name)
        if numbers:
            states = [
                end if n == "0" else run(dataclasses.replace(config, dead_code_threshold=float(n)), record=False)
                for n in numbers.groups()
            ]
            case.check(f"threshold{name}", np.bool_(all(map(np.array_equal, *map(jax.tree.leaves, states)))))

    x_ND = jnp.asarray(inputs["x0"])
    codes_NR = rvq.quantize(start, x_ND)
    case.check("eval/indices", codes_NR.T, _ties(case, "eval/indices", start, x_ND))
    case.check("eval/quantized", rvq.dequantize(start, codes_NR))
    case.check("eval/losses", np.zeros((len(start), 1), np.float32))  # nothing is learned
    _kmeans(case, inputs, config)


@functools.partial(jax.jit, static_argnums=0)
def _step(config: RVQConfig, codebook: rvq.Codebook, x_ND: jax.Array, cotangent_ND: jax.Array) -> tuple[Any, ...]:
    mask_N = jnp.ones(len(x_ND), bool)
    key = jax.random.key(0)

    def commitment(x_ND: jax.Array) -> tuple[jax.Array, Any]:
        out = rvq.train_quantize(config, codebook, x_ND, mask_N, key=key)
        return (out.squared_error_R / out.vectors_R).mean(), out

    def straight(x_ND: jax.Array) -> jax.Array:
        return (rvq.train_quantize(config, codebook, x_ND, mask_N, key=key).quantized_ND * cotangent_ND).sum()

    gradient, out = jax.grad(commitment, has_aux=True)(x_ND)
    return out, gradient, jax.grad(straight)(x_ND)


def _before(case: Case, name: str, codebook: rvq.Codebook, x_ND: jax.Array) -> None:
    for i, level in enumerate(codebook.values()):
        for threshold in case.names(f"{name}/q{i}_expired_at_threshold"):
            dead = np.asarray(level["count"]) < float(threshold)
            case.check(f"{name}/q{i}_expired_at_threshold{threshold}", dead)


def _after(
    case: Case, name: str, codebook: rvq.Codebook, x_ND: jax.Array, out: Any, commit: Any, straight: Any
) -> None:
    losses_R = out.squared_error_R / out.vectors_R
    case.check(f"{name}/quantized", out.quantized_ND)
    case.check(f"{name}/indices", out.codes_NR.T, _ties(case, f"{name}/indices", codebook, x_ND))
    case.check(f"{name}/commit_losses", losses_R[:, None])
    case.check(f"{name}/commit_loss_mean", losses_R.mean())
    case.check(f"{name}/grad_commit_mean_wrt_x", commit)
    case.check(f"{name}/grad_quantized_dot_cotangent_wrt_x", straight)
    for layer in case.names(f"{name}/quantized_after_layer"):
        part = rvq.dequantize(codebook, out.codes_NR[:, : int(layer) + 1])
        case.check(f"{name}/quantized_after_layer{layer}", part)


def _ties(case: Case, name: str, codebook: rvq.Codebook, x_ND: jax.Array) -> Any:
    if name not in case.expected:
        return True
    codes_NR = case.expected[name].reshape(-1, len(x_ND)).T
    return decided(margins(codebook, x_ND, codes_NR), DISTANCE_TOLERANCE).T.reshape(case.expected[name].shape)


def _kmeans(case: Case, inputs: dict[str, np.ndarray], config: RVQConfig) -> None:
    x_ND = jnp.asarray(inputs["kmeans_samples"])
    start_KD = x_ND[inputs["kmeans_init_index"]]
    mask_N = jnp.ones(len(x_ND), bool)
    for name in case.names("kmeans/iters"):
        iterations = int(name.partition("_")[0])
        means_KD, counts_K = rvq.kmeans(x_ND, mask_N, start_KD, iterations)
        case.check(f"kmeans/iters{iterations}_means", means_KD)
        case.check(f"kmeans/iters{iterations}_bins", np.asarray(counts_K).astype(np.int64))

    config = dataclasses.replace(config, codebook_sizes=(len(start_KD),))
    level = rvq.started_level(config, *rvq.kmeans(x_ND, mask_N, start_KD, config.kmeans_iterations))
    codebook = {rvq.level_name(0): level}
    out = _step(config, codebook, x_ND, x_ND)[0]
    after, name = out.codebook[rvq.level_name(0)], "kmeans/first_train_forward_"
    case.check(f"{name}indices", out.codes_NR[:, 0], _ties(case, f"{name}indices", codebook, x_ND))
    case.check(f"{name}quantized", out.quantized_ND)
    case.check(f"{name}after_embed", after["entries"])
    case.check(f"{name}after_embed_avg", after["code_sum"])
    case.check(f"{name}after_cluster_size", after["count"])
    case.check(f"{name}after_inited", np.ones(1, np.float32))  # a codebook of ours has always been started
