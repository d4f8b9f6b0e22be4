"""Files of codes: round trip, streaming, and what is refused before anything is written."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import soundfile
from models.tokenizer.tiny import compute, noise_clips, random_codebook, random_params, tiny_config

from mimo_jax.audio.files import load_audio, save_wav
from mimo_jax.cli import main
from mimo_jax.codec_files import CodesFile, decode_files, encode_files
from mimo_jax.config import ConfigError
from mimo_jax.data.records import DataError
from mimo_jax.models.tokenizer.audio_tokenizer import init_variables
from mimo_jax.models.tokenizer.codec import Codec

CONFIG = dataclasses.replace(tiny_config(), decoder_norm="frame")


@pytest.fixture(scope="module")
def load():
    boxed = jax.eval_shape(lambda: init_variables(CONFIG, compute("float32"), jax.random.key(0)))
    parts = random_params(boxed["params"]), random_codebook(CONFIG)
    return lambda segment_seconds=2.0, reference_quirks=False, norm="frame": Codec(
        dataclasses.replace(CONFIG, decoder_norm=norm),
        *parts,
        segment_seconds=segment_seconds,
        reference_quirks=reference_quirks,
    )


@pytest.fixture
def recordings(tmp_path):
    paths = []
    for name, clip in zip("ab", noise_clips(30_000, 70_123), strict=True):
        paths.append(str(tmp_path / f"{name}.wav"))
        save_wav(paths[-1], clip, 24_000)
    return paths


def test_recordings_become_codes_and_come_back_as_long_as_they_were(tmp_path, load, recordings, capsys):
    codec = load()
    paths = encode_files(recordings, codec, str(tmp_path / "codes"), 3)
    assert [path.name for path in paths] == ["a.npz", "b.npz"]
    whole = decode_files([str(path) for path in paths], load, str(tmp_path / "whole"))
    streamed = decode_files([str(path) for path in paths], load, str(tmp_path / "streamed"), chunk_seconds=0.4)
    assert f"encode {recordings[1]}: 3s of 3s" in (said := capsys.readouterr().err) and "ETA 0s" in said
    for recording, path, one, other in zip(recordings, paths, whole, streamed, strict=True):
        wav, content = load_audio(recording), CodesFile.load(path)
        np.testing.assert_array_equal(content.codes, codec.encode([wav], 3)[0])
        a, b = (soundfile.read(file, dtype="int16")[0].astype(int) for file in (one, other))
        expected = np.rint(np.clip(codec.decode(content.codes)[: len(wav)], -1, 32767 / 32768) * 32768)
        assert len(a) == len(b) == len(wav)
        np.testing.assert_array_equal(a, expected)
        assert np.abs(a - b).max() <= 1


def test_the_verbs_use_the_settings_of_the_file(tmp_path, load, recordings, monkeypatch, capsys):
    monkeypatch.setattr("mimo_jax.loading.load_codec", lambda checkpoint, step=None, **options: load(**options))
    common = ["--audio-tokenizer", "x", "--out", str(tmp_path)]
    assert main(["codec", "encode", *recordings, *common, "--segment-seconds", "1", "--reference-quirks"]) == 0
    content = CodesFile.load(tmp_path / "b.npz")
    assert content.segment_seconds == 1.0 and content.quirks and content.codes.shape == (74, 4)
    assert main(["codec", "decode", str(tmp_path / "b.npz"), *common, "--stream"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(tmp_path / "b-decoded.wav")
    assert re.search(r"b\.npz: streamed, looking 0\.\d\d s ahead\n", said.err) and "differ" not in said.err
    assert main(["codec", "encode", *recordings, *common, "--levels", "5"]) == 2
    assert "error: levels: expected 1..4, got 5" in capsys.readouterr().err
    assert main(["codec", "encode", *recordings, *common, "--segment-seconds", "nan"]) == 2
    assert main(["codec", "decode", str(tmp_path / "b.npz"), *common, "--chunk-seconds", "0"]) == 2
    assert "--chunk-seconds: expected a positive number" in capsys.readouterr().err


def test_streaming_with_the_published_norm_says_how_far_off_it_is(tmp_path, load, recordings, capsys):
    (path,) = encode_files(recordings[1:], load(60.0, norm="sequence"), str(tmp_path))
    decode_files([str(path)], functools.partial(load, norm="sequence"), str(tmp_path), chunk_seconds=0.4)
    said = capsys.readouterr().err
    assert "streamed, looking 1.60 s ahead" in said
    largest, rms = re.search(r"first 3\.0 s differ .* at most (\S+), RMS (\S+) \(signal", said).groups()
    assert float(largest) > float(rms) > 0


def test_bad_files_are_refused_by_name_before_anything_is_written(tmp_path, load, recordings):
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="different names"):
        encode_files([recordings[0], recordings[0]], load(), out)
    (good,) = encode_files(recordings[:1], load(), str(tmp_path))
    text, other = tmp_path / "text.npz", tmp_path / "other.npz"
    text.write_bytes(b"no archive")
    dataclasses.replace(CodesFile.load(good), fingerprint="0" * 16).save(other)
    np.savez(tmp_path / "half.npz", codes=np.zeros((3, 2), np.uint16))
    fields = dict(np.load(good))
    bad = {
        "codes": (np.zeros((3, 2), np.int64), "codes: expected uint16"),
        "codes ": (np.full((40, 2), 999, np.uint16), "codes: level 0 has a code outside"),
        "samples": (-1, "samples: expected a number of samples, got -1"),
        "samples ": (10**9, "samples: expected at most"),
        "samples  ": (np.ones(2, int), "samples: expected an integer, got int64"),
        "segment_seconds": (np.nan, "segment_seconds: expected 1..3600, got nan"),
        "segment_seconds ": (np.inf, "segment_seconds: expected 1..3600, got inf"),
        "segment_seconds  ": (1e-3, "segment_seconds: expected 1..3600, got 0.001"),
        "quirks": ("no", "quirks: expected a bool"),
        "fingerprint": (3, "fingerprint: expected a text"),
    }
    for name, (value, _) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **{**fields, name.strip(): value})
    for name, error, message in (
        ("text", DataError, "text.npz: expected a file of codes"),
        ("half", DataError, "half.npz: expected a file of codes"),
        ("other", ConfigError, "other.npz: expected codes of the audio tokenizer"),
        ("missing", FileNotFoundError, "missing.npz"),
        *((name, DataError, rf"{name}\.npz: {message}") for name, (_, message) in bad.items()),
    ):
        with pytest.raises(error, match=message):
            decode_files([str(good), str(tmp_path / f"{name}.npz")], load, out)
    assert not (tmp_path / "out").exists()
