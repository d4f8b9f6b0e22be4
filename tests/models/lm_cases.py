"""A language model of a few thousand parameters, random documents for it, and rows made of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from mimo_jax.config import AudioLMConfig, ComputeConfig, TransformerConfig
from mimo_jax.models.audio_lm import AudioLM, init_params
from mimo_jax.rows import LMRows

CONFIG = AudioLMConfig(
    vocab_size=40,
    empty_id=6,
    llm=TransformerConfig.qwen2(16, 2, 4, 4, 32, 2),
    patch_encoder=TransformerConfig.qwen2(8, 2, 2, 4, 16, causal=False),
    patch_decoder=TransformerConfig.qwen2(12, 2, 2, 6, 16),
    codebook_sizes=(12, 9, 7),
    group_size=2,
    delays=(0, 1, 3),
)
# Chunks small enough that the losses need several.
COMPUTE = ComputeConfig(patch_chunk=5, logits_chunk=500)
COMPUTE64 = dataclasses.replace(COMPUTE, dtype="float64", param_dtype="float64")
# Options of `jax.jit`: compiling takes nearly all of the time of these tests, and this halves it.
QUICK = {"xla_backend_optimization_level": 0}
MODEL, MODEL64 = AudioLM(CONFIG, COMPUTE), AudioLM(CONFIG, COMPUTE64)


class Document(NamedTuple):
    """Text ids, `<|empty|>` where a patch stands, the patches in order, the task, and target weights."""

    text: np.ndarray
    patches: np.ndarray
    task: int
    text_weights: np.ndarray
    audio_weights: np.ndarray


@functools.cache
def fresh_params(seed: int = 0) -> Any:
    """Parameters as a new run has them."""
    return jax.jit(init_params, static_argnums=(0, 1))(CONFIG, COMPUTE, jax.random.key(seed))["params"]


@functools.cache
def _params(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    start = fresh_params(seed)
    return jax.tree.map(lambda x: (np.asarray(x) + 0.2 * rng.standard_normal(x.shape)).astype(np.float32), start)


def params(seed: int = 0) -> Any:
    """Float32 parameters, none of them at its neutral value; the same whatever the precision they are asked for in."""
    return _params(seed)


def params64(seed: int = 0) -> Any:
    return jax.tree.map(lambda x: x.astype(np.float64), params(seed))


def document(length: int, num_patches: int, seed: int = 0, task: int = 1) -> Document:
    """A document of `length` positions, `num_patches` of which (anywhere, also the first) are patches."""
    rng = np.random.default_rng(seed)
    c = CONFIG
    text = rng.integers(7, c.vocab_size, length).astype(np.int32)
    text[rng.permutation(length)[:num_patches]] = c.empty_id
    codes = [rng.integers(0, n, (num_patches, c.group_size)) for n in c.codebook_sizes]
    weights = np.where(text == c.empty_id, 0.01, rng.integers(0, 2, length)).astype(np.float32)
    audio_weights = rng.integers(0, 2, num_patches).astype(np.float32)
    return Document(text, np.stack(codes, -1).astype(np.int32), task, weights, audio_weights)


DOCUMENTS = (
    document(9, 4, 1, task=1),
    document(6, 0, 2, task=0),
    document(12, 7, 3, task=4),
    document(5, 5, 4, task=2),
)


def rows(packing: list[list[Document]], length: int, slots: int) -> LMRows:
    """Rows of `length` positions and `slots` patches; each holds the documents of one list, one after another."""
    B, c = len(packing), CONFIG
    out = LMRows(
        text_BL=np.zeros((B, length), np.int32),
        patches_BCGR=np.zeros((B, slots, c.group_size, c.num_channels), np.int32),
        patch_positions_BC=np.full((B, slots), length, np.int32),
        segment_ids_BL=np.zeros((B, length), np.int32),
        positions_BL=np.zeros((B, length), np.int32),
        task_ids_BL=np.zeros((B, length), np.uint8),
        text_weights_BL=np.zeros((B, length), np.float32),
        audio_weights_BC=np.zeros((B, slots), np.float32),
    )
    for b, documents in enumerate(packing):
        at = slot = 0
        for i, d in enumerate(documents):
            here, there = slice(at, at + len(d.text)), slice(slot, slot + len(d.patches))
            out.text_BL[b, here] = d.text
            out.segment_ids_BL[b, here] = i + 1
            out.positions_BL[b, here] = np.arange(len(d.text))
            out.task_ids_BL[b, here] = d.task
            out.text_weights_BL[b, here] = d.text_weights
            out.patches_BCGR[b, there] = d.patches
            out.patch_positions_BC[b, there] = at + np.flatnonzero(d.text == c.empty_id)
            out.audio_weights_BC[b, there] = d.audio_weights
            at, slot = here.stop, there.stop
    return out


def alone(d: Document) -> LMRows:
    """The document in a row of its own, without padding."""
    return rows([[d]], len(d.text), len(d.patches))
