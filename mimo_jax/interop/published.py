"""The published models: their config.json, and small ones in memory. `mimo_jax.convert` streams large ones.

Read `names` for which array is which tensor. A text model in plain Hugging Face layout is read as the LLM part of an
audio language model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mimo_jax.audio.features import hann_window
from mimo_jax.config import (
    AudioLMConfig,
    AudioTokenizerConfig,
    ComputeConfig,
    ConfigError,
    MelConfig,
    RVQConfig,
    TransformerConfig,
    require,
)
from mimo_jax.interop import names
from mimo_jax.interop.safetensors import Reader, SafetensorsError, describe
from mimo_jax.sharding import unboxed
from mimo_jax.trees import flatten, nest

Config = AudioLMConfig | AudioTokenizerConfig
Kind = Literal["audio_tokenizer", "audio_lm", "text_lm"]
Tree = dict[str, Any]

EMPTY_TOKEN = "<|empty|>"


# ----------------------------------------------------------------------------------------------------------
# config.json


class _Json:
    """A config.json whose faults are named."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> _Json:
        path = Path(folder) / "config.json"
        try:
            return cls(path, dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}: expected a JSON object: {error}") from None

    def get(self, key: str, kind: type = int, default: Any = dataclasses.MISSING) -> Any:
        value = self.values.get(key, default)
        if value is dataclasses.MISSING:
            raise ConfigError(f"{self.path}: {key}: this setting is missing")
        if value is None and default is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.path}: {key}: expected {kind.__name__}, got {value!r}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a setting that would change what is computed in a way that ours does not have."""
        value = self.values.get(key, allowed[0])
        require(value in allowed, f"{self.path}: {key}", " or ".join(map(repr, allowed)), value)

    def numbers(self, key: str, count: int) -> tuple[int, ...]:
        """`1025-129-129`, or one number for all."""
        text = str(self.values.get(key))
        if not re.fullmatch(r"\d+(-\d+)*", text):
            raise ConfigError(f"{self.path}: {key}: expected numbers joined by -, got {text!r}")
        numbers = tuple(map(int, text.split("-")))
        numbers = numbers * count if len(numbers) == 1 else numbers
        require(len(numbers) == count, f"{self.path}: {key}", f"{count} numbers", text)
        return numbers

    def checked(self, build: Callable[[_Json], Any]) -> Any:
        """What `build` makes of it, with the path before the message of what it refuses."""
        try:
            return build(self)
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if message.startswith(str(self.path)) else f"{self.path}: {message}") from None


def read_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`folder`/config.json as it is.

    Raises:
        ConfigError: it is not a JSON object.
        FileNotFoundError: there is none.
    """
    return dict(_Json.of(folder).values)


def kind_of(folder: str | os.PathLike[str]) -> Kind:
    """What a published folder holds, from its config.json.

    Raises:
        ConfigError: none of the models that can be read.
        FileNotFoundError: there is no config.json.
    """
    raw = _Json.of(folder)
    if "codebook_size" in raw.values and "vocoder_dim" in raw.values:
        return "audio_tokenizer"
    if "speech_vocab_size" in raw.values:
        return "audio_lm"
    raw.only("model_type", "qwen2", "llama", "mimo", "mistral")
    return "text_lm"


# Settings of ours and their published names; those that ours has only one value for.
_MEL = {
    "sample_rate": "sampling_rate",
    "n_fft": "nfft",
    "win_length": "window_size",
    "hop_length": "hop_length",
    "n_mels": "n_mels",
}
_STACK = ("d_model", "num_layers", "num_heads", "d_ff")
_STACKS = {
    "encoder": ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
    "decoder": ("d_model", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim"),
    "vocoder": ("vocoder_dim", "vocoder_num_layers", "vocoder_attention_heads", "vocoder_intermediate_dim"),
}
_TOKENIZER_FIXED = {
    "kernel_size": 3,
    "stride_size": 2,
    "decoder_kernel_size": 3,
    "decoder_stride_size": 2,
    "activation_function": "gelu",
    "vocoder_padding": "same",
    "rope_type": "default",
}
_LLM = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}


