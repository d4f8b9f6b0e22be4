"""Continuation, TTS and transcription from waves and texts to files."""

import dataclasses
import json

import numpy as np
import pytest
from data_pipeline.builders import CharTokenizer
from generation.small_speech import CODEBOOKS, noise, speech_model

from mimo_jax.audio.files import load_audio
from mimo_jax.config import ConfigError
from mimo_jax.generation.app import (
    GenerationSettings,
    SpeechModel,
    TaskRequest,
    generate_speech_continuation,
    generate_tts,
    run_tasks,
    transcribe,
)
from mimo_jax.generation.generate import Bucket, Generated, Timing
from mimo_jax.generation.outputs import check_names, load_history, save_history, write_output, write_record
from mimo_jax.generation.prompts import Prompts
from mimo_jax.generation.sampling import GREEDY
from mimo_jax.generation.tasks import TASKS

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


class FoldingTokenizer(CharTokenizer):
    """Characters beyond Latin share ids, so that the published Chinese wordings fit a small vocabulary."""

    def encode(self, text):
        return [100 + (ord(c) if ord(c) < 1000 else 1000 + ord(c) % 2000) for c in text]


@pytest.fixture(scope="module")
def chat(model):
    return dataclasses.replace(model, tokenizer=FoldingTokenizer(), prompts="chat")


def mixed_requests():
    few = GenerationSettings(max_seconds=0.6, max_text=6, seed=77, patch_sampling=GREEDY)
    spoken = ("yes", noise(0.4, 5))
    return [
        TaskRequest(task="asr", audio=noise(0.5)),
        TaskRequest(task="tts", text="one two", settings=dataclasses.replace(few, force_text=True)),
        TaskRequest(task="instruct-tts", text="a", instruction="b", voice=noise(0.3, 1), settings=few),
        TaskRequest(task="understand", audio=noise(0.9, 2), text="what?", thinking=True, settings=few),
        TaskRequest(task="dialogue", audio=noise(0.4, 3), system="be brief", turns=(noise(0.4, 4), spoken)),
        TaskRequest(task="speech-to-text", audio=noise(0.3, 6), settings=few),
        TaskRequest(task="chat", text="hello", turns=("hi", "good day"), thinking=True),
        TaskRequest(task="few-shot", instruction="x", audio=noise(0.3, 7), examples=((noise(0.3), noise(0.2), "w"),)),
        TaskRequest(task="continue", audio=noise(0.4, 8), settings=few),
        TaskRequest(task="clone", text="c d", voice=noise(0.5, 9), voice_text="e f", settings=few),
    ]


def test_every_task_answers_in_one_call_as_it_answers_alone(chat):
    settings = GenerationSettings(max_seconds=0.5, max_text=8, seed=3, batch_size=16)
    together, timing = run_tasks(chat, mixed_requests(), settings)
    assert {o.task for o in together} == set(TASKS) and timing.positions == sum(o.positions for o in together)
    for number, output in enumerate(together):
        own = output.settings if number in (1, 4, 9) else None
        if own:
            request = dataclasses.replace(mixed_requests()[number], settings=own)
            (alone,), _ = run_tasks(chat, [request], settings)
            assert alone.text == output.text and alone.seed == output.seed
            np.testing.assert_array_equal(alone.wav, output.wav)
        assert not len(output.wav) or TASKS[output.task].speaks
    assert [o.seed for o in together][:3] == [3, 77, 77]
    assert len(together[9].full_wav) == len(together[9].wav) + 12 * 960  # the voice, its whole patches


