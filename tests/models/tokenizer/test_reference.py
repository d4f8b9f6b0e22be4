"""The released code's batching artefacts: there when asked for, equal to the goldens, and absent by default."""

import jax
import numpy as np
import pytest
from models.tokenizer.tiny import compute, noise_clips, random_codebook, random_params, tiny_config

from mimo_jax.models.tokenizer import reference
from mimo_jax.models.tokenizer.audio_tokenizer import init_variables
from mimo_jax.models.tokenizer.codec import Codec

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def codecs():
    boxed = jax.eval_shape(lambda: init_variables(CONFIG, compute("float32"), jax.random.key(0)))
    parts = random_params(boxed["params"]), random_codebook(CONFIG)
    return [Codec(CONFIG, *parts, segment_seconds=2.0, reference_quirks=quirks) for quirks in (False, True)]


def test_only_the_shorter_clips_of_a_batch_are_changed(codecs):
    plain, quirky = codecs
    clips = noise_clips(30_000, 12_345, 29_000)
    alone, packed = plain.encode(clips), quirky.encode(clips)
    np.testing.assert_array_equal(packed[0], alone[0])
    assert any((packed[i] != alone[i]).any() for i in (1, 2))
    np.testing.assert_array_equal(quirky.encode(clips[1:2])[0], alone[1])
    waves, longest = quirky.decode_batch(alone), 960 * len(alone[0])
    assert [len(wav) for wav in waves] == [longest] * 3
    np.testing.assert_array_equal(waves[0], plain.decode(alone[0]))
    assert np.abs(waves[1][: 960 * len(alone[1])] - plain.decode(alone[1])).max() > 1e-3
    for wav, codes in zip(plain.decode_batch(alone), alone, strict=True):
        np.testing.assert_array_equal(wav, plain.decode(codes))


def test_the_last_segment_of_a_long_clip_is_padded_to_the_first(codecs):
    plain, quirky = codecs
    (clip,) = noise_clips(70_200)  # the last segment has an odd number of frames
    ours, theirs = plain.encode([clip])[0], quirky.encode([clip])[0]
    np.testing.assert_array_equal(ours[:50], theirs[:50])
    assert (ours[50:] != theirs[50:]).any()
    assert plain.fingerprint != quirky.fingerprint


def test_batches_are_filled_in_order_up_to_the_released_limit():
    frames = reference.PACKED_FRAMES
    assert reference.packed_extents([6000, 6000, 10]) == [6000, 6000, 6000]
    assert reference.packed_extents([6000] * (frames // 6000) + [5000, 10]) == [6000] * (frames // 6000) + [5000, 5000]
    assert reference.packed_extents([frames + 1, 7, 8]) == [frames + 1, 8, 8]
