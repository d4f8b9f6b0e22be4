"""Both stages of the audio tokenizer on four devices train as on one: losses, codes, k-means, moving averages."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tokenizer.tiny import compute, make_rows, noise_clips, random_codebook, random_params, tiny_a2t, tiny_config

from mimo_jax.config import (
    AdversarialTrainConfig,
    AudioDataConfig,
    DiscriminatorConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerTrainConfig,
)
from mimo_jax.models.tokenizer import rvq
from mimo_jax.models.tokenizer.text_decoder import TextDecoder
from mimo_jax.sharding import batch_sharding, make_mesh
from mimo_jax.training import adversarial_loss, loop, tokenizer, tokenizer_adversarial, tokenizer_loss

MESHES = [MeshConfig(4, 1, 1), MeshConfig(1, 4, 1), MeshConfig(2, 2, 1)]
# Relative difference of the loss at the first step and at any.
LIMITS = {"float64": (1e-9, 1e-9), "float32": (1e-6, 1e-4)}
ROWS, ROW_CODES = 4, 24


def _data(row_text: int) -> AudioDataConfig:
    return AudioDataConfig("", "", "", rows=ROWS, row_codes=ROW_CODES, row_text=row_text)


def _config(stage: int, dtype: str, mesh: MeshConfig) -> TokenizerTrainConfig | AdversarialTrainConfig:
    # A threshold at which codes die and are revived in these steps, from vectors of the whole batch.
    model = tiny_config(dropout=0.5, threshold=0.3)
    shared = dict(model=model, run=RunConfig(steps=20), learning_rate=3e-3, compute=compute(dtype), mesh=mesh)
    if stage == 1:
        return TokenizerTrainConfig(a2t=tiny_a2t(), data=_data(12), optimizer=OptimizerConfig(), **shared)
    discriminator = DiscriminatorConfig((2,), (4, 512), (128,), 4)  # a layer that is cut over `fsdp`
    return AdversarialTrainConfig(
        discriminator=discriminator,
        data=_data(0),
        discriminator_learning_rate=3e-3,
        init_from="-",
        **shared,
    )


def _rows(cfg, step: int):
    """Rows that differ in what they hold: so a device's part is not the whole."""
    lengths = np.random.default_rng(step).integers(2400, 9000, ROWS)
    clips = noise_clips(*map(int, lengths), seed=step)
    texts = [[[1 + (i + step) % 20, 5, 2 + i][: 3 - i % 2]] if cfg.data.row_text else [[]] for i in range(ROWS)]
    dtype = "float64" if cfg.compute.dtype == "float64" else "float32"
    return make_rows(cfg.model, [[clip] for clip in clips], texts, ROW_CODES, cfg.data.row_text, dtype)


