"""Trains the audio tokenizer, stage 2: decoder and vocoder against discriminators (report section 2.1).

Encoder and codebooks stay as stage 1 left them, so that codes, and shards made of them, stay what they are. Generator:
1 reconstruction + 1 adversarial + 2 feature matching. Both players move at once, each from what the other one is before
the step: so one pass through the discriminators serves both.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mimo_jax.config import (
    AdversarialLossConfig,
    AdversarialTrainConfig,
    ComputeConfig,
    ConfigError,
    DiscriminatorConfig,
    LMModelConfig,
    LMTrainConfig,
)
from mimo_jax.config_files import from_config_dict
from mimo_jax.data.tokenizer_rows import tokenizer_loader
from mimo_jax.models.tokenizer import audio_tokenizer, discriminators
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.discriminators import Discriminators, Outputs
from mimo_jax.models.tokenizer.vocoder import synthesize
from mimo_jax.rows import TokenizerRows
from mimo_jax.sharding import batch_sharding, make_mesh, shardings, unboxed
from mimo_jax.training import adversarial_loss, loop
from mimo_jax.training.adversarial_loss import AdversarialSums
from mimo_jax.training.checkpoint import (
    FOLDER,
    CheckpointStore,
    differences,
    good_steps,
    open_step,
    read_meta,
    read_variables,
    transfer,
)
from mimo_jax.training.health import adversarial_symptoms
from mimo_jax.training.metrics import MetricsWriter, StepMetrics
from mimo_jax.training.optimizer import apply_gradients, budget, make_optimizer, schedule
from mimo_jax.training.samples import Samples, first_batch
from mimo_jax.training.state import TrainState, Tree
from mimo_jax.training.tokenizer import TokenizerJob, codebook_metrics, count_rows
from mimo_jax.training.tokenizer_loss import mel_distance, true_wave

GROUPS = ("audio_tokenizer", "discriminators")
TRAINED = ("decoder", "vocoder")  # parts of the audio tokenizer


def train_adversarial(cfg: AdversarialTrainConfig, workdir: str | os.PathLike[str]) -> None:
    """Trains, or continues the run that is in `workdir`: writes and raises what `train_language_model` does."""
    if cfg.run.accumulation != 1:
        raise ConfigError(f"run.accumulation: expected 1, got {cfg.run.accumulation}: use fewer data.rows")
    with loop.working_directory(workdir) as folder:
        # Mesh
        mesh = make_mesh(cfg.mesh)
        loop.check_rows(cfg.data.rows, 1, mesh)
        # What is wrong with the first stage is found before anything is opened; a run that goes on does not need it.
        origin = None if good_steps(folder / FOLDER) else find_origin(cfg)
        with jax.set_mesh(mesh):
            _train(cfg, folder, mesh, origin)


def _train(cfg: AdversarialTrainConfig, folder: Path, mesh: jax.sharding.Mesh, origin: Path | None) -> None:
    run = cfg.run

    # Data
    loader, validation = tokenizer_loader(cfg, "train"), tokenizer_loader(cfg, "validation")

    # Models, optimisers and update step, on the mesh
    job = assemble(cfg, mesh)
    abstract, placed = job.abstract, job.placed
    replicated = NamedSharding(mesh, PartitionSpec())
    put = functools.partial(loop.to_devices, sharding=batch_sharding(mesh))

    @jax.jit
    def eval_step(state: TrainState, rows: TokenizerRows) -> StepMetrics:
        sums = forward(cfg, state, rows)[0]
        return jax.lax.with_sharding_constraint(StepMetrics.make({"loss": sums}), replicated)

    describe = jax.jit(functools.partial(make_metrics, cfg))
    samples = Samples(job.model, folder, cfg.data.samples, replicated)

    def validate(step: int, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        batches = first_batch(validation, put, lambda rows: samples.write(step, state, rows, writer))
        return loop.evaluate(eval_step, state, batches, put, describe, run.eval_batches, stop)

    # Restore
    store = CheckpointStore(folder, run.keep_checkpoints, run.keep_every_tokens, run.keep_best)
    restored = loop.resume(store, abstract, placed, cfg, loader)
    if restored is not None:
        state, meta = restored
        counters = meta["counters"]
        writer = MetricsWriter(folder, meta["step"])
        writer.say(f"continuing from step {meta['step']}")
    else:
        writer, counters = MetricsWriter(folder), {}
        assert origin is not None
        params, codebook = read_origin(origin, abstract, placed)
        writer.say(f"{', '.join(sorted(params))} from {origin}")
        if "discriminators" not in params:
            fresh = jax.jit(
                lambda key: unboxed(init_discriminators(cfg, key)["params"]),
                out_shardings=placed.params["discriminators"],
            )
            params["discriminators"] = fresh(jax.random.key(run.seed))
        begin = jax.jit(job.start, out_shardings=placed, donate_argnums=0)
        state = begin(params, codebook, jax.random.key(run.seed))
    loop.describe_run(folder, cfg, state.params)
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trainable(state.params).items()}
    writer.say(
        f"{sizes['audio_tokenizer']:,} parameters of decoder and vocoder against {sizes['discriminators']:,} of "
        f"{len(cfg.discriminator.names)} discriminators; {mesh.size} devices"
    )

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
                losses={"mel": "mel", "feature": "feature", "D": "discriminator", "margin": "margin"},
                unit="audio s",
                counter="audio_seconds",
                flops=lambda counters: train_flops(cfg, counters),
                symptoms=adversarial_symptoms,
                ranked_by="mel",  # the other terms are what the discriminators of that moment say
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


def assemble(cfg: AdversarialTrainConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> TokenizerJob:
    """Puts the parts of a job together; nothing is computed or compiled.

    Raises:
        ConfigError: settings do not fit the mesh.
    """
    optimizer = make_optimizer(cfg.optimizer, _rates(cfg), *budget(cfg))

    def start(params: Tree, codebook: Tree, key: jax.Array) -> TrainState:
        spectral = discriminators.init_spectral(*_sizes(cfg), params["discriminators"], key)
        return TrainState.start(params, optimizer.init(trainable(params)), codebook, spectral)

    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(functools.partial(init_variables, cfg), key)
    abstract = jax.eval_shape(start, unboxed(boxed["params"]), boxed["codebook"], key)
    placed = loop.state_shardings(abstract, shardings(boxed, mesh)["params"], mesh)
    step = make_train_step(cfg, optimizer)
    update = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))
    return TokenizerJob(AudioTokenizer(cfg.model, cfg.compute), abstract, placed, start, update)


def init_discriminators(cfg: AdversarialTrainConfig, key: jax.Array) -> dict[str, Any]:
    """Random variables {"params", "spectral"} of the discriminators; parameters are boxed with their logical axes."""
    return discriminators.init_variables(*_sizes(cfg), key)


def _sizes(cfg: AdversarialTrainConfig) -> tuple[DiscriminatorConfig, int, ComputeConfig]:
    return cfg.discriminator, cfg.model.mel.sample_rate, cfg.compute


def init_variables(cfg: AdversarialTrainConfig, key: jax.Array) -> dict[str, Any]:
    """Random variables {"params": {"audio_tokenizer", "discriminators"}, "codebook"}, boxed likewise."""
    tokenizer = audio_tokenizer.init_variables(cfg.model, cfg.compute, key)
    params = {"audio_tokenizer": tokenizer["params"], "discriminators": init_discriminators(cfg, key)["params"]}
    return {"params": params, "codebook": tokenizer["codebook"]}


def trainable(params: Tree) -> Tree:
    """The parameters that learn: those of decoder and vocoder, and of the discriminators."""
    tokenizer = {name: params["audio_tokenizer"][name] for name in TRAINED}
    return {"audio_tokenizer": tokenizer, "discriminators": params["discriminators"]}


def _rates(cfg: AdversarialTrainConfig) -> dict[str, float]:
    return {"audio_tokenizer": cfg.learning_rate, "discriminators": cfg.discriminator_learning_rate}


def find_origin(cfg: AdversarialTrainConfig) -> Path:
    """Folder of the step of `init_from` to begin with.

    Raises:
        CheckpointError: there is none.
        ConfigError: it is no audio tokenizer, or one of other settings.
    """
    origin = open_step(cfg.init_from)
    meta = read_meta(origin)
    saved = from_config_dict(meta["config"])  # settings that are newer than the checkpoint: their defaults
    if isinstance(saved, LMTrainConfig | LMModelConfig):
        raise ConfigError(f"init_from: {origin}: expected the checkpoint of an audio tokenizer, got one of {saved.job}")
    # How codebooks learn and quantiser dropout are drawn may be otherwise here; what the codes are may not.
    for key, old, new in differences(asdict(saved), asdict(cfg)):
        if re.fullmatch(r"model\.(?!rvq).*|model\.rvq\.(codebook_sizes|epsilon)|compute\.(param_)?dtype", key):
            raise ConfigError(f"{key}: expected {old!r}, as in {origin}, got {new!r}")
    return origin


def read_origin(origin: Path, abstract: TrainState, placed: TrainState) -> tuple[Tree, Tree]:
    """Parameters of the groups that were trained there, and codebooks; raises CheckpointError as `transfer` does."""
    params = transfer(origin, loop.with_shardings(abstract.params, placed.params), verified=True)
    books = loop.with_shardings(abstract.codebook, placed.codebook)
    return params, read_variables(origin, {"codebook": books})["codebook"]


def forward(
    cfg: AdversarialTrainConfig, state: TrainState, rows: TokenizerRows, rng: jax.Array | None = None
) -> tuple[AdversarialSums, Tree, dict[str, jax.Array], Tree]:
    """Both players on a batch.

    The gradients of the generator's terms come apart as far as the log magnitudes and phases of the vocoder, where all
    of them meet: so each is measured, and may be weighed (`balance`). That is one more backward pass through the
    discriminators than their sum would need.

    Args:
        rng: random key of quantiser dropout and of the windows that the discriminators see; without one all levels are
            used, and they see whole rows.

    Returns:
        Sums of all losses; gradients of both players, a tree like `trainable(state.params)`; the norms of the
        gradients of the generator's terms, weights included; the new power iterations.
    """
    model = AudioTokenizer(cfg.model, cfg.compute)
    discriminate = Discriminators(*_sizes(cfg))
    learning, loss = trainable(state.params), cfg.loss
    frozen = {"params": state.params["audio_tokenizer"], "codebook": state.codebook}
    quantized_BMD, ids_BM, code_counts = model.apply(frozen, rows, rng, method="encode_quantized")
    window, hop = windows(cfg, rows, rng), cfg.model.mel.hop_length
    true_BS, ids_BT = true_wave(rows, cfg.model)
    inside_BS = window(jnp.repeat(ids_BT > 0, hop, axis=1))

    def generate(tokenizer: Tree) -> tuple[jax.Array, jax.Array]:
        variables = {"params": tokenizer, "codebook": state.codebook}
        return model.apply(variables, quantized_BMD, ids_BM, method="decode_coefficients")

    def look(params: Tree, wav_BS: jax.Array) -> tuple[Outputs, Any]:
        seen_BS = jnp.where(inside_BS, window(wav_BS), 0)
        variables = {"params": params, "spectral": state.spectral}
        (outputs, inside), found = discriminate.apply(variables, seen_BS, inside_BS, mutable=["spectral"])
        return outputs, (inside, found["spectral"])

    def mel(wav_BS: jax.Array) -> tuple[jax.Array, Any]:
        distances = mel_distance(wav_BS, rows, cfg.model, loss)
        return loss.mel_weight * adversarial_loss.mel_loss(*distances), distances

    coefficients_BTE, back_to_generator, ids_BT = jax.vjp(generate, learning["audio_tokenizer"], has_aux=True)
    fake_BS, back_to_coefficients = jax.vjp(lambda x_BTE: synthesize(x_BTE, ids_BT, hop), coefficients_BTE)
    true_BS = true_BS.astype(fake_BS.dtype)
    params = learning["discriminators"]
    real, back_from_real, (inside, spectral) = jax.vjp(lambda params: look(params, true_BS), params, has_aux=True)
    fake, back_from_fake, _ = jax.vjp(look, params, fake_BS, has_aux=True)
    _, back_from_mel, (mel_I, frames_I) = jax.vjp(mel, fake_BS, has_aux=True)

    def hinge(real: Outputs, fake: Outputs) -> jax.Array:
        return adversarial_loss.hinge_loss(
            adversarial_loss.scores(real, inside, real=True), adversarial_loss.scores(fake, inside, real=False)
        )

    def adversarial(fake: Outputs) -> jax.Array:
        scores = adversarial_loss.scores(fake, inside, real=False)
        return loss.adversarial_weight * adversarial_loss.adversarial_loss(scores)

    def feature(fake: Outputs) -> jax.Array:
        return loss.feature_weight * adversarial_loss.feature_loss(*adversarial_loss.feature_sums(real, fake, inside))

    of_real, of_fake = jax.grad(hinge, (0, 1))(real, fake)
    of_discriminators = jax.tree.map(jnp.add, back_from_real(of_real)[0], back_from_fake(of_fake)[0])
    at_wave = {
        "mel": back_from_mel(jnp.ones_like(mel_I[0]))[0],
        "adversarial": back_from_fake(jax.grad(adversarial)(fake))[1],
        "feature": back_from_fake(jax.grad(feature)(fake))[1],
    }
    terms = {name: back_to_coefficients(x_BS)[0] for name, x_BS in at_wave.items()}
    norms = {name: jnp.sqrt(jnp.sum(jnp.square(x_BTE))) for name, x_BTE in terms.items()}
    factors = balance(loss, norms)
    of_generator = back_to_generator(sum(factors[name] * x_BTE for name, x_BTE in terms.items()))[0]

    features, feature_places = adversarial_loss.feature_sums(real, fake, inside)
    sums = AdversarialSums(
        mel_I=mel_I,
        mel_frames_I=frames_I,
        real=adversarial_loss.scores(real, inside, real=True),
        fake=adversarial_loss.scores(fake, inside, real=False),
        features=features,
        feature_places=feature_places,
        code_counts=code_counts,
    )
    gradients = {"audio_tokenizer": of_generator, "discriminators": of_discriminators}
    return sums, gradients, {f"term_norm/{name}": factors[name] * norm for name, norm in norms.items()}, spectral


def windows(
    cfg: AdversarialTrainConfig, rows: TokenizerRows, rng: jax.Array | None
) -> Callable[[jax.Array], jax.Array]:
    """What cuts [B, S] down to what the discriminators see of each row: windows that begin with an RVQ frame."""
    size, per_code = cfg.discriminator.window_codes, cfg.model.samples_per_code
    if rng is None or not size:
        return lambda x_BS: x_BS
    batch, codes = rows.wav_BS.shape[0], rows.wav_BS.shape[1] // per_code
    start_B = per_code * jax.random.randint(jax.random.fold_in(rng, 1), (batch,), 0, codes - size + 1)
    cut = jax.vmap(lambda x_S, start: jax.lax.dynamic_slice(x_S, (start,), (size * per_code,)))
    return lambda x_BS: cut(x_BS, start_B)


def balance(loss: AdversarialLossConfig, norms: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Factors on the gradients of the weighted terms `mel`, `adversarial` and `feature`, whose norms are given.

    With `loss.balance` "gradients" the norms of all become those of mel times their weights over mel's.
    """
    if loss.balance == "none":
        return dict.fromkeys(norms, 1.0)
    weights = {"mel": loss.mel_weight, "adversarial": loss.adversarial_weight, "feature": loss.feature_weight}
    unit = norms["mel"] / loss.mel_weight
    return {name: weights[name] * unit / jnp.maximum(norm, 1e-30) for name, norm in norms.items()}


