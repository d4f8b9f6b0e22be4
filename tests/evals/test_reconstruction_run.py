"""`eval reconstruction`: a killed run goes on, what cannot be measured is counted, only like is compared with like."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from models.tokenizer.tiny import compute, noise_clips, random_codebook, random_params, tiny_config

from mimo_jax.audio.files import save_wav
from mimo_jax.cli import main
from mimo_jax.config import ConfigError
from mimo_jax.evals import reconstruction_run
from mimo_jax.evals.reconstruction_results import compare, comparison_markdown, load_result, markdown, write_comparison
from mimo_jax.evals.reconstruction_run import FILES, Evaluation, evaluate_reconstruction, weights_fingerprint
from mimo_jax.models.tokenizer.audio_tokenizer import init_variables
from mimo_jax.models.tokenizer.codec import Codec

CONFIG = tiny_config()
PLAIN = Evaluation(levels=(1, 3), baselines=(), metrics=("mel", "stft", "si-sdr"))
TIMED = ("encode_seconds", "decode_seconds")


def tokenizer(seed):
    boxed = jax.eval_shape(lambda: init_variables(CONFIG, compute("float32"), jax.random.key(0)))
    params = random_params(boxed["params"])
    changed = jax.tree.map(lambda x: x * (1 + 0.1 * seed), params["decoder"])
    return Codec(CONFIG, {**params, "decoder": changed}, random_codebook(CONFIG), segment_seconds=2.0)


@pytest.fixture(scope="module")
def codec():
    return tokenizer(0)


@pytest.fixture
def manifest(tmp_path):
    lines = []
    for i, clip in enumerate(noise_clips(30_000, 29_000, 31_000, 28_000)):
        save_wav(tmp_path / f"{i}.wav", clip, 24_000)
        lines.append({"audio": f"{i}.wav", "language": "en" if i < 2 else "fr", "speaker": f"s{i % 2}"})
    return write(tmp_path / "clips.jsonl", lines)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def untimed(files):
    return [{k: v for k, v in line.items() if k not in TIMED} for line in files]


def test_results_are_aggregates_of_the_files_whole_and_by_group(codec, manifest, tmp_path):
    content = evaluate_reconstruction(codec, manifest, tmp_path / "out", PLAIN, workers=0, tokenizer={"step": 7})
    assert content == load_result(tmp_path / "out")
    assert list(content["systems"]) == ["source", "levels-1", "levels-3"]
    assert content["systems"]["levels-3"]["bitrate"] == CONFIG.bitrate(3)
    assert content["tokenizer"] == {"fingerprint": codec.fingerprint, "step": 7}
    values = [f["systems"]["levels-3"]["values"]["mel"] for f in content["files"]]
    mel = content["systems"]["levels-3"]["metrics"]["mel"]
    assert mel["value"] == pytest.approx(np.mean(values)) and mel["low"] < mel["value"] < mel["high"]
    assert mel["recordings"] == 4
    french = content["groups"]["language"]["fr"]["levels-3"]["metrics"]["mel"]
    assert french["value"] == pytest.approx(np.mean(values[2:])) and list(content["groups"]["speaker"]) == ["s0", "s1"]
    assert content["systems"]["source"]["left_out"] == {"si_sdr": {"the reconstruction is the source": 4}}
    speed = content["speed"]
    assert speed["encode_real_time_factor"] > 0 and set(speed["decode_real_time_factor"]) == {"1", "3"}
    text = (tmp_path / "out/reconstruction.md").read_text()
    assert text == markdown(content) and "| 3 levels " in text and "| fr, 1 level " in text and "Left out" not in text
    assert (tmp_path / "out/reconstruction.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_goes_on_and_ends_in_the_same_values(codec, manifest, tmp_path, monkeypatch):
    whole = evaluate_reconstruction(codec, manifest, tmp_path / "whole", PLAIN, workers=0)
    measure, calls = reconstruction_run.measure, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(reconstruction_run, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_reconstruction(codec, manifest, tmp_path / "out", PLAIN, workers=0)
    assert not (tmp_path / "out/reconstruction.json").exists()
    with (tmp_path / "out" / FILES).open("ab") as file:
        file.write(b'{"index": 2, "sys')  # a line that a power failure tore
    del calls[:]
    calls.extend([1] * 10)
    resumed = evaluate_reconstruction(codec, manifest, tmp_path / "out", PLAIN, workers=0)
    assert len(calls) == 12  # two of four were there
    assert untimed(resumed["files"]) == untimed(whole["files"]) and resumed["systems"] == whole["systems"]
    assert len((tmp_path / "out" / FILES).read_bytes().splitlines()) == 5
    evaluate_reconstruction(codec, manifest, tmp_path / "out", PLAIN, workers=0)
    assert len(calls) == 12


def test_other_settings_are_refused_by_name_and_nothing_is_lost(codec, manifest, tmp_path):
    evaluate_reconstruction(codec, manifest, tmp_path / "out", PLAIN, workers=0)
    before = (tmp_path / "out" / FILES).read_bytes()
    for change in ({"levels": (1, 2)}, {"metrics": ("mel",)}, {"limit": 2}):
        other = dataclasses.replace(PLAIN, **change)
        with pytest.raises(ConfigError, match=f"holds an evaluation with {next(iter(change))} .*choose another --out"):
            evaluate_reconstruction(codec, manifest, tmp_path / "out", other, workers=0)
    with pytest.raises(ConfigError, match="with tokenizer"):
        evaluate_reconstruction(tokenizer(1), manifest, tmp_path / "out", PLAIN, workers=0)
    assert (tmp_path / "out" / FILES).read_bytes() == before
    (tmp_path / "out" / FILES).write_text("my notes\n")
    with pytest.raises(ConfigError, match="expected the files of an evaluation"):
        evaluate_reconstruction(codec, manifest, tmp_path / "out", PLAIN, workers=0)


def test_another_decoder_has_the_same_codes_but_another_fingerprint_here(codec):
    other = tokenizer(1)
    assert other.fingerprint == codec.fingerprint and weights_fingerprint(other) != weights_fingerprint(codec)


def test_recordings_that_cannot_be_read_or_measured_are_counted(codec, manifest, tmp_path):
    save_wav(tmp_path / "silent.wav", np.zeros(30_000), 24_000)
    save_wav(tmp_path / "short.wav", np.full(30, 0.1), 24_000)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    lines = [{"audio": f"{name}.wav"} for name in ("0", "silent", "short", "broken", "absent")]
    path = write(tmp_path / "bad.jsonl", lines)
    content = evaluate_reconstruction(codec, path, tmp_path / "out", PLAIN, workers=0)
    assert content["counts"]["measured"] == 3 and content["counts"]["failed"] == 2
    assert len(content["failed"]) == 2 and any("absent.wav: no such" in reason for reason in content["failed"])
    assert content["systems"]["levels-1"]["left_out"]["si_sdr"] == {"the source is silent": 1}
    assert content["systems"]["levels-1"]["metrics"]["mel"]["recordings"] == 3
    text = markdown(content)
    assert "Left out, 1 x SI-SDR dB of 1 level: the source is silent" in text and "Not read, 1 x" in text
    with pytest.raises(ConfigError, match=r"no recording could be read; the first: .*broken.wav"):
        evaluate_reconstruction(codec, write(path, lines[3:]), tmp_path / "none", PLAIN, workers=0)


def test_a_limit_is_spread_over_the_manifest(codec, manifest, tmp_path):
    limited = dataclasses.replace(PLAIN, limit=2)
    content = evaluate_reconstruction(codec, manifest, tmp_path / "out", limited, workers=0)
    assert [f["id"] for f in content["files"]] == ["0.wav", "2.wav"]


def test_workers_measure_what_this_process_measures(codec, manifest, tmp_path):
    every = Evaluation((2,), ("griffin-lim",), ("mel", "si-sdr"), limit=3)
    here = evaluate_reconstruction(codec, manifest, tmp_path / "here", every, workers=0)
    there = evaluate_reconstruction(codec, manifest, tmp_path / "there", every, workers=1)
    for one, other in zip(untimed(here["files"]), untimed(there["files"]), strict=True):
        systems, others = one.pop("systems"), other.pop("systems")
        assert one == other and list(systems) == list(others) == ["source", "levels-2", "griffin-lim"]
        # Workers have one thread for linear algebra and round otherwise; Griffin-Lim makes more of it.
        assert others["levels-2"]["values"] == pytest.approx(systems["levels-2"]["values"], rel=1e-6)
        assert others["griffin-lim"]["values"]["mel"] == pytest.approx(
            systems["griffin-lim"]["values"]["mel"], rel=0.05
        )
    assert "griffin-lim" in here["systems"] and there["machine"]["workers"] == 1


def test_no_worker_outlives_a_process_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import concurrent.futures, multiprocessing, os, signal\n"
        "from mimo_jax.evals.reconstruction_run import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = concurrent.futures.ProcessPoolExecutor(1, context, initializer=end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Reading ends when nobody is left who could write: a worker that stayed would be waited for.
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, timeout=60, check=False)
    assert int(done.stdout) and done.returncode == -signal.SIGKILL


def test_impossible_levels_are_refused(codec, manifest, tmp_path):
    with pytest.raises(ConfigError, match=r"--levels: expected some of 1..4, got 3,5"):
        evaluate_reconstruction(codec, manifest, tmp_path, dataclasses.replace(PLAIN, levels=(3, 5)), workers=0)


def test_comparison_is_paired_and_says_which_is_better(codec, manifest, tmp_path):
    one = evaluate_reconstruction(codec, manifest, tmp_path / "one", PLAIN, workers=0)
    same = compare(one, one)["systems"]["levels-1"]["mel"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "recordings": 4, "better": None}
    two = json.loads(json.dumps(one))
    for i, file in enumerate(two["files"]):
        file["systems"]["levels-3"]["values"]["mel"] += 1.0 + 0.1 * i
        file["systems"]["levels-3"]["values"]["si_sdr"] += (-1) ** i
    found = compare(one, two)["systems"]["levels-3"]
    assert found["mel"]["value"] == pytest.approx(-1.15) and found["mel"]["better"] is True
    assert -1.3 <= found["mel"]["low"] < -1.15 < found["mel"]["high"] <= -1.0
    assert found["si_sdr"]["better"] is None and compare(two, one)["systems"]["levels-3"]["mel"]["better"] is False
    text = write_comparison(tmp_path / "one", compare(one, two))
    assert text == comparison_markdown(compare(one, two)) and "-1.150 [" in text and "] +" in text
    assert json.loads((tmp_path / "one/comparison.json").read_text()) == compare(one, two)


def test_other_recordings_and_other_metrics_are_not_compared(codec, manifest, tmp_path):
    one = evaluate_reconstruction(codec, manifest, tmp_path / "one", PLAIN, workers=0)
    for change in (
        lambda c: c["files"].pop(),
        lambda c: c["files"][1].update(id="other"),
        lambda c: c["files"][1].update(sha256="0" * 16),  # the same name, another sound
    ):
        two = json.loads(json.dumps(one))
        change(two)
        with pytest.raises(ConfigError, match="--compare: expected an evaluation of the same recordings"):
            compare(one, two)
    two = json.loads(json.dumps(one))
    two["settings"]["speaker_model"] = "mine:embed"
    with pytest.raises(ConfigError, match="--compare: speaker_model"):
        compare(one, two)
    with pytest.raises(ConfigError, match="expected a finished evaluation"):
        load_result(tmp_path / "nothing")


def test_the_verb(codec, manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mimo_jax.loading.load_codec", lambda path, step=None: codec)
    monkeypatch.setattr("mimo_jax.training.checkpoint.open_step", lambda path, step: tmp_path)
    monkeypatch.setattr("mimo_jax.training.checkpoint.read_meta", lambda path: {"step": 12})
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # no cache for the tests that come after
    common = ["eval", "reconstruction", "--audio-tokenizer", "runs/x", "--manifest", str(manifest)]
    plain = ["--baselines", "none", "--metrics", "mel,si-sdr", "--workers", "0"]
    first = str(tmp_path / "first")
    assert main([*common, *plain, "--out", first, "--levels", "1-2,4"]) == 0
    said = capsys.readouterr()
    assert "| 4 levels " in said.out and said.out.splitlines()[-1] == f"{first}/reconstruction.json"
    assert "4 of 4 recordings" in said.err and "ETA 0s" in said.err
    assert load_result(first)["tokenizer"]["step"] == 12
    second = str(tmp_path / "second")
    assert main([*common, *plain, "--out", second, "--compare", first]) == 0  # by default 1, 2 and all levels there are
    assert "# Comparison" in capsys.readouterr().out
    assert set(load_result(second)["systems"]) == {"source", "levels-1", "levels-2", "levels-4"}
    assert main([*common, "--out", second, "--compare", str(tmp_path / "x")]) == 2
    assert main([*common, "--out", second, "--metrics", "melody"]) == 2
    assert "--metrics: expected some of mel" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*common, "--out", second, "--levels", "4-2"])
