"""The audio tokenizer: one clip layer by layer, packed batches, long clips, and streams.

B clips, S samples, T mel frames (100 Hz), H hidden frames (50 Hz), M RVQ frames (25 Hz), R levels, D width. The decoder
is compared on the reference's codes, so that a code that differs by a near-tie does not hide it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.audio.features import frame_mel, mel_filterbank
from mimo_jax.audio.packing import (
    empty_row,
    guard_codes,
    num_codes,
    num_mel_frames,
    pack_clips,
    reflect_pad,
    write_frames,
)
from mimo_jax.config import AudioTokenizerConfig, ComputeConfig
from mimo_jax.interop.published import load_tokenizer
from mimo_jax.models.tokenizer import reference, rvq
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.models.tokenizer.streaming import ReferenceStream
from mimo_jax.models.trace import Trace, traced
from mimo_jax.models.transformer import unstack_layers
from mimo_jax.parity.harness import Case
from mimo_jax.parity.rvq import decided, margins

UNROLLED = ComputeConfig(scan_layers=False)

cached_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)


def _unrolled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with unrolled layers, each of which can be traced."""
    if "layers" in tree:
        tree = unstack_layers(tree, len(jax.tree.leaves(tree["layers"])[0]))
    return {key: _unrolled(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _layers(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {"params": _unrolled(variables["params"]), "codebook": variables["codebook"]}


@functools.lru_cache(maxsize=4)
def cached_codec(folder: Path, reference_quirks: bool = False) -> Codec:
    """The codec of a published folder, and so its compiled programs, for all cases."""
    config, variables = cached_tokenizer(folder)
    return Codec(config, variables["params"], variables["codebook"], reference_quirks=reference_quirks)


Pick = Callable[[Any, np.ndarray], Any]  # a padded batch on some grid, and the lengths there -> what is compared


def _packed(x_BL: Any, lengths_B: np.ndarray) -> np.ndarray:
    """All valid positions, side by side."""
    return np.concatenate([np.asarray(x)[:n] for x, n in zip(x_BL, lengths_B, strict=True)])


def _padded(x_BL: Any, lengths_B: np.ndarray) -> np.ndarray:
    """The batch, as long as its longest sequence."""
    return np.asarray(x_BL)[:, : lengths_B.max()]


def _encoder(
    case: Case, config: AudioTokenizerConfig, trace: Trace, z: Any, frames_B: np.ndarray, padded: Pick
) -> None:
    """All stages of the encoder; arrays of the convolutions are compared as `padded` gives them."""
    hidden_B = -(-frames_B // config.stem_stride)
    codes_B = -(-hidden_B // config.pool)
    case.check("conv1_out", padded(trace.result("encoder/conv1"), frames_B))
    case.check("conv2_out", padded(trace.result("encoder/conv2"), hidden_B))
    lower = config.encoder_skip_layer or 0
    stacks = [("lower", i) for i in range(lower)] + [("upper", i) for i in range(config.encoder.num_layers - lower)]
    case.check("enc_layers_in", _packed(trace.given(f"encoder/{stacks[0][0]}/layers_0"), hidden_B))
    for number, (stack, i) in enumerate(stacks, 1):
        case.check(f"enc_layer_{number:02d}", _packed(trace.result(f"encoder/{stack}/layers_{i}"), hidden_B))
    if lower:
        case.check("enc_skip", _packed(trace.result("encoder/lower"), hidden_B))
    case.check("enc_final_plus_skip", _packed(trace.given("encoder/norm"), hidden_B))
    case.check("enc_layer_norm", _packed(trace.result("encoder/norm"), hidden_B))
    if config.pool > 1:
        case.check("enc_downsample", padded(trace.given("encoder/pool_norm"), codes_B))
    case.check("quantizer_in", _packed(z, codes_B))
    case.check("code_lengths", codes_B)


def _codes(case: Case, codebook: rvq.Codebook, z_ND: Any, codes_NR: Any, name: str = "codes") -> None:
    """Codes and their margins; `z_ND` is what they were quantised from."""
    if name in case.expected:
        margins_NR = margins(codebook, z_ND, case.expected[name].T)
        case.check("rvq_margin", margins_NR.T)
        case.check(name, codes_NR.T, decided(margins_NR, case.atol("rvq_margin")).T)


def _decoder(case: Case, config: AudioTokenizerConfig, trace: Trace, codes_B: np.ndarray, padded: Pick) -> None:
    hidden_B, frames_B = codes_B * config.pool, codes_B * config.mel_frames_per_code
    if config.pool > 1:
        case.check("dec_dconv1", padded(trace.given("decoder/transformer"), hidden_B))
    case.check("dec_layers_in", _packed(trace.given("decoder/transformer"), hidden_B))
    for i in range(config.decoder.num_layers):
        case.check(f"dec_layer_{i + 1:02d}", _packed(trace.result(f"decoder/transformer/layers_{i}"), hidden_B))
    case.check("dec_layer_norm", _packed(trace.result("decoder/transformer/norm"), hidden_B))
    case.check("coarse_mel", padded(trace.given("vocoder/embed"), frames_B))
    case.check("voc_embed", _packed(trace.result("vocoder/embed"), frames_B))
    for i in range(config.vocoder.num_layers):
        case.check(f"voc_layer_{i + 1:02d}", _packed(trace.result(f"vocoder/transformer/layers_{i}"), frames_B))
    case.check("voc_layer_norm", _packed(trace.result("vocoder/transformer/norm"), frames_B))
    case.check("voc_head_out", _packed(trace.result("vocoder/head"), frames_B))


def single(case: Case) -> None:
    """One clip: every stage, and decoding from the first levels."""
    config, variables = cached_tokenizer(case.folder / "model")
    model, layers, codebook = AudioTokenizer(config, UNROLLED), _layers(variables), variables["codebook"]
    if (case.folder / "single_inputs.npz").is_file():
        wav = case.inputs("single_inputs.npz")["wav"]
        wav_BS, ids_BT = pack_clips([wav], config)
        frames_B, codes = np.array([num_mel_frames(len(wav), config)]), num_codes(len(wav), config)
        case.check("mel_filterbank", mel_filterbank(config.mel))
        case.check("mel_magnitude", _packed(frame_mel(jnp.asarray(wav_BS), config.mel), frames_B))
        (z_BMD, _), trace = traced(model, layers, wav_BS, ids_BT, method="encode_features")
        case.check("log_mel", _packed(trace.given("encoder"), frames_B))
        _encoder(case, config, trace, z_BMD, frames_B, _packed)
        _codes(case, codebook, z_BMD[0, :codes], rvq.quantize(codebook, z_BMD[0, :codes]))

    else:  # a folder without the recording
        case.use("codes")

    codes_MR = jnp.asarray(case.expected["codes"].T)
    ids_BM = np.ones((1, len(codes_MR)), np.int32)
    q_BMD, _ = traced(model, layers, codes_MR[None], method="dequantize")
    case.check("dequantized", q_BMD[0])
    wav_BS, trace = traced(model, layers, q_BMD, ids_BM, method="decode_features")
    _decoder(case, config, trace, np.array([len(codes_MR)]), _packed)
    case.check("wav_out", wav_BS[0])
    codec = cached_codec(case.folder / "model")
    for levels in map(int, case.names("wav_out_first")):
        case.check(f"wav_out_first{levels}", codec.decode(np.asarray(codes_MR[:, :levels])))
    for levels in map(int, case.names("dequantized_first")):
        case.check(f"dequantized_first{levels}", rvq.dequantize(codebook, codes_MR[:, :levels]))
    for first in map(int, case.names("dequantized_st")):
        rest = {rvq.level_name(i): codebook[rvq.level_name(first + i)] for i in range(len(codebook) - first)}
        case.check(f"dequantized_st{first}", rvq.dequantize(rest, codes_MR[:, first:]))


def batch(case: Case) -> None:
    """Clips as the released code packs them, and each on its own."""
    config, variables = cached_tokenizer(case.folder / "model")
    model, layers, codebook = AudioTokenizer(config, UNROLLED), _layers(variables), variables["codebook"]
    inputs = case.inputs("batch_inputs.npz")
    wavs = [inputs[f"wav_{i}"] for i in range(sum(name.startswith("wav_") for name in inputs))]
    frames_B = np.array([num_mel_frames(len(wav), config) for wav in wavs])
    codes_B = np.array([num_codes(len(wav), config) for wav in wavs])
    case.check("mel_lengths", frames_B)
    (z_BMD, _), trace = traced(model, layers, *reference.wave_batch(wavs, config), method="encode_features")
    case.check("log_mel_packed", _packed(trace.given("encoder"), frames_B))
    _encoder(case, config, trace, z_BMD, frames_B, _padded)
    found = cached_codec(case.folder / "model", reference_quirks=True).encode(wavs)
    _codes(case, codebook, _packed(z_BMD, codes_B), np.concatenate(found))

    codes = np.split(case.expected["codes"].T, np.cumsum(codes_B)[:-1])
    codes_BMR, ids_BM, extent_BM = reference.code_batch(codes)
    q_BMD, _ = traced(model, layers, codes_BMR, method="dequantize")
    case.check("dequantized", _packed(q_BMD, codes_B))
    case.check("dequantized_padded", np.where(ids_BM[..., None] > 0, q_BMD, 0))
    wav_BS, trace = traced(model, layers, q_BMD, ids_BM, extent_BM, method="decode_features")
    _decoder(case, config, trace, codes_B, _padded)
    case.check("wav_out", wav_BS[:, None])

    alone = cached_codec(case.folder / "model")
    for i, (wav, z_ND) in enumerate(zip(wavs, quantizer_inputs(alone, wavs), strict=True)):
        if (name := f"codes_alone_{i}") in case.expected:
            ties = decided(margins(codebook, z_ND, case.expected[name].T), case.atol("rvq_margin"))
            case.check(name, alone.encode([wav])[0].T, ties.T)
        case.check(f"wav_alone_from_batch_codes_{i}", alone.decode(codes[i]))


def quantizer_inputs(codec: Codec, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the quantiser gets of each clip, segment by segment, each clip being a batch of its own: [M, D]."""
    config = codec.config
    step = codec.segment_codes * config.mel_frames_per_code
    lengths = [num_mel_frames(len(wav), config) for wav in wavs]
    row_codes = -(-min(step, max(lengths)) // config.mel_frames_per_code) + guard_codes(config)
    model, outputs = AudioTokenizer(config, codec.compute), []
    for wav, frames in zip(wavs, lengths, strict=True):
        parts = []
        for first in range(0, frames, step):
            count = min(step, frames - first)
            wav_S, ids_T = empty_row(row_codes, config)
            write_frames(wav_S, ids_T, 0, reflect_pad(wav, config), first, count, 1, config)
            extent_T = (np.arange(len(ids_T)) < min(step, frames)).astype(np.int32)
            extent_BT = extent_T[None] if codec.reference_quirks else None
            z_BMD, _ = _encode_features(model, codec.variables, wav_S[None], ids_T[None], extent_BT)
            parts.append(np.asarray(z_BMD[0, : -(-count // config.mel_frames_per_code)]))
        outputs.append(np.concatenate(parts))
    return outputs


@functools.partial(jax.jit, static_argnums=0)
def _encode_features(model: AudioTokenizer, variables: Any, *args: Any) -> Any:
    return model.apply(variables, *args, method="encode_features")


def long(case: Case) -> None:
    """Clips of more than a minute, in the published segments, as the flat tokens of the released preprocessing."""
    codec = cached_codec(case.folder / "model", reference_quirks=True)
    config, codebook = codec.config, codec.variables["codebook"]
    inputs = case.inputs("long_inputs.npz")
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for source, channels, group_size in json.loads(str(inputs["meta"])):
        wav = inputs[source]
        wav = wav.astype(np.float32) / 32768 if wav.dtype == np.int16 else wav
        if source not in found:
            found[source] = codec.encode([wav])[0], quantizer_inputs(codec, [wav])[0]
        codes_MR, z_MD = found[source]
        name = f"{source}_ch{channels}_gs{group_size}"
        if name in case.expected:
            theirs_MR = case.expected[name].reshape(-1, channels)[: len(z_MD)]
            ties = decided(margins(codebook, z_MD, theirs_MR), case.atol("rvq_margin"))
            tokens_MR = pad_to_groups(codes_MR[:, :channels].astype(np.int64), group_size)
            case.check(name, tokens_MR.reshape(-1), pad_to_groups(ties, group_size).reshape(-1))
    # All codes are those of the clip that has several segments.
    source = max(found, key=lambda name: len(found[name][0]))
    codes_MR, z_MD = found[source]
    frames = num_mel_frames(len(inputs[source]), config)
    step = codec.segment_codes * config.mel_frames_per_code
    segments = np.array([min(step, frames - first) for first in range(0, frames, step)])
    case.check("segments", segments)
    case.check("code_lengths", -(-segments // config.mel_frames_per_code))
    _codes(case, codebook, z_MD, codes_MR, "codes_all")


def pad_to_groups(x_MR: np.ndarray, group_size: int) -> np.ndarray:
    """Repeats the last frame until the number of frames is a multiple of `group_size`."""
    return np.pad(x_MR, ((0, -len(x_MR) % group_size), (0, 0)), mode="edge")


def streaming(case: Case) -> None:
    """Streams of one and of several sequences, call by call, and what is kept between calls."""
    codec = cached_codec(case.folder / "model", reference_quirks=True)
    inputs = case.inputs("streaming_inputs.npz")
    for name, scenario in json.loads(str(inputs["meta"])).items():
        stream = ReferenceStream(codec, scenario["left_overlap"], scenario["right_overlap"])
        rest = [inputs[f"codes_{b}"].T for b in range(scenario["batch"])]
        for i, counts in enumerate(scenario["chunks"]):
            chunks = [codes_MR[:n] for codes_MR, n in zip(rest, counts, strict=True)]
            rest = [codes_MR[n:] for codes_MR, n in zip(rest, counts, strict=True)]
            waves = stream.push(chunks, last=i + 1 == len(scenario["chunks"]))
            for b, wav in enumerate(waves):
                case.check(f"{name}/chunk{i}_seq{b}_none", np.bool_(wav is None))
                case.check(f"{name}/chunk{i}_seq{b}", np.zeros(0, np.float32) if wav is None else wav)
            case.check(f"{name}/chunk{i}_processed_lengths", np.array(stream.processed_lengths))
            case.check(f"{name}/chunk{i}_cache_lengths", np.array(stream.cache_lengths))
