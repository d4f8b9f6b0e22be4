"""The command line: exit statuses, one-line errors, overrides, and every verb from its arguments to its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.builders import WORDS
from generation import small_speech

from mimo_jax import cli, verbs
from mimo_jax import config as c
from mimo_jax import config_files as files
from mimo_jax.audio.files import AudioError, load_audio, save_wav
from mimo_jax.generation.generate import Generator
from mimo_jax.generation.tasks import TASKS
from mimo_jax.text.tokenizers import load_text_tokenizer
from mimo_jax.training.checkpoint import CheckpointStore, make_meta

CONFIGS = Path(__file__).parents[1] / "configs"
JOINT = f"{CONFIGS / 'joint.py'}:tiny"


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def error_of(capsys, *arguments):
    """Runs a command that must fail in the expected way; returns the one line it says."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


# ----------------------------------------------------------------------------------------------------------
# Exit statuses and errors


def all_verbs():
    parser = cli.make_parser()
    found = []

    def walk(parser, words):
        actions = [a for a in parser._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]
        for action in actions:
            for name, child in action.choices.items():
                walk(child, [*words, name])
        if not actions:
            found.append(words)

    walk(parser, [])
    return found


def test_every_verb_has_a_help_page(capsys):
    names = {" ".join(v) for v in all_verbs()}
    assert names == {
        "train", *(f"launch {s}" for s in ("local", "slurm", "gke", "xpk")), "checkpoint inspect", "config show",
        "plan",
        "data ingest", "data ingest-text", "data index", "data show",
        "codec encode", "text-tokenizer train", *(f"generate {task}" for task in TASKS), "codec decode", "convert",
        "eval codebooks", "eval probe", "eval reconstruction", "parity", "quickstart",
        *(f"prepare {corpus}" for corpus in ("debian", "synthetic", "words", "join")),
    }  # fmt: skip
    for words in [[], *all_verbs()]:
        with pytest.raises(SystemExit) as stop:
            run(*words, "--help")
        assert stop.value.code == 0
        page = capsys.readouterr().out
        assert page.startswith(f"usage: mimo-jax {' '.join(words)}".rstrip()) and len(page.splitlines()) > 5


def test_help_and_config_show_do_not_load_jax():
    code = (
        "import sys; from mimo_jax import cli\n"
        f"cli.main(['config', 'show', '--config', {JOINT!r}])\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules, 'a slow import at start'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=CONFIGS.parent)


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["train"], ["generate", "tts", "--nothing"], ["data", "show", "--conf", "x"]]
)
def test_a_wrong_command_line_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2 and "usage: mimo-jax" in capsys.readouterr().err


def test_expected_errors_are_one_line_and_status_2(capsys, tmp_path):
    assert "run.stepz: unknown setting; did you mean steps?" in error_of(
        capsys, "config", "show", "--config", JOINT, "--config.run.stepz=1"
    )
    assert "there is no file 'nowhere.py'" in error_of(
        capsys, "train", "--config", "nowhere.py:tiny", "--workdir", tmp_path
    )
    # Not 3, with which `launch` tries again, but for a run that had its files once.
    lost = ("train", "--config", JOINT, "--config.data.text_tokenizer=nothing.model", "--workdir", tmp_path)
    assert "no such text tokenizer" in error_of(capsys, *lost)
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    assert run(*lost) == 3 and "no such text tokenizer" in capsys.readouterr().err
    assert run(*lost, "--config.run.log_every=0") == 2 and "log_every" in capsys.readouterr().err
    assert "nothing.txt: No such file" in error_of(
        capsys, "text-tokenizer", "train", tmp_path / "nothing.txt", "--out", tmp_path / "t.model"
    )
    assert "checkpoint" in error_of(
        capsys,
        "generate",
        "tts",
        "--checkpoint",
        tmp_path,
        "--audio-tokenizer",
        tmp_path,
        "--text",
        "a",
        "--out",
        tmp_path,
    )