def make_train_step(cfg: AdversarialTrainConfig, optimizer: Any) -> Any:
    """The update as a function (state, rows) -> (state, metrics), to be jitted with the state donated."""
    factor = schedule(cfg.optimizer, *budget(cfg))
    rates = _rates(cfg)

    def step(state: TrainState, rows: TokenizerRows) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(jax.random.key(cfg.run.seed), state.step)
        sums, gradients, term_norms, spectral = forward(cfg, state, rows, rng)
        terms = adversarial_loss.loss_terms(sums, cfg.loss, cfg.discriminator.names)
        updates_made = state.step - state.skipped
        state, scalars = apply_gradients(
            state,
            gradients,
            terms["loss"] + terms["discriminator"],
            optimizer,
            cfg.optimizer,
            max_bad_steps=cfg.run.patience,
            spectral=spectral,
            seed=cfg.run.seed,
            per_group=True,
        )
        scalars |= {f"learning_rate/{group}": rate * factor(updates_made) for group, rate in rates.items()}
        return state, StepMetrics.make({"loss": sums}, scalars | term_norms, count_rows(cfg, rows))

    return step


def make_metrics(cfg: AdversarialTrainConfig, sums: dict[str, Any]) -> dict[str, jax.Array]:
    """Loss terms, what each discriminator thinks, and of each level share of used codes and perplexity."""
    losses = sums["loss"]
    terms = adversarial_loss.loss_terms(losses, cfg.loss, cfg.discriminator.names)
    return terms | codebook_metrics(losses.code_counts)


def train_flops(cfg: AdversarialTrainConfig, counters: Mapping[str, float]) -> float:
    """Model FLOPs of training on what `counters` counted: the frozen encoder runs once, decoder and vocoder count
    three times. The discriminators: forward twice, backward to weights and inputs twice, to inputs twice more."""
    clips = max(counters["clips"], 1.0)
    codes, length = counters["codes"], counters["codes"] / clips
    encoding = cfg.model.flops_per_code(length, decode=False)
    decoding = cfg.model.flops_per_code(length) - encoding
    seen = cfg.discriminator.window_codes / cfg.data.row_codes or 1.0
    judging = 8.0 * seen * cfg.discriminator.flops_per_sample() * cfg.model.samples_per_code
    return codes * (encoding + 3.0 * decoding + judging)