def read_tokenizer_config(folder: str | os.PathLike[str]) -> AudioTokenizerConfig:
    """The audio tokenizer that `folder`/config.json describes.

    Raises:
        ConfigError: a setting is missing, impossible, or asks for something that ours does not compute.
    """
    return _Json.of(folder).checked(_tokenizer_config)


def _tokenizer_config(raw: _Json) -> AudioTokenizerConfig:
    for key, value in _TOKENIZER_FIXED.items():
        raw.only(key, value)
    norm, levels, sizes = raw.get("ln_type", str).lower(), raw.get("num_quantizers"), raw.get("codebook_size", list)
    require(norm in ("layernorm", "rmsnorm"), "ln_type", "LayerNorm or RMSNorm", norm)
    require(0 < len(sizes) <= levels, "codebook_size", f"1 to {levels} sizes", sizes)

    def stack(part: str, causal: bool) -> TransformerConfig:
        window = tuple(raw.get(f"{part}_attn_window_size", list, [-1, -1]))
        width, layers, heads, ffn = map(raw.get, _STACKS[part])
        codec = TransformerConfig.codec(width, layers, heads, ffn, causal, window, norm)
        return dataclasses.replace(codec, rope_theta=raw.get("rope_theta", float, 10_000.0))

    mel = {ours: raw.get(key) for ours, key in _MEL.items()}
    return AudioTokenizerConfig(
        mel=MelConfig(**mel, f_min=raw.get("fmin", float), f_max=raw.get("fmax", float, None)),
        encoder=stack("encoder", raw.get("encoder_causal", bool)),
        decoder=stack("decoder", raw.get("decoder_causal", bool)),
        vocoder=stack("vocoder", False),
        rvq=RVQConfig(
            codebook_sizes=(*sizes, *sizes[-1:] * (levels - len(sizes))),
            dead_code_threshold=raw.get("threshold_ema_dead_code", float, 2.0),
        ),
        encoder_skip_layer=raw.get("encoder_skip_layer_id", int, None),
        pool=raw.get("avg_pooler"),
        decoder_norm=raw.get("decoder_norm", str, "sequence"),
        resampler=raw.get("resampler", str, "sinc"),
    )


def tokenizer_config_json(config: AudioTokenizerConfig, dtype: str = "float32") -> dict[str, Any]:
    """config.json of an audio tokenizer: the inverse of `read_tokenizer_config`. How it learns is not part of it.

    Raises:
        ConfigError: the published format cannot express a setting.
    """
    out: dict[str, Any] = {
        "model_type": "mimo_audio_tokenizer",
        "architectures": ["MiMoAudioTokenizer"],
        "max_audio_seconds": 1800,
        "scale_embedding": False,
        "position_embedding_type": "rope",
        **_TOKENIZER_FIXED,
        **{key: getattr(config.mel, ours) for ours, key in _MEL.items()},
        "fmin": config.mel.f_min,
        "fmax": config.mel.f_max,
        "avg_pooler": config.pool,
        "encoder_skip_layer_id": config.encoder_skip_layer,
        "encoder_causal": config.encoder.causal,
        "decoder_causal": config.decoder.causal,
        "num_quantizers": config.rvq.num_levels,
        "codebook_size": list(config.rvq.codebook_sizes),
        "threshold_ema_dead_code": config.rvq.dead_code_threshold,
        "rope_theta": config.encoder.rope_theta,
        "ln_type": "LayerNorm" if config.encoder.norm == "layernorm" else "RMSNorm",
        "torch_dtype": dtype,
        "decoder_norm": config.decoder_norm,
        "resampler": config.resampler,
    }
    for name, keys in _STACKS.items():
        part = getattr(config, name)
        out |= {key: getattr(part, ours) for ours, key in zip(_STACK, keys, strict=True)}
        out[f"{name}_attn_window_size"] = list(part.window)
    learned = RVQConfig(config.rvq.codebook_sizes, dead_code_threshold=config.rvq.dead_code_threshold)
    _check_expressed(dataclasses.replace(config, rvq=learned), _tokenizer_config(_Json(Path("config.json"), out)))
    return out


