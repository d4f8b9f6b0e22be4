"""Loads the reference language models of the parity goldens into our parameters.

The files hold Hugging Face Qwen2 names in the torch layout [out, in]; a case's `input_ids` are text ids (one per frame,
read every `group_size`) above the codes of each channel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mimo_jax.config import AudioLMConfig, TransformerConfig
from mimo_jax.rows import LMRows

EMPTY_TOKEN = "<|empty|>"


def _numbers(value: str | int, count: int) -> tuple[int, ...]:
    numbers = tuple(int(x) for x in str(value).split("-"))
    return numbers * count if len(numbers) == 1 else numbers


def load_config(folder: Path) -> AudioLMConfig:
    """Our configuration of the model in `folder` (config.json, tokenizer.json)."""
    raw = json.loads((folder / "config.json").read_text())
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    empty_id = next(t["id"] for t in tokens if t["content"] == EMPTY_TOKEN)
    channels = raw["audio_channels"]

    def stack(width: int, layers: int, heads: int, head_dim: int, ffn: int, kv: int, causal: bool) -> TransformerConfig:
        return TransformerConfig.qwen2(width, layers, heads, head_dim, ffn, kv, causal, rope_theta=raw["rope_theta"])

    width, local, inner = raw["hidden_size"], raw["local_dim"], raw["input_local_dim"]
    heads = raw["local_attn_heads"]
    llm = stack(
        width,
        raw["num_hidden_layers"],
        raw["num_attention_heads"],
        raw["head_dim"],
        raw["intermediate_size"],
        raw["num_key_value_heads"],
        True,
    )
    encoder_causal = not raw.get("input_full_attention", False)
    encoder = stack(inner, raw["input_local_layers"], heads, inner // heads, 4 * inner, heads, encoder_causal)
    decoder = stack(local, raw["local_layers"], heads, local // heads, raw["local_ffn_dim"], heads, True)
    assert raw["rms_norm_eps"] == llm.norm_eps
    return AudioLMConfig(
        vocab_size=raw["vocab_size"],
        empty_id=empty_id,
        llm=llm,
        patch_encoder=encoder,
        patch_decoder=decoder,
        codebook_sizes=tuple(n - 1 for n in _numbers(raw["speech_vocab_size"], channels)),
        group_size=raw["group_size"],
        delays=_numbers(raw["delay_pattern"], channels),
    )


def _stack(tensors: dict[str, np.ndarray], prefix: str, config: TransformerConfig) -> dict[str, Any]:
    def linear(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        kernel = np.stack([tensors[f"{prefix}.layers.{i}.{name}.weight"].T for i in range(config.num_layers)])
        out = {"kernel": kernel.reshape(config.num_layers, *shape)}
        if f"{prefix}.layers.0.{name}.bias" in tensors:
            bias = np.stack([tensors[f"{prefix}.layers.{i}.{name}.bias"] for i in range(config.num_layers)])
            out["bias"] = bias.reshape(config.num_layers, *shape[1:])
        return out

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": np.stack([tensors[f"{prefix}.layers.{i}.{name}.weight"] for i in range(config.num_layers)])}

    d, n, k, h, f = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff
    layers = {
        "attn": {
            "q": linear("self_attn.q_proj", (d, n, h)),
            "k": linear("self_attn.k_proj", (d, k, h)),
            "v": linear("self_attn.v_proj", (d, k, h)),
            "out": linear("self_attn.o_proj", (n, h, d)),
        },
        "mlp": {
            "up": linear("mlp.up_proj", (d, f)),
            "gate": linear("mlp.gate_proj", (d, f)),
            "down": linear("mlp.down_proj", (f, d)),
        },
        "norm_attn": norm("input_layernorm"),
        "norm_mlp": norm("post_attention_layernorm"),
    }
    return {"layers": layers, "norm": {"scale": tensors[f"{prefix}.norm.weight"]}}


def convert(tensors: dict[str, np.ndarray], config: AudioLMConfig) -> dict[str, Any]:
    """Our parameters (scanned layers) from the reference's tensors; gradients convert the same way."""
    g, e = config.group_size, config.patch_encoder.d_model
    channels = range(config.num_channels)
    decoder = {
        "input": {"kernel": tensors["hidden_states_downcast.weight"].T},
        "transformer": _stack(tensors, "local_transformer", config.patch_decoder),
        **{f"head_{r}": {"kernel": tensors[f"local_transformer_lm_heads.{r}.weight"].T} for r in channels},
    }
    if e != config.patch_decoder.d_model:
        decoder["codes"] = {"kernel": tensors["speech_embeddings_to_local.weight"].T}
    return {
        "llm": {
            "embedding": tensors["model.embed_tokens.weight"],
            "head": tensors["lm_head.weight"].T,
            "transformer": _stack(tensors, "model", config.llm),
        },
        "patch_encoder": {
            "embedding": np.concatenate([tensors[f"speech_embeddings.{r}.weight"] for r in channels]),
            "transformer": _stack(tensors, "input_local_transformer", config.patch_encoder),
            "projection": {"kernel": tensors["speech_group_downcast.weight"].T.reshape(g, e, -1)},
        },
        "patch_decoder": decoder,
    }