def test_the_adversarial_stage_wants_a_first_stage(capsys, tmp_path):
    spec = f"{CONFIGS / 'tokenizer_adversarial.py'}:tiny"
    line = error_of(capsys, "train", "--config", spec, "--workdir", tmp_path / "run", "--config.init_from=")
    assert "init_from: expected the run of stage 1" in line and not (tmp_path / "run").exists()
    assert run("config", "show", "--config", spec) == 0


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def fault(options):
        raise RuntimeError("a fault")

    monkeypatch.setattr(verbs, "run_config_show", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        run("config", "show", "--config", JOINT)


def test_traceback_is_shown_on_request():
    with pytest.raises(c.ConfigError):
        run("config", "show", "--config", "nowhere.py", "--traceback")


def test_an_interrupt_ends_with_status_130(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "run_config_show", interrupt)
    assert run("config", "show", "--config", JOINT) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_leaves_is_no_fault():
    command = [sys.executable, "-m", "mimo_jax.cli", "config", "show", "--config", JOINT, "--json"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=CONFIGS.parent)
    os.close(write)
    assert result.returncode == 0 and result.stderr == b""


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    def broken(options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(verbs, "run_config_show", broken)
    assert "Broken pipe" in error_of(capsys, "config", "show", "--config", JOINT)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (c.ConfigError("a"), True),
        (AudioError("a"), True),
        (PermissionError(13, "Permission denied", "/x"), True),
        (ValueError("a"), False),
        (KeyError("a"), False),
        (AssertionError(), False),
    ],
)
def test_only_named_errors_are_expected(error, expected):
    assert cli.is_expected(error) is expected


def test_messages_are_one_line_and_name_the_file():
    assert cli.message_of(PermissionError(13, "Permission denied", "/x")) == "/x: Permission denied"
    assert cli.message_of(FileNotFoundError("no such thing")) == "no such thing"
    assert cli.message_of(c.ConfigError("two\n  lines")) == "two lines"


# ----------------------------------------------------------------------------------------------------------
# Settings


def test_overrides_may_stand_anywhere_and_with_a_space():
    words, overrides = cli.split_overrides(
        ["train", "--config.run.steps=3", "--config", "a.py:tiny", "--config.run.seed", "4", "--workdir", "w"]
    )
    assert words == ["train", "--config", "a.py:tiny", "--workdir", "w"]
    assert overrides == ["--config.run.steps=3", "--config.run.seed=4"]


def test_overrides_without_a_config_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("quickstart", "--config.run.steps=3")
    assert stop.value.code == 2 and "only verbs with --config take overrides" in capsys.readouterr().err


def test_config_show_prints_settings_parameters_and_budget(capsys):
    assert run("config", "show", "--config", f"{CONFIGS / 'joint.py'}:7b", "--config.run.steps=10") == 0
    page = capsys.readouterr().out
    assert "config.run.steps = 10\n" in page and "config.model.llm.d_model = 4096\n" in page
    assert "8,018,587,648" in page and "7,622,619,136" in page and "16,777,216" in page and "167,772,160" in page


def test_printed_settings_can_be_given_back_as_overrides(capsys):
    assert run("config", "show", "--config", JOINT) == 0
    settings = capsys.readouterr().out.split("\n\n")[0].splitlines()
    overrides = ["--" + line.replace(" = ", "=") for line in settings if not line.startswith("config.job")]
    assert len(overrides) > 60
    assert files.load_config(JOINT, overrides) == files.load_config(JOINT, [])


