"""Streaming: the released scheme number for number, and with norm `frame` the wave that decoding at once gives."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from models.tokenizer.tiny import compute, random_codebook, random_params, tiny_config

from mimo_jax.config import ConfigError
from mimo_jax.models.tokenizer import streaming
from mimo_jax.models.tokenizer.audio_tokenizer import init_variables
from mimo_jax.models.tokenizer.codec import Codec
from mimo_jax.models.tokenizer.streaming import CodecStream, ReferenceStream, stream_deviation
from mimo_jax.presets import audio_tokenizer


@functools.cache
def _codec(norm="frame", segment_seconds=1.32, **settings):
    config = dataclasses.replace(tiny_config(), decoder_norm=norm)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=2))
    config = dataclasses.replace(config, vocoder=dataclasses.replace(config.vocoder, num_layers=2))
    config = dataclasses.replace(config, **settings)
    boxed = jax.eval_shape(lambda: init_variables(config, compute("float32"), jax.random.key(0)))
    codec = Codec(config, random_params(boxed["params"]), random_codebook(config), segment_seconds=segment_seconds)
    sizes = np.array(config.rvq.codebook_sizes)
    return codec, (np.random.default_rng(0).random((100, len(sizes))) * sizes).astype(np.uint16)


def _pieces(codes, seed=1):
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(codes), 12))
    return np.split(codes, cuts)


@pytest.mark.parametrize("chunk_codes", [1, 200])
def test_with_norm_frame_any_cut_of_the_codes_gives_the_wave_of_decoding_at_once(chunk_codes):
    codec, codes = _codec()
    expected = codec.decode(codes)  # three segments of 33 frames, and one
    stream = CodecStream(codec, chunk_codes)
    found = np.concatenate(list(stream.decode(_pieces(codes))))
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert stream._decoder._run._cache_size() == 1  # one program serves a stream of any length


@pytest.mark.parametrize(
    "settings",
    [
        {"pool": 1},
        {"vocoder": dataclasses.replace(tiny_config().vocoder, window=(-1, 3))},
        {"decoder": dataclasses.replace(tiny_config().decoder, window=(9, -1))},
    ],
    ids=["no pooling", "vocoder looks back without limit", "decoder window"],
)
def test_with_norm_frame_other_structures_stream_too(settings):
    codec, codes = _codec(**settings)
    expected = codec.decode(codes[:, :3])
    found = np.concatenate(list(CodecStream(codec, 7).decode(_pieces(codes[:, :3]))))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_sample_is_returned_as_soon_as_its_look_ahead_is_known():
    codec, codes = _codec(segment_seconds=60.0)
    stream = CodecStream(codec, chunk_codes=1)
    assert streaming.look_ahead_frames(codec.config) == 2 * 2 + 2
    assert stream.look_ahead_seconds == pytest.approx(0.06) and stream.latency_seconds == pytest.approx(0.10)
    got = [len(stream.push(codes[i : i + 1])) for i in range(10)]
    assert np.cumsum(got).tolist() == [max(0, 240 * (4 * (i + 1) - 6)) for i in range(10)]
    assert len(stream.finish()) == 6 * 240
    # After the end a stream can be used again.
    again = np.concatenate([stream.push(codes[:5]), stream.finish()])
    np.testing.assert_array_equal(again, np.concatenate(list(CodecStream(codec, 1).decode([codes[:5]]))))


def test_the_published_size_looks_1_62_seconds_ahead():
    assert streaming.look_ahead_frames(audio_tokenizer("7b")) == 162


def test_the_published_norm_streams_as_released_segment_by_segment():
    codec, codes = _codec("sequence", segment_seconds=2.0)
    expected = []
    for first in (0, 50):
        stream = ReferenceStream(codec, left_overlap=20, right_overlap=6)
        for start in range(0, 50, 10):
            (wav,) = stream.push([codes[first + start :][:10]], last=start == 40)
            expected.append(wav)
    stream = CodecStream(codec, chunk_codes=10, left_overlap=20, right_overlap=6)
    assert stream.look_ahead_seconds == pytest.approx(6 / 25)
    found = [stream.push(piece) for piece in _pieces(codes)] + [stream.finish()]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))
    assert sum(map(len, found)) == len(codes) * 960
    # The norm sees less than the whole segment: what is streamed differs from decoding at once.
    codec, codes = _codec("sequence", segment_seconds=60.0)
    apart = np.concatenate(list(CodecStream(codec, 10).decode([codes]))) - codec.decode(codes)
    deviation = stream_deviation(codec, codes, 10)
    assert deviation.max_abs == pytest.approx(np.abs(apart).max()) and deviation.max_abs > 1e-3
    assert deviation.rms == pytest.approx(np.sqrt(np.mean(apart.astype(float) ** 2)))
    assert deviation.signal_rms == pytest.approx(np.sqrt(np.mean(codec.decode(codes).astype(float) ** 2)))


def test_without_quirks_sequences_side_by_side_do_not_change_each_other():
    codec, codes = _codec("sequence", segment_seconds=60.0)
    both, alone = (ReferenceStream(codec, 20, 6) for _ in range(2))
    together = both.push([codes[:30], codes[40:50]], last=True)
    np.testing.assert_array_equal(together[1], alone.push([codes[40:50]], last=True)[0])
    assert len(together[1]) == 10 * 960


def test_what_cannot_be_streamed_is_refused():
    codec, codes = _codec()
    stream = CodecStream(codec)
    stream.push(codes[:3])
    with pytest.raises(ValueError, match="expected 4 levels as before, got 2"):
        stream.push(codes[:3, :2])
    with pytest.raises(ValueError, match="outside 0..15"):
        stream.push(codes[:3] + 16)
    with pytest.raises(ConfigError, match="chunk_codes"):
        CodecStream(codec, chunk_codes=0)
    with pytest.raises(ConfigError, match=r"right <= left frames, got 9 and 5"):
        CodecStream(_codec("sequence")[0], left_overlap=5, right_overlap=9)
    with pytest.raises(ConfigError, match="causal decoder"):
        CodecStream(_codec(decoder=dataclasses.replace(codec.config.decoder, causal=False))[0])
    with pytest.raises(ConfigError, match="limited right window"):
        CodecStream(_codec(vocoder=dataclasses.replace(codec.config.vocoder, window=(4, -1)))[0])
    with pytest.raises(ValueError, match="at least one RVQ frame"):
        stream_deviation(codec, codes[:0])