def load_model(folder: Path) -> tuple[AudioLMConfig, dict[str, Any]]:
    """Configuration and parameters of the reference model in `folder`."""
    config = load_config(folder)
    return config, convert(load_file(folder / "model.safetensors"), config)


def rows_from_ids(ids: np.ndarray, config: AudioLMConfig) -> LMRows:
    """One row (B = 1) from a reference `input_ids` [1 + R, T * G], all of it one document with targets everywhere."""
    g = config.group_size
    text = ids[0, ::g].astype(np.int32)
    length = len(text)
    is_patch = text == config.empty_id
    codes = ids[1:].T.reshape(length, g, -1)[is_patch].astype(np.int32)
    weights = np.ones(length, np.float32)
    return LMRows(
        text_BL=text[None],
        patches_BCGR=codes[None],
        patch_positions_BC=np.flatnonzero(is_patch).astype(np.int32)[None],
        segment_ids_BL=np.ones((1, length), np.int32),
        positions_BL=np.arange(length, dtype=np.int32)[None],
        task_ids_BL=np.zeros((1, length), np.uint8),
        text_weights_BL=weights[None],
        audio_weights_BC=np.ones((1, len(codes)), np.float32),
    )


def training_rows(ids: np.ndarray, labels: np.ndarray, valid: np.ndarray, config: AudioLMConfig) -> LMRows:
    """Rows of the reference's training batch, weighted as its trainer does.

    Args:
        ids: input_ids [B, 1 + R, T * G].
        labels: the same with -100 where nothing is learned.
        valid: attention mask [B, T].
        config: of the model.
    """
    g, length = config.group_size, valid.shape[1]
    text, targets = ids[:, 0, ::g].astype(np.int32), labels[:, 0, ::g]
    is_patch = (text == config.empty_id) & (valid != 0)
    slots = int(is_patch.sum(1).max())
    patches = np.zeros((len(ids), slots, g, config.num_channels), np.int32)
    at = np.full((len(ids), slots), length, np.int32)
    audio_weights = np.zeros((len(ids), slots), np.float32)
    for b, row in enumerate(ids):
        where = np.flatnonzero(is_patch[b])
        codes = row[1:].T.reshape(length, g, -1)
        patches[b, : len(where)], at[b, : len(where)] = codes[where], where
        audio_weights[b, : len(where)] = targets[b, where] == config.empty_id
    text_weights = np.where(targets == -100, 0, np.where(targets == config.empty_id, 0.01, 1)).astype(np.float32)
    return LMRows(
        text_BL=np.where(valid != 0, text, 0),
        patches_BCGR=patches,
        patch_positions_BC=at,
        segment_ids_BL=valid.astype(np.int32),
        positions_BL=np.broadcast_to(np.arange(length, dtype=np.int32), valid.shape),
        task_ids_BL=np.zeros(valid.shape, np.uint8),
        text_weights_BL=text_weights,
        audio_weights_BC=audio_weights,
    )