def _llm(raw: _Json, head_dim: int) -> TransformerConfig:
    """The LLM of an audio language model or of a text model."""
    raw.only("hidden_act", "silu")
    raw.only("rope_scaling", None)
    raw.only("mlp_bias", False)
    kind = raw.values.get("model_type", "qwen2")
    if raw.get("use_sliding_window", bool, kind == "mistral"):
        raw.only("sliding_window", None)
    rope = raw.values.get("rope_parameters") or {}  # where newer files have it
    require(rope.get("rope_type", "default") == "default", "rope_parameters", "rope_type default", rope)
    qwen2 = kind in ("qwen2", "mimo")
    bias = raw.get("attention_bias", bool, qwen2)
    sizes = {ours: raw.get(key) for ours, key in _LLM.items()}
    return TransformerConfig(
        **sizes,
        num_kv_heads=raw.get("num_key_value_heads", int, sizes["num_heads"]),
        head_dim=head_dim,
        causal=True,
        norm_eps=raw.get("rms_norm_eps", float, 1e-6),
        rope_theta=raw.get("rope_theta", float, float(rope.get("rope_theta", 10_000.0))),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), bias),
        out_bias=bias and not qwen2,
    )


def read_lm_config(folder: str | os.PathLike[str]) -> AudioLMConfig:
    """The audio language model that `folder`/config.json describes, and tokenizer.json (for the id of `<|empty|>`).

    Without a tokenizer.json, as models with a SentencePiece model are, config.json has `empty_token_id`.

    Raises:
        ConfigError: a setting is missing, impossible, or asks for something that ours does not compute.
    """
    raw = _Json.of(folder)
    if "empty_token_id" in raw.values and not (Path(folder) / "tokenizer.json").is_file():
        return raw.checked(_lm_config)
    added = added_tokens(folder)
    require(EMPTY_TOKEN in added, f"{folder}/tokenizer.json", f"an added token {EMPTY_TOKEN}", sorted(added))
    return _Json(raw.path, {**raw.values, "empty_token_id": added[EMPTY_TOKEN]}).checked(_lm_config)


