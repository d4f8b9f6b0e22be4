"""Requests from files: every key lands where it belongs, and what is wrong is named with its line."""

import json

import numpy as np
import pytest
from generation.small_speech import noise, speech_model

from mimo_jax.audio.files import AudioError, save_wav
from mimo_jax.config import ConfigError
from mimo_jax.generation.app import GenerationSettings
from mimo_jax.generation.requests import SETTINGS, apply_settings, make_requests, output_names, read_requests
from mimo_jax.generation.sampling import PATCHES, SamplingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    for i in range(3):
        save_wav(folder / f"{i}.wav", noise(0.3 + 0.1 * i, i), 24_000)
    return folder


def write(folder, *lines):
    path = folder / "requests.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_become_requests_with_settings_and_seeds_of_their_own(folder):
    path = write(
        folder,
        {"text": "hello", "temperature": 0.5, "max_seconds": 3, "name": "greeting"},
        "",
        {"task": "dialogue", "audio": "0.wav", "voice": "1.wav", "seed": 9, "text_top_p": 0.8,
         "turns": [{"role": "user", "audio": "1.wav"}, {"role": "assistant", "text": "yes", "audio": "2.wav"}]},
        {"task": "few-shot", "instruction": "do", "audio": "2.wav", "force_text": False,
         "examples": [{"input": "0.wav", "output": "1.wav", "text": "said"}]},
        {"task": "chat", "text": "bye", "turns": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]},
    )  # fmt: skip
    model, settings = speech_model(), GenerationSettings(seed=4, min_seconds=0.5)
    lines = read_requests(path, "tts")
    assert output_names(lines) == ["greeting", "0-dialogue", "2-few-shot", "chat-3"]
    tts, dialogue, few_shot, chat = make_requests(lines, model, settings)
    assert (tts.task, tts.text) == ("tts", "hello")
    assert tts.settings == GenerationSettings(
        seed=4, min_seconds=0.5, max_seconds=3, patch_sampling=SamplingConfig(0.5, 0, PATCHES.top_p)
    )
    assert dialogue.settings.seed == 9 and dialogue.settings.text_sampling == SamplingConfig(1.0, 0, 0.8)
    np.testing.assert_allclose(dialogue.voice, noise(0.4, 1), atol=1e-4)
    said, spoken = dialogue.turns[1]
    assert said == "yes" and len(spoken) == 0.5 * 24_000 and len(dialogue.turns[0]) == 0.4 * 24_000
    ((given, reply, words),) = few_shot.examples
    assert (len(given), len(reply), words) == (0.3 * 24_000, 0.4 * 24_000, "said") and few_shot.settings.seed == 6
    assert chat.turns == ("a", "b")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", ".hidden", "", "a\nb"])
def test_a_name_that_would_leave_the_folder_is_refused(folder, name):
    path = write(folder, {"text": "hello", "name": name})
    with pytest.raises(ConfigError, match=r"requests\.jsonl:1: name: expected the name of a file"):
        read_requests(path, "tts")


def test_every_setting_is_one_that_generation_has():
    values = {key: kind(1) for key, kind in SETTINGS.items()}
    changed = apply_settings(GenerationSettings(max_seconds=2), values)
    assert changed.patch_sampling == changed.text_sampling == SamplingConfig(1.0, 1, 1.0)
    for key in ("max_seconds", "min_seconds", "max_text", "max_new", "constrain", "force_text", "seed"):
        assert getattr(changed, key) == 1
    assert apply_settings(changed, dict.fromkeys(SETTINGS)) == changed


def test_outputs_of_one_name_are_told_apart():
    lines = [{"task": "asr", "audio": "a/x.wav"}, {"task": "asr", "audio": "b/x.wav"}]
    assert output_names(lines) == ["0-x-asr", "1-x-asr"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2: "),
        ("[1]", "2: expected a JSON object"),
        ({"txt": "a"}, "2: txt: unknown key; expected one of task, name, audio"),
        ({"text": 3}, "2: text: expected str, got 3"),
        ({"text": "a", "seed": 1.5}, "2: seed: expected int"),
        ({"text": "a", "temperature": True}, "2: temperature: expected float"),
        ({"task": "sing", "text": "a"}, "2: task: expected one of asr"),
        (
            {"task": "chat", "turns": [{"role": "assistant", "text": "a"}]},
            "2: turns: expected turn 0 to be of role user",
        ),
        ({"task": "chat", "turns": ["a"]}, "2: turns: expected objects"),
        (
            {"task": "dialogue", "turns": [{"role": "user", "audio": "a"}, {"role": "assistant", "text": "a"}]},
            "2: turns: expected turn 1 to be of role assistant with text and audio",
        ),
        (
            {"task": "few-shot", "examples": [{"input": "a"}]},
            "2: examples: expected objects with the texts input, output",
        ),
    ],
)
def test_a_line_that_is_no_request_is_named(folder, line, message):
    with pytest.raises(ConfigError, match=rf"requests\.jsonl:{message}"):
        read_requests(write(folder, {"text": "fine"}, line), "tts")


def test_files_that_do_not_serve_are_named(folder):
    model, settings = speech_model(), GenerationSettings()
    with pytest.raises(ConfigError, match="at least one request"):
        read_requests(write(folder, ""), "tts")
    (folder / "bad.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"bad\.jsonl: expected UTF-8"):
        read_requests(folder / "bad.jsonl", "tts")
    with pytest.raises(AudioError, match=r"nothing\.wav: no such"):
        make_requests(read_requests(write(folder, {"audio": "nothing.wav"}), "asr"), model, settings)
    with pytest.raises(FileNotFoundError, match="nothing"):
        make_requests(read_requests(write(folder, {"text": "a", "history": "nothing.json"}), "chat"), model, settings)
