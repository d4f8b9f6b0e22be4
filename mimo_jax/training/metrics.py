"""Metrics: from the device to `metrics.jsonl`, TensorBoard and the console.

A step returns a `StepMetrics`, one small array that stays on the device until the next report. Means are carried as
sums and counts, so that averages over steps, micro-batches and hosts weigh every target the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.chips import chip_of

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What one step reports, as one float32 vector: fetching a hundred arrays instead costs 1 ms a step (on a CPU)."""

    values_N: jax.Array
    structure: Any = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def make(
        cls, sums: Any, scalars: Mapping[str, Any] | None = None, counters: Mapping[str, Any] | None = None
    ) -> StepMetrics:
        """Packs the metrics of a step.

        Args:
            sums: tree of arrays that are added up over steps (loss sums, target counts, code counts); a job's
                `View.describe` makes means of them.
            scalars: numbers that are averaged over steps, such as norms. `good` (0 or 1) and `bad_in_row` are kept
                apart: see `Summary`.
            counters: numbers that are added up over the whole run, such as the positions of the batch.
        """
        tree = {"sums": sums, "scalars": dict(scalars or {}), "counters": dict(counters or {})}
        leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree))
        return cls(jnp.concatenate([x.ravel() for x in leaves]), structure, tuple(x.shape for x in leaves))

    def unpack(self, values_N: np.ndarray) -> dict[str, Any]:
        """The tree `{"sums", "scalars", "counters"}` of numpy arrays with these values."""
        parts = np.split(values_N, np.cumsum([math.prod(shape) for shape in self.shapes])[:-1])
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Metrics of several steps on the host, float64."""

    last: int  # the last of these steps
    sums: Any  # tree of sums over the good steps; None if there was none
    scalars: dict[str, float]  # means over the good steps
    counters: dict[str, float]  # totals over all steps, skipped ones included: their data is used up
    skipped: list[tuple[int, dict[str, float]]]  # (step, scalars) of every step that was not good
    bad_in_row: int  # value of the scalar `bad_in_row` after the last step


def summarize(steps: Sequence[int], metrics: Sequence[StepMetrics], patience: float = math.inf) -> Summary:
    """Fetches and adds up the metrics of `steps`; one that changed nothing stays out of sums and means.

    What follows the step at which `bad_in_row` reached `patience` has changed nothing, and is left out.
    """
    fetched = [values_N.astype(np.float64) for values_N in jax.device_get([m.values_N for m in metrics])]
    trees = [m.unpack(values_N) for m, values_N in zip(metrics, fetched, strict=True)]
    bad = [int(tree["scalars"].pop("bad_in_row", 0)) for tree in trees]
    end = next((i for i, n in enumerate(bad, 1) if n >= patience), len(trees))
    steps, trees = steps[:end], trees[:end]
    counts = [float(tree["scalars"].pop("good", 1.0)) > 0 and not n for tree, n in zip(trees, bad[:end], strict=True)]
    good = [tree for tree, ok in zip(trees, counts, strict=True) if ok]

    def numbers(tree: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {name: float(value) for name, value in tree.items()}

    def total(kept: list[dict[str, Any]], part: str) -> Any:
        return jax.tree.map(lambda *x: np.sum(x, axis=0), *(tree[part] for tree in kept))

    return Summary(
        last=steps[-1],
        sums=total(good, "sums") if good else None,
        scalars={n: v / len(good) for n, v in numbers(total(good, "scalars")).items()} if good else {},
        counters=numbers(total(trees, "counters")),
        skipped=[(s, numbers(t["scalars"])) for s, t, ok in zip(steps, trees, counts, strict=True) if not ok],
        bad_in_row=bad[end - 1],
    )


def peak_flops() -> float | None:
    """Peak of all devices of the job in FLOP/s, or None where the kind of device is not known."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.peak_flops * jax.device_count() if chip else None


class MetricsWriter:
    """Writes `metrics.jsonl` (the source of truth), TensorBoard events and console lines.

    Lines of an earlier run beyond `resume_step`, the step that was restored (all of them if None), are dropped. Only
    process 0 writes; on the others every method does nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        drop_after(path, -1 if resume_step is None else resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(workdir / EVENTS_FOLDER))
        # TensorBoard forgets what an earlier session wrote beyond this step.
        first = 0 if resume_step is None else resume_step + 1
        start = Event(step=first, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
        self._events.add_event(start)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line `{"step", "split", name: value, ...}`; a value that is not finite becomes null."""
        if not self._active:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary

        finite = {name: float(v) if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        self._file.flush()
        known = {f"{split}/{name}": value for name, value in finite.items() if value is not None}
        scalars = [EventSummary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
        self._events.add_event(Event(step=step, wall_time=time.time(), summary=EventSummary(value=scalars)))

    def show(self, step: int, name: str, sounds: Mapping[str, np.ndarray], sample_rate: int, picture: bytes) -> None:
        """Gives TensorBoard sounds, float waves [S_i] by title, and a PNG of them."""
        if not self._active:
            return
        import io

        import soundfile
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary

        values = []
        for title, wav_S in sounds.items():
            buffer = io.BytesIO()
            soundfile.write(buffer, wav_S, sample_rate, format="WAV", subtype="PCM_16")
            audio = EventSummary.Audio(
                sample_rate=sample_rate,
                num_channels=1,
                length_frames=len(wav_S),
                encoded_audio_string=buffer.getvalue(),
                content_type="audio/wav",
            )
            values.append(EventSummary.Value(tag=f"{name}/{title}", audio=audio))
        width, height = (int.from_bytes(picture[i : i + 4]) for i in (16, 20))  # of the header of a PNG
        image = EventSummary.Image(height=height, width=width, colorspace=4, encoded_image_string=picture)
        values.append(EventSummary.Value(tag=name, image=image))
        self._events.add_event(Event(step=step, wall_time=time.time(), summary=EventSummary(value=values)))

    def say(self, line: str) -> None:
        """Prints a line."""
        if self._active:
            print(line, flush=True)

    def sync(self) -> None:
        """Puts everything written so far on disk: called before a checkpoint that says it is there."""
        if self._active:
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._events.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl` but a last line that a killed process left unfinished; ValueError names any other."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: expected a JSON object: {error}") from error
    return out


def drop_after(path: Path, step: int) -> None:
    """Rewrites `metrics.jsonl` without the lines beyond `step`, atomically. A missing file is fine."""
    if not path.exists():
        return
    kept = "".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step)
    atomic_write(path, kept.encode())