@pytest.mark.parametrize(("stage", "size"), [("tokenizer", "7b"), ("tokenizer_adversarial", "tiny"), ("text", "1b")])
def test_config_show_as_json_is_complete(capsys, stage, size):
    spec = f"{CONFIGS / stage}.py:{size}"
    assert run("config", "show", "--config", spec, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    config = files.load_config(spec, [])
    assert files.from_config_dict(shown["config"]) == config
    assert shown["derived"]["parameters"] == config.model.num_params()
    if stage == "tokenizer":
        assert shown["derived"]["bit/s, first 8 levels"] == 1550 and shown["derived"]["bit/s, all levels"] == 3650


def test_plan_prints_what_a_job_needs(capsys):
    sft = ["plan", "--config", f"{CONFIGS / 'sft.py'}:7b", "--topology"]
    assert run(*sft, "h100:8") == 0
    page = capsys.readouterr().out
    assert "parameters          3.74 GiB" in page and "stay free" in page and "bound by compute" in page
    assert run(*sft, "h200:1", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert not shown["fits"] and shown["peak_hbm_bytes"] == sum(shown["hbm_by_category"].values())
    assert "KIND:NUMBER" in error_of(capsys, *sft, "abacus:1")
    assert "multiple of the 3 slices" in error_of(capsys, *sft, "v5e:4x4", "--slices", "3", "--no-compile")


# ----------------------------------------------------------------------------------------------------------
# From a corpus to speech, with models that have learnt nothing


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, a text tokenizer and checkpoints of an audio tokenizer and a language model, made once."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    sentences = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 10)) + "." for _ in range(200)]
    (home / "corpus.txt").write_text("\n\n".join(sentences) + "\n")
    assert run("text-tokenizer", "train", home / "corpus.txt", "--vocab-size", 300, "--out", home / "text.model") == 0
    for i in range(4):
        save_wav(home / f"{i}.wav", small_speech.noise(1.0 + i / 3, seed=i), 24_000)
    lines = [json.dumps({"audio": f"{i}.wav", "text": sentences[i], "language": "en"}) for i in range(4)]
    (home / "manifest.jsonl").write_text("\n".join(lines) + "\n")

    tokenizer = load_text_tokenizer(home / "text.model")
    run_config = c.RunConfig(steps=1)
    stack = c.TransformerConfig.qwen2
    audio_config = c.TokenizerTrainConfig(
        model=small_speech.AUDIO,
        a2t=c.A2TConfig(stack(16, 1, 2, 8, 32), 300),
        data=c.AudioDataConfig("", "", str(home / "text.model"), rows=1, row_codes=100, row_text=10),
        run=run_config,
        learning_rate=1e-3,
    )
    audio = small_speech.audio_variables()
    variables = {"params": {"audio_tokenizer": audio["params"], "text_decoder": {}}, "codebook": audio["codebook"]}
    save(home / "tokenizer", audio_config, variables, {}, ["audio_tokenizer"])
    assert ingest(home, "speech", home / "tokenizer") == 0

    from mimo_jax.loading import load_codec

    config = lm_config(home)
    fingerprint = {
        "text_tokenizer": tokenizer.fingerprint,
        "audio_tokenizer": load_codec(home / "tokenizer").fingerprint,
    }
    groups = ["llm", "patch_encoder", "patch_decoder"]
    variables = {"params": small_speech.lm_variables(300)["params"]}
    save(home / "joint", config, variables, fingerprint, groups)
    save(home / "understanding", config, variables, fingerprint, groups[:2])
    save(home / "elsewhere", config, variables, fingerprint | {"audio_tokenizer": "0" * 16}, groups)
    return home


def ingest(home, name, tokenizer):
    return run(
        "data", "ingest", "--manifest", home / "manifest.jsonl", "--audio-tokenizer", tokenizer, "--out", home / name,
        "--text-tokenizer", home / "text.model",
    )  # fmt: skip


def lm_config(home):
    speech = {"speech": c.SourceConfig(str(home / "speech"), 1.0, c.LayoutWeights(tts=1.0, continuation=1.0))}
    return c.LMTrainConfig(
        model=small_speech.lm_config(300),
        data=c.LMDataConfig(speech, speech, str(home / "text.model"), rows=1, row_length=64, row_patches=32),
        run=c.RunConfig(steps=1),
        learning_rates=c.LearningRates(llm=1e-3),
        loss=c.LMLossConfig(channel_weights=(1.0, 1.0, 1.0)),
    )


def save(workdir, config, variables, fingerprint, groups):
    store = CheckpointStore(workdir)
    store.save(1, variables, {"count": np.zeros(1)}, make_meta(1, config, {}, fingerprint, groups, {}))
    store.wait()
    store.close()


def generate(home, task, *arguments, checkpoint="joint"):
    return run(
        "generate", task, "--checkpoint", home / checkpoint, "--audio-tokenizer", home / "tokenizer",
        "--out", home / "out" / task, *arguments,
    )  # fmt: skip


def test_continue_writes_the_new_speech_and_a_record(home, capsys):
    arguments = ["--input", home / "0.wav", home / "1.wav", "--prompt-seconds", 0.5, "--max-seconds", 0.64]
    assert generate(home, "continue", *arguments, "--min-seconds", 0.64, "--seed", 7, "--temperature", 0.5) == 0
    assert "0-continue: 0.64 s of speech" in capsys.readouterr().out
    record = json.loads((home / "out" / "continue" / "continue.json").read_text())
    assert record["settings"]["patch_sampling"] == {"temperature": 0.5, "top_k": 0, "top_p": 0.95}
    assert [item["seed"] for item in record["items"]] == [7, 8] and record["model"]["step"] == 1
    assert len(load_audio(home / "out" / "continue" / "1-continue.wav")) == 0.64 * 24_000
    prompt = 12 // 4 * 4 * 960  # of the 13 frames of half a second, whole patches
    assert len(load_audio(home / "out" / "continue" / "1-continue-full.wav")) == prompt + 0.64 * 24_000


@pytest.mark.parametrize(("seconds", "expected"), [("nan", "--prompt-seconds: expected"), ("0.05", "0.wav: expected")])
def test_a_prompt_that_is_no_patch_is_named(home, capsys, seconds, expected):
    assert generate(home, "continue", "--input", home / "0.wav", "--prompt-seconds", seconds) == 2
    assert expected in capsys.readouterr().err


def test_tts_and_asr_write_their_records(home, capsys):
    (home / "say.txt").write_text("old stone bridges\n\nquiet rivers\n")
    assert generate(home, "tts", "--text", "wise owls", "--text-file", home / "say.txt", "--max-seconds", 0.5) == 0
    record = json.loads((home / "out" / "tts" / "tts.json").read_text())
    assert [item["input"] for item in record["items"]] == ["wise owls", "old stone bridges", "quiet rivers"]
    assert generate(home, "asr", "--input", home / "2.wav", "--max-text", 8, checkpoint="understanding") == 0
    record = json.loads((home / "out" / "asr" / "asr.json").read_text())
    assert record["items"][0]["positions"] <= 8 and record["settings"]["max_text"] == 8
    assert "patches/s" not in capsys.readouterr().out.splitlines()[-2]


def test_an_interruption_loses_only_the_batch_that_ran(home, capsys, monkeypatch):
    ours, calls = Generator.generate, iter(range(9))

    def interrupted(*arguments):
        if next(calls):
            raise KeyboardInterrupt
        return ours(*arguments)

    monkeypatch.setattr(Generator, "generate", interrupted)
    arguments = ["--prompts", "chat", "--max-text", 4, "--batch-size", 1, "--text", "quiet rivers", "--text", "owls"]
    assert generate(home, "chat", *arguments) == 130
    progress, end = capsys.readouterr().err.splitlines()[-2:]
    assert progress.startswith("generate: 1 of 2 requests, ETA ") and end == "interrupted"
    out = home / "out" / "chat"
    (item,) = json.loads((out / "chat.json").read_text())["items"]
    assert item["input"] == "owls" and item["files"]["history"] == "chat-1-history.json"  # the shorter prompt is first
    assert sorted(path.name for path in out.iterdir()) == sorted(["chat.json", *item["files"].values()])


def test_a_conversation_goes_on_and_takes_more_requests(home, capsys):
    (home / "more.jsonl").write_text('{"task": "tts", "text": "wise owls", "force_text": true, "seed": 5}\n')
    limits = ["--prompts", "chat", "--max-text", 6, "--max-seconds", 0.4]
    arguments = [*limits, "--voice", home / "1.wav", "--system", "be brief", "--requests", home / "more.jsonl"]
    arguments += ["--input", home / "0.wav"]
    assert generate(home, "dialogue", *arguments) == 0
    record = json.loads((home / "out" / "dialogue" / "dialogue.json").read_text())
    first, more = record["items"]
    assert record["prompts"] == "chat" and first["files"]["history"] == "0-dialogue-history.json"
    assert more["text"] == "Wise owls" and more["seed"] == more["settings"]["seed"] == 5
    history = home / "out" / "dialogue" / "0-dialogue-history.json"
    arguments = [*limits, "--history", history]
    assert generate(home, "dialogue", "--input", home / "2.wav", *arguments) == 0
    turns = json.loads((home / "out" / "dialogue" / "2-dialogue-history.json").read_text())["turns"]
    assert len(turns) == 2 and turns[0] == json.loads(history.read_text())["turns"][0]
    capsys.readouterr()
    assert "one request with --history" in failed(
        home, capsys, "dialogue", "--input", home / "0.wav", home / "1.wav", *arguments
    )
    assert "dialogue: expected chat prompts" in failed(home, capsys, "dialogue", "--input", home / "0.wav")
    assert "expected --input, or --requests" in failed(home, capsys, "asr")
    arguments = ["--text", "a", "--prompts", "chat", "--template", 10]
    assert "template: expected 0..9" in failed(home, capsys, "tts", *arguments)


def test_generation_that_cannot_work_is_refused(home, capsys, tmp_path):
    assert "its patch_decoder has not been trained" in failed(
        home, capsys, "tts", "--text", "a", checkpoint="understanding"
    )
    assert "expected the audio tokenizer that the model was trained with (0000" in failed(
        home, capsys, "tts", "--text", "a", checkpoint="elsewhere"
    )
    assert "expected the checkpoint of a language model" in failed(
        home, capsys, "tts", "--text", "a", checkpoint="tokenizer"
    )
    assert "expected --text" in failed(home, capsys, "tts")
    assert "max_seconds" in failed(home, capsys, "tts", "--text", "a", "--max-seconds", -1)
    assert "top_p" in failed(home, capsys, "tts", "--text", "a", "--top-p", 7)
    assert "nothing.wav" in failed(home, capsys, "asr", "--input", tmp_path / "nothing.wav")
    assert "expected the checkpoint of an audio tokenizer" in error_of(
        capsys,
        "data",
        "ingest",
        "--manifest",
        home / "manifest.jsonl",
        "--audio-tokenizer",
        home / "joint",
        "--out",
        tmp_path / "x",
    )


def failed(home, capsys, task, *arguments, checkpoint="joint"):
    assert generate(home, task, *arguments, checkpoint=checkpoint) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    return printed


def test_ingested_shards_can_be_indexed_and_shown(home, capsys, tmp_path):
    arguments = ["--text-tokenizer", home / "text.model"]
    assert run("data", "ingest-text", home / "corpus.txt", "--out", home / "text", *arguments) == 0
    assert "200 records" in capsys.readouterr().out
    assert run("data", "index", home / "speech", home / "text", *arguments) == 0
    assert capsys.readouterr().out.count("records") == 2
    config = lm_config(home)
    (tmp_path / "job.py").write_text(
        "import json\nfrom mimo_jax import config_files as files\n"
        "def get_config():\n    return files.to_config_dict(files.from_config_dict(json.loads(TEXT)))\n"
        f"TEXT = {files.to_json(config)!r}\n"
    )
    assert run("data", "show", "--config", tmp_path / "job.py", "--layout", "tts", "--rows", 1) == 0
    page = capsys.readouterr().out
    assert "row 0" in page and "(tts)" in page and "patches" in page
    assert "layout" in error_of(capsys, "data", "show", "--config", tmp_path / "job.py", "--layout", "song")


def test_conversations_are_ingested_and_their_faults_named_by_line(home, capsys, tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(chat) + "\n" + json.dumps(chat[:1]) + "\n")
    arguments = ["data", "ingest", "--conversations", file, "--audio-tokenizer", home / "tokenizer"]
    assert "chat.jsonl:2: messages: expected an answer" in error_of(capsys, *arguments, "--out", tmp_path / "set")
    file.write_text(json.dumps(chat) + "\n")
    assert run(*arguments, "--out", tmp_path / "set", "--text-tokenizer", home / "text.model") == 0
    assert "1 records" in capsys.readouterr().out


def test_tokenizer_corpora_are_text_and_the_texts_of_manifests(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"audio": "x.wav", "text": "three"}\n{"audio": "y.wav"}\n')
    assert list(verbs.corpus_lines([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])) == ["one", "two", "three"]
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"audio": \n')
    with pytest.raises(c.ConfigError, match=r"b\.jsonl:2: expected a JSON object"):
        list(verbs.corpus_lines([str(tmp_path / "b.jsonl")]))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(c.ConfigError, match=r"a\.txt: expected UTF-8"):
        list(verbs.corpus_lines([str(tmp_path / "a.txt")]))


@pytest.mark.parametrize("worker", ["3", "2/2", "a/b", "-1/2"])
def test_an_impossible_worker_is_refused(worker, capsys):
    with pytest.raises(SystemExit):
        run("data", "ingest-text", "x", "--out", "y", f"--worker={worker}")
    assert "expected I/N" in capsys.readouterr().err
