"""What a language-model job takes of the memory of each device: arithmetic, nothing is compiled.

A device works on b = rows / accumulation / (data * fsdp) rows at a time. Per device:

    parameters    every array, cut as `sharding.LOGICAL_RULES` say; the base of a LoRA run in its own dtype
    optimiser     two moments of what is trained
    gradients     one of what is trained, two where steps are accumulated
    weights       copies to work with: two layers of the LLM in the compute dtype; a chunk of the text head's columns,
                  and the gradients of both chunk and head if it is trained
    activations   of every layer of LLM (b L positions), patch encoder (b C G) and patch decoder (b C T) what the remat
                  policy keeps: its input (`full`; with `offload` those of two layers of the LLM, the others wait in the
                  host's memory), the products of matrices too (`dots`), or all it computes (`none`)
    working set   the largest of: one layer of a stack computed anew, with its gradients; a chunk of text logits; the
                  logits of one audio channel
    batch         the rows, twice (the next ones are on their way)

XLA may do better (fusion) or worse (fragments, buffers of collectives): a test holds the sum against what it reserves.
B rows, L positions, C patches, G frames, T steps of the patch decoder, as in the models; stacks over patches work on
`compute.patch_chunk` of them at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from mimo_jax.chips import Topology
from mimo_jax.config import AudioLMConfig, ComputeConfig, LMTrainConfig, TransformerConfig
from mimo_jax.models.attention import DENSE_SCORES
from mimo_jax.models.audio_lm import abstract_params
from mimo_jax.sharding import MESH_AXES, check_batch, mesh_shape, shardings
from mimo_jax.training import lora
from mimo_jax.training.cross_entropy import columns_at_once

_ARRAYS: dict[Any, tuple[dict[str, float], int, int, int]] = {}  # what `_arrays` gave: a search asks many times
_BLOCK_ROWS = 128  # queries of a block of chunked attention in long rows


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        parts: bytes by name.
        available: bytes a program can use.
        trained: parameters that are trained, in all.
        parameters: all of them.
        checkpoint: bytes of one checkpoint: what a run holds, and the moments of what it trains.
        accumulation: smallest `run.accumulation` with which the job fits; 0 if there is none.
    """

    parts: Mapping[str, int]
    available: int
    trained: int
    parameters: int
    checkpoint: int
    accumulation: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def advice(self) -> str:
        """How it would fit, as the end of a sentence."""
        if self.accumulation:
            return f"; with --config.run.accumulation={self.accumulation} it would"
        return " with any run.accumulation: cut the model over more devices, or train less of it"


