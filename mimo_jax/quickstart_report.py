"""The quickstart's report page, made from the files that its stages leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_jax.audio.files import load_audio
from mimo_jax.progress import clock
from mimo_jax.report import (
    Block,
    Cell,
    Clip,
    Figure,
    Page,
    Sample,
    Section,
    Series,
    Table,
    interval_chart,
    level_chart,
    line_chart,
)
from mimo_jax.training import metrics

if TYPE_CHECKING:
    from mimo_jax.quickstart import Stage

Row = list[Cell | str]

_LM_STAGES = {"text": "Text LM", "understanding": "Understanding (stage 1)", "joint": "Joint (stage 2)"}


def quickstart_page(out: Path, stages: Sequence[Stage]) -> Page:
    """The page of a finished quickstart in `out`; raises OSError if a file of a stage is missing."""
    measured = _read_json(out / "measurements.json")
    samples = _read_json(out / "samples" / "samples.json")["samples"]
    wall, cpu = sum(s.wall for s in stages), sum(s.cpu for s in stages)
    met = sum(bar["met"] for bar in measured["bars"])
    notes = {stage.name: stage.note for stage in stages}
    return Page(
        "Quickstart: speech in, trained model, speech out",
        subtitle="Every stage of the full system at its smallest size, trained from scratch on this machine.",
        facts=[
            ("Wall time", clock(wall)),
            ("CPU time", clock(cpu)),
            ("Held out", f"{measured['held_out']['clips']} clips, {clock(measured['held_out']['seconds'])}"),
            ("Bars met", f"{met} of {len(measured['bars'])}"),
        ],
        sections=[
            Section("Results", _results(measured), "On held-out sentences, with 95 % bootstrap intervals over clips."),
            Section("What ran", [_stage_table(stages)], f"Corpus: {notes.get('corpus', '')}."),
            Section("Loss curves", _curves(out), "Lines are training, marked points are the held-out set."),
            Section(
                "Codebooks",
                _codebooks(measured),
                "Perplexity (exp of the entropy of the codes) of each RVQ level on held-out clips.",
            ),
            Section(
                "Reconstruction",
                _samples(samples["reconstruction"], out),
                "Held-out clips through the audio tokenizer: encoded and decoded. A tokenizer trained for minutes, "
                "without the adversarial stage, keeps rhythm and the broad spectrum, not yet the voice.",
            ),
            Section(
                "Generated",
                [
                    *_samples(samples["continuation"], out, "Continuation: "),
                    *_samples(samples["tts"], out, "Text to speech: "),
                    _transcripts(samples["asr"]),
                ],
                "From the joint model and held-out prompts. Minutes of data teach it how speech sounds, not what to "
                "say: expect speech-like sound and words of the training sentences.",
            ),
        ],
    )


def _results(measured: Mapping[str, Any]) -> list[Block]:
    rows: list[Row] = [
        [bar["name"], bar["found"], Cell("met", "good") if bar["met"] else Cell("not met", "bad")]
        for bar in measured["bars"]
    ]
    channels = measured["channels"]
    labels = {"model": "model", "control": "model with another utterance's context", "unigram": "training unigram"}
    series = [(label, [_triple(channel[key]) for channel in channels]) for key, label in labels.items()]
    names = [f"channel {r}" for r in range(len(channels))]
    table: list[Row] = [
        [name, *(Cell(_shown(channel[key]), "number") for key in labels)]
        for name, channel in zip(names, channels, strict=True)
    ]
    start, end = measured["tokenizer"]["start"], measured["tokenizer"]["end"]
    tokenizer: list[Row] = [
        [f"Log-mel distance, {n} codebooks", *(Cell(_shown(x["distance"][n]), "number") for x in (start, end))]
        for n in sorted(end["distance"], key=int)
    ]
    tokenizer.append(["Level-1 perplexity", *(Cell(_shown(x["perplexity"][0], 1), "number") for x in (start, end))])
    return [
        Table(["What it has to show", "Found", "Verdict"], rows),
        Table(
            ["Audio tokenizer", "Step 0", "Trained"],
            tokenizer,
            note="Step 0: random weights, codebooks from k-means. Distance: L1 of natural-log mel spectrograms, mean "
            "over bins and frames, summed over three scales (32, 64, 128 bands).",
        ),
        interval_chart(names, series, "Held-out cross-entropy of the RVQ channels", "nats per code"),
        Table(
            ["Cross-entropy, nats per code", "Model", "Another utterance's context", "Training unigram"],
            table,
            note="The unigram is counted on the training clips with add-one smoothing.",
        ),
    ]


def _stage_table(stages: Sequence[Stage]) -> Table:
    def row(name: str, wall: float, cpu: float, note: str, command: str) -> Row:
        times = [Cell(f"{x:.1f} s", "number") for x in (wall, cpu)]
        return [name, *times, note, Cell(command.replace(" --", " \\\n  --"), "code")]  # a line for each flag

    rows = [row(s.name, s.wall, s.cpu, s.note, s.command) for s in stages]
    rows.append(row("all", sum(s.wall for s in stages), sum(s.cpu for s in stages), "", ""))
    return Table(["Stage", "Wall", "CPU", "Outcome", "Command to repeat it"], rows)


def _curves(out: Path) -> list[Figure]:
    figures = []
    lines = _metrics(out / "tokenizer")
    for key, title, unit in (
        ("loss", "Audio tokenizer: loss", ""),
        ("mel", "Audio tokenizer: mel distance", "L1 of log mel, three scales"),
        ("a2t", "Audio tokenizer: text from speech", "nats per token"),
    ):
        figures.append(line_chart(_both(lines, key), title, y_label=unit))
    shown = [("level/00", "level 1"), ("level/01", "level 2"), ("level/04", "level 5"), ("level/19", "level 20")]
    perplexities = [
        _series(lines, "train", f"{level}/perplexity", label, "line", i) for i, (level, label) in enumerate(shown)
    ]
    figures.append(line_chart(perplexities, "Audio tokenizer: perplexity in training batches", logarithmic=True))
    for job, name in _LM_STAGES.items():
        lines = _metrics(out / job)
        figures.append(line_chart(_both(lines, "text/word_ce"), f"{name}: text", y_label="nats per token"))
        if any(x.get("channel/0/ce") is not None for x in lines):
            channels = [_series(lines, "train", f"channel/{r}/ce", f"channel {r}", "line", r) for r in range(8)]
            figures.append(line_chart(channels, f"{name}: training, by channel", y_label="nats per code"))
            held_out = [_series(lines, "validation", f"channel/{r}/ce", f"channel {r}", "marked", r) for r in range(8)]
            figures.append(line_chart(held_out, f"{name}: held out, by channel", y_label="nats per code"))
    return figures


def _metrics(workdir: Path) -> list[dict[str, Any]]:
    return metrics.read(workdir / metrics.METRICS_FILE)


def _both(lines: Sequence[Mapping[str, Any]], key: str) -> list[Series]:
    styles = (("train", "training", "faint"), ("validation", "held out", "marked"))
    return [_series(lines, split, key, label, style, i) for i, (split, label, style) in enumerate(styles)]


def _series(lines: Sequence[Mapping[str, Any]], split: str, key: str, label: str, style: Any, colour: int) -> Series:
    chosen = [x for x in lines if x["split"] == split]
    return Series(label, [x["step"] for x in chosen], [x.get(key) for x in chosen], style, colour)


def _codebooks(measured: Mapping[str, Any]) -> list[Block]:
    sizes, states = measured["codebook_sizes"], measured["tokenizer"]
    labels = {"start": "step 0", "end": "trained"}
    values = [(label, [x["value"] for x in states[when]["perplexity"]]) for when, label in labels.items()]
    rows: list[Row] = []
    for r, size in enumerate(sizes):
        figures = [f"{states[when]['perplexity'][r]['value']:.1f}" for when in labels]
        used = [f"{states[when]['used'][r]:.0%}" for when in labels]
        rows.append([str(r + 1), *(Cell(x, "number") for x in (str(size), *figures, *used))])
    header = ["Level", "Entries", "Perplexity, step 0", "Perplexity, trained", "Entries that occur, step 0", "trained"]
    return [level_chart(values, sizes, "Perplexity of each RVQ level", "perplexity"), Table(header, rows)]


def _samples(items: Sequence[Mapping[str, Any]], out: Path, prefix: str = "") -> list[Block]:
    blocks: list[Block] = []
    for item in items:
        clips = [Clip(label, load_audio(out / "samples" / file)) for label, file in item["clips"].items()]
        labels = {"text": "Text", "said": "Text in the stream"}
        texts = [(label, item[key]) for key, label in labels.items() if item.get(key)]
        blocks.append(Sample(prefix + item["title"], texts, clips))
    return blocks


def _transcripts(items: Sequence[Mapping[str, Any]]) -> Table:
    rows = [[item["title"], item["reference"], item["hypothesis"] or "(nothing)"] for item in items]
    return Table(["Transcription of", "Reference", "Hypothesis"], rows)


def _triple(interval: Mapping[str, float]) -> tuple[float, float, float]:
    return interval["value"], interval["low"], interval["high"]


def _shown(interval: Mapping[str, float], digits: int = 3) -> str:
    value, low, high = (f"{x:.{digits}f}" for x in _triple(interval))
    return f"{value} ({low} – {high})"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
