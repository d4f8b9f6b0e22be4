"""Losses of the adversarial stage: closed forms, gradients of both players, and what padding may not change."""

import dataclasses

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
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.discriminators import Discriminators, Judgement
from mimo_jax.training import adversarial_loss as al
from mimo_jax.training import tokenizer_adversarial as job
from mimo_jax.training.state import TrainState
from mimo_jax.training.tokenizer_loss import mel_distance

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
    inside = (Judgement(jnp.array([[[True, True, False]]]), ()),)
    judged = (Judgement(logits, ()),)
    real, made = al.scores(judged, inside, real=True), al.scores(judged, inside, real=False)
    np.testing.assert_allclose(real.hinge_K, [0 + 1.5])
    np.testing.assert_allclose(made.hinge_K, [3 + 0.5])
    assert float(real.right_K[0]) == 1 == float(made.right_K[0]) and float(real.places_K[0]) == 2
    np.testing.assert_allclose(al.hinge_loss(real, made), (1.5 + 3.5) / 2)
    np.testing.assert_allclose(al.adversarial_loss(made), -(2.0 - 0.5) / 2)


def test_feature_maps_and_discriminators_weigh_the_same_whatever_their_size():
    def judgement(value, shapes):
        return Judgement(jnp.zeros((1, 1, 1)), tuple(jnp.full(s, value) for s in shapes))

    shapes = [[(1, 2, 6, 4), (1, 2, 3, 8)], [(1, 5, 7, 2), (1, 5, 7, 2), (1, 5, 7, 2)]]
    real = tuple(judgement(1.0, s) for s in shapes)
    made = tuple(judgement(v, s) for v, s in zip((1.5, -1.0), shapes, strict=True))
    inside = tuple(Judgement(jnp.ones((1, 1, 1), bool), tuple(jnp.ones(f[:3], bool) for f in s)) for s in shapes)
    distances, places = al.feature_sums(real, made, inside)
    np.testing.assert_allclose(distances[0] / places[0], [0.5, 0.5])
    np.testing.assert_allclose(distances[1] / places[1], [2.0, 2.0, 2.0])
    np.testing.assert_allclose(al.feature_loss(distances, places), 1.25)
    gradient = jax.grad(lambda real: al.feature_loss(*al.feature_sums(real, made, inside)))(real)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_true_wave_is_the_clips_where_the_reconstruction_has_them():
    cfg = _config()
    with jax.enable_x64(True):
        wav, inside = al.true_wave(_rows(cfg), cfg.model)
    start = 0
    for clip in CLIPS:
        length = len(clip) // 240 * 240
        np.testing.assert_array_equal(wav[0, start : start + length], clip[:length])
        assert np.asarray(inside[0, start : start + length]).all()
        end = start + 960 * slot_codes(len(clip), cfg.model)
        assert not np.asarray(inside[0, start + length : end]).any() and not np.any(wav[0, start + length : end])
        start = end


def _objectives(cfg, state, rows):
    """What each player minimises, written down without the tricks of `forward`."""
    model = AudioTokenizer(cfg.model, cfg.compute)
    judges = Discriminators(cfg.discriminator, 24_000, cfg.compute)
    true, inside = al.true_wave(rows, cfg.model)

    def both(params):
        variables = {"params": params["audio_tokenizer"], "codebook": state.codebook}
        made = model.apply(variables, rows).wav_BS
        judging = {"params": params["discriminators"], "spectral": state.spectral}
        seen, places = judges.apply(judging, jnp.where(inside, made, 0), inside)
        real, _ = judges.apply(judging, true, inside)
        return made, real, seen, places

    def generator(params):
        made, real, seen, places = both(params)
        mel = al.mel_loss(*mel_distance(made, rows, cfg.model, cfg.loss))
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
            sums, gradients, spectral = job.forward(cfg, state, rows)
            expected = [jax.value_and_grad(f)(state.params) for f in _objectives(cfg, state, rows)]
            return al.loss_terms(sums, cfg.loss, cfg.discriminator.names), gradients(), spectral, expected

        return state, run(state, rows)


def test_both_players_get_the_gradients_of_their_objectives(stepped):
    _, (terms, (gradients, _), _, ((loss, generator), (hinge, discriminators))) = stepped
    np.testing.assert_allclose(terms["loss"], loss, rtol=1e-9)
    np.testing.assert_allclose(terms["discriminator"], hinge, rtol=1e-9)
    assert set(gradients["audio_tokenizer"]) == {"decoder", "vocoder"}
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
    state, (_, _, spectral, _) = stepped
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


def test_losses_do_not_see_what_lies_outside_of_clips():
    cfg = _config()
    with jax.enable_x64(True):
        state, rows = _state(cfg), _rows(cfg)
        run = fast_jit(lambda state, rows: job.forward(cfg, state, rows)[0])
        plain = run(state, rows)
        # The decoder gives zeros at padding; a wave there would be cut off before the discriminators look.
        dirty = rows._replace(wav_BS=rows.wav_BS.at[:, -960:].set(9.0))
        other = run(state, dirty)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), plain, other)


def test_quantiser_dropout_is_drawn_for_training_only():
    cfg = _config()
    model = dataclasses.replace(cfg.model, rvq=dataclasses.replace(cfg.model.rvq, dropout_probability=1.0))
    cfg = dataclasses.replace(cfg, model=model)
    with jax.enable_x64(True):
        state, rows = _state(cfg), _rows(cfg)
        run = fast_jit(lambda rng: job.forward(cfg, state, rows, rng)[0].code_counts)
        reached = [float(counts.sum()) for counts in run(jax.random.key(0))]
        everything = [float(c.sum()) for c in fast_jit(lambda: job.forward(cfg, state, rows)[0].code_counts)()]
    assert len(set(everything)) == 1 and reached[0] == everything[0] > reached[-1]
