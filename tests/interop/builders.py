"""Small published folders with random weights, and what compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.config import AudioLMConfig, AudioTokenizerConfig, MelConfig, RVQConfig, TransformerConfig
from mimo_jax.interop import published, safetensors
from mimo_jax.text.tokenizers import SPECIAL_TOKENS
from mimo_jax.trees import nest

BF16 = np.dtype(ml_dtypes.bfloat16)
FIRST_SPECIAL = 256

LM = AudioLMConfig(
    vocab_size=272,
    empty_id=FIRST_SPECIAL + SPECIAL_TOKENS.index("<|empty|>"),
    llm=TransformerConfig.qwen2(16, 3, 4, 6, 24, 2),
    patch_encoder=TransformerConfig.qwen2(8, 2, 2, 4, 32, causal=False),
    patch_decoder=TransformerConfig.qwen2(12, 2, 2, 6, 20),
    codebook_sizes=(12, 9, 7),
    group_size=2,
    delays=(0, 1, 3),
)


def tokenizer_config(norm: Any, skip: int | None, pool: int) -> AudioTokenizerConfig:
    return AudioTokenizerConfig(
        mel=MelConfig(n_mels=10, n_fft=128, win_length=120, hop_length=40, f_min=50.0, f_max=8000.0),
        encoder=TransformerConfig.codec(8, 3, 2, 24, False, (5, 4), norm),
        decoder=TransformerConfig.codec(8, 2, 4, 20, True, norm=norm),
        vocoder=TransformerConfig.codec(12, 2, 2, 16, False, (4, 2), norm),
        rvq=RVQConfig(codebook_sizes=(12, 7, 7), dead_code_threshold=3.0),
        encoder_skip_layer=skip,
        pool=pool,
    )


TOKENIZERS = {"published": tokenizer_config("layernorm", 1, 2), "other": tokenizer_config("rmsnorm", None, 1)}


def arrays(config: published.Config, dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    """Random arrays for everything a model has; buffers and codebooks are always float32."""
    rng = np.random.default_rng(seed)
    return nest(
        {
            path: rng.normal(size=shape).astype(dtype if path.startswith("params/") else np.float32)
            for path, shape in published.shapes_of(config).items()
        }
    )


def tokenizer_json(tokens: tuple[str, ...] = SPECIAL_TOKENS) -> str:
    """A byte-level tokenizer without merges: 256 bytes, then the given tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": FIRST_SPECIAL + i, "content": t, **flags} for i, t in enumerate(tokens)],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {letters[b]: b for b in range(256)}, "merges": []},
        }
    )


def write_model(folder: Path, config: published.Config, tree: dict[str, Any], **settings: Any) -> Path:
    """A published folder. config.json has a key that nobody knows, and `settings`."""
    folder.mkdir(parents=True)
    values = published.config_json(config, "float32") | {"unknown_key": {"of": ["another", "version"]}} | settings
    (folder / "config.json").write_text(json.dumps(values))
    is_lm = isinstance(config, AudioLMConfig)
    if is_lm:
        (folder / "tokenizer.json").write_text(tokenizer_json())
    safetensors.save(folder, published.to_published(tree["params"] if is_lm else tree, config))
    return folder


def write_text_model(
    folder: Path, values: dict[str, Any], tensors: dict[str, np.ndarray], tokens: tuple[str, ...] = SPECIAL_TOKENS[:3]
) -> Path:
    """A plain Hugging Face text model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(tokenizer_json(tokens))
    safetensors.save(folder, tensors)
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    with safetensors.Reader(folder) as reader:
        return {name: reader.read(name) for name in reader.entries}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same tensors to the byte."""
    assert sorted(found) == sorted(expected)
    for name, x in expected.items():
        y = found[name]
        assert (y.dtype, y.shape, y.tobytes()) == (x.dtype, x.shape, x.tobytes()), name