def plan_memory(cfg: LMTrainConfig, topology: Topology) -> MemoryPlan:
    """The plan of a job.

    Raises:
        ConfigError: the job cannot be placed on so many devices.
    """
    shape = mesh_shape(cfg.mesh, topology.devices)
    available = topology.chip.hbm_bytes
    key = (
        cfg.model,
        cfg.compute.param_dtype,
        cfg.compute.scan_layers,
        cfg.lora,
        cfg.learning_rates,
        cfg.optimizer,
        shape,
    )
    if key not in _ARRAYS:
        _ARRAYS[key] = _arrays(cfg, shape)
    fixed, trained, parameters, checkpoint = _ARRAYS[key]
    data = shape[0] * shape[1]
    check_batch(cfg.data.rows, cfg.run.accumulation, data)

    def parts(accumulation: int) -> dict[str, int]:
        rows = cfg.data.rows // (accumulation * data)
        gradients = fixed["gradients"] * (2 if accumulation > 1 else 1)
        return {k: int(v) for k, v in (fixed | {"gradients": gradients} | _work(cfg, rows, shape)).items()}

    possible = [n for n in range(1, cfg.data.rows // data + 1) if cfg.data.rows % (n * data) == 0]
    fitting = next((n for n in possible if sum(parts(n).values()) <= available), 0)
    return MemoryPlan(parts(cfg.run.accumulation), available, trained, parameters, checkpoint, fitting)


def _arrays(cfg: LMTrainConfig, shape: tuple[int, ...]) -> tuple[dict[str, float], int, int, int]:
    """Bytes of parameters, moments and gradients; trained parameters; all of them; bytes of a checkpoint."""
    mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    rates = dataclasses.asdict(cfg.learning_rates)
    everything = _shapes(cfg.model, cfg.compute.param_dtype, cfg.compute.scan_layers)
    learnt = lora.abstract(cfg.lora, rates, everything) if cfg.lora.rank else everything
    frozen = lora.split(learnt, everything)[0] if cfg.lora.rank else {}

    def count(tree: Any, device: bool) -> tuple[float, float, float]:
        """(elements, their bytes, bytes of one moment of each), on one device or in all."""
        placed = lora.flatten(shardings(tree, mesh))
        leaves = {path: box.value for path, box in lora.flatten(tree).items()}
        sizes = {p: math.prod(placed[p].shard_shape(x.shape) if device else x.shape) for p, x in leaves.items()}
        widths = {p: x.dtype.itemsize for p, x in leaves.items()}
        moments = {p: 2 if cfg.optimizer.moment_dtype == "bfloat16" else max(4, width) for p, width in widths.items()}
        return sum(sizes.values()), *(sum(n * each[p] for p, n in sizes.items()) for each in (widths, moments))

    learning = {group: tree for group, tree in learnt.items() if rates[group] > 0}
    _, trained, moment = count(learning, True)
    fixed = {
        "parameters": count(frozen, True)[1] + count(learnt, True)[1],
        "optimiser": 2 * moment,
        "gradients": trained,
    }
    number, _, moment = count(learning, False)
    return fixed, int(number), cfg.model.num_params(), int(count(learnt, False)[1] + 2 * moment)


@functools.lru_cache(maxsize=8)
def _shapes(model: AudioLMConfig, param_dtype: Any, scan_layers: bool) -> Any:
    """Shapes of all parameters, in boxes with the logical names of their axes."""
    return abstract_params(model, ComputeConfig(param_dtype=param_dtype, scan_layers=scan_layers))["params"]


def _stacks(cfg: LMTrainConfig, rows: int) -> list[tuple[TransformerConfig, int, int]]:
    """Stacks of the model that a step runs, each with the number and length of its rows."""
    m, C = cfg.model, cfg.data.row_patches
    stacks = [(m.llm, rows, cfg.data.row_length), (m.patch_encoder, rows * C, m.group_size)]
    return stacks + ([(m.patch_decoder, rows * C, m.num_steps)] if cfg.loss.trains_audio else [])


def patch_chunks(cfg: LMTrainConfig, rows: int) -> int:
    """Chunks in which a device works on the patches of so many rows."""
    patches = rows * cfg.data.row_patches
    return -(-patches // cfg.compute.patch_chunk) if cfg.compute.patch_chunk else min(1, patches)


def gathered_params(cfg: LMTrainConfig, rows: int, narrowest: float = 0) -> float:
    """Parameters that a device gathers in one pass over so many rows: those of the patches once for each chunk.

    Shards narrower than `narrowest` count twice: TPUs gather them by summing whole arrays of zeros.
    """
    m, chunks = cfg.model, patch_chunks(cfg, rows)
    towers = min(m.patch_encoder.d_model, m.patch_decoder.d_model)
    llm, patch = (2 if width < narrowest else 1 for width in (m.llm.d_model, towers))
    return llm * m.num_llm_params() + patch * chunks * (m.num_params() - m.num_llm_params())


def traffic(cfg: LMTrainConfig, shape: Mapping[str, int], trained: int) -> float:
    """Bytes that a device reads and writes in a step beside its matrix products: activations, weights, optimiser.

    All that a layer computes is written and read once in the forward pass, as often where it is computed anew, and
    twice in the backward pass.
    """
    width = np.dtype(jnp.dtype(cfg.compute.dtype)).itemsize
    rows = cfg.data.rows / (shape["data"] * shape["fsdp"])
    passes = 4 if cfg.compute.remat in ("full", "offload") else 3
    total = 0.0
    for config, batch, length in _stacks(cfg, 1):
        per_position = block_bytes(config, cfg.compute, shape["tensor"])["all"]
        total += 2 * passes * rows * config.num_layers * batch * length * per_position
    gathered = gathered_params(cfg, int(rows / cfg.run.accumulation))
    weights = gathered / shape["tensor"] * width * 2 * passes * cfg.run.accumulation
    return total + weights + 7 * 4 * trained / (shape["fsdp"] * shape["tensor"])


def offloaded(cfg: LMTrainConfig, rows: float) -> float:
    """Bytes that a device with so many rows keeps in its host's memory."""
    if cfg.compute.remat != "offload":
        return 0.0
    width = np.dtype(jnp.dtype(cfg.compute.dtype)).itemsize
    return cfg.model.llm.num_layers * rows * cfg.data.row_length * cfg.model.llm.d_model * width


def _work(cfg: LMTrainConfig, rows: int, shape: tuple[int, ...]) -> dict[str, float]:
    """Bytes of what a device with so many rows makes while it computes a step."""
    m, compute = cfg.model, cfg.compute
    L, C, G = cfg.data.row_length, cfg.data.row_patches, m.group_size
    _, fsdp, tensor = shape
    width = np.dtype(jnp.dtype(compute.dtype)).itemsize
    wide = max(width, 4)
    together = min(rows * C, compute.patch_chunk or rows * C)  # patches
    kept, working = 0.0, 0.0
    for config, batch, length in _stacks(cfg, rows):
        block, scores = block_bytes(config, compute, tensor), 3 * score_bytes(config, length, tensor, width)
        dense = length * length <= DENSE_SCORES  # chunked attention keeps none of its scores
        layer = {"none": block["all"] + scores * dense, "dots": block["dots"]}.get(compute.remat, 0.0)
        layers = min(2, config.num_layers) if compute.remat == "offload" and config is m.llm else config.num_layers
        kept += layers * batch * length * (config.d_model * width + layer)
        working = max(working, (batch if config is m.llm else together) * length * (2 * block["all"] + scores))
    kept += 3 * rows * L * m.llm.d_model * width  # input and output of the LLM, and a gradient
    frames = G + (m.num_steps - 1 if cfg.loss.trains_audio else 0)
    kept += rows * C * frames * m.patch_encoder.d_model * (2 * width + wide)  # embedded codes: sums, values, gradient
    columns = columns_at_once(rows * L, m.vocab_size // tensor, compute.logits_chunk)
    logits = 3.0 * rows * L * columns * wide
    channel = 3.0 * together * G * max(m.audio_vocab_sizes) * wide if cfg.loss.trains_audio else 0.0
    rates = dataclasses.asdict(cfg.learning_rates)
    head_learns = rates["llm"] > 0 and (not cfg.lora.rank or cfg.lora.tables)
    chunk = m.llm.d_model * columns * (width + wide * (2 if head_learns else 1))
    head = chunk + m.llm.d_model * m.vocab_size / (tensor * fsdp) * wide * head_learns
    weights = 2.0 * m.llm.params_per_layer() / tensor * width  # of two layers
    row = L * 21 + C * (G * m.num_channels * 2 + 8)
    return {
        "weights": head + weights,
        "activations": kept,
        "working set": max(working, logits, channel),
        "batch": 2.0 * rows * row,
    }


def block_bytes(config: TransformerConfig, compute: ComputeConfig, tensor: int) -> dict[str, float]:
    """Bytes per position of one block: products of matrices, and all it computes (attention's scores apart)."""
    width = np.dtype(jnp.dtype(compute.dtype)).itemsize
    wide = max(width, 4)
    heads, kv = config.num_heads * config.head_dim / tensor, config.num_kv_heads * config.head_dim / tensor
    d, ff = config.d_model, config.d_ff / tensor
    ups = 2 if config.mlp == "swiglu" else 1
    dots = width * (heads + 2 * kv + 2 * d + ups * ff)
    # Beside them: two norms in float32 and in the compute dtype, the rotation, attention's output, activation, product.
    rest = 2 * d * (wide + width) + (heads + kv) * (wide + width) + width * (heads + 2 * ff)
    return {"dots": dots, "all": dots + rest}


def score_bytes(config: TransformerConfig, length: int, tensor: int, width: int) -> float:
    """Bytes per position of attention's scores, one array of them."""
    wide = max(width, 4)
    if length * length <= DENSE_SCORES:
        return config.num_heads / tensor * length * wide
    return config.num_heads / tensor * _BLOCK_ROWS * wide  # a block of queries sees all keys: shared out over positions
