"""How an audio tokenizer uses its codebooks: entries used, perplexity and entropy of the codes of each level.

    mimo-jax eval codebooks --audio-tokenizer runs/tokenizer --manifest data/train.jsonl --out runs/eval/codebooks.json

N clips, M RVQ frames, R levels, K entries of a codebook, X draws.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_jax.audio.files import AudioError, load_audio
from mimo_jax.data.manifest import Manifest
from mimo_jax.evals.intervals import Interval, bootstrap
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.progress import Meter

DEAD = 2.0  # a level whose codes have a lower perplexity says next to nothing


@dataclass(frozen=True)
class LevelUse:
    """The codes of one level."""

    size: int  # entries
    used: float  # share of the entries that occur
    perplexity: Interval  # exp of the entropy of the codes, over clips

    @property
    def bits(self) -> float:
        """Entropy of a code; log2 of the size if all entries occur equally often."""
        return float(np.log2(self.perplexity.value))


def codebook_use(codes: Iterable[np.ndarray], sizes: Sequence[int]) -> list[LevelUse]:
    """Use of each level.

    Args:
        codes: of each clip, integers [M_i, R].
        sizes: entries of each of the R levels.

    Raises:
        ValueError: there is no clip.
    """
    counts = [
        [np.bincount(codes_MR[:, level], minlength=size) for level, size in enumerate(sizes)] for codes_MR in codes
    ]
    if not counts:
        raise ValueError("codebooks: expected at least one clip")
    levels = []
    for size, counts_N in zip(sizes, zip(*counts, strict=True), strict=True):
        counts_NK = np.stack(counts_N).astype(np.float64)
        used = float((counts_NK.sum(axis=0) > 0).mean())
        levels.append(LevelUse(size, used, bootstrap(functools.partial(_perplexity, counts_NK), len(counts_NK))))
    return levels


def _perplexity(counts_NK: np.ndarray, weights_XN: np.ndarray) -> np.ndarray:
    counts_XK = weights_XN @ counts_NK
    share = counts_XK / counts_XK.sum(axis=1, keepdims=True)
    return np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1))


def measure(codec: Codec, manifest: Manifest) -> dict[str, Any]:
    """Encodes all recordings of a manifest; what cannot be read is counted.

    Returns:
        `levels` (size, used, perplexity with interval, bits), `bits_per_second` of the codes as they are used beside
        `bits_per_second_at_most`, `clips`, `seconds`, `left_out`, and the tokenizer's fingerprint.

    Raises:
        AudioError: no recording could be read.
    """
    config, codes, left_out, samples = codec.config, [], [], 0
    meter = Meter(len(manifest), lambda done, speed: f"codebooks: {done:.0f} of {len(manifest)}, {speed:.1f}/s")
    for entry in manifest:
        try:
            wav_S = load_audio(entry.audio, config.mel.sample_rate, config.resampler)
        except AudioError as error:
            left_out.append(str(error))
        else:
            codes.append(codec.encode([wav_S])[0])
            samples += len(wav_S)
        meter.step(1)
    if not codes:
        raise AudioError(f"{manifest.path}: none of its {len(manifest)} recordings could be read: {left_out[:1]}")
    levels = codebook_use(codes, config.rvq.codebook_sizes)
    return {
        "tokenizer": codec.fingerprint,
        "clips": len(codes),
        "seconds": samples / config.mel.sample_rate,
        "left_out": left_out,
        "bits_per_second": config.frame_rate * sum(level.bits for level in levels),
        "bits_per_second_at_most": config.bitrate(),
        "levels": [
            {"size": x.size, "used": x.used, "perplexity": x.perplexity.to_json(), "bits": x.bits} for x in levels
        ],
    }


def table(found: dict[str, Any]) -> str:
    """What `measure` found, for the console."""
    lines = [f"{'level':>5} {'entries':>8} {'used':>7} {'perplexity':>24} {'bits':>12}"]
    for r, level in enumerate(found["levels"]):
        p, verdict = level["perplexity"], "  dead" if level["perplexity"]["value"] < DEAD else ""
        interval = f"{p['value']:.1f} ({p['low']:.1f} to {p['high']:.1f})"
        bits = f"{level['bits']:.2f} of {np.log2(level['size']):.0f}"
        lines.append(f"{r:>5} {level['size']:>8} {level['used']:>7.1%} {interval:>24} {bits:>12}{verdict}")
    rate = f"{found['bits_per_second']:,.0f} of {found['bits_per_second_at_most']:,.0f} bit/s"
    return "\n".join([*lines, f"{found['clips']:,} clips, {found['seconds'] / 3600:.2f} hours; {rate}"])
