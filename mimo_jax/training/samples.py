"""Sounds for people who want to hear how a tokenizer gets on: held-out clips and what it makes of them.

    WORKDIR/samples/STEP/clip-00-original.wav, clip-00-8-levels.wav, clip-00-20-levels.wav, clip-00.png ...

The same goes to TensorBoard. B rows, S samples, T mel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import AudioError, save_wav
from mimo_jax.audio.pictures import spectrograms
from mimo_jax.config import AudioTokenizerConfig
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.rows import TokenizerRows
from mimo_jax.training.metrics import MetricsWriter
from mimo_jax.training.state import TrainState
from mimo_jax.training.tokenizer_loss import true_wave

FOLDER = "samples"
_LEVELS = 8  # those that the language model reads, beside all


class Samples:
    """Writes what a tokenizer makes of the first clips of the first validation batch."""

    def __init__(self, model: AudioTokenizer, workdir: Path, count: int, replicated: NamedSharding) -> None:
        """Samples of `count` clips at most; 0 writes none."""
        config = model.config
        levels = sorted({min(_LEVELS, config.rvq.num_levels), config.rvq.num_levels})

        def make(state: TrainState, rows: TokenizerRows) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
            rows = jax.tree.map(lambda x: x[:count], rows)  # each has a clip at least
            variables = {"params": state.params["audio_tokenizer"], "codebook": state.codebook}
            codes_BMR = model.apply(variables, rows.wav_BS, rows.segment_ids_BT, method="encode")
            ids_BM = rows.segment_ids_BT[:, :: config.mel_frames_per_code]
            made = [model.apply(variables, codes_BMR[..., :n], ids_BM, method="decode") for n in levels]
            return rows.segment_ids_BT, true_wave(rows, config)[0], made

        self._make = jax.jit(make, out_shardings=replicated)
        self._folder, self._count, self._config = workdir / FOLDER, count, config
        self._titles = ["original", *(f"{n} levels" for n in levels)]

    def write(self, step: int, state: TrainState, rows: TokenizerRows, writer: MetricsWriter) -> None:
        """Encodes and decodes `rows`; every process takes part, the first one writes."""
        if not self._count:
            return
        ids_BT, true_BS, made = jax.device_get(self._make(state, rows))
        if jax.process_index() != 0:
            return
        try:
            self._write(step, clips(ids_BT, [true_BS, *made], self._config, self._count), writer)
        except (AudioError, OSError) as error:  # not worth a run: samples that are not finite, a full disk
            writer.say(f"step {step}  no samples written: {error}")

    def _write(self, step: int, found: Sequence[Sequence[np.ndarray]], writer: MetricsWriter) -> None:
        rate = self._config.mel.sample_rate
        for i, wavs in enumerate(found):
            sounds = dict(zip(self._titles, wavs, strict=True))
            stem = self._folder / str(step) / f"clip-{i:02d}"
            for title, wav_S in sounds.items():
                save_wav(stem.with_name(f"{stem.name}-{title.replace(' ', '-')}.wav"), wav_S, rate)
            picture = spectrograms(sounds, rate)
            atomic_write(stem.with_suffix(".png"), picture)
            writer.show(step, f"{FOLDER}/{i:02d}", sounds, rate, picture)


def clips(
    ids_BT: np.ndarray, wavs: Sequence[np.ndarray], config: AudioTokenizerConfig, count: int
) -> list[list[np.ndarray]]:
    """The first clips of packed rows: for each, its part of every one of `wavs` [B, S]."""
    found: list[list[np.ndarray]] = []
    hop = config.mel.hop_length
    for b, ids_T in enumerate(ids_BT):
        for segment in range(1, int(ids_T.max(initial=0)) + 1):
            frames = np.flatnonzero(ids_T == segment)
            if len(frames) > 1 and len(found) < count:
                here = slice(frames[0] * hop, frames[-1] * hop)  # as in the loss, but the last frame
                found.append([np.asarray(wav_BS[b, here], np.float32) for wav_BS in wavs])
    return found


def first_batch(batches: Any, put: Callable[[Any], Any], made: Callable[[Any], None]) -> Any:
    """The batches as they are; `made` gets the first one, on the devices."""
    for i, rows in enumerate(batches):
        if i == 0:
            made(put(rows))
        yield rows
