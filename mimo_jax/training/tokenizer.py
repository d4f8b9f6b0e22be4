"""Trains the audio tokenizer, stage 1: unified representation learning (report section 2.1).

Encoder, quantiser, decoder, vocoder and a text decoder learn together: 10 audio-to-text + 1 reconstruction +
1 commitment. The codebooks are no parameters: k-means on the first batch starts them, moving averages teach them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mimo_jax.config import AdversarialTrainConfig, ConfigError, TokenizerTrainConfig
from mimo_jax.data.tokenizer_rows import tokenizer_loader
from mimo_jax.models.tokenizer import rvq
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.text_decoder import TextDecoder
from mimo_jax.rows import TokenizerRows
from mimo_jax.sharding import batch_sharding, make_mesh, shardings, unboxed
from mimo_jax.text.tokenizers import load_text_tokenizer
from mimo_jax.training import loop, tokenizer_loss
from mimo_jax.training.checkpoint import CheckpointStore
from mimo_jax.training.health import codebook_symptoms
from mimo_jax.training.metrics import MetricsWriter, StepMetrics
from mimo_jax.training.optimizer import apply_gradients, budget, make_optimizer, schedule
from mimo_jax.training.samples import Samples, first_batch
from mimo_jax.training.state import TrainState

GROUPS = ("audio_tokenizer", "text_decoder")


def train_tokenizer(cfg: TokenizerTrainConfig, workdir: str | os.PathLike[str]) -> None:
    """Trains, or continues the run that is in `workdir`: writes and raises what `train_language_model` does."""
    if cfg.run.accumulation != 1:
        raise ConfigError(
            f"run.accumulation: expected 1, got {cfg.run.accumulation}: the codebooks learn from whole batches; "
            "use fewer data.rows or more devices"
        )
    with loop.working_directory(workdir) as folder:
        # Mesh
        mesh = make_mesh(cfg.mesh)
        loop.check_rows(cfg.data.rows, 1, mesh)
        with jax.set_mesh(mesh):
            _train(cfg, folder, mesh)


def _train(cfg: TokenizerTrainConfig, folder: Path, mesh: jax.sharding.Mesh) -> None:
    run = cfg.run
    init_key, kmeans_key, _ = _keys(run.seed)

    # Data
    text_tokenizer = load_text_tokenizer(cfg.data.text_tokenizer)
    loader = tokenizer_loader(cfg, "train", text_tokenizer)
    validation = tokenizer_loader(cfg, "validation", text_tokenizer)

    # Model, optimiser and update step, on the mesh
    job = assemble(cfg, mesh)
    model, placed = job.model, job.placed
    text_decoder = TextDecoder(cfg.a2t, cfg.model.encoder.d_model, cfg.compute)
    replicated = NamedSharding(mesh, PartitionSpec())
    put = functools.partial(loop.to_devices, sharding=batch_sharding(mesh))

    @jax.jit
    def eval_step(state: TrainState, rows: TokenizerRows) -> StepMetrics:
        _, (sums, _) = tokenizer_loss.tokenizer_loss(model, text_decoder, state.params, state.codebook, rows, cfg.loss)
        return jax.lax.with_sharding_constraint(StepMetrics.make({"loss": sums}), replicated)

    describe = jax.jit(functools.partial(make_metrics, cfg))
    samples = Samples(model, folder, cfg.data.samples, replicated)

    def validate(step: int, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        batches = first_batch(validation, put, lambda rows: samples.write(step, state, rows, writer))
        return loop.evaluate(eval_step, state, batches, put, describe, run.eval_batches, stop)

    # Restore
    store = CheckpointStore(folder, run.keep_checkpoints, run.keep_every_tokens, run.keep_best)
    restored = loop.resume(store, job.abstract, placed, cfg, loader)
    if restored is not None:
        state, meta = restored
        counters = meta["counters"]
        writer = MetricsWriter(folder, meta["step"])
        writer.say(f"continuing from step {meta['step']}")
    else:
        writer = MetricsWriter(folder)
        state, counters = jax.jit(job.start, out_shardings=placed)(init_key), {}
        position = loader.state()
        codebook = kmeans_start(cfg, model, state, put(next(loader)), kmeans_key)
        loader.restore(position)  # the first batch is used again, by the first step
        codebook = jax.jit(lambda tree: tree, out_shardings=placed.codebook)(codebook)
        state = dataclasses.replace(state, codebook=codebook)
    loop.describe_run(folder, cfg, state.params)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    writer.say(f"{num_params:,} parameters, {cfg.model.rvq.num_levels} codebooks; {mesh.size} devices")

    # Loop
    try:
        loop.train_loop(
            state,
            job.update,
            loader,
            validate,
            config=cfg,
            groups=list(GROUPS),
            view=loop.View(
                describe,
                losses={"text": "a2t", "mel": "mel", "perplexity": "level/00/perplexity"},
                unit="audio s",
                counter="audio_seconds",
                flops=lambda counters: train_flops(cfg, counters),
                symptoms=functools.partial(codebook_symptoms, sizes=cfg.model.rvq.codebook_sizes),
            ),
            put=put,
            store=store,
            writer=writer,
            counters=counters,
        )
    finally:
        writer.close()
        store.close()
        loader.close()
        validation.close()


class TokenizerJob(NamedTuple):
    """The parts of a job of either stage that need no devices to exist."""

    model: AudioTokenizer
    abstract: TrainState  # shapes of the state
    placed: TrainState  # its shardings
    start: Callable[..., TrainState]  # the state before the first step: of a random key, or (stage 2) of arrays
    update: Any  # the jitted step (state, rows) -> (state, metrics), which donates the state


def assemble(cfg: TokenizerTrainConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> TokenizerJob:
    """Puts the parts of a job together; nothing is computed or compiled.

    Raises:
        ConfigError: settings do not fit the mesh.
    """
    model = AudioTokenizer(cfg.model, cfg.compute)
    text_decoder = TextDecoder(cfg.a2t, cfg.model.encoder.d_model, cfg.compute)
    optimizer = make_optimizer(cfg.optimizer, dict.fromkeys(GROUPS, cfg.learning_rate), *budget(cfg))
    init = functools.partial(tokenizer_loss.init_variables, cfg.model, cfg.a2t, cfg.compute)

    def start(key: jax.Array) -> TrainState:
        variables = unboxed(init(key))
        return TrainState.start(variables["params"], optimizer.init(variables["params"]), variables["codebook"])

    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = jax.eval_shape(start, key)
    placed = loop.state_shardings(abstract, shardings(jax.eval_shape(init, key), mesh)["params"], mesh)
    step = make_train_step(cfg, model, text_decoder, optimizer)
    update = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))
    return TokenizerJob(model, abstract, placed, start, update)


def _keys(seed: int) -> jax.Array:
    """Random keys of a run: for the parameters, for k-means, and for what is drawn in steps."""
    return jax.random.split(jax.random.key(seed), 3)


def starting_tokenizer(cfg: TokenizerTrainConfig) -> dict[str, Any]:
    """Variables of the audio tokenizer before the first step of a run: random weights, codebooks from k-means.

    For evaluation, which compares a trained tokenizer with them; the run itself makes them on its mesh.
    """
    init_key, kmeans_key, _ = _keys(cfg.run.seed)
    init = jax.jit(lambda key: unboxed(tokenizer_loss.init_variables(cfg.model, cfg.a2t, cfg.compute, key)))
    variables = init(init_key)
    loader = tokenizer_loader(cfg, "train")
    try:
        rows = next(loader)
    finally:
        loader.close()
    state = TrainState.start(variables["params"], (), variables["codebook"])
    codebook = kmeans_start(cfg, AudioTokenizer(cfg.model, cfg.compute), state, rows, kmeans_key)
    return {"params": variables["params"]["audio_tokenizer"], "codebook": codebook}


def kmeans_start(
    cfg: TokenizerTrainConfig, model: AudioTokenizer, state: TrainState, rows: TokenizerRows, key: jax.Array
) -> rvq.Codebook:
    """The codebooks that k-means finds in what the encoder, as initialised, makes of a batch."""

    @jax.jit
    def features(state: TrainState, rows: TokenizerRows) -> tuple[jax.Array, jax.Array]:
        variables = {"params": state.params["audio_tokenizer"], "codebook": state.codebook}
        z_BMD, segment_ids_BM = model.apply(variables, rows.wav_BS, rows.segment_ids_BT, method="encode_features")
        return z_BMD.reshape(-1, z_BMD.shape[-1]), (segment_ids_BM > 0).reshape(-1)

    z_ND, mask_N = features(state, rows)
    return rvq.init_codebooks(cfg.model.rvq, z_ND, mask_N, key)


def make_train_step(cfg: TokenizerTrainConfig, model: AudioTokenizer, text_decoder: TextDecoder, optimizer: Any) -> Any:
    """The update as a function (state, rows) -> (state, metrics), to be jitted with the state donated."""
    factor = schedule(cfg.optimizer, *budget(cfg))

    def step(state: TrainState, rows: TokenizerRows) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(_keys(cfg.run.seed)[2], state.step)

        def loss(params: Any, taps: Any) -> Any:
            return tokenizer_loss.tokenizer_loss(model, text_decoder, params, state.codebook, rows, cfg.loss, rng, taps)

        taps = tokenizer_loss.make_taps(cfg.model, rows, jnp.promote_types(cfg.compute.dtype, jnp.float32))
        (value, (sums, codebook)), (gradients, at_taps) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            state.params, taps
        )
        updates_made = state.step - state.skipped
        state, scalars = apply_gradients(
            state,
            gradients,
            value,
            optimizer,
            cfg.optimizer,
            max_bad_steps=cfg.run.patience,
            codebook=codebook,
            seed=cfg.run.seed,
        )
        scalars["learning_rate"] = cfg.learning_rate * factor(updates_made)
        scalars |= tokenizer_loss.term_norms(at_taps)
        metrics = {"loss": sums, "steps": jnp.ones(())}
        return state, StepMetrics.make(metrics, scalars, count_rows(cfg, rows))

    return step


def make_metrics(cfg: TokenizerTrainConfig, sums: dict[str, Any]) -> dict[str, jax.Array]:
    """Loss terms, and of each level share of used codes, perplexity, error, dead and revived codes a step."""
    losses = sums["loss"]
    out = tokenizer_loss.loss_terms(losses, cfg.loss) | codebook_metrics(losses.code_counts)
    error_R = losses.commitment_R / jnp.maximum(losses.vectors_R, 1)
    for r in range(cfg.model.rvq.num_levels):
        out[f"{_level(r)}/error"] = error_R[r]
        if "steps" in sums:
            dead = losses.dead_R[r] / sums["steps"]
            out |= {f"{_level(r)}/dead": dead, f"{_level(r)}/revived": dead if rvq.revives(cfg.model.rvq) else 0 * dead}
    return out


def codebook_metrics(code_counts: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    """`level/RR/usage`, the share of the entries that were chosen, and `level/RR/perplexity` of the codes."""
    usage_R, perplexity_R = rvq.usage_and_perplexity(code_counts)
    usage = {f"{_level(r)}/usage": usage_R[r] for r in range(len(code_counts))}
    return usage | {f"{_level(r)}/perplexity": perplexity_R[r] for r in range(len(code_counts))}


def _level(r: int) -> str:
    return rvq.level_name(r).replace("_", "/")


def count_rows(cfg: TokenizerTrainConfig | AdversarialTrainConfig, rows: TokenizerRows) -> dict[str, jax.Array]:
    """What a batch holds: clips, seconds and hours of audio, RVQ frames, text tokens."""
    frames = jnp.sum(rows.segment_ids_BT > 0, dtype=jnp.float32)
    seconds = frames * (cfg.model.mel.hop_length / cfg.model.mel.sample_rate)
    return {
        "audio_seconds": seconds,
        "audio_hours": seconds / 3600,
        "clips": jnp.sum(jnp.max(rows.segment_ids_BT, axis=1, initial=0), dtype=jnp.float32),
        "codes": frames / cfg.model.mel_frames_per_code,
        "text_tokens": jnp.sum(rows.text_segment_ids_BU > 0, dtype=jnp.float32),
    }


def train_flops(cfg: TokenizerTrainConfig, counters: Mapping[str, float]) -> float:
    """Model FLOPs of training on what `counters` counted: 3 times the forward pass, for clips of mean length."""
    clips = max(counters["clips"], 1.0)
    codes, tokens, transformer = counters["codes"], counters["text_tokens"], cfg.a2t.transformer
    text = (codes + tokens) * transformer.flops_per_position((codes + tokens) / clips / 2)
    text += 2.0 * transformer.d_model * (codes * cfg.model.encoder.d_model + tokens * cfg.a2t.vocab_size)
    return 3.0 * (codes * cfg.model.flops_per_code(codes / clips) + text)
