"""A job of two small matrices, run by the real loop, store and writer: fast enough to kill and restart many times.

As a program it trains in WORKDIR, and ends itself by SIGKILL when it asks for the batch of step KILL_AT (0: never):

    python toy.py WORKDIR STEPS [KILL_AT [PROCESS PROCESSES PORT]]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mimo_jax import presets
from mimo_jax.config import LearningRates, LMDataConfig, LMTrainConfig, MeshConfig, OptimizerConfig, RunConfig
from mimo_jax.sharding import batch_sharding, make_mesh
from mimo_jax.training import loop
from mimo_jax.training.checkpoint import CheckpointStore
from mimo_jax.training.metrics import MetricsWriter, StepMetrics
from mimo_jax.training.optimizer import apply_gradients, budget, make_optimizer, trained
from mimo_jax.training.state import TrainState

RATES = {"llm": 1e-2, "patch_encoder": 3e-3, "patch_decoder": 0.0}


def make_config(steps: int, mesh: MeshConfig | None = None, **run: float) -> LMTrainConfig:
    """A job config for the checkpoint's meta; only `run`, `optimizer` and `mesh` matter here."""
    return LMTrainConfig(
        model=presets.audio_lm("tiny"),
        data=LMDataConfig(sources={}, validation={}, text_tokenizer="", rows=8, row_length=16, row_patches=8),
        run=RunConfig(steps=steps, **{"log_every": 2, "eval_every": 8, "checkpoint_every": 4, **run}),
        learning_rates=LearningRates(**RATES),
        optimizer=OptimizerConfig(warmup_fraction=0.1),
        mesh=mesh or MeshConfig(),
    )


class ToyLoader:
    """Batch i is a function of i; every process gets its part of it.

    Args:
        poison: steps whose batch is not finite.
        spikes: steps whose batch is a thousand times too large.
        signals: step -> signal that the process sends to itself when this step's batch is asked for.
    """

    fingerprint: ClassVar = {"toy": "1"}

    def __init__(
        self, poison: Sequence[int] = (), signals: Mapping[int, int] | None = None, spikes: Sequence[int] = ()
    ) -> None:
        self.position, self.poison, self.signals, self.spikes = 0, poison, signals or {}, spikes
        self.seen: list[int] = []

    def __next__(self) -> dict[str, np.ndarray]:
        step = self.position + 1
        if step in self.signals:
            os.kill(os.getpid(), self.signals[step])
        self.seen.append(step)
        x = np.random.default_rng(step).standard_normal((8, 16), np.float32)
        if step in self.poison:
            x[3, 5] = np.nan
        if step in self.spikes:
            x *= 1e3
        self.position = step
        local = slice(
            jax.process_index() * 8 // jax.process_count(), (jax.process_index() + 1) * 8 // jax.process_count()
        )
        return {"x": x[local], "y": np.roll(x, 1, axis=1)[local]}

    def seek(self, step: int) -> None:
        self.position = step

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def init(key: jax.Array) -> dict:
    keys = jax.random.split(key, 3)
    return {
        group: {"kernel": 0.3 * jax.random.normal(k, (16, 16)), "bias": jnp.zeros(16)}
        for group, k in zip(RATES, keys, strict=True)
    }


def loss(params: dict, rows: dict) -> jax.Array:
    h = jnp.tanh(rows["x"] @ params["llm"]["kernel"] + params["llm"]["bias"])
    h = h @ params["patch_encoder"]["kernel"] + params["patch_encoder"]["bias"]
    return jnp.mean((h @ params["patch_decoder"]["kernel"] - rows["y"]) ** 2)


def sums(value: jax.Array) -> dict[str, jax.Array]:
    return {"loss": value, "count": jnp.ones(())}


def describe(sums: dict) -> dict:
    return {"loss": sums["loss"] / sums["count"]}


def train(
    workdir: Path, config: LMTrainConfig, loader: ToyLoader, symptoms: Callable = lambda values: {}
) -> TrainState:
    """The toy job: the same sequence of calls as the real ones."""
    run = config.run
    with loop.working_directory(workdir) as folder:
        mesh = make_mesh(config.mesh)
        optimizer = make_optimizer(config.optimizer, RATES, *budget(config))

        def start(key: jax.Array) -> TrainState:
            params = init(key)
            return TrainState.start(params, optimizer.init(trained(params, RATES)))

        key = jax.random.key(run.seed)
        abstract = jax.eval_shape(start, key)
        cut = NamedSharding(mesh, PartitionSpec("fsdp"))
        placed = loop.state_shardings(abstract, jax.tree.map(lambda _: cut, abstract.params), mesh)

        def step(state: TrainState, rows: dict) -> tuple[TrainState, StepMetrics]:
            fixed = {g: p for g, p in state.params.items() if RATES[g] == 0}
            active = trained(state.params, RATES)
            noise = jax.random.normal(jax.random.fold_in(key, state.step), rows["x"].shape)
            rows = {"x": rows["x"] + 0.1 * noise, "y": rows["y"]}
            value, gradients = jax.value_and_grad(lambda p: loss({**fixed, **p}, rows))(active)
            state, scalars = apply_gradients(
                state, gradients, value, optimizer, config.optimizer, max_bad_steps=run.patience, seed=run.seed
            )
            return state, StepMetrics.make(sums(value), scalars, {"rows": rows["x"].shape[0]})

        train_step = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))

        def validate(step: int, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
            held_out = ToyLoader()
            held_out.position = 10_000
            batches = (next(held_out) for _ in range(3))
            return loop.evaluate(eval_step, state, batches, put, describe, 0, stop)

        @jax.jit
        def eval_step(state: TrainState, rows: dict) -> StepMetrics:
            return StepMetrics.make(sums(loss(state.params, rows)))

        def put(rows: dict) -> dict:
            return loop.to_devices(rows, batch_sharding(mesh))

        store = CheckpointStore(folder, run.keep_checkpoints, run.keep_every_tokens, run.keep_best)
        restored = loop.resume(store, abstract, placed, config, loader)
        if restored is None:
            state, counters = jax.jit(start, out_shardings=placed)(key), {}
        else:
            state, counters = restored[0], restored[1]["counters"]
        loop.describe_run(folder, config, state.params)
        writer = MetricsWriter(folder, None if restored is None else int(state.step))
        try:
            return loop.train_loop(
                state,
                train_step,
                loader,
                validate,
                config=config,
                groups=["llm"],
                view=loop.View(describe, {}, "rows", "rows", lambda counters: counters["rows"] * 1e3, symptoms),
                put=put,
                store=store,
                writer=writer,
                counters=counters,
            )
        finally:
            writer.close()
            store.close()


def digest(state: TrainState) -> str:
    """SHA-256 of every array of a state."""
    import hashlib

    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


if __name__ == "__main__":
    workdir, steps, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    if len(sys.argv) > 4:
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[6]}", int(sys.argv[5]), int(sys.argv[4]))
    final = train(workdir, make_config(steps), ToyLoader(signals={kill_at: signal.SIGKILL}))
    if jax.process_count() == 1:
        print("digest", digest(final))
