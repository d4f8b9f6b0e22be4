"""Continuation, TTS and transcription from waves and texts to files."""

import dataclasses
import json

import numpy as np
import pytest
from generation.small_speech import CODEBOOKS, noise, speech_model

from mimo_jax.audio.files import load_audio
from mimo_jax.config import ConfigError
from mimo_jax.generation import app
from mimo_jax.generation.app import (
    GenerationSettings,
    SpeechModel,
    generate_speech_continuation,
    generate_tts,
    transcribe,
    write_outputs,
)
from mimo_jax.generation.prompts import tts_prompt

PATCH_SAMPLES = 4 * 960


@pytest.fixture(scope="module")
def model():
    return speech_model()


def test_continuation_goes_on_after_the_last_whole_patch(model):
    wavs = [noise(0.7), noise(1.3, seed=1)]
    settings = GenerationSettings(max_seconds=1.0, min_seconds=1.0, seed=5)
    outputs, timing = generate_speech_continuation(model, wavs, settings)
    for wav, output in zip(wavs, outputs, strict=True):
        prompt = len(wav) // 240 + 1  # mel frames
        prompt = -(-prompt // 4) // 4 * PATCH_SAMPLES
        assert len(output.wav) == 24_000 and len(output.full_wav) == prompt + len(output.wav)
        np.testing.assert_array_equal(output.full_wav[prompt:], output.wav)
        assert np.isfinite(output.full_wav).all()
        assert output.text == "" and output.codes_MR.shape == (25, 3)
    assert [o.seed for o in outputs] == [5, 6]
    assert timing.patches == 14 and timing.audio_seconds == pytest.approx(2.0)
    assert timing.real_time_factor > 0 and timing.patches_per_second > 0


def test_answers_do_not_depend_on_how_inputs_are_batched(model):
    wavs = [noise(0.5), noise(0.9, seed=1), noise(0.7, seed=2)]
    settings = GenerationSettings(max_seconds=0.8, min_seconds=0.3, seed=3)
    together, _ = generate_speech_continuation(model, wavs, settings)
    apart, _ = generate_speech_continuation(model, wavs, dataclasses.replace(settings, batch_size=1))
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_array_equal(a.codes_MR, b.codes_MR)
        np.testing.assert_array_equal(a.wav, b.wav)
    other, _ = generate_speech_continuation(model, wavs, dataclasses.replace(settings, seed=30))
    assert not any(np.array_equal(a.codes_MR, b.codes_MR) for a, b in zip(together, other, strict=True))


def test_tts_never_speaks_longer_than_allowed(model, monkeypatch):
    def only_speech(*arguments):
        return dataclasses.replace(tts_prompt(*arguments), allowed_ids=(model.generator.config.empty_id,))

    monkeypatch.setattr(app, "tts_prompt", only_speech)
    outputs, timing = generate_tts(model, ["a" * 20], GenerationSettings(max_seconds=0.4))
    assert timing.patches > 3 and len(outputs[0].wav) == 0.4 * 24_000


def test_tts_says_and_keeps_only_ordinary_text(model):
    (output,), _ = generate_tts(model, ["a b"], GenerationSettings(max_seconds=2.0))
    assert output.text and not any(token in output.text for token in model.tokenizer.special)


def test_a_transcript_has_no_speech_and_keeps_its_limit(model):
    outputs, timing = transcribe(model, [noise(0.5)], GenerationSettings(max_text=9))
    assert len(outputs[0].wav) == 0 and outputs[0].positions <= 9
    assert timing.real_time_factor is None and timing.patches == 0


def test_files_hold_what_was_generated(model, tmp_path):
    settings = GenerationSettings(max_seconds=0.5, min_seconds=0.5)
    outputs, timing = generate_speech_continuation(model, [noise(0.5)], settings)
    spoken = dataclasses.replace(outputs[0], text="some words")
    path = write_outputs(
        tmp_path / "new", "continue", model, [outputs[0], spoken], timing, settings, ["a", "b"], ["x", "y"]
    )
    record = json.loads(path.read_text())
    first, second = record["items"]
    assert first["files"] == {"wav": "a.wav", "full_wav": "a-full.wav"} and "text" in second["files"]
    wav = load_audio(path.parent / "a.wav")
    np.testing.assert_allclose(wav, np.clip(outputs[0].wav, -1, 1), atol=1e-4)
    assert (path.parent / "b.txt").read_text() == "some words\n"
    assert first["input"] == "x" and first["seed"] == 0 and first["patches"] == 4
    assert record["settings"]["max_seconds"] == 0.5 and record["settings"]["patch_sampling"]["top_p"] == 0.95
    assert record["timing"]["patches"] == 4 and record["model"] == {"checkpoint": "nowhere"}
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "a-full.wav",
        "a.wav",
        "b-full.wav",
        "b.txt",
        "b.wav",
        "continue.json",
    ]


def test_two_outputs_of_one_name_are_refused_before_anything_is_written(model, tmp_path):
    outputs, timing = transcribe(model, [noise(0.5)] * 2, GenerationSettings(max_text=2))
    with pytest.raises(ConfigError, match="different names"):
        write_outputs(tmp_path / "new", "asr", model, outputs, timing, GenerationSettings(), ["a", "a"])
    assert not (tmp_path / "new").exists()


def test_a_prompt_shorter_than_a_patch_is_refused(model):
    with pytest.raises(ConfigError, match="at least 4 frames"):
        generate_speech_continuation(model, [noise(0.05)])


def test_parts_that_do_not_belong_together_are_refused(model):
    codec = dataclasses.replace(
        model.codec.config, rvq=dataclasses.replace(model.codec.config.rvq, codebook_sizes=(41, *CODEBOOKS[1:]))
    )

    class OtherCodec:
        config = codec

    with pytest.raises(ConfigError, match="audio tokenizer: expected codebooks"):
        SpeechModel(model.generator, OtherCodec(), model.tokenizer)

    class OtherTokenizer:
        name, vocab_size, special = "other.model", 10, {"<|empty|>": 3}

    with pytest.raises(ConfigError, match=r"other\.model: expected <\|empty\|> at id 6"):
        SpeechModel(model.generator, model.codec, OtherTokenizer())


@pytest.mark.parametrize(
    "values",
    [
        dict(max_seconds=0),
        dict(max_seconds=float("inf")),
        dict(min_seconds=21),
        dict(max_text=0),
        dict(batch_size=0),
        dict(seed=-1),
    ],
)
def test_impossible_settings_are_refused_by_name(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        GenerationSettings(**values)
