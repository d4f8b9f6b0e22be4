"""Loads the reference audio tokenizers of the parity goldens into our parameter tree.

The goldens' checkpoints hold the released code's state-dict names; this is the mapping a converter makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mimo_jax.config import AudioTokenizerConfig, ComputeConfig, MelConfig, RVQConfig, TransformerConfig
from mimo_jax.models.tokenizer import rvq

Tree = dict[str, Any]


def load_config(folder: Path) -> AudioTokenizerConfig:
    """Our config of `folder`/config.json."""
    c = json.loads((folder / "config.json").read_text())
    norm = c["ln_type"].lower()
    sizes = c["codebook_size"] + [c["codebook_size"][-1]] * (c["num_quantizers"] - len(c["codebook_size"]))

    def stack(width: str, layers: str, heads: str, d_ff: str, causal: bool, window: str) -> TransformerConfig:
        return TransformerConfig.codec(c[width], c[layers], c[heads], c[d_ff], causal, tuple(c[window]), norm)

    return AudioTokenizerConfig(
        mel=MelConfig(
            c["sampling_rate"], c["nfft"], c["window_size"], c["hop_length"], c["n_mels"], c["fmin"], c["fmax"]
        ),
        encoder=stack(
            "d_model",
            "encoder_layers",
            "encoder_attention_heads",
            "encoder_ffn_dim",
            c["encoder_causal"],
            "encoder_attn_window_size",
        ),
        decoder=stack(
            "d_model",
            "decoder_layers",
            "decoder_attention_heads",
            "decoder_ffn_dim",
            c["decoder_causal"],
            "decoder_attn_window_size",
        ),
        vocoder=stack(
            "vocoder_dim",
            "vocoder_num_layers",
            "vocoder_attention_heads",
            "vocoder_intermediate_dim",
            False,
            "vocoder_attn_window_size",
        ),
        rvq=RVQConfig(codebook_sizes=tuple(sizes)),
        encoder_skip_layer=c["encoder_skip_layer_id"],
        pool=c["avg_pooler"],
    )


def load_variables(folder: Path, config: AudioTokenizerConfig, dtype: str = "float32") -> Tree:
    """{"params", "codebook"} for unrolled layers (`ComputeConfig.scan_layers` False)."""
    from safetensors.numpy import load_file

    weights = {name: w.astype(dtype) for name, w in load_file(str(folder / "model.safetensors")).items()}

    def norm(name: str) -> Tree:
        out = {"scale": weights[f"{name}.weight"]}
        return out | ({"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {})

    def linear(name: str, *shape: int) -> Tree:
        out = {"kernel": weights[f"{name}.weight"].T.reshape(shape)}
        outputs = shape[1:] if len(shape) < 3 or "out_proj" not in name else shape[2:]
        return out | ({"bias": weights[f"{name}.bias"].reshape(outputs)} if f"{name}.bias" in weights else {})

    def stack(prefix: str, c: TransformerConfig, first: int, count: int) -> Tree:
        layers = {}
        d, heads = c.d_model, (c.num_heads, c.head_dim)
        for i in range(count):
            p = f"{prefix}.layers.{first + i}"
            layers[f"layers_{i}"] = {
                "norm_attn": norm(f"{p}.self_attn_layer_norm"),
                "norm_mlp": norm(f"{p}.final_layer_norm"),
                "attn": {n: linear(f"{p}.self_attn.{n}_proj", d, *heads) for n in ("q", "k", "v")}
                | {"out": linear(f"{p}.self_attn.out_proj", *heads, d)},
                "mlp": {"up": linear(f"{p}.fc1", d, c.d_ff), "down": linear(f"{p}.fc2", c.d_ff, d)},
            }
        return layers

    def conv(name: str) -> Tree:  # [out, in, k] -> [k, in, out]
        out = {"kernel": weights[f"{name}.weight"].transpose(2, 1, 0)}
        return out | ({"bias": weights[f"{name}.bias"]} if f"{name}.bias" in weights else {})

    def up_conv(name: str) -> Tree:  # [in, out, k] -> [in, k, out]
        return {
            "conv": {"kernel": weights[f"{name}.conv.weight"].transpose(0, 2, 1)},
            "bias": weights[f"{name}.conv.bias"],
            "norm_scale": weights[f"{name}.norm.weight"],
            "norm_bias": weights[f"{name}.norm.bias"],
        }

    lower = config.encoder_skip_layer or 0
    encoder = {
        "conv1": conv("encoder.conv1"),
        "conv2": conv("encoder.conv2"),
        "upper": stack("encoder", config.encoder, lower, config.encoder.num_layers - lower),
        "norm": norm("encoder.layer_norm"),
    }
    if lower:
        encoder["lower"] = stack("encoder", config.encoder, 0, lower)
    decoder = {
        "transformer": stack("decoder", config.decoder, 0, config.decoder.num_layers)
        | {"norm": norm("decoder.layer_norm")},
        "up2": up_conv("decoder.dconv2"),
    }
    if config.pool > 1:
        encoder |= {"pool": conv("encoder.down_sample_layer.0"), "pool_norm": norm("encoder.down_sample_norm")}
        decoder["up1"] = up_conv("decoder.dconv1")
    width = config.vocoder.d_model
    vocoder = {
        "embed": linear("decoder.vocoder.embeddings", config.mel.n_mels, width),
        "transformer": stack("decoder.vocoder", config.vocoder, 0, config.vocoder.num_layers)
        | {"norm": norm("decoder.vocoder.layer_norm")},
        "head": linear("decoder.vocoder.head.out", width, config.mel.n_fft + 2),
    }
    codebook = {}
    for i in range(config.rvq.num_levels):
        p = f"encoder.quantizer.vq.layers.{i}._codebook"
        codebook[rvq.level_name(i)] = rvq.level_from_entries(
            jnp.asarray(weights[f"{p}.embed"]), jnp.asarray(weights[f"{p}.cluster_size"]), config.rvq.epsilon
        )
    return {"params": {"encoder": encoder, "decoder": decoder, "vocoder": vocoder}, "codebook": codebook}


UNROLLED = ComputeConfig(scan_layers=False)


def tolerances(parity: Path, file: str) -> dict[str, float]:
    """Suggested absolute tolerance of each float array of `file`, from the goldens' manifest."""
    arrays = json.loads((parity / "manifest.json").read_text())[file]
    return {name: entry["suggested_atol"] for name, entry in arrays.items() if "suggested_atol" in entry}


def golden(parity: Path, file: str) -> dict[str, np.ndarray]:
    """All arrays of one golden file."""
    with np.load(parity / file) as arrays:
        return dict(arrays)
