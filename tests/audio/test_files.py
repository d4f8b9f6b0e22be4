"""Reading, resampling and writing audio files, and what broken files are answered with."""

import json
import struct
import sys

import numpy as np
import pytest
import soundfile

from mimo_jax.audio.files import AudioError, audio_length, load_audio, resample, save_wav


def _tone(hertz, rate, seconds=0.5):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def _level(wav):
    """Amplitude of a tone, ends left out."""
    return float(np.sqrt(2 * np.mean(wav[500:-500] ** 2)))


def test_recorded_speech_matches_its_transcript_length(librivox_dir):
    lines = [json.loads(line) for line in (librivox_dir / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        wav = load_audio(librivox_dir / line["audio"])
        assert len(wav) == audio_length(librivox_dir / line["audio"], 24_000) and wav.dtype == np.float32
        assert 10 < len(line["text"]) / (len(wav) / 24_000) < 20, "characters per second of read speech"
        assert 0.2 < np.abs(wav).max() < 1.0


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_every_common_format_is_read_at_the_wanted_rate(tmp_path, kind):
    path = tmp_path / f"tone.{kind}"
    soundfile.write(path, _tone(440.0, 16_000), 16_000)
    wav = load_audio(path, 24_000)
    assert len(wav) == audio_length(path, 24_000) == 12_000
    assert _level(wav) == pytest.approx(0.5, rel=0.02)


def test_channels_are_averaged(tmp_path):
    left, right = _tone(440.0, 24_000), _tone(1000.0, 24_000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 24_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "stereo.wav"), (left + right) / 2, atol=1e-7)


def test_formats_beyond_libsndfile_go_through_pyav(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is an optional extra")
    path = tmp_path / "tone.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="stereo")
        samples = np.repeat(_tone(440.0, 16_000, 2.0)[None], 2, axis=0)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    wav = load_audio(path)
    assert len(wav) == audio_length(path, 24_000) == pytest.approx(48_000, abs=3_600)
    assert _level(wav[6000:-6000]) == pytest.approx(0.5, rel=0.05)


def test_without_pyav_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "talk.m4a").write_bytes(b"not audio at all" * 8)
    with pytest.raises(AudioError, match=r"talk\.m4a.*install PyAV"):
        load_audio(tmp_path / "talk.m4a")


# ----------------------------------------------------------------------------------------------------------
# Resampling


@pytest.mark.parametrize("rate", [16_000, 22_050, 32_000, 44_100, 48_000])
def test_resampling_agrees_with_the_released_code_inside_the_band(parity_dir, rate):
    """Both resamplers are right below 0.85 of the lower Nyquist frequency; lengths are equal."""
    source = np.load(parity_dir / "audio" / "resample_inputs.npz")[f"in_{rate}"]
    expected = np.load(parity_dir / "audio" / "resample_expected.npz")[f"out_24000_from_{rate}"]
    got = resample(source, rate, 24_000)
    assert got.shape == expected.shape and got.dtype == np.float32
    band = np.fft.rfftfreq(len(got), 1 / 24_000) < 0.85 * min(rate, 24_000) / 2
    window = np.hanning(len(got))
    difference = np.fft.rfft((got - expected) * window)[band]
    reference = np.fft.rfft(expected * window)[band]
    assert np.linalg.norm(difference) < 0.006 * np.linalg.norm(reference)


def test_resampling_keeps_the_band_and_removes_aliases():
    for hertz in (100.0, 5_000.0, 10_900.0):
        assert _level(resample(_tone(hertz, 48_000), 48_000, 24_000)) == pytest.approx(0.5, rel=0.01)
    for hertz in (12_100.0, 20_000.0):
        assert _level(resample(_tone(hertz, 48_000), 48_000, 24_000)) < 1e-5


@pytest.mark.parametrize(("samples", "rate"), [(0, 16_000), (1, 16_000), (1, 48_000), (7, 44_100), (1001, 22_050)])
def test_resampled_length_is_the_ceiling(samples, rate):
    assert len(resample(np.ones(samples, np.float32), rate, 24_000)) == -(-samples * 24_000 // rate)


def test_equal_rates_change_nothing():
    wav = _tone(440.0, 24_000)
    np.testing.assert_array_equal(resample(wav, 24_000, 24_000), wav)


# ----------------------------------------------------------------------------------------------------------
# Writing


def test_16_bit_audio_survives_a_round_trip_exactly(tmp_path):
    pcm = np.array([-32_768, -32_767, -1, 0, 1, 255, 32_767], np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, 24_000)
    save_wav(tmp_path / "new" / "b.wav", load_audio(tmp_path / "a.wav"), 24_000)
    np.testing.assert_array_equal(soundfile.read(tmp_path / "new" / "b.wav", dtype="int16")[0], pcm)


def test_values_beyond_full_scale_are_clipped_not_wrapped(tmp_path):
    save_wav(tmp_path / "loud.wav", np.array([1.5, -1.5, 1.0]), 24_000)
    np.testing.assert_array_equal(
        soundfile.read(tmp_path / "loud.wav", dtype="int16")[0], np.array([32_767, -32_768, 32_767])
    )


@pytest.mark.parametrize(
    ("wav", "rate", "message"),
    [
        (np.zeros((2, 3)), 24_000, r"shape \[S\]"),
        (np.array([0.0, np.nan]), 24_000, "finite"),
        (np.zeros(3), 0, "sample rate"),
    ],
)
def test_impossible_waves_are_refused_and_the_old_file_stays(tmp_path, wav, rate, message):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")
    with pytest.raises(AudioError, match=message):
        save_wav(path, wav, rate)
    assert path.read_bytes() == b"old"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    save_wav(path, np.zeros(10), 24_000)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_wav(path, np.ones(10), 24_000)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


# ----------------------------------------------------------------------------------------------------------
# Broken input


@pytest.fixture
def wav_bytes(tmp_path):
    soundfile.write(tmp_path / "good.wav", _tone(440.0, 16_000), 16_000)
    return (tmp_path / "good.wav").read_bytes()


def _refused(path, reason):
    for function in (audio_length, load_audio):
        with pytest.raises(AudioError, match=reason) as caught:
            function(path, 24_000)
        assert path.name in str(caught.value)


def test_missing_file(tmp_path):
    _refused(tmp_path / "absent.wav", "no such audio file")


def test_folder_instead_of_a_file(tmp_path):
    _refused(tmp_path, "cannot be read")


def test_empty_file(tmp_path):
    (tmp_path / "empty.wav").touch()
    _refused(tmp_path / "empty.wav", "empty file")


def test_header_without_samples(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    _refused(tmp_path / "none.wav", "no samples")


@pytest.mark.parametrize("kind", ["wav", "aiff", "w64", "au"])
def test_truncated_pcm(tmp_path, kind):
    path = tmp_path / f"cut.{kind}"
    soundfile.write(path, _tone(440.0, 16_000), 16_000)
    path.write_bytes(path.read_bytes()[:9_000])
    _refused(path, "truncated")


@pytest.mark.parametrize("kind", ["flac", "mp3"])
def test_truncated_compressed_audio(tmp_path, kind):
    path = tmp_path / f"cut.{kind}"
    soundfile.write(path, np.random.default_rng(0).normal(size=48_000) * 0.1, 16_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=rf"cut\.{kind}: truncated"):
        load_audio(path)


def test_a_streamed_wav_of_undeclared_length_is_read(tmp_path, wav_bytes):
    data = bytearray(wav_bytes)
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFF_FFFF)
    (tmp_path / "pipe.wav").write_bytes(data)
    assert len(load_audio(tmp_path / "pipe.wav", 16_000)) == 8_000


def test_a_wrong_byte_rate_in_the_header_does_not_matter(tmp_path, wav_bytes):
    data = bytearray(wav_bytes)
    data[28:32] = struct.pack("<I", 96_000)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(load_audio(tmp_path / "a.wav", 16_000)) == 8_000


@pytest.mark.parametrize("rate", [0, 1, 900_000])
def test_wrong_rate(tmp_path, wav_bytes, rate):
    data = bytearray(wav_bytes)
    data[24:28] = struct.pack("<I", rate)
    path = tmp_path / "rate.wav"
    path.write_bytes(data)
    _refused(path, "sample rate of 4000..768000" if rate else r"can(not)? read it")


def test_not_audio(tmp_path):
    path = tmp_path / "text.wav"
    path.write_bytes(b"RIFF of something else entirely. " * 10)
    _refused(path, r"can(not)? read it")


def test_raw_samples_have_no_rate(tmp_path):
    path = tmp_path / "speech.raw"
    path.write_bytes(bytes(1000))
    _refused(path, "audio")


def test_samples_that_are_not_finite(tmp_path):
    wav = _tone(440.0, 24_000)
    wav[7] = np.inf
    soundfile.write(tmp_path / "inf.wav", wav, 24_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"inf\.wav.*sample 7"):
        load_audio(tmp_path / "inf.wav")
