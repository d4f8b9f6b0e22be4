"""The speaker embedding is that of the package whose weights it has, and it tells voices apart."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from evals.voice import LIBRIVOX, clip, voice

from mimo_jax.audio.files import load_audio
from mimo_jax.config import ConfigError
from mimo_jax.evals import speaker
from mimo_jax.evals.slaney import power_mel
from mimo_jax.evals.speaker import load_speaker_model, resemblyzer_embedding, speaker_similarity


@pytest.fixture(autouse=True)
def weights():
    try:
        load_speaker_model("resemblyzer")
    except ConfigError as error:
        pytest.skip(str(error))


# Largest entries and sum of `VoiceEncoder().embed_utterance(wav)` of resemblyzer 0.1.4 with torch 2.14.1, of waves that
# were raised to -30 dBFS before: less than one partial utterance, a last one that is kept, one that is left out.
GOLDEN = {
    5_000: ({9: 0.279587, 20: 0.270157, 0: 0.226421, 58: 0.214792, 160: 0.213971, 89: 0.198981}, 8.540865),
    40_000: ({74: 0.234825, 180: 0.208727, 72: 0.200614, 175: 0.192203, 131: 0.188205, 93: 0.181034}, 9.390054),
    61_000: ({93: 0.228175, 180: 0.206949, 72: 0.192191, 175: 0.190654, 131: 0.184275, 203: 0.176489}, 10.595875),
}


@pytest.mark.parametrize("samples", GOLDEN)
def test_embedding_is_that_of_the_package(samples):
    largest, total = GOLDEN[samples]
    embedding = resemblyzer_embedding(voice(samples), 16_000)
    assert embedding.shape == (256,) and np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-5)
    assert embedding[list(largest)] == pytest.approx(list(largest.values()), abs=5e-6)
    assert np.argsort(-embedding)[:6].tolist() == list(largest)
    assert embedding.sum() == pytest.approx(total, abs=1e-4)


def test_mel_spectrogram_is_that_of_librosa():
    # `librosa.feature.melspectrogram` 1.0.0: entries 0, 5, 20, 39 of frame 10, and the sum.
    wav = voice(16_000).astype(np.float32)
    for n_fft, mels, frames, entries, total in (
        (400, 40, 101, (6.0521738e-02, 7.8114566e-04, 2.6557470e-04, 0.0), 16.79251389),
        (321, 120, 100, (7.9192481e-07, 2.9948960e-01, 2.9227579e-06, 1.6347551e-03), 31.85125451),
    ):
        mel = power_mel(wav, 16_000, n_fft, 160, mels)
        assert mel.shape == (frames, mels)
        assert mel[10, [0, 5, 20, 39]] == pytest.approx(entries, rel=1e-4, abs=1e-12)
        assert mel.sum() == pytest.approx(total, rel=1e-6)


def test_one_voice_is_nearer_to_itself_than_to_another():
    reader = [resemblyzer_embedding(load_audio(path), 24_000) for path in sorted(LIBRIVOX.glob("*.wav"))[:2]]
    other = resemblyzer_embedding(voice(48_000), 16_000)
    assert speaker_similarity(*reader) > 0.75 > 0.7 > speaker_similarity(reader[0], other)


def test_level_does_not_matter_and_silence_has_no_voice():
    wav = clip()
    quiet = resemblyzer_embedding(0.001 * wav, 24_000)
    assert speaker_similarity(quiet, resemblyzer_embedding(0.01 * wav, 24_000)) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="zero"):
        speaker_similarity(quiet, resemblyzer_embedding(0 * wav, 24_000))


def test_another_file_of_weights_is_refused(monkeypatch):
    speaker._weights.cache_clear()
    monkeypatch.setattr(speaker, "_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=r"pretrained.pt: expected the file of resemblyzer 0.1.4"):
        load_speaker_model("resemblyzer")


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    speaker._weights.cache_clear()
    monkeypatch.setattr(speaker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps resemblyzer==0.1.4"):
        load_speaker_model("resemblyzer")


def test_a_function_of_the_user_is_a_speaker_model(monkeypatch, tmp_path):
    (tmp_path / "my_voices.py").write_text("def embed(wav, rate):\n    return wav[:4]\nnumber = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_speaker_model("my_voices:embed")(np.arange(9), 24_000).tolist() == [0, 1, 2, 3]
    assert "torch" not in sys.modules and "resemblyzer" not in sys.modules
    for wrong in ("my_voices:nothing", "my_voices:number", "no_such_module:f", "name", ":f"):
        with pytest.raises(ConfigError, match="--speaker-model"):
            load_speaker_model(wrong)
