"""Losses of the joint stage on every mesh of 8 devices, in 1, 2 and 4 processes, against one device.

    python benchmarks/mesh_losses.py [--steps 20] [--dtypes float64 float32] [--first 1]

Each run is a process (or several, on the loopback interface) of its own with virtual CPU devices:
`configs/joint.py:tiny` on the same made-up rows. Prints a table of relative differences, at the first step and the
largest of all; the exit code is 1 if one is above its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8
# data, fsdp, tensor; processes
RUNS = [
    ((8, 1, 1), 1),
    ((1, 8, 1), 1),
    ((2, 4, 1), 1),
    ((1, 4, 2), 1),
    ((2, 2, 2), 1),
    ((4, 1, 2), 1),
    ((2, 4, 1), 2),
    ((1, 4, 2), 2),
    ((2, 4, 1), 4),
]
# Relative difference at the first step and at any.
LIMITS = {"float64": (1e-9, 1e-9), "float32": (1e-6, 1e-4)}


def train(options: argparse.Namespace) -> None:
    """One process of one run: writes the losses as JSON."""
    data, fsdp, tensor = options.mesh
    devices = data * fsdp * tensor // options.processes
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    # Threads of XLA. A device that waits for another keeps one; with no more than devices, they may all wait for ever.
    os.environ["NPROC"] = "32"
    import jax

    jax.config.update("jax_enable_x64", options.dtype == "float64")
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    from rows import made_up_rows

    from mimo_jax.config_files import load_config
    from mimo_jax.models.audio_lm import init_params
    from mimo_jax.sharding import batch_sharding, make_mesh
    from mimo_jax.training.language_model import assemble
    from mimo_jax.training.lm_loss import lm_loss

    sizes = {f"mesh.{name}": size for name, size in zip(("data", "fsdp", "tensor"), options.mesh, strict=True)}
    settings = sizes | {
        "compute.dtype": options.dtype,
        "compute.param_dtype": options.dtype,
        "compute.remat": "full",
        "compute.patch_chunk": 40,
        "compute.logits_chunk": 2**17,
        "data.rows": 16,
        "data.row_length": 64,
        "data.row_patches": 40,
        "run.accumulation": 2,
        "run.steps": options.steps,
    }
    config = load_config(f"{ROOT}/configs/joint.py:tiny", [f"--config.{k}={v}" for k, v in settings.items()])
    mesh = make_mesh(config.mesh)
    losses = []
    with jax.set_mesh(mesh):
        job = assemble(config, mesh)
        init = jax.jit(init_params, static_argnums=(0, 1), out_shardings={"params": job.placed.params})
        params = init(config.model, config.compute, jax.random.key(0))["params"]
        state = jax.jit(job.start, out_shardings=job.placed)(params)
        loss = jax.jit(lambda params, rows: lm_loss(job.model, params, rows, config.loss)[0])
        place = batch_sharding(mesh)
        for step in range(options.steps):
            rows = made_up_rows(config, seed=step)
            rows = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]), rows)
            losses.append(float(loss(state.params, rows)))  # metrics are float32
            state, _ = job.update(state, rows, {})
    if options.process == 0:
        Path(options.out).write_text(json.dumps(losses))


def run(mesh: tuple[int, ...], processes: int, dtype: str, steps: int, folder: Path) -> list[float]:
    """Losses of a run, in processes of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = folder / f"{dtype}-{'-'.join(map(str, mesh))}-{processes}.json"
    command = [sys.executable, __file__, "--out", str(out), "--dtype", dtype, "--steps", str(steps)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--mesh", *map(str, mesh)]
    jobs = [subprocess.Popen([*command, "--process", str(i)]) for i in range(processes)]
    codes = [job.wait() for job in jobs]
    if any(codes):
        raise SystemExit(f"mesh {mesh} in {processes} processes failed")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--first", type=int, default=1, metavar="N", help="begin with line N of the table")
    worker = parser.add_argument_group("one process of one run (used by the script itself)")
    worker.add_argument("--mesh", nargs=3, type=int)
    worker.add_argument("--dtype")
    worker.add_argument("--processes", type=int, default=1)
    worker.add_argument("--process", type=int, default=0)
    worker.add_argument("--coordinator")
    worker.add_argument("--out")
    options = parser.parse_args()
    if options.mesh:
        return train(options)
    import tempfile

    within = True
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'dtype':<9}{'data fsdp tensor':<18}{'processes':<11}{'step 1':>10}{'largest':>10}")
        for dtype in options.dtypes:
            alone = np.array(run((1, 1, 1), 1, dtype, options.steps, Path(folder)))
            print(f"{dtype:<9}{'1 1 1':<18}{1:<11}{'loss':>6}{alone[0]:9.6f} -> {alone[-1]:.6f}", flush=True)
            for mesh, processes in RUNS[options.first - 1 :]:
                off = np.abs(np.array(run(mesh, processes, dtype, options.steps, Path(folder))) / alone - 1)
                fine = off[0] <= LIMITS[dtype][0] and off.max() <= LIMITS[dtype][1]
                within &= bool(fine)
                shape = " ".join(map(str, mesh))
                verdict = "" if fine else f"  above {LIMITS[dtype]}"
                print(f"{dtype:<9}{shape:<18}{processes:<11}{off[0]:10.1e}{off.max():10.1e}{verdict}", flush=True)
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
