"""Trains the language model: text pre-training, understanding (stage 1), joint (stage 2) and post-training.

The stages differ in their config only: which groups learn, at which rate, which losses have a weight, what the rows are
made of. All parameters always exist: a text run keeps the patch encoder and decoder as they were initialised, and the
checkpoint says which groups were ever trained, so that a later stage takes over those and starts the others afresh.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mimo_jax.config import ConfigError, LMTrainConfig
from mimo_jax.data.lm_rows import lm_loader
from mimo_jax.models.audio_lm import AudioLM, abstract_params, init_params
from mimo_jax.rows import LMRows
from mimo_jax.sharding import batch_sharding, make_mesh, shardings, unboxed
from mimo_jax.text.tokenizers import load_text_tokenizer
from mimo_jax.training import lm_loss, loop, lora
from mimo_jax.training.checkpoint import CheckpointStore, base_of, open_step, reference, transfer
from mimo_jax.training.metrics import MetricsWriter, StepMetrics
from mimo_jax.training.optimizer import apply_gradients, budget, make_optimizer, schedule, trained
from mimo_jax.training.state import TrainState, Tree
from mimo_jax.trees import flatten, nest

CODES_PER_SECOND = 25.0  # frames of the audio tokenizer


def train_language_model(cfg: LMTrainConfig, workdir: str | os.PathLike[str]) -> None:
    """Trains, or continues the run that is in `workdir`; returns when the run is finished.

    Writes `checkpoints/` (see `checkpoint`), `metrics.jsonl`, `tensorboard/` and `config.json` to `workdir`.

    Raises:
        ConfigError: settings do not fit each other or the devices.
        DataError: the data does not fit the settings, or is damaged.
        OSError: the working directory or a data file cannot be read or written.
        CheckpointError, TrainingError, SystemExit: see `loop.train_loop`.
    """
    with loop.working_directory(workdir) as folder:
        # Mesh
        mesh = make_mesh(cfg.mesh)
        loop.check_rows(cfg.data.rows, cfg.run.accumulation, mesh)
        with jax.set_mesh(mesh):
            _train(cfg, folder, mesh)


def _train(cfg: LMTrainConfig, folder: Any, mesh: jax.sharding.Mesh) -> None:
    run = cfg.run
    key = jax.random.key(run.seed)

    # Data
    tokenizer = load_text_tokenizer(cfg.data.text_tokenizer)
    loader, validation = lm_loader(cfg, "train", tokenizer), lm_loader(cfg, "validation", tokenizer)

    # Model, optimiser and update step, on the mesh
    job = assemble(cfg, mesh)
    model, rates, learnt, abstract, placed = job.model, job.rates, job.learnt, job.abstract, job.placed
    replicated = NamedSharding(mesh, PartitionSpec())

    def put(rows: LMRows) -> LMRows:
        return loop.to_devices(rows, batch_sharding(mesh))

    @jax.jit
    def eval_step(params: Tree, rows: LMRows, base: Tree) -> StepMetrics:
        _, sums = lm_loss.lm_loss(model, rows=rows, loss=cfg.loss, **model_variables(cfg, params, base))
        return jax.lax.with_sharding_constraint(StepMetrics.make(sums), replicated)

    @jax.jit
    def describe(sums: lm_loss.LMLossSums) -> dict[str, jax.Array]:
        means = lm_loss.means(model, sums, cfg.loss)
        channels = [means[f"channel/{r}/ce"] for r in range(cfg.model.num_channels)]
        return means | {"audio/ce": jnp.mean(jnp.stack(channels))}

    def validate(step: int, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        def one(state: TrainState, rows: LMRows) -> StepMetrics:
            return eval_step(state.params, rows, base)

        return loop.evaluate(one, state, validation, put, describe, run.eval_batches, stop)

    # Restore
    store = CheckpointStore(folder, run.keep_checkpoints, run.keep_every_tokens, run.keep_best)
    restored = loop.resume(store, abstract, placed, cfg, loader)
    base: Tree = {}
    tables: Tree = {}
    stands_on = None
    source = cfg.init_from
    if cfg.lora.rank:
        if restored is not None:  # on the step that it began with, although `init_from` may have newer ones by now
            source = str(base_of(store.folder / str(restored[1]["step"]), elsewhere=source))
        origin = open_step(source)
        source = str(origin)
        wanted = loop.with_shardings(_base_shapes(job.everything, learnt), shardings(job.everything, mesh))
        given = transfer(origin, wanted, loader.fingerprint, verified=True)
        if set(given) < set(rates):
            missing = ", ".join(sorted(set(rates) - set(given)))
            raise ConfigError(f"init_from: expected a checkpoint in which {missing} has been trained, got {origin}")
        base, tables = lora.split(learnt, given)
        del given
        stands_on = reference(origin, store.folder)
    if restored is not None:
        tables = {}  # the state has them
        state, meta = restored
        groups, counters = meta["trained_groups"], meta["counters"]
        writer = MetricsWriter(folder, meta["step"])
        writer.say(f"continuing from step {meta['step']}")
    else:
        writer, counters, params = MetricsWriter(folder), {}, {}
        if cfg.init_from:
            if not cfg.lora.rank:
                wanted = loop.with_shardings(abstract.params, placed.params)
                params = transfer(cfg.init_from, wanted, loader.fingerprint)
            writer.say(f"{', '.join(sorted(params or base))} from {source}")
        groups = [group for group in sorted(rates) if group in params or group in base or rates[group] > 0]
        if cfg.lora.rank:
            begin = functools.partial(lora.start, abstract.params)
            place = jax.jit(begin, out_shardings=placed.params, donate_argnums=0)
            params = place(tables, key)
            del tables
        elif set(params) < set(rates):
            # Apart from the optimiser, so that all stages of a model share one compiled program: random numbers compile
            # slowly.
            init = jax.jit(init_params, static_argnums=(0, 1), out_shardings={"params": placed.params})
            params = init(cfg.model, cfg.compute, key)["params"] | params
        state = jax.jit(job.start, out_shardings=placed, donate_argnums=0)(params)
    loop.describe_run(folder, cfg, state.params)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    beside = f" beside {sum(x.size for x in jax.tree.leaves(base)):,} frozen ones" if base else ""
    learning = ", ".join(trained(state.params, rates))
    writer.say(f"{num_params:,} parameters{beside}, trained: {learning}; {mesh.size} devices")

    # Loop
    try:
        loop.train_loop(
            state,
            lambda state, rows: job.update(state, rows, base),
            loader,
            validate,
            config=cfg,
            groups=groups,
            view=loop.View(
                describe,
                losses={"text": "text/word_ce", "audio": "audio/ce"},
                unit="positions",
                counter="positions",
                flops=lambda counters: train_flops(cfg, counters),
            ),
            put=put,
            store=store,
            writer=writer,
            counters=counters,
            base=stands_on,
        )
    finally:
        writer.close()
        store.close()
        loader.close()
        validation.close()


class LMJob(NamedTuple):
    """The parts of a job that do not need devices to exist: what training runs and `mimo-jax plan` compiles."""

    model: AudioLM
    rates: dict[str, float]  # peak learning rate of each parameter group
    everything: Tree  # shapes of all parameters, in boxes with the logical names of their axes
    learnt: Tree  # the same of what the state holds: everything, or what a LoRA run trains
    abstract: TrainState  # shapes of the state
    placed: TrainState  # its shardings
    start: Callable[[Tree], TrainState]  # parameters -> the state before the first step
    update: Any  # the jitted step (state, rows, base) -> (state, metrics), which donates the state


def assemble(cfg: LMTrainConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> LMJob:
    """Puts the parts of a job together; nothing is computed or compiled.

    Raises:
        ConfigError: settings do not fit each other or the mesh.
    """
    model = AudioLM(cfg.model, cfg.compute)
    rates = dataclasses.asdict(cfg.learning_rates)
    optimizer = make_optimizer(cfg.optimizer, rates, *budget(cfg))
    everything = abstract_params(cfg.model, cfg.compute)["params"]
    learnt = lora.abstract(cfg.lora, rates, everything) if cfg.lora.rank else everything

    def start(params: Tree) -> TrainState:
        return TrainState.start(params, optimizer.init(trained(params, rates)))

    abstract = jax.eval_shape(start, unboxed(learnt))
    placed = loop.state_shardings(abstract, shardings(learnt, mesh), mesh)
    step = make_train_step(cfg, model, optimizer)
    update = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))
    return LMJob(model, rates, everything, learnt, abstract, placed, start, update)


def abstract_rows(cfg: LMTrainConfig, sharding: jax.sharding.Sharding | None = None) -> LMRows:
    """Shapes of a batch."""
    d, m = cfg.data, cfg.model
    L, C = (d.row_length,), (d.row_patches,)
    shapes = LMRows(
        text_BL=(L, jnp.int32),
        patches_BCGR=((*C, m.group_size, m.num_channels), jnp.uint16),
        patch_positions_BC=(C, jnp.int32),
        segment_ids_BL=(L, jnp.int32),
        positions_BL=(L, jnp.int32),
        task_ids_BL=(L, jnp.uint8),
        text_weights_BL=(L, jnp.float32),
        audio_weights_BC=(C, jnp.float32),
    )
    return LMRows(*(jax.ShapeDtypeStruct((d.rows, *shape), dtype, sharding=sharding) for shape, dtype in shapes))


def _base_shapes(everything: Tree, learnt: Tree) -> Tree:
    """Shapes of a model whose trained tables are float32, as `learnt` has them."""
    tables = flatten(unboxed(learnt))
    return nest({path: tables.get(path, x) for path, x in flatten(unboxed(everything)).items()})


def model_variables(cfg: LMTrainConfig, params: Tree, base: Tree) -> dict[str, Tree]:
    """`params` and, for a LoRA run, `lora`, as `lm_loss` takes them.

    Args:
        params: what the state holds: all parameters, or what a LoRA run trains.
        base: the frozen parameters of a LoRA run.
    """
    return lora.variables(cfg.lora, base, params) if cfg.lora.rank else {"params": params}


def make_train_step(cfg: LMTrainConfig, model: AudioLM, optimizer: Any) -> Any:
    """The update as a function (state, rows, base) -> (state, metrics), to be jitted with the state donated.

    `base` are the frozen parameters of a LoRA run.
    """
    rates = dataclasses.asdict(cfg.learning_rates)
    factor = schedule(cfg.optimizer, *budget(cfg))

    def step(state: TrainState, rows: LMRows, base: Tree = None) -> tuple[TrainState, StepMetrics]:
        totals = lm_loss.loss_totals(rows)
        learning = trained(state.params, rates)

        def loss(learning: Any, rows: LMRows) -> tuple[jax.Array, lm_loss.LMLossSums]:
            given = model_variables(cfg, {**state.params, **learning}, base)
            return lm_loss.lm_loss(model, rows=rows, loss=cfg.loss, totals=totals, **given)

        def micro_batch(rows: LMRows) -> Any:
            return jax.value_and_grad(loss, has_aux=True)(learning, rows)

        (value, sums), gradients = loop.accumulate(micro_batch, rows, cfg.run.accumulation)
        updates_made = state.step - state.skipped
        limits = {"max_bad_steps": cfg.run.patience, "seed": cfg.run.seed}
        state, scalars = apply_gradients(state, gradients, value, optimizer, cfg.optimizer, **limits)  # type: ignore[arg-type]
        scalars |= {f"learning_rate/{group}": rates[group] * factor(updates_made) for group in learning}
        return state, StepMetrics.make(sums, scalars, count_rows(rows, cfg.model.group_size))

    return step


def count_rows(rows: LMRows, group_size: int) -> dict[str, jax.Array]:
    """What a batch holds: positions, patches, text tokens, hours of audio, (query, key) pairs of causal attention."""
    used_BL = rows.segment_ids_BL > 0
    # Counted in int32: a float32 sum stands still at 2^24.
    positions = jnp.sum(used_BL, dtype=jnp.int32).astype(jnp.float32)
    patches = jnp.sum(rows.patch_positions_BC < rows.text_BL.shape[1], dtype=jnp.int32).astype(jnp.float32)
    return {
        "positions": positions,
        "patches": patches,
        "text_tokens": positions - patches,
        "audio_hours": patches * (group_size / CODES_PER_SECOND / 3600),
        "attention_pairs": jnp.sum(jnp.where(used_BL, rows.positions_BL + 1.0, 0.0)),
    }


def train_flops(cfg: LMTrainConfig, counters: Mapping[str, float]) -> float:
    """Model FLOPs of training on what `counters` counted: 3 times those of the forward pass, remat not counted."""
    positions = max(counters["positions"], 1.0)
    # `flops_per_position` wants the length of documents whose mean context, (length + 1) / 2, is this one.
    length = 2 * counters["attention_pairs"] / positions - 1
    patches = counters["patches"] / positions
    return 3.0 * positions * cfg.model.flops_per_position(length, patches, generate=cfg.loss.trains_audio)