def _lm_config(raw: _Json) -> AudioLMConfig:
    channels = raw.get("audio_channels")
    sizes, empty = raw.numbers("speech_vocab_size", channels), raw.numbers("speech_zeroemb_idx", channels)
    require(empty == tuple(n - 1 for n in sizes), "speech_zeroemb_idx", "the last id of each channel", empty)
    llm = _llm(raw, raw.get("head_dim", int, 128))
    local, inner, heads = raw.get("local_dim"), raw.get("input_local_dim"), raw.get("local_attn_heads")

    def stack(width: int, layers: int, ffn: int, causal: bool) -> TransformerConfig:
        block = TransformerConfig.qwen2(width, layers, heads, width // heads, ffn, causal=causal)
        return dataclasses.replace(block, rope_theta=llm.rope_theta, norm_eps=llm.norm_eps)

    full = raw.get("input_full_attention", bool, False)
    return AudioLMConfig(
        vocab_size=raw.get("vocab_size"),
        empty_id=raw.get("empty_token_id"),
        llm=llm,
        patch_encoder=stack(inner, raw.get("input_local_layers"), 4 * inner, not full),
        patch_decoder=stack(local, raw.get("local_layers"), raw.get("local_ffn_dim"), True),
        codebook_sizes=empty,
        group_size=raw.get("group_size"),
        delays=raw.numbers("delay_pattern", channels),
    )


def lm_config_json(config: AudioLMConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json of an audio language model: the inverse of `read_lm_config`.

    Raises:
        ConfigError: the published format cannot express a setting.
    """
    llm, encoder, decoder = config.llm, config.patch_encoder, config.patch_decoder

    def joined(numbers: Sequence[int]) -> str:
        return "-".join(map(str, numbers))

    out = {
        "model_type": "qwen2",
        "architectures": ["MiMoAudioForCausalLM"],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "max_window_layers": llm.num_layers,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "empty_token_id": config.empty_id,
        **{key: getattr(llm, ours) for ours, key in _LLM.items()},
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "attention_bias": llm.q_bias,
        "rope_theta": llm.rope_theta,
        "rms_norm_eps": llm.norm_eps,
        "audio_channels": config.num_channels,
        "speech_vocab_size": joined(config.audio_vocab_sizes),
        "speech_zeroemb_idx": joined(config.codebook_sizes),
        "delay_pattern": joined(config.delays),
        "group_size": config.group_size,
        "local_dim": decoder.d_model,
        "local_layers": decoder.num_layers,
        "local_attn_heads": decoder.num_heads,
        "local_ffn_dim": decoder.d_ff,
        "local_attn_dropout": 0.0,
        "input_local_dim": encoder.d_model,
        "input_local_layers": encoder.num_layers,
        "input_full_attention": not encoder.causal,
    }
    _check_expressed(config, _lm_config(_Json(Path("config.json"), out)))
    return out


def read_text_lm_config(folder: str | os.PathLike[str]) -> tuple[TransformerConfig, int, bool]:
    """A plain Hugging Face text model (Qwen2, MiMo-7B, Llama): the stack, rows of its tables, whether they are tied."""

    def build(raw: _Json) -> tuple[TransformerConfig, int, bool]:
        head_dim = raw.get("head_dim", int, None) or raw.get("hidden_size") // raw.get("num_attention_heads")
        return _llm(raw, head_dim), raw.get("vocab_size"), raw.get("tie_word_embeddings", bool, False)

    return _Json.of(folder).checked(build)


def read_config(folder: str | os.PathLike[str]) -> Config:
    """`read_tokenizer_config` or `read_lm_config`, whichever `folder` is for."""
    return read_tokenizer_config(folder) if kind_of(folder) == "audio_tokenizer" else read_lm_config(folder)


def config_json(config: Config, dtype: str) -> dict[str, Any]:
    """`tokenizer_config_json` or `lm_config_json`."""
    return lm_config_json(config, dtype) if isinstance(config, AudioLMConfig) else tokenizer_config_json(config, dtype)


def _check_expressed(config: Config, read: Config) -> None:
    for field in dataclasses.fields(config):
        name, a, b = f"model.{field.name}", getattr(config, field.name), getattr(read, field.name)
        if a != b and dataclasses.is_dataclass(a):
            key = next(f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name))
            name, a, b = f"{name}.{key}", getattr(a, key), getattr(b, key)
        if a != b:
            raise ConfigError(f"{name}: the published format has {b!r} where the model has {a!r}")


def added_tokens(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Ids of the added tokens of `folder`/tokenizer.json.

    Raises:
        ConfigError: the file is not one.
        FileNotFoundError: there is none.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        return {t["content"]: int(t["id"]) for t in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a Hugging Face tokenizer.json: {error!r}") from None


# ----------------------------------------------------------------------------------------------------------
# Arrays


@functools.cache
def shapes_of(config: Config) -> Mapping[str, names.Shape]:
    """Shapes of our arrays by path, layers stacked: `params/...`, of a tokenizer also `codebook/...`, `buffers/...`."""
    init: Any
    if isinstance(config, AudioLMConfig):
        from mimo_jax.models.audio_lm import init_params as init
    else:
        from mimo_jax.models.tokenizer.audio_tokenizer import init_variables as init

    boxes: Any = jax.eval_shape(lambda: init(config, ComputeConfig(), jax.random.key(0)))
    tree = jax.tree.map(lambda x: x.shape, unboxed(boxes))
    if isinstance(config, AudioTokenizerConfig):
        tree["buffers"] = jax.tree.map(np.shape, default_buffers(config))
    return flatten(tree)


def default_buffers(config: AudioTokenizerConfig) -> Tree:
    """Constants that the published tokenizer stores among its weights: the window and "this codebook has started"."""
    from mimo_jax.models.tokenizer.rvq import level_name

    inited = {level_name(i): np.ones(1, np.float32) for i in range(config.rvq.num_levels)}
    return {"istft_window": hann_window(config.mel.n_fft).astype(np.float32), "inited": inited}


def tensors_of(config: Config, shapes: Mapping[str, names.Shape]) -> list[names.Tensor]:
    """The published tensors that arrays of ours (`shapes`, by path) are."""
    if isinstance(config, AudioLMConfig):
        return names.tensors(names.LM_RULES, shapes, config.audio_vocab_sizes)
    first = {"params/encoder/upper": config.encoder_skip_layer or 0}
    return names.tensors(names.TOKENIZER_RULES, shapes, first_layer=first)


def check_tensors(reader: Reader, expected: Sequence[names.Tensor], ignored: Sequence[str] = ()) -> None:
    """Makes sure that a folder holds the expected tensors and no others, all parts of one array in one dtype.

    Raises:
        SafetensorsError: it does not; names tensors, what was found and what was expected.
    """
    found = {name: e for name, e in reader.entries.items() if not any(re.fullmatch(p, name) for p in ignored)}
    wanted = {t.name: t for t in expected}
    dtypes: dict[str, np.dtype] = {}
    faults = []
    for name in sorted(set(found) | set(wanted)):
        if name not in wanted:
            faults.append(f"tensor {name} {list(found[name].shape)}: unknown")
        elif name not in found:
            faults.append(f"tensor {name}: missing, expected {list(wanted[name].shape)}")
        elif found[name].shape != wanted[name].shape:
            faults.append(f"tensor {name}: found {list(found[name].shape)}, expected {list(wanted[name].shape)}")
        elif (dtype := dtypes.setdefault(wanted[name].path, found[name].dtype)) != found[name].dtype:
            faults.append(f"tensor {name}: found {found[name].dtype}, expected {dtype} as its neighbours have")
    if faults:
        raise SafetensorsError(f"{reader.folder}: {describe(faults)}")


def _load(folder: str | os.PathLike[str], config: Config, dtype: Any) -> Tree:
    shapes = shapes_of(config)
    expected = tensors_of(config, shapes)
    arrays: dict[str, np.ndarray] = {}
    with Reader(folder) as reader:
        check_tensors(reader, expected)
        for tensor in expected:
            rows = reader.read(tensor.name)
            if tensor.path not in arrays:
                arrays[tensor.path] = np.empty(shapes[tensor.path], dtype or rows.dtype)
            arrays[tensor.path][tensor.place()] = tensor.from_published(rows)
    return nest(arrays)


def load_tokenizer(folder: str | os.PathLike[str], dtype: Any = None) -> tuple[AudioTokenizerConfig, Tree]:
    """The audio tokenizer of a published folder.

    Returns:
        The config, and {"params", "codebook", "buffers"} as NumPy arrays in `dtype`, or as stored; layers stacked.

    Raises:
        ConfigError, SafetensorsError: the folder does not hold what it should; names setting or tensor.
    """
    config = read_tokenizer_config(folder)
    return config, _load(folder, config, dtype)


def load_lm(folder: str | os.PathLike[str], dtype: Any = None) -> tuple[AudioLMConfig, Tree]:
    """The audio language model of a published folder: its config and parameters, as stored or in `dtype`."""
    config = read_lm_config(folder)
    return config, _load(folder, config, dtype)["params"]


def to_published(tree: Mapping[str, Any], config: Config) -> dict[str, np.ndarray]:
    """Published tensors of our arrays, sorted by name.

    Args:
        tree: parameters of a language model, or {"params", "codebook", "buffers"} of a tokenizer or some of these
            (buffers are made up where there are codebooks); layers stacked or apart. Gradients work as well.
    """
    tree = {"params": tree} if isinstance(config, AudioLMConfig) else dict(tree)
    if "codebook" in tree and isinstance(config, AudioTokenizerConfig):
        tree.setdefault("buffers", default_buffers(config))
    arrays = {path: np.asarray(x) for path, x in flatten(tree).items()}
    tensors = sorted(tensors_of(config, {path: x.shape for path, x in arrays.items()}))
    return {t.name: np.ascontiguousarray(t.to_published(arrays[t.path][t.place()])) for t in tensors}