def _train(stage: int, dtype: str, mesh_config: MeshConfig, steps: int):
    """Losses, the codebooks of k-means, codes of the first rows after the last step, codebooks after it."""
    cfg = _config(stage, dtype, mesh_config)
    count = mesh_config.data * mesh_config.fsdp
    with jax.enable_x64(dtype == "float64"):
        mesh = make_mesh(cfg.mesh, jax.devices()[:count])
        place = batch_sharding(mesh)
        with jax.set_mesh(mesh):
            put = functools.partial(loop.to_devices, sharding=place)
            rows = [jax.tree.map(np.asarray, _rows(cfg, step)) for step in range(steps)]
            if stage == 1:
                job = tokenizer.assemble(cfg, mesh)
                state = jax.jit(job.start, out_shardings=job.placed)(jax.random.key(0))
                init = functools.partial(tokenizer_loss.init_variables, cfg.model, cfg.a2t, cfg.compute)
                # Initial weights make nearly the same of all sounds.
                params = random_params(jax.eval_shape(init, jax.random.key(0))["params"])
                state = dataclasses.replace(state, params=jax.device_put(params, job.placed.params))
                book = tokenizer.kmeans_start(cfg, job.model, state, put(rows[0]), jax.random.key(1))
                state = dataclasses.replace(state, codebook=jax.device_put(book, job.placed.codebook))
                text = TextDecoder(cfg.a2t, cfg.model.encoder.d_model, cfg.compute)

                @jax.jit
                def measure(state, rows):
                    args = (job.model, text, state.params, state.codebook, rows, cfg.loss)
                    return tokenizer_loss.tokenizer_loss(*args)[0]
            else:
                job = tokenizer_adversarial.assemble(cfg, mesh)
                boxed = jax.eval_shape(lambda: tokenizer_adversarial.init_variables(cfg, jax.random.key(0)))
                arrays = (random_params(boxed["params"]), random_codebook(cfg.model, dtype=dtype), jax.random.key(0))
                state = jax.jit(job.start, out_shardings=job.placed)(*arrays)
                book = state.codebook

                @jax.jit
                def measure(state, rows):
                    sums = tokenizer_adversarial.forward(cfg, state, rows)[0]
                    terms = adversarial_loss.loss_terms(sums, cfg.loss, cfg.discriminator.names)
                    return terms["loss"] + terms["discriminator"]

            start = jax.tree.map(np.asarray, book)
            losses = []
            for batch in rows:
                batch = put(batch)
                losses.append(float(measure(state, batch)))
                state, _ = job.update(state, batch)
            assert not int(state.skipped)
            variables = {"params": state.params["audio_tokenizer"], "codebook": state.codebook}
            encode = jax.jit(lambda v, rows: job.model.apply(v, rows.wav_BS, rows.segment_ids_BT, method="encode"))
            codes = np.asarray(encode(variables, put(rows[0])))
            return np.array(losses), start, codes, jax.tree.map(np.asarray, state.codebook)


def _compare(stage: int, dtype: str, meshes: list[MeshConfig], steps: int) -> None:
    alone = _train(stage, dtype, MeshConfig(1, 1, 1), steps)
    for mesh in meshes:
        several = _train(stage, dtype, mesh, steps)
        off = np.abs(several[0] / alone[0] - 1)
        print(f"stage {stage} {dtype} {mesh}: {off[0]:.1e} at step 1, {off.max():.1e} at most")
        assert off[0] <= LIMITS[dtype][0] and off.max() <= LIMITS[dtype][1], (mesh, off)
        if dtype == "float64":
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), several[1], alone[1])
            np.testing.assert_array_equal(several[2], alone[2])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), several[3], alone[3])
    moved = np.abs(np.diff(alone[0])) / np.abs(alone[0][0])
    assert moved.max() > 1e-3 and len(np.unique(alone[2][..., 0])) > 1, "nothing was trained: equality says nothing"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_twenty_steps_on_every_mesh_of_four_devices(stage, dtype):
    _compare(stage, dtype, MESHES, 20)


def test_seeds_of_k_means_come_from_all_devices():
    """Each device holds vectors of a place of its own: all places are among the drawn ones."""
    mesh = make_mesh(MeshConfig(4, 1, 1), jax.devices()[:4])
    x = jnp.repeat(jnp.arange(4.0), 8)[:, None] * jnp.ones((1, 3)) + jnp.linspace(0, 0.1, 32)[:, None]
    config = dataclasses.replace(tiny_config().rvq, codebook_sizes=(16,), kmeans_iterations=1)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, batch_sharding(mesh))
        drawn = rvq._draw_vectors(x, jnp.ones(32, bool), 16, jax.random.key(0))
        book = rvq.init_codebooks(config, x, jnp.ones(32, bool), jax.random.key(0))
    assert set(np.asarray(drawn)[:, 0].astype(int)) == {0, 1, 2, 3}
    assert set(np.asarray(rvq.entries(book["level_00"]))[:, 0].astype(int)) == {0, 1, 2, 3}