def test_held_text_is_what_is_said_whatever_the_model_would_say(chat):
    texts = ["wise owls", "a", "old stone bridges"]
    for model in (chat, dataclasses.replace(chat, prompts="base")):
        outputs, _ = generate_tts(model, texts, GenerationSettings(max_seconds=4, force_text=True))
        wanted = [t.capitalize() for t in texts] if model is chat else texts
        assert [o.text for o in outputs] == wanted
        for output, text in zip(outputs, texts, strict=True):
            turns = -(-len(text) // 5)
            assert len(output.codes_MR) >= (turns - 1) * 5 * 4
    request = TaskRequest(task="instruct-tts", text="wise owls", instruction="low")
    (output,), _ = run_tasks(chat, [request], GenerationSettings(max_seconds=2, force_text=True))
    assert output.text == "Wise owls" and output.thinking == ""


def test_a_conversation_goes_on_from_its_file(chat, tmp_path):
    settings = GenerationSettings(max_seconds=0.5, max_text=8)
    first, _ = run_tasks(chat, [TaskRequest(task="chat", text="hello")], settings)
    write_output(tmp_path, "chat-0", first[0], None, chat, settings)
    history = load_history(tmp_path / "chat-0-history.json", chat)
    assert len(history) == 1
    np.testing.assert_array_equal(history[0].text, first[0].history[0].text)
    (second,), _ = run_tasks(chat, [TaskRequest(task="dialogue", audio=noise(0.4), history=history)], settings)
    save_history(tmp_path / "two.json", chat, second.history)
    again = load_history(tmp_path / "two.json", chat)
    assert len(again) == 2 and len(again[1].patches) == len(second.history[1].patches) >= 3
    np.testing.assert_array_equal(again[1].patches, second.history[1].patches)
    special = chat.tokenizer.special
    (third,), _ = run_tasks(chat, [TaskRequest(task="chat", text="and?", history=again)], settings)
    whole = np.concatenate([turn.text for turn in third.history])
    assert (whole == special["<|im_start|>"]).sum() == 6 and (whole == special["<|im_end|>"]).sum() >= 6

    other = json.loads((tmp_path / "two.json").read_text())
    for change, message in ((dict(tokenizers=["a", "b"]), "made with the tokenizers"), (dict(turns=3), "history that")):
        (tmp_path / "bad.json").write_text(json.dumps({**other, **change}))
        with pytest.raises(ConfigError, match=rf"bad\.json: .*{message}"):
            load_history(tmp_path / "bad.json", chat)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(task="sing"), "task: expected one of asr, tts"),
        (dict(task="tts"), "tts: text is missing"),
        (dict(task="asr", audio=np.zeros(9), text="a"), "asr: takes no text"),
        (dict(task="chat", text="a", thinking=True, history=(1,), turns=("a", "b")), "belong to the first turn"),
        (dict(task="chat", text="a", turns=("a",)), "turns: expected pairs"),
        (dict(task="clone", text="a"), "clone: voice is missing"),
    ],
)
def test_a_request_that_is_none_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        TaskRequest(**fields)


def test_an_impossible_request_is_named_before_anything_is_generated(chat, monkeypatch):
    monkeypatch.setattr(type(chat.generator), "generate", lambda *_: pytest.fail("generated"))
    requests = [TaskRequest(task="tts", text="a"), TaskRequest(task="tts", text="a", template=10)]
    with pytest.raises(ConfigError, match="request 1: template"):
        run_tasks(chat, requests)
    base = dataclasses.replace(chat, prompts="base")
    with pytest.raises(ConfigError, match="dialogue: expected chat prompts"):
        run_tasks(base, [TaskRequest(task="dialogue", audio=noise(0.3))])
    for fields in (
        dict(task="asr", audio=noise(0.3)),
        dict(task="tts", text="a"),
        dict(task="clone", text="a", voice=noise(0.3), voice_text="b"),
    ):
        with pytest.raises(ConfigError, match=r"template: expected chat prompts \(base models have not learnt other"):
            run_tasks(base, [TaskRequest(**fields, template=0)])
    with pytest.raises(ConfigError, match=r"bucket: expected at least Bucket\(requests=1, prompt=64, "):
        run_tasks(chat, requests[:1], bucket=Bucket(1, 16, 16, 512))
    with pytest.raises(ConfigError, match="force_text: expected a task whose words are given"):
        run_tasks(chat, [TaskRequest(task="asr", audio=noise(0.3))], GenerationSettings(force_text=True))
    with pytest.raises(ConfigError, match="request 0: max_positions: expected at most 32768"):
        run_tasks(chat, requests[:1] * 2, GenerationSettings(max_seconds=7200))


def test_chain_of_thought_is_told_apart_from_the_answer(chat, monkeypatch):
    special, encode = chat.tokenizer.special, chat.tokenizer.encode
    stop = special["<|im_end|>"]
    none = np.zeros((0, 4, 3), np.int32)

    def answers(ids):
        result = Generated(np.asarray(ids, np.int32), none, stop)
        timing = Timing(positions=len(ids))
        monkeypatch.setattr(type(chat.generator), "generate", lambda *_: ([result], timing))
        (output,), _ = run_tasks(chat, [TaskRequest(task="chat", text="a", thinking=True)])
        return output.thinking, output.text

    assert answers([*encode("two and two\n</think>\nfour"), stop]) == ("two and two", "four")
    assert answers(encode("two and")) == ("two and", "")


def test_tts_never_speaks_longer_than_allowed(model, monkeypatch):
    tts = Prompts.tts

    def only_speech(*arguments, **keywords):
        return dataclasses.replace(tts(*arguments, **keywords), allowed_ids=(model.generator.config.empty_id,))

    monkeypatch.setattr(Prompts, "tts", only_speech)
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
    folder = tmp_path / "new"
    items = [write_output(folder, *x, model, settings) for x in (("a", outputs[0], "x"), ("b", spoken, "y"))]
    path = write_record(folder, "continue", model, items, timing, settings)
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


@pytest.mark.parametrize("names", [["a", "a"], ["a", "a-full"], ["a-history", "a"]])
def test_two_outputs_of_one_name_are_refused(names):
    with pytest.raises(ConfigError, match="2 different names"):
        check_names(names)


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
