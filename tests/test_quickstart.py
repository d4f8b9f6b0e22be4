"""The quickstart's bookkeeping: what is done again and what is not, the verdicts, and the page."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

from mimo_jax.audio.files import save_wav
from mimo_jax.config import ConfigError
from mimo_jax.quickstart import Quickstart, Stage, bars
from mimo_jax.quickstart_report import quickstart_page
from mimo_jax.report import render


class Recorder:
    """Runs a two-stage quickstart in a folder; counts how often each stage is made."""

    def __init__(self, folder):
        self.folder, self.made, self.lines = folder, [], []

    def run(self, first=1, second=1, fail=False):
        quickstart = Quickstart(self.folder, (), 1.0, 1.0, self.lines.append)

        def make(name):
            def inner():
                self.made.append(name)
                path = self.folder / name
                path.mkdir(parents=True, exist_ok=True)
                (path / f"file-{len(self.made)}").write_text("x")
                if fail and name == "b":
                    raise RuntimeError("killed")
                return f"note of {name}"

            return inner

        quickstart._stage("a", [self.folder / "a"], first, "command a", make("a"))
        quickstart._stage("b", [self.folder / "b"], second, "command b", make("b"))
        return quickstart.stages


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path / "out")


def test_finished_stages_are_not_repeated_and_keep_their_times(recorder):
    first = recorder.run()
    assert recorder.made == ["a", "b"]
    assert recorder.run() == first
    assert recorder.made == ["a", "b"]
    assert [s.note for s in first] == ["note of a", "note of b"]


def test_interrupted_stage_goes_on_from_its_files(recorder):
    with pytest.raises(RuntimeError, match="killed"):
        recorder.run(fail=True)
    recorder.run()
    assert recorder.made == ["a", "b", "b"]
    assert len(list((recorder.folder / "b").iterdir())) == 2


def test_changed_input_repeats_the_stage_afresh_and_all_after_it(recorder):
    recorder.run()
    recorder.run(second=2)
    assert recorder.made == ["a", "b", "b"]
    recorder.run(first=2, second=2)
    assert recorder.made == ["a", "b", "b", "a", "b"]
    assert len(list((recorder.folder / "b").iterdir())) == 1


def test_missing_result_repeats_the_stage(recorder):
    recorder.run()
    for path in (recorder.folder / "b").iterdir():
        path.unlink()
    (recorder.folder / "b").rmdir()
    recorder.run()
    assert recorder.made == ["a", "b", "b"]


def test_files_that_are_not_ours_are_never_touched(recorder):
    mine = recorder.folder / "b" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(ConfigError, match="not made by a quickstart"):
        recorder.run()
    assert mine.read_text() == "years of work"


def interval(value, half=0.1):
    return {"value": value, "low": value - half, "high": value + half}


def measurements(channels=8, levels=20):
    def state(distance, perplexity):
        return {
            "distance": {"8": interval(distance), "20": interval(distance - 0.5)},
            "perplexity": [interval(perplexity)] * levels,
            "used": [0.5] * levels,
        }

    channel = {
        "model": interval(4.0),
        "control": interval(4.5),
        "unigram": interval(5.0),
        "reduction": interval(0.2, 0.05),
        "control_gap": interval(0.5),
    }
    result = {
        "tokenizer": {"start": state(8.0, 30.0), "end": state(4.0, 60.0)},
        "codebook_sizes": [1024, 1024] + [128] * (levels - 2),
        "channels": [json.loads(json.dumps(channel)) for _ in range(channels)],
        "control_gap": interval(0.5),
        "held_out": {"clips": 33, "seconds": 139.5},
    }
    return {**result, "bars": bars(result)}


def test_all_bars_are_judged_and_met_by_good_figures():
    found = bars(measurements())
    assert len(found) == 2 + 8 + 1 and all(bar["met"] for bar in found)


@pytest.mark.parametrize(
    ("path", "value", "failed"),
    [
        (("tokenizer", "end", "distance", "20"), interval(7.4), "distance"),
        (("tokenizer", "end", "perplexity", 0), interval(30.1), "perplexity"),
        (("channels", 0, "reduction"), interval(0.09, 0.01), "Channel 0 at least 10 %"),
        (("channels", 3, "reduction"), interval(0.01, 0.02), "Channel 3 below"),
        (("control_gap",), interval(-0.1, 0.02), "All channels worse"),
        (("control_gap",), interval(0.1, 0.2), "All channels worse"),
    ],
)
def test_bar_fails_when_its_figure_is_not_good_enough(path, value, failed):
    measured = measurements()
    place = measured
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    missed = [bar["name"] for bar in bars(measured) if not bar["met"]]
    assert len(missed) == 1 and failed in missed[0]


def test_nine_percent_below_is_enough_for_every_channel_but_the_first():
    measured = measurements()
    for channel in measured["channels"][1:]:
        channel["reduction"] = interval(0.02, 0.01)
    assert all(bar["met"] for bar in bars(measured))


@pytest.fixture
def finished(tmp_path):
    """A folder as the stages leave it."""
    (tmp_path / "measurements.json").write_text(json.dumps(measurements()))
    save_wav(tmp_path / "samples" / "a.wav", np.random.default_rng(0).normal(0, 0.1, 24_000), 24_000)
    shown = {
        "reconstruction": [{"title": "espeak-f2", "text": "A text.", "clips": {"original": "a.wav"}}],
        "continuation": [{"title": "espeak-f2", "clips": {"prompt": "a.wav", "continuation": "a.wav"}}],
        "tts": [{"title": "Text 1", "text": "A text.", "said": "", "clips": {}}],
        "asr": [{"title": "espeak-f2", "reference": "A text.", "hypothesis": ""}],
    }
    (tmp_path / "samples" / "samples.json").write_text(json.dumps({"samples": shown, "timings": {}}))
    for job in ("tokenizer", "text", "understanding", "joint"):
        lines = []
        for step in range(3):
            for split in ("train", "validation"):
                values = {"loss": 3.0 - step, "mel": 2.0, "a2t": None, "text/word_ce": 5.0, "level/00/perplexity": 9.0}
                if job == "joint":
                    values |= {f"channel/{r}/ce": 4.0 for r in range(8)}
                lines.append(json.dumps({"step": step, "split": split, **values}))
        (tmp_path / job).mkdir()
        (tmp_path / job / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_page_shows_every_stage_curve_sample_and_verdict(finished):
    stages = [Stage(name, f"mimo-jax {name} --x 1", 61.0, 100.0, "a note") for name in ("corpus", "tokenizer", "joint")]
    page = quickstart_page(finished, stages)
    assert dict(page.facts) == {
        "Wall time": "3m03s",
        "CPU time": "5m00s",
        "Held out": "33 clips, 2m20s",
        "Bars met": "11 of 11",
    }
    sections = {s.title: s for s in page.sections}
    (table,) = sections["What ran"].blocks
    assert len(table.rows) == 4
    assert table.rows[0][-1].text == "mimo-jax corpus \\\n  --x 1", "commands are broken at their flags"
    assert len(sections["Loss curves"].blocks) == 4 + 3 + 2
    assert len(sections["Generated"].blocks) == 3
    content = render(page)
    assert content.count("<audio") == 3 and content.count(">met<") == 11
    assert "(nothing)" in content


def test_commands_in_the_report_are_ones_the_command_line_understands(tmp_path, monkeypatch):
    from mimo_jax.cli import make_parser, split_overrides

    quickstart = Quickstart(tmp_path / "out", (tmp_path / "my audio",), 1.0, 0.5, lambda line: None)
    lines = [{"audio": f"{i}.wav", "text": f"It's {i}.", "speaker": f"s{i}", "duration": 5.0} for i in range(6)]
    quickstart.corpus.mkdir(parents=True)
    (quickstart.corpus / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    commands = []
    monkeypatch.setattr(quickstart, "_stage", lambda name, paths, inputs, command, make: commands.append(command))
    with pytest.raises(FileNotFoundError):  # nothing has run, so there is nothing to report
        quickstart.run()
    lines = [line for command in commands for line in command.splitlines()]
    assert len(lines) == 2 + 1 + 4 + 3 + 3 + 1
    for line in lines:
        program, *arguments = shlex.split(line)
        rest, _ = split_overrides(arguments)
        assert program == "mimo-jax" and make_parser().parse_args(rest)
