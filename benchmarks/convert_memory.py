"""Peak memory of `mimo-jax convert` on 7B-shaped checkpoints of 18 and 36 layers, both directions.

    python benchmarks/convert_memory.py --folder /tmp/convert [--layers 18 36]

Makes synthetic published weights (bfloat16, the shapes of `presets.audio_lm("7b")`), converts them there and back, each
in a process of its own, compares all tensors, and removes everything it made. Needs 33 GB of disk for 36 layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from mimo_jax import presets
from mimo_jax.interop import published
from mimo_jax.interop.safetensors import Reader, Writer

LIMIT_GB, SPREAD = 6.0, 0.10


def make_weights(folder: Path, layers: int) -> dict[str, str]:
    """Writes the weights; returns the digest of each tensor."""
    config = presets.audio_lm("7b")
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, num_layers=layers))
    tensors = published.tensors_of(config, published.shapes_of(config))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(published.lm_config_json(config)))
    added = [{"id": config.empty_id, "content": published.EMPTY_TOKEN}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    dtype, rng = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    with Writer(folder, {t.name: (dtype, t.shape) for t in tensors}, 5 * 10**9) as writer:
        for t in tensors:
            step = max(1, (64 << 20) // (2 * int(np.prod(t.shape[1:]))))
            for start in range(0, t.shape[0], step):
                rows = min(step, t.shape[0] - start)
                values = rng.integers(0, 1 << 16, (rows, *t.shape[1:]), np.uint16)
                writer.write(t.name, values.view(dtype), start)
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    out = {}
    with Reader(folder) as reader:
        for name, entry in reader.entries.items():
            digest = hashlib.sha256(f"{entry.dtype} {entry.shape}".encode())
            step = max(1, (64 << 20) // (2 * int(np.prod(entry.shape[1:]))))
            for start in range(0, entry.shape[0], step):
                digest.update(reader.read(name, start, min(start + step, entry.shape[0])).tobytes())
            out[name] = digest.hexdigest()
    return out


def convert(source: Path, out: Path) -> tuple[float, float]:
    """Peak resident memory in GB and seconds of one run of the verb."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "mimo_jax.cli", "convert", str(source), "--out", str(out)]
    child = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"convert {source} failed")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[18, 36])
    options = parser.parse_args()
    peaks: dict[str, list[float]] = {"to ours": [], "back": []}
    differing = 0
    print("layers  direction       GB    peak GB  seconds  differing tensors")
    try:
        for layers in options.layers:
            source, ours, back = (options.folder / name for name in ("published", "ours", "back"))
            before = make_weights(source, layers)
            size = sum(p.stat().st_size for p in source.iterdir()) / 1e9
            for direction, a, b in (("to ours", source, ours), ("back", ours, back)):
                peak, seconds = convert(a, b)
                peaks[direction].append(peak)
                shutil.rmtree(a)
                bad = 0
                if b == back:
                    after = digests(back)
                    bad = sum(before.get(k) != after.get(k) for k in before.keys() | after.keys())
                differing += bad
                print(f"{layers:6}  {direction:9} {size:8.2f} {peak:10.3f} {seconds:8.0f}  {bad}", flush=True)
            shutil.rmtree(back)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    level = all(max(p) <= (1 + SPREAD) * min(p) for p in peaks.values())
    low = max(map(max, peaks.values())) <= LIMIT_GB
    print(f"peak at most {LIMIT_GB} GB: {low}; equal within {SPREAD:.0%} for all depths: {level}")
    sys.exit(0 if level and low and not differing else 1)


if __name__ == "__main__":
    main()
