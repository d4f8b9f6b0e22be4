"""What the data tests are built from: a readable text tokenizer, a codec without training, sets without an ingest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mimo_jax import presets
from mimo_jax.config import AudioLMConfig, LayoutWeights
from mimo_jax.data.records import Record, Segment
from mimo_jax.data.shards import ShardSetInfo, commit, shard_name, write_shard
from mimo_jax.text.tokenizers import SPECIAL_TOKENS, TextTokenizer

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wise owls sing of quiet rivers and old stone walls".split()
)
SIZES = (1024, 1024, *(128,) * 18)


class CharTokenizer:
    """One id for each character, 100 + code point: ids in tests can be read."""

    special: ClassVar[dict[str, int]] = {t: i + 1 for i, t in enumerate(SPECIAL_TOKENS)}
    vocab_size = 4096
    fingerprint = "characters"

    def encode(self, text: str) -> list[int]:
        return [100 + ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i - 100) for i in ids if i >= 100)

    def token(self, token_id: int) -> str:
        return self.decode([token_id])


class HashCodec:
    """Codes that are a hash of the samples: deterministic, different for different audio."""

    def __init__(self, fingerprint: str = "aaaa000011112222", delay: float = 0.0):
        self.config = presets.audio_tokenizer("tiny")
        self.fingerprint, self.delay = fingerprint, delay

    def encode(self, wavs: Sequence[np.ndarray]) -> list[np.ndarray]:
        import time

        time.sleep(self.delay)
        out = []
        for wav in wavs:
            seed = int.from_bytes(hashlib.sha256(np.ascontiguousarray(wav).tobytes()).digest()[:8], "little")
            out.append(random_codes(np.random.default_rng(seed), -(-(len(wav) // 240 + 1) // 4)))
        return out


def random_codes(rng: np.random.Generator, frames: int, sizes: Sequence[int] = SIZES) -> np.ndarray:
    return np.stack([rng.integers(0, n, frames) for n in sizes], axis=1).astype(np.uint16).reshape(frames, len(sizes))


def random_record(rng: np.random.Generator, name: str, frames: int | None = None, level: int | None = None) -> Record:
    """A clip with everything known about it; `level` 0..3 takes away segments, caption and instruction, text."""
    frames = int(rng.integers(30, 420)) if frames is None else frames
    seconds = frames / 25
    words = [WORDS[i] for i in rng.integers(0, len(WORDS), max(3, int(seconds * 2.5)))]
    cuts = np.linspace(0.1, max(seconds - 0.1, 0.2), len(words) + 1)
    level = int(rng.integers(0, 4)) if level is None else level
    return Record(
        id=name,
        codes_MR=random_codes(rng, frames),
        text=" ".join(words).capitalize() + "." if level < 3 else "",
        language="en",
        caption="A calm voice reads." if level < 2 else "",
        instruction="slowly" if level < 2 else "",
        segments=tuple(Segment(float(a), float(b), w) for a, b, w in zip(cuts[:-1], cuts[1:], words, strict=True))
        if level < 1
        else (),
        duration=seconds,
    )


def write_set(
    folder: Path,
    records: Sequence[Record],
    shards: int = 3,
    tokenizer: str = "aaaa000011112222",
    sizes: tuple[int, ...] = SIZES,
) -> Path:
    """Writes a shard set without an ingest."""
    folder.mkdir(parents=True)
    kind = "speech" if any(len(r.codes_MR) for r in records) else "text"
    per = -(-len(records) // shards)
    files = [write_shard(folder / shard_name(kind, i, shards), records[i * per : (i + 1) * per]) for i in range(shards)]
    info = ShardSetInfo(
        kind=kind,
        codebook_sizes=sizes if kind == "speech" else (),
        frame_rate=25.0 if kind == "speech" else 0.0,
        tokenizer=tokenizer if kind == "speech" else "",
        records=len(records),
        hours=sum(r.duration for r in records) / 3600,
        counts={},
        skipped={},
        shards=tuple(files),
    )
    commit(folder, info)
    return folder


def write_wavs(folder: Path, count: int, seconds: float = 0.3, rate: int = 24_000, text: bool = True) -> Path:
    """Writes small noises and their manifest; returns the manifest."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        rng = np.random.default_rng(i)
        wav = (0.1 * rng.standard_normal(int(rate * seconds * (1 + i % 3)))).astype(np.float32)
        soundfile.write(folder / f"{i:03d}.wav", wav, rate, subtype="PCM_16")
        line = {"audio": f"{i:03d}.wav", "language": "en"}
        if text:
            line["text"] = f"clip number {i}"
        lines.append(json.dumps(line))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def tiny_model(tokenizer: TextTokenizer | CharTokenizer, channels: int = 8) -> AudioLMConfig:
    model = presets.audio_lm("tiny")
    return AudioLMConfig(
        vocab_size=max(tokenizer.vocab_size, 16),
        empty_id=tokenizer.special["<|empty|>"],
        llm=model.llm,
        patch_encoder=model.patch_encoder,
        patch_decoder=model.patch_decoder,
        codebook_sizes=SIZES[:channels],
        delays=tuple(range(channels)),
    )


ALL_LAYOUTS = LayoutWeights(text=0.5, continuation=1, interleaved=1, asr=1, tts=1, caption=1, instruct_tts=1)
