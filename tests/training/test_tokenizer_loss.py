"""Loss of the audio tokenizer: packed rows against clips alone, its three terms, and what a step trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.tokenizer.tiny import (
    WIDTH,
    compute,
    fast_jit,
    make_rows,
    noise_clips,
    random_codebook,
    random_params,
    tiny_a2t,
    tiny_config,
)

from mimo_jax.audio.features import mel_filterbank
from mimo_jax.audio.packing import num_codes, pack_clips, slot_codes
from mimo_jax.config import TokenizerLossConfig
from mimo_jax.kernels.rvq_encode.reference import squared_distances
from mimo_jax.models.tokenizer import rvq
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer
from mimo_jax.models.tokenizer.text_decoder import TextDecoder
from mimo_jax.training import tokenizer_loss as tl

CLIPS = noise_clips(5000, 3361, 7200)  # 21, 15 and 31 mel frames: odd and even numbers on every grid
TEXTS = [[3, 1, 4], [], [2, 7, 1, 8]]


def _loss(config, dtype, rng):
    """(params, codebook, rows) -> (loss, (sums, new codebook))."""
    model = AudioTokenizer(config, compute(dtype))
    text = TextDecoder(tiny_a2t(), WIDTH, compute(dtype))

    def loss(params, codebook, rows):
        return tl.tokenizer_loss(model, text, params, codebook, rows, TokenizerLossConfig(), rng)

    return loss


def _variables(config, dtype):
    boxed = jax.eval_shape(lambda: tl.init_variables(config, tiny_a2t(), compute("float32"), jax.random.key(0)))
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(boxed["params"]))
    return params, random_codebook(config, dtype=dtype)


def _rows(config, packed, dtype="float32"):
    """Three rows: all clips in the second and nothing in the others, or one clip in each."""
    length = sum(slot_codes(len(c), config) for c in CLIPS) + 2
    if packed:
        return make_rows(config, [[], CLIPS, []], [[], TEXTS, []], length, 12, dtype)
    return make_rows(config, [[c] for c in CLIPS], [[t] for t in TEXTS], length, 12, dtype)


def _run(config, dtype):
    """Everything a step returns (loss, sums, codebook, gradients), packed and alone; numpy float64."""
    with jax.enable_x64(dtype == "float64"):
        params, codebook = _variables(config, dtype)
        step = fast_jit(jax.value_and_grad(_loss(config, dtype, jax.random.key(7)), has_aux=True))
        out = [step(params, codebook, _rows(config, packed, dtype)) for packed in (True, False)]
        return [jax.tree.map(lambda x: np.asarray(x, np.float64), o) for o in out]


def _distance(a, b):
    """Largest difference of two trees, each leaf relative to its own largest value."""

    def leaf(x, y):
        return np.abs(x - y).max(initial=0.0) / max(np.abs(y).max(initial=0.0), 1e-12)

    return max(jax.tree.leaves(jax.tree.map(leaf, a, b)))


@pytest.mark.parametrize("norm", ["sequence", pytest.param("frame", marks=pytest.mark.slow)])
def test_a_packed_row_has_the_loss_gradients_and_codebook_update_of_its_clips_alone(norm):
    config = dataclasses.replace(tiny_config(), decoder_norm=norm)
    packed64, alone64 = _run(config, "float64")
    assert _distance(packed64, alone64) < 1e-9
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(packed64))
    gradients = jax.tree_util.tree_flatten_with_path(packed64[1])[0]
    silent = [jax.tree_util.keystr(path) for path, g in gradients if np.abs(g).max() == 0]
    assert not silent, f"no gradient reaches {silent}"

    packed32, alone32 = _run(config, "float32")
    (_, (sums32, _)), (_, (sums64, _)) = alone32[0], alone64[0]
    jax.tree.map(np.testing.assert_array_equal, sums32.code_counts, sums64.code_counts)
    np.testing.assert_array_equal([float(sums64.a2t_weight), float(sums64.a2t_clips)], [9, 2])
    rounding = _distance(alone32, alone64)
    assert rounding < 1e-3
    assert _distance(packed32, alone32) <= 4 * rounding


def test_codes_of_a_packed_row_are_those_of_its_clips_alone():
    config = tiny_config()
    params, codebook = _variables(config, "float32")
    model = AudioTokenizer(config, compute("float32"))
    variables = {"params": params["audio_tokenizer"], "codebook": codebook}

    @fast_jit
    def encode(wav_BS, ids_BT):
        z, ids_BM = model.apply(variables, wav_BS, ids_BT, method="encode_features")
        return z, ids_BM, model.apply(variables, wav_BS, ids_BT, method="encode")

    z, ids_BM, packed = encode(*pack_clips(CLIPS, config))
    for i, clip in enumerate(CLIPS):
        codes = num_codes(len(clip), config)
        z_alone, _, alone = encode(*pack_clips([clip], config))
        inside = np.asarray(ids_BM[0]) == i + 1
        assert inside.sum() == codes
        np.testing.assert_allclose(z[0][inside], z_alone[0, :codes], atol=1e-5)
        decided = np.cumprod(_margins(codebook, z_alone[0, :codes], config) > 1e-4, axis=1).astype(bool)
        assert decided.mean() > 0.9
        np.testing.assert_array_equal(np.asarray(packed[0])[inside][decided], np.asarray(alone[0, :codes])[decided])


def _margins(codebook, x, config):
    """Second-best minus best squared distance of every vector and level."""
    margins, residual = [], jnp.asarray(x)
    for i in range(config.rvq.num_levels):
        entries = rvq.entries(codebook[rvq.level_name(i)])
        distances = jnp.sort(squared_distances(residual, entries), axis=1)
        margins.append(distances[:, 1] - distances[:, 0])
        residual = residual - entries[rvq.nearest(residual, entries)]
    return np.stack(margins, axis=1)


def _naive_mel_distance(made, true, scale):
    config = tl.mel_scale_config(scale, 24_000)
    window, hop = 15 * 2 ** (scale - 1), 15 * 2 ** (scale - 2)
    assert (config.n_fft, config.win_length, config.hop_length, config.n_mels) == (window, window, hop, 2**scale)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = range((len(true) - window) // hop + 1)
    out = []
    for t in frames:
        cut = [x[t * hop : t * hop + window] * hann / np.sqrt((hann**2).sum()) for x in (made, true)]
        mels = [np.abs(np.fft.rfft(x)) @ mel_filterbank(config) for x in cut]
        out.append(np.abs(np.diff(np.log(np.maximum(mels, 1e-5)), axis=0)).mean())
    return sum(out), len(out)


def test_reconstruction_loss_is_the_three_scale_distance_over_frames_inside_the_clips():
    config = tiny_config()
    rows = _rows(config, True)
    made = np.random.default_rng(3).normal(size=rows.wav_BS.shape).astype(np.float32) * 0.1
    distance, frames = fast_jit(lambda w: tl.mel_distance(w, rows, config, TokenizerLossConfig()))(made)
    expected, count, start = np.zeros(3), np.zeros(3), 0
    for clip in CLIPS:
        valid = len(clip) // 240 * 240
        for i, scale in enumerate((5, 6, 7)):
            total, n = _naive_mel_distance(made[1, start : start + valid], clip[:valid], scale)
            expected[i] += total
            count[i] += n
        start += 960 * slot_codes(len(clip), config)
    np.testing.assert_array_equal(frames, count)
    np.testing.assert_allclose(distance, expected, rtol=1e-4)


def test_reconstruction_loss_of_the_true_wave_is_zero_and_settings_change_it_as_named():
    config = tiny_config()
    rows = _rows(config, True)
    half = config.mel.n_fft // 2
    true = jnp.concatenate([rows.wav_BS[:, half:], jnp.zeros((3, half))], axis=1)
    assert not np.asarray(tl.mel_distance(true, rows, config, TokenizerLossConfig())[0]).any()
    mean, _ = tl.mel_distance(true * 0.5, rows, config, TokenizerLossConfig())
    summed, frames = tl.mel_distance(true * 0.5, rows, config, TokenizerLossConfig(mel_reduction="sum"))
    np.testing.assert_allclose(summed, mean * np.array([32, 64, 128]), rtol=1e-5)
    # Halving the wave halves every magnitude: log 2 everywhere (but in the filters that hold no bin).
    share = [np.mean(mel_filterbank(tl.mel_scale_config(i, 24_000)).any(axis=0)) for i in (5, 6, 7)]
    np.testing.assert_allclose(mean / frames, np.log(2) * np.array(share), rtol=1e-3)
    linear, _ = tl.mel_distance(true * 0.5, rows, config, TokenizerLossConfig(mel_scale="linear"))
    double, _ = tl.mel_distance(true * 0.0, rows, config, TokenizerLossConfig(mel_scale="linear"))
    np.testing.assert_allclose(double, 2 * linear, rtol=1e-4)


def test_gradient_of_a_silent_reconstruction_is_finite():
    config = tiny_config()
    rows = _rows(config, True)
    for scale in ("log", "linear"):
        loss = TokenizerLossConfig(mel_scale=scale)

        def total(wav_BS, loss=loss):
            return tl.mel_distance(wav_BS, rows, config, loss)[0].sum()

        gradient = fast_jit(jax.grad(total))(jnp.zeros_like(rows.wav_BS))
        assert np.isfinite(gradient).all()


def test_total_and_terms_follow_the_weights_and_reductions():
    sums = tl.TokenizerLossSums(
        a2t=jnp.float32(12.0),
        a2t_weight=jnp.float32(8.0),
        a2t_correct=jnp.float32(2.0),
        a2t_clips=jnp.float32(3.0),
        mel_I=jnp.array([2.0, 3.0, 8.0]),
        mel_frames_I=jnp.array([4.0, 3.0, 2.0]),
        commitment_R=jnp.array([6.0, 1.0, 0.0]),
        vectors_R=jnp.array([3.0, 2.0, 0.0]),
        code_counts=(jnp.array([1.0, 1.0]),),
        dead_R=jnp.zeros(1),
    )
    terms = tl.loss_terms(sums, TokenizerLossConfig())
    expected = {"a2t": 1.5, "mel": 5.5, "commitment": 2.5 / 3, "a2t_accuracy": 0.25, "mel_5": 0.5, "mel_7": 4}
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(terms["loss"], 15 + 5.5 + 2.5 / 3, rtol=1e-6)
    other = TokenizerLossConfig(a2t_weight=1.0, mel_weight=0.0, commitment_weight=0.0, a2t_reduction="sum")
    np.testing.assert_allclose(tl.loss_terms(sums, other)["loss"], 4.0, rtol=1e-6)
    both = jax.tree.map(jnp.add, sums, sums)
    np.testing.assert_allclose(tl.loss_terms(both, TokenizerLossConfig())["loss"], terms["loss"], rtol=1e-6)


def test_evaluation_uses_all_levels_and_leaves_the_codebook_while_training_moves_it():
    config = tiny_config(dropout=1.0, threshold=2.0)
    params, codebook = _variables(config, "float32")
    # Without room for text the text decoder is not run, so that it needs no parameters.
    rows = make_rows(config, [CLIPS], [[[], [], []]], 24, 0)
    params["text_decoder"] = {}
    loss, (evaluated, kept) = fast_jit(_loss(config, "float32", None))(params, codebook, rows)
    vectors = sum(num_codes(len(c), config) for c in CLIPS)
    np.testing.assert_array_equal(evaluated.vectors_R, [vectors] * 4)
    jax.tree.map(np.testing.assert_array_equal, kept, codebook)
    assert np.isfinite(loss) and float(evaluated.a2t_weight) == 0 and float(evaluated.mel_frames_I[0]) > 0
    _, (trained, moved) = fast_jit(_loss(config, "float32", jax.random.key(0)))(params, codebook, rows)
    assert trained.vectors_R[0] == vectors > trained.vectors_R[3] and (np.diff(trained.vectors_R) <= 0).all()
    assert not np.array_equal(moved["level_00"]["count"], codebook["level_00"]["count"])


def test_a_text_token_sees_its_own_clip_and_the_text_before_it_only():
    config, dtype = tiny_config(), "float32"
    params, _ = _variables(config, dtype)
    decoder = TextDecoder(tiny_a2t(), WIDTH, compute(dtype))
    rows = _rows(config, True)
    ids_BM = rows.segment_ids_BT[:, ::4]
    q = jnp.asarray(np.random.default_rng(0).normal(size=(*ids_BM.shape, WIDTH)), jnp.float32)

    @fast_jit
    def hidden(q, text):
        arrays = (ids_BM, text, rows.text_segment_ids_BU, rows.text_positions_BU)
        return decoder.apply({"params": params["text_decoder"]}, q, *arrays)

    before = np.asarray(hidden(q, rows.text_BU))[1]
    other_clip = np.asarray(hidden(jnp.where((ids_BM == 1)[..., None], q + 1, q), rows.text_BU))[1]
    changed = np.abs(other_clip - before).max(-1) > 1e-6
    np.testing.assert_array_equal(changed, np.asarray(rows.text_segment_ids_BU[1]) == 1)
    later = np.asarray(hidden(q, rows.text_BU.at[1, 6].set(5)))[1]
    changed = np.abs(later - before).max(-1) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(changed), [6, 7, 8])


def test_loss_settings_are_those_of_the_report():
    loss = TokenizerLossConfig()
    assert (loss.a2t_weight, loss.mel_weight, loss.commitment_weight) == (10.0, 1.0, 1.0)
    assert tl.MEL_SCALES == (5, 6, 7)
    windows = [dataclasses.astuple(tl.mel_scale_config(i, 24_000))[1:5] for i in tl.MEL_SCALES]
    assert windows == [(240, 240, 120, 32), (480, 480, 240, 64), (960, 960, 480, 128)]
