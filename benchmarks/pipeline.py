"""Speed of the data pipeline of one host of a pod, on the cores that are here.

    python benchmarks/pipeline.py [--config configs/joint.py:7b] [--hosts 64] [--step-seconds 14.8] [--steps 6]

Six made-up shard sets (clips of 5 to 30 s with words and times, texts of 100 to 2,000 words) are mixed, laid out,
packed and batched as in training; the conditioning side of tasks is masked (`data.target_conditioning=False`). Prints
the positions/s of one host of `--hosts`, and their ratio to what a step of `--step-seconds` consumes
(docs/planning.md). Every host plans all rows and reads its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mimo_jax.config import LayoutWeights, LMTrainConfig, SourceConfig
from mimo_jax.config_files import load_config
from mimo_jax.data.lm_rows import lm_loader
from mimo_jax.data.records import Record, Segment
from mimo_jax.data.shards import ShardSetInfo, commit, index_shards, shard_name, write_shard
from mimo_jax.text.tokenizers import load_text_tokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parents[1]
FRAMES_PER_SECOND = 25
# Share of each set and of its layouts.
SETS = {
    "podcasts": (0.2, {"continuation": 0.6, "interleaved": 0.4}),
    "audiobooks": (0.15, {"continuation": 0.2, "interleaved": 0.4, "asr": 0.2, "tts": 0.2}),
    "read": (0.05, {"asr": 0.5, "tts": 0.5}),
    "styled": (0.05, {"instruct_tts": 0.7, "caption": 0.3}),
    "web": (0.35, {"text": 1.0}),
    "books": (0.2, {"text": 1.0}),
}


def words(rng: np.random.Generator, count: int, dictionary: list[str]) -> list[str]:
    return [dictionary[i] for i in np.minimum(rng.zipf(1.3, count), len(dictionary)) - 1]


def made_up(name: str, count: int, sizes: tuple[int, ...], dictionary: list[str], speech: bool) -> Iterator[Record]:
    """Records of one set; they depend on its name alone."""
    rng = np.random.default_rng(list(name.encode()))
    for i in range(count):
        if not speech:
            yield Record(id=f"{name}{i}", text=" ".join(words(rng, int(rng.integers(100, 2000)), dictionary)) + ".")
            continue
        frames = int(rng.integers(5, 31)) * FRAMES_PER_SECOND
        seconds = frames / FRAMES_PER_SECOND
        said = words(rng, round(seconds * 2.5), dictionary)
        times = np.linspace(0.0, seconds, len(said) + 1)
        yield Record(
            id=f"{name}{i}",
            codes_MR=np.stack([rng.integers(0, size, frames) for size in sizes], 1).astype(np.uint16),
            text=" ".join(said) + ".",
            caption="A calm voice reads in a quiet room.",
            instruction="slowly and warmly",
            segments=tuple(Segment(a, b, w) for a, b, w in zip(times[:-1], times[1:], said, strict=True)),
            duration=seconds,
        )


def write_set(folder: Path, records: Iterator[Record], count: int, sizes: tuple[int, ...], shards: int = 4) -> None:
    """Writes a shard set and its manifest."""
    folder.mkdir(parents=True)
    kind = "speech" if sizes else "text"
    bounds = [count * i // shards for i in range(shards + 1)]
    files = [
        write_shard(folder / shard_name(kind, i, shards), (next(records) for _ in range(bounds[i + 1] - bounds[i])))
        for i in range(shards)
    ]
    rate, fingerprint = (FRAMES_PER_SECOND, "made-up") if sizes else (0.0, "")
    commit(folder, ShardSetInfo(kind, sizes, rate, fingerprint, count, 0.0, {}, {}, tuple(files)))


def prepare(config: LMTrainConfig, folder: Path, records: int) -> list[str]:
    """Writes the sets and the text tokenizer; returns the settings that name them."""
    letters, rng = np.array(list("etaoinshrdlucmfwypvbgk")), np.random.default_rng(0)
    dictionary = ["".join(rng.choice(letters, int(n))) for n in rng.integers(2, 9, 3000)]
    train_sentencepiece((" ".join(words(rng, 200, dictionary)) for _ in range(500)), folder / "text.model", 2000)
    tokenizer = load_text_tokenizer(folder / "text.model")
    settings = [
        f"--config.data.text_tokenizer={folder / 'text.model'}",
        f"--config.model.empty_id={tokenizer.special['<|empty|>']}",
        "--config.data.target_conditioning=False",
    ]
    for name, (_, layouts) in SETS.items():
        speech = "text" not in layouts
        sizes = config.model.codebook_sizes if speech else ()
        write_set(folder / name, made_up(name, records, sizes, dictionary, speech), records, sizes)
        index_shards(folder / name, tokenizer)
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=f"{ROOT}/configs/joint.py:7b", metavar="FILE:SIZE")
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--step-seconds", type=float, default=14.8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--records", type=int, default=4000, help="records of each set")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = load_config(options.config, [])
        assert isinstance(config, LMTrainConfig)
        settings = prepare(config, folder, options.records)
        config = load_config(options.config, settings)
        sources = {
            name: SourceConfig(str(folder / name), weight, LayoutWeights(**layouts))
            for name, (weight, layouts) in SETS.items()
        }
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources, validation={}))
        with lm_loader(config, process_index=0, process_count=options.hosts) as loader:
            batch = next(loader)  # opens the files
            filled = positions = 0
            begin = time.perf_counter()
            for _ in range(options.steps):
                batch = next(loader)
                filled += int((batch.segment_ids_BL > 0).sum())
                positions += batch.segment_ids_BL.size
            rate = positions / (time.perf_counter() - begin)
    needed = config.data.rows * config.data.row_length / options.hosts / options.step_seconds
    patches = float((batch.patch_positions_BC < config.data.row_length).mean())
    result = {
        "positions_per_second": rate,
        "needed": needed,
        "ratio": rate / needed,
        "filled": filled / positions,
        "patch_slots_used": patches,
    }
    print(f"{rate:,.0f} positions/s on one host of {options.hosts}, {filled / positions:.1%} of them filled")
    print(f"{rate / needed:.2f} x the {needed:,.0f} positions/s that a step of {options.step_seconds:g} s consumes")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
