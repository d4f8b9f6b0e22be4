"""The codec: buckets, segments, stability, errors."""

import jax
import numpy as np
import pytest
from models.tokenizer.tiny import compute, noise_clips, random_codebook, random_params, tiny_config

from mimo_jax.audio.packing import num_codes, pack_clips
from mimo_jax.models.tokenizer.audio_tokenizer import AudioTokenizer, init_variables
from mimo_jax.models.tokenizer.codec import Codec

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def variables():
    boxed = jax.eval_shape(lambda: init_variables(CONFIG, compute("float32"), jax.random.key(0)))
    return {"params": random_params(boxed["params"]), "codebook": random_codebook(CONFIG)}


@pytest.fixture(scope="module")
def codec(variables):
    return Codec(CONFIG, variables["params"], variables["codebook"], segment_seconds=3.0)


def test_variables_have_the_parameter_count_of_the_config():
    variables = jax.eval_shape(lambda: init_variables(CONFIG, compute("float32"), jax.random.key(0)))
    codebooks = sum(level["code_sum"].size for level in variables["codebook"].values())
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) + codebooks == CONFIG.num_params()
    assert set(variables["params"]) == {"encoder", "decoder", "vocoder"}


def test_codes_of_a_clip_do_not_depend_on_its_neighbours_or_on_the_order_of_calls(codec):
    clips = noise_clips(7000, 60_000, 12_345, 100)
    together, reversed_ = codec.encode(clips), codec.encode(clips[::-1])[::-1]
    alone = [codec.encode([clip])[0] for clip in clips]
    for a, b, c, clip in zip(together, reversed_, alone, clips, strict=True):
        assert a.dtype == np.uint16 and a.shape == (num_codes(len(clip), CONFIG), 4) and (a < [16, 16, 8, 8]).all()
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(codec.encode(clips[:1], num_levels=2)[0], together[0][:, :2])


def test_codes_and_wave_are_those_of_an_unpadded_row(codec, variables):
    (clip,) = noise_clips(30_000)
    (codes,) = codec.encode([clip])
    model = AudioTokenizer(CONFIG, compute("float32"))
    wav_BS, ids_BT = pack_clips([clip], CONFIG)
    row = jax.jit(lambda w, s: model.apply(variables, w, s, method="encode"))(wav_BS, ids_BT)
    np.testing.assert_array_equal(codes, row[0, : len(codes)])
    ones = np.ones((1, len(codes)), np.int32)
    wav = jax.jit(lambda c, s: model.apply(variables, c, s, method="decode"))(codes[None].astype(np.int32), ones)
    found = codec.decode(codes)
    assert found.dtype == np.float32 and found.shape == (960 * len(codes),)
    np.testing.assert_allclose(found, wav[0], atol=2e-6 * np.abs(wav).max())


def test_long_clips_are_cut_into_segments_that_decode_by_themselves(codec):
    (clip,) = noise_clips(100_000)
    (codes,) = codec.encode([clip])
    assert codec.segment_codes == 75 and len(codes) == num_codes(len(clip), CONFIG) == 105
    whole = codec.decode(codes)
    np.testing.assert_array_equal(whole, np.concatenate([codec.decode(codes[:75]), codec.decode(codes[75:])]))


def test_vectors_are_sums_of_the_entries_that_the_codes_name(codec, variables):
    codes = codec.encode(noise_clips(9_000))[0]
    levels = sorted(variables["codebook"].items(), key=lambda item: int("".join(filter(str.isdigit, item[0])) or 0))
    entries = [np.asarray(level["entries"]) for _, level in levels]
    for n in (1, 2):
        q_MD = codec.dequantize(codes[:, :n])
        expected = sum(entries[r][codes[:, r]] for r in range(n))
        np.testing.assert_allclose(q_MD, expected, rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused(codec):
    with pytest.raises(ValueError, match="at least one sample"):
        codec.encode([np.zeros(0, np.float32)])
    with pytest.raises(ValueError, match="finite"):
        codec.encode([np.array([0.0, np.nan], np.float32)])
    with pytest.raises(ValueError, match=r"level 2 has a code outside 0\.\.7"):
        codec.decode(np.array([[0, 15, 8, 0]]))
    with pytest.raises(ValueError, match="1 <= R <= 4"):
        codec.decode(np.zeros((3, 5), np.int32))
    with pytest.raises(ValueError, match="at least one RVQ frame"):
        Codec(CONFIG, {}, {}, segment_seconds=0.0)
    assert codec.decode(np.zeros((0, 4), np.int32)).shape == (0,)
