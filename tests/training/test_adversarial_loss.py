"""Losses of the adversarial stage: closed forms, gradients of both players, and what padding may not change."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tokenizer.tiny import compute, fast_jit, make_rows, noise_clips, random_codebook, random_params, tiny_config

from mimo_jax.audio.packing import slot_codes
from mimo_jax.config import (
    AdversarialLossConfig,
    AdversarialTrainConfig,
    AudioDataConfig,
    DiscriminatorConfig,
    RunConfig,
)
from mimo_jax.config_files import load_config
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer, init_variables
from mimo_jax.models.tokenizer.discriminators import DiscriminatorOutput, Discriminators
from mimo_jax.sharding import MESH_AXES
from mimo_jax.training import adversarial_loss as al
from mimo_jax.training import tokenizer_adversarial as job
from mimo_jax.training import tokenizer_loss as tl
from mimo_jax.training.state import TrainState

CONFIGS = Path(__file__).parents[2] / "configs"
CLIPS = noise_clips(5000, 3361, 7200)


def _config(**changes):
    return AdversarialTrainConfig(
        model=tiny_config(),
        discriminator=DiscriminatorConfig((2,), (3, 4), (64,), 2),
        data=AudioDataConfig("a", "b", "", rows=1, row_codes=30, row_text=0),
        run=RunConfig(steps=10),
        learning_rate=1e-3,
        discriminator_learning_rate=1e-3,
        init_from="somewhere",
        compute=compute("float64"),
        **changes,
    )


def _state(cfg):
    boxed = jax.eval_shape(lambda: job.init_variables(cfg, jax.random.key(0)))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), random_params(boxed["params"]))
    spectral = nn.unbox(job.init_discriminators(cfg, jax.random.key(1)))["spectral"]
    return TrainState.start(params, (), random_codebook(cfg.model, dtype="float64"), spectral)


def _rows(cfg, clips=CLIPS):
    length = sum(slot_codes(len(c), cfg.model) for c in CLIPS) + 2
    return make_rows(cfg.model, [clips], [[[]] * len(clips)], length, 0, "float64")


def test_losses_have_their_closed_forms():
    logits = jnp.array([[[2.0, -0.5, 9.0]]])
    inside = (DiscriminatorOutput(jnp.array([[[True, True, False]]]), ()),)
    outputs = (DiscriminatorOutput(logits, ()),)
    real, fake = al.scores(outputs, inside, real=True), al.scores(outputs, inside, real=False)
    np.testing.assert_allclose(real.hinge_K, [0 + 1.5])
    np.testing.assert_allclose(fake.hinge_K, [3 + 0.5])
    assert float(real.correct_K[0]) == 1 == float(fake.correct_K[0]) and float(real.places_K[0]) == 2
    np.testing.assert_allclose(al.hinge_loss(real, fake), (1.5 + 3.5) / 2)
    np.testing.assert_allclose(al.adversarial_loss(fake), -(2.0 - 0.5) / 2)


def test_feature_maps_and_discriminators_weigh_the_same_whatever_their_size():
    def output(value, shapes):
        return DiscriminatorOutput(jnp.zeros((1, 1, 1)), tuple(jnp.full(s, value) for s in shapes))

    shapes = [[(1, 2, 6, 4), (1, 2, 3, 8)], [(1, 5, 7, 2), (1, 5, 7, 2), (1, 5, 7, 2)]]
    real = tuple(output(1.0, s) for s in shapes)
    fake = tuple(output(v, s) for v, s in zip((1.5, -1.0), shapes, strict=True))
    inside = tuple(
        DiscriminatorOutput(jnp.ones((1, 1, 1), bool), tuple(jnp.ones(f[:3], bool) for f in s)) for s in shapes
    )
    distances, places = al.feature_sums(real, fake, inside)
    np.testing.assert_allclose(distances[0] / places[0], [0.5, 0.5])
    np.testing.assert_allclose(distances[1] / places[1], [2.0, 2.0, 2.0])
    np.testing.assert_allclose(al.feature_loss(distances, places), 1.25)
    gradient = jax.grad(lambda real: al.feature_loss(*al.feature_sums(real, fake, inside)))(real)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_true_wave_is_the_clips_where_the_reconstruction_has_them():
    cfg = _config()
    with jax.enable_x64(True):
        wav, ids = tl.true_wave(_rows(cfg), cfg.model)
    inside, start = np.repeat(np.asarray(ids) > 0, 240, axis=1), 0
    for clip in CLIPS:
        length = len(clip) // 240 * 240
        np.testing.assert_array_equal(wav[0, start : start + length], clip[:length])
        assert inside[0, start : start + length].all()
        end = start + 960 * slot_codes(len(clip), cfg.model)
        assert not inside[0, start + length : end].any()
        start = end


def _objectives(cfg, state, rows):
    """What each player minimises, written down without the tricks of `forward`."""
    model = AudioTokenizer(cfg.model, cfg.compute)
    discriminate = Discriminators(cfg.discriminator, 24_000, cfg.compute)
    true, ids = tl.true_wave(rows, cfg.model)
    inside = jnp.repeat(ids > 0, 240, axis=1)

    def both(params):
        variables = {"params": params["audio_tokenizer"], "codebook": state.codebook}
        fake = model.apply(variables, rows).wav_BS
        variables_of_them = {"params": params["discriminators"], "spectral": state.spectral}
        seen, places = discriminate.apply(variables_of_them, jnp.where(inside, fake, 0), inside)
        real, _ = discriminate.apply(variables_of_them, jnp.where(inside, true, 0), inside)
        return fake, real, seen, places

    def generator(params):
        fake, real, seen, places = both(params)
        mel = al.mel_loss(*tl.mel_distance(fake, rows, cfg.model, cfg.loss))
        adversarial = -jnp.mean(
            jnp.stack([jnp.mean(s.logits_BHW, where=p.logits_BHW) for s, p in zip(seen, places, strict=True)])
        )
        of_one = []
        for a, b, p in zip(real, seen, places, strict=True):
            maps = [
                jnp.mean(jnp.abs(jax.lax.stop_gradient(x) - y).mean(-1), where=where)
                for x, y, where in zip(a.features, b.features, p.features, strict=True)
            ]
            of_one.append(jnp.mean(jnp.stack(maps)))
        return mel + adversarial + 2 * jnp.mean(jnp.stack(of_one))

    def discriminators(params):
        _, real, seen, places = both(params)
        losses = []
        for a, b, p in zip(real, seen, places, strict=True):
            losses.append(jnp.mean(nn.relu(1 - a.logits_BHW), where=p.logits_BHW))
            losses[-1] += jnp.mean(nn.relu(1 + b.logits_BHW), where=p.logits_BHW)
        return jnp.mean(jnp.stack(losses))

    return generator, discriminators


@pytest.fixture(scope="module")
def stepped():
    """Sums, gradients and norms of `forward`, and the gradients of the objectives; float64."""
    cfg = _config()
    with jax.enable_x64(True):
        state, rows = _state(cfg), _rows(cfg)

        @fast_jit
        def run(state, rows):
            sums, gradients, norms, spectral = job.forward(cfg, state, rows)
            expected = [jax.value_and_grad(f)(state.params) for f in _objectives(cfg, state, rows)]
            return al.loss_terms(sums, cfg.loss, cfg.discriminator.names), gradients, norms, spectral, expected

        return state, run(state, rows)


def test_both_players_get_the_gradients_of_their_objectives(stepped):
    _, (terms, gradients, norms, _, ((loss, generator), (hinge, discriminators))) = stepped
    np.testing.assert_allclose(terms["loss"], loss, rtol=1e-9)
    np.testing.assert_allclose(terms["discriminator"], hinge, rtol=1e-9)
    assert set(gradients["audio_tokenizer"]) == {"decoder", "vocoder"}
    assert all(norms[f"term_norm/{name}"] > 0 for name in ("mel", "adversarial", "feature"))
    expected = {
        "audio_tokenizer": {name: generator["audio_tokenizer"][name] for name in ("decoder", "vocoder")},
        "discriminators": discriminators["discriminators"],
    }
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        scale, name = np.abs(wanted).max(), jax.tree_util.keystr(path)
        # Within the margins of the hinge, both sides may pull equally at a bias of a discriminator.
        assert scale > 0 or name.endswith("['bias']"), name
        np.testing.assert_allclose(found, wanted, atol=1e-9 * max(scale, 1e-3), err_msg=name)


def test_power_iterations_move(stepped):
    state, (*_, spectral, _) = stepped
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.spectral, spectral)
    names = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(moved) if not x]
    assert all("last" in name for name in names), names  # one output: its vector is 1 or -1


def test_balanced_terms_have_gradients_as_their_weights_say():
    loss = AdversarialLossConfig(balance="gradients")
    norms = {"mel": jnp.float32(4.0), "adversarial": jnp.float32(1e-4), "feature": jnp.float32(3.0)}
    factors = job.balance(loss, norms)
    shares = {name: float(factors[name] * norm) for name, norm in norms.items()}
    assert shares == pytest.approx({"mel": 4.0, "adversarial": 4.0, "feature": 8.0})
    assert set(job.balance(AdversarialLossConfig(), norms).values()) == {1.0}
    with pytest.raises(ValueError, match=r"loss\.mel_weight"):
        AdversarialLossConfig(balance="gradients", mel_weight=0.0)


def test_discriminators_see_a_window_of_each_row_that_begins_with_a_frame():
    cfg = _config()
    cfg = dataclasses.replace(cfg, discriminator=dataclasses.replace(cfg.discriminator, window_codes=7))
    rows = _rows(cfg)._replace(wav_BS=jnp.zeros((40, 960 * 30)))
    samples = jnp.broadcast_to(jnp.arange(960 * 30), (40, 960 * 30))
    seen = np.asarray(job.windows(cfg, rows, jax.random.key(0))(samples))
    assert seen.shape == (40, 960 * 7) and (np.diff(seen, axis=1) == 1).all() and (seen[:, 0] % 960 == 0).all()
    assert set(seen[:, 0] // 960) <= set(range(24)) and len(set(seen[:, 0])) > 10
    whole = job.windows(cfg, rows, None)(samples)
    np.testing.assert_array_equal(whole, samples)
    with pytest.raises(ValueError, match=r"discriminator\.window_codes: expected at most data\.row_codes \(30\)"):
        dataclasses.replace(cfg, discriminator=dataclasses.replace(cfg.discriminator, window_codes=31))


def test_quantiser_dropout_of_frozen_codebooks_is_drawn_with_a_key_only():
    model = tiny_config(dropout=1.0)
    params = random_params(
        jax.eval_shape(lambda: init_variables(model, compute("float32"), jax.random.key(0)))["params"]
    )
    variables = {"params": params, "codebook": random_codebook(model)}
    rows = make_rows(model, [CLIPS], [[[], [], []]], 30, 0)
    tokenizer = AudioTokenizer(model, compute("float32"))

    @fast_jit
    def reached(rng):
        return [counts.sum() for counts in tokenizer.apply(variables, rows, rng, method="encode_quantized")[2]]

    dropped, everything = (np.array(reached(rng)) for rng in (jax.random.key(0), None))
    assert len(set(everything)) == 1 and dropped[0] == everything[0] > dropped[-1]


def test_weights_below_zero_are_refused():
    with pytest.raises(ValueError, match=r"loss\.feature_weight: expected a non-negative number, got -2"):
        AdversarialLossConfig(feature_weight=-2.0)


def test_moments_lie_like_their_parameters_and_power_iterations_everywhere_at_the_published_size():
    spec = f"{CONFIGS / 'tokenizer_adversarial.py'}:7b"
    cfg = load_config(spec, ["--config.mesh.data=2", "--config.mesh.fsdp=8"])
    mesh = jax.sharding.AbstractMesh((2, 8, 1), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = job.assemble(cfg, mesh).placed
    kernel = placed.params["discriminators"]["period_2"]["conv_3"]["kernel"].spec
    assert "fsdp" in jax.tree.leaves(tuple(kernel))
    moments = [
        (jax.tree_util.keystr(path), sharding.spec)
        for path, sharding in jax.tree_util.tree_leaves_with_path(placed.optimizer)
    ]
    of_kernel = [spec for path, spec in moments if path.endswith("['period_2']['conv_3']['kernel']")]
    assert len(of_kernel) == 2 and set(of_kernel) == {kernel}
    assert any("fsdp" in str(spec) for path, spec in moments if "['vocoder']" in path)
    assert not any("encoder" in path.replace("decoder", "") for path, _ in moments), "frozen parts have no moments"
    assert all(not tuple(x.spec) for x in jax.tree.leaves(placed.spectral))


def test_a_state_without_power_iterations_has_the_progress_of_older_checkpoints():
    params = {"a": jnp.zeros(2)}
    plain, spectral = TrainState.start(params, {}), TrainState.start(params, {}, spectral={"u": jnp.ones(3)})
    assert set(plain.progress()) == {"step", "skipped", "bad_in_row", "optimizer"}
    assert set(spectral.progress()) == {*plain.progress(), "spectral"}
    back = TrainState.join(spectral.variables(), spectral.progress())
    np.testing.assert_array_equal(back.spectral["u"], 1.0)
