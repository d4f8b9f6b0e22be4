"""The verb `eval reconstruction`: an audio tokenizer measured on a manifest, file by file, beside its baselines.

What is measured of a file is appended to `files.jsonl` in the output folder, behind a line of the settings, so that an
evaluation that was killed goes on where it was. The tokenizer runs in this process, the metrics in others: PESQ keeps
its state in global variables.

S samples, M RVQ frames, R levels.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.files import AudioError, load_audio
from mimo_jax.config import ConfigError, MelConfig
from mimo_jax.data.manifest import Manifest, ManifestEntry
from mimo_jax.evals import reconstruction_results as results
from mimo_jax.evals.baselines import BASELINES, OPUS_BITRATES, check_baselines, griffin_lim, opus
from mimo_jax.evals.quality import DEFAULT_METRICS, Source, check_metrics
from mimo_jax.evals.speaker import DEFAULT
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.progress import Meter

FORMAT = 1  # of the files written here; another one is measured anew
FILES = "files.jsonl"
DEFAULT_LEVELS = (1, 2, 4, 8, 20)


@dataclass(frozen=True)
class Evaluation:
    """What to measure. `levels` of None are the default ones that the tokenizer has; `limit` of None is no limit."""

    levels: tuple[int, ...] | None = None
    baselines: tuple[str, ...] = BASELINES
    metrics: tuple[str, ...] = DEFAULT_METRICS
    speaker_model: str = DEFAULT
    limit: int | None = None


def evaluate_reconstruction(
    codec: Codec,
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    workers: int = 1,
    tokenizer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures a tokenizer on the recordings of a manifest, with progress on stderr.

    Writes `files.jsonl`, `reconstruction.json`, `.md` and `.png` into `out`. Recordings that were measured there
    before, with the same settings, are not measured again.

    Args:
        workers: processes that measure; 0 measures in this one.
        tokenizer: what else `reconstruction.json` shall say of the tokenizer, as its path and step.

    Returns:
        The content of `reconstruction.json`.

    Raises:
        ConfigError: a setting is impossible, a package is missing, `out` holds an evaluation of other settings or is
            in use, or no recording can be read.
        ManifestError: a line of the manifest is wrong.
    """
    rvq = codec.config.rvq.num_levels
    levels = evaluation.levels or tuple(sorted({min(n, rvq) for n in DEFAULT_LEVELS}))
    if not all(1 <= n <= rvq for n in levels):
        raise ConfigError(f"--levels: expected some of 1..{rvq}, got {','.join(map(str, levels))}")
    levels = tuple(sorted(set(levels)))
    check_baselines(evaluation.baselines)
    packages = check_metrics(evaluation.metrics, evaluation.speaker_model)
    if "opus" in evaluation.baselines:
        import av

        packages["av"] = av.__version__
    entries = Manifest(Path(manifest))
    count = min(len(entries), evaluation.limit or len(entries))
    chosen = [i * len(entries) // count for i in range(count)]  # spread over the manifest, which is often sorted
    settings = {
        "format": FORMAT,
        "manifest": entries.sha256,
        "limit": count,
        "tokenizer": weights_fingerprint(codec),
        "segment_seconds": codec.segment_codes / codec.config.frame_rate,
        "reference_quirks": codec.reference_quirks,
        "levels": list(levels),
        "baselines": list(evaluation.baselines),
        "metrics": list(evaluation.metrics),
        "speaker_model": evaluation.speaker_model if "speaker" in evaluation.metrics else "",
        "packages": packages,
    }
    settings = json.loads(json.dumps(settings))
    folder = Path(out)
    with _locked(folder), _Journal(folder / FILES, settings) as journal:
        missing = [i for i in chosen if i not in journal.done]
        meter = Meter(
            count, lambda done, speed: f"eval reconstruction: {done:.0f} of {count} recordings, {speed:.2f}/s"
        )
        meter.resume(count - len(missing))
        work = _decoded(codec, entries, missing, levels)
        for line in _measured(work, evaluation, codec.config.mel, workers):
            journal.append(line)
            meter.step()
        meter.say()
        files = [journal.done[i] for i in chosen]
    if not any("systems" in line for line in files):
        raise ConfigError(f"{manifest}: no recording could be read; the first: {files[0]['failed']}")
    content = {
        "settings": settings,
        "tokenizer": {"fingerprint": codec.fingerprint, **(tokenizer or {})},
        "manifest": str(manifest),
        "machine": _machine(workers),
        **results.aggregate(files, {f"levels-{n}": codec.config.bitrate(n) for n in levels}),
        "files": files,
    }
    from mimo_jax.evals.reconstruction_plot import plot

    atomic_write(folder / "reconstruction.png", plot(content))
    atomic_write(folder / "reconstruction.md", results.markdown(content).encode())
    atomic_write(folder / results.RESULT, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return content


def weights_fingerprint(codec: Codec) -> str:
    """First 16 hexadecimal digits of a SHA-256 over all settings, parameters and codebooks of a tokenizer.

    Unlike `Codec.fingerprint` it is changed by another decoder too.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(codec.config), sort_keys=True).encode())
    digest.update(json.dumps(dataclasses.asdict(codec.compute), sort_keys=True).encode())
    for path, x in jax.tree_util.tree_leaves_with_path(codec.variables):
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


def _machine(workers: int) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "workers": workers,
        "jax": jax.__version__,
    }


# ----------------------------------------------------------------------------------------------------------
# The tokenizer


@dataclass(frozen=True)
class _Work:
    """A recording and its reconstructions, for a worker; without a wave where it could not be read."""

    line: dict[str, Any]  # what is known already
    wav_S: np.ndarray | None = None
    decoded: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _decoded(codec: Codec, entries: Manifest, indices: Sequence[int], levels: Sequence[int]) -> Iterator[_Work]:
    rate = codec.config.mel.sample_rate
    warm: set[Any] = set()
    for i in indices:
        entry: ManifestEntry = entries[i]
        line: dict[str, Any] = {"index": i, "id": entry.id, "language": entry.language, "speaker": entry.speaker}
        try:
            wav_S = load_audio(entry.audio, rate, codec.config.resampler)
        except AudioError as error:
            yield _Work(line | {"failed": str(error)})
            continue
        line |= {"seconds": len(wav_S) / rate, "sha256": hashlib.sha256(wav_S.tobytes()).hexdigest()[:16]}
        if (shapes := _shapes(codec, len(wav_S))) not in warm:  # what is timed has been compiled
            warm.add(shapes)
            codes_MR = codec.encode([wav_S])[0]
            for n in levels:
                codec.decode(codes_MR[:, :n])
        started = time.perf_counter()
        codes_MR = codec.encode([wav_S])[0]
        line["encode_seconds"] = time.perf_counter() - started
        line["decode_seconds"], decoded = {}, {}
        for n in levels:
            started = time.perf_counter()
            decoded[f"levels-{n}"] = codec.decode(codes_MR[:, :n])[: len(wav_S)]
            line["decode_seconds"][str(n)] = time.perf_counter() - started
        yield _Work(line, wav_S, decoded)


def _shapes(codec: Codec, num_samples: int) -> tuple[Any, ...]:
    """What the programs for a clip are compiled for: the shape of its whole segments, and that of the last one."""
    whole, last = divmod(num_samples, codec.segment_codes * codec.config.samples_per_code)
    lengths = [num_samples] * (whole > 0) + [last] * (last > 0)
    return tuple(codec.row_shapes(length)[0].shape for length in lengths)


# ----------------------------------------------------------------------------------------------------------
# The metrics


def _measured(work: Iterator[_Work], evaluation: Evaluation, mel: MelConfig, workers: int) -> Iterator[dict[str, Any]]:
    """Lines of measured recordings, in any order."""
    if workers == 0:
        for item in work:
            yield measure(item, evaluation, mel)
        return
    # Files are measured side by side, so a worker gets one thread; it reads this when it loads its libraries.
    for library in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(library, "1")
    context = multiprocessing.get_context("spawn")  # a process with JAX in it cannot be forked
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=end_with_parent)
    pending: set[concurrent.futures.Future[dict[str, Any]]] = set()
    try:
        for item in work:
            pending.add(pool.submit(measure, item, evaluation, mel))
            # Few waves wait in memory; what is done is handed on at once.
            timeout = None if len(pending) > 2 * workers else 0.0
            done, pending = concurrent.futures.wait(pending, timeout, concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)
        for future in concurrent.futures.as_completed(pending):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """Lets this worker end when the process that started it is gone: after a `kill -9` nothing else would end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measure(work: _Work, evaluation: Evaluation, mel: MelConfig) -> dict[str, Any]:
    """The line of a recording with what was measured of every system."""
    if work.wav_S is None:
        return work.line
    source = Source(work.wav_S, mel.sample_rate, evaluation.metrics, evaluation.speaker_model)
    systems: dict[str, dict[str, Any]] = {}

    def add(name: str, wav_S: np.ndarray, **more: Any) -> None:
        values, left_out = source.measure(wav_S)
        systems[name] = {"values": values, **({"left_out": left_out} if left_out else {}), **more}

    add("source", work.wav_S)
    for name, wav_S in work.decoded.items():
        add(name, wav_S)
    if "opus" in evaluation.baselines:
        for bitrate in OPUS_BITRATES:
            wav_S, bits = opus(work.wav_S, mel.sample_rate, bitrate)
            add(f"opus-{bitrate // 1000}k", wav_S, bits=bits)
    if "griffin-lim" in evaluation.baselines:
        add("griffin-lim", griffin_lim(work.wav_S, mel))
    return work.line | {"systems": systems}


# ----------------------------------------------------------------------------------------------------------
# What is done


class _Journal:
    """`files.jsonl`: a line of settings, then one for each recording that is done.

    Raises:
        ConfigError: it is of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.done: dict[int, dict[str, Any]] = {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # behind the last end is a torn line
        if not lines:
            atomic_write(path, json.dumps({"settings": settings}).encode() + b"\n")
        else:
            header = (_parsed(lines[0]) or {}).get("settings")
            if not isinstance(header, dict):
                raise ConfigError(f"{path}: expected the files of an evaluation; choose another --out, or remove it")
            for name, wanted in settings.items():
                if (found := header.get(name)) != wanted:
                    held = f"{path}: holds an evaluation with {name} {found}, not {wanted}"
                    raise ConfigError(f"{held}; choose another --out, or remove it")
            kept = [(line, value) for line in lines[1:] if (value := _parsed(line)) is not None]
            self.done = {value["index"]: value for _, value in kept}
            atomic_write(path, b"".join(line + b"\n" for line in [lines[0], *(line for line, _ in kept)]))
        self._file = path.open("ab")

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        """Puts a line on disk."""
        text = json.dumps(line, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[line["index"]] = json.loads(text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another evaluation is writing there") from None
        yield
