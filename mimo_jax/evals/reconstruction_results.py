"""From what was measured of each recording to tables: aggregates, groups, and the comparison of two evaluations.

N recordings. Values are means over recordings, with bootstrap intervals over recordings.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.config import ConfigError
from mimo_jax.evals.intervals import mean_interval
from mimo_jax.evals.quality import COLUMNS

RESULT = "reconstruction.json"
# Quantities of the tables; the others are in the JSON file.
_SHOWN = (
    *("pesq_nb", "pesq_wb", "stoi", "speaker_similarity", "mel", "stft", "si_sdr"),
    *("dnsmos_overall", "dnsmos_p808"),
)
_DIGITS = {"stoi": 3, "speaker_similarity": 3, "mel": 3, "stft": 3}


def aggregate(files: Sequence[Mapping[str, Any]], bitrates: Mapping[str, float]) -> dict[str, Any]:
    """What is in `reconstruction.json` beside the files.

    Args:
        files: lines of `files.jsonl`, in the order of the manifest.
        bitrates: bit/s of the systems whose bits are not counted.

    Returns:
        `counts` (recordings measured and failed, seconds), `failed` by reason, `systems`, `groups` by language and by
        speaker, and `speed`: seconds of computing for one second of audio.
    """
    measured = [f for f in files if "systems" in f]
    seconds = sum(f["seconds"] for f in measured)
    groups: dict[str, dict[str, Any]] = {}
    for field in ("language", "speaker"):
        names = sorted({f[field] for f in measured})
        groups[field] = {n: _systems([f for f in measured if f[field] == n], bitrates) for n in names if n}
    decode = {
        n: sum(f["decode_seconds"][n] for f in measured) / seconds
        for n in (measured[0]["decode_seconds"] if measured else ())
    }
    encode = sum(f["encode_seconds"] for f in measured) / seconds if measured else 0.0
    return {
        "counts": {"measured": len(measured), "failed": len(files) - len(measured), "seconds": seconds},
        "failed": dict(collections.Counter(f["failed"] for f in files if "failed" in f)),
        "speed": {"encode_real_time_factor": encode, "decode_real_time_factor": decode},
        "systems": _systems(measured, bitrates),
        "groups": groups,
    }


def _systems(files: Sequence[Mapping[str, Any]], bitrates: Mapping[str, float]) -> dict[str, Any]:
    systems: dict[str, Any] = {}
    for name in files[0]["systems"] if files else ():
        parts = [f["systems"][name] for f in files]
        metrics = {}
        left_out: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for part in parts:
            for metric, reason in part.get("left_out", {}).items():
                left_out[metric][reason] += 1
        for metric in COLUMNS:
            if values := [part["values"][metric] for part in parts if metric in part["values"]]:
                interval = mean_interval(np.asarray(values), np.ones(len(values)))
                metrics[metric] = {**interval.to_json(), "recordings": len(values)}
        systems[name] = {"metrics": metrics, "left_out": {k: dict(v) for k, v in left_out.items()}}
        if name in bitrates:
            systems[name]["bitrate"] = bitrates[name]
        elif "bits" in parts[0]:
            systems[name]["bitrate"] = sum(p["bits"] for p in parts) / sum(f["seconds"] for f in files)
    return systems


# ----------------------------------------------------------------------------------------------------------
# Tables


def label(system: str) -> str:
    """A system's name for people."""
    if system.startswith("levels-"):
        number = int(system.removeprefix("levels-"))
        return f"{number} level{'s' if number > 1 else ''}"
    return {"source": "source itself", "griffin-lim": "Griffin-Lim"}.get(system, system.replace("opus-", "Opus "))


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of an evaluation: the whole, the languages if there are several, speed, and what was left out."""
    counts, machine, speed = content["counts"], content["machine"], content["speed"]
    lines = [
        "# Reconstruction",
        "",
        f"{counts['measured']} recordings, {counts['seconds'] / 60:.1f} minutes of {content['manifest']}; mean over "
        "recordings ± half of the 95 % bootstrap interval.",
        "",
        *_system_table(content["systems"]),
        "",
    ]
    if len(content["groups"]["language"]) > 1:
        lines += ["## By language", ""]
        rows = [
            (f"{language}, {label(name)}", system)
            for language, systems in content["groups"]["language"].items()
            for name, system in systems.items()
            if name.startswith("levels-")
        ]
        lines += [*_rows(rows), ""]
    decode = ", ".join(f"{label(f'levels-{n}')} {x:.4f}" for n, x in speed["decode_real_time_factor"].items())
    lines += [
        f"Seconds of computing for a second of audio on {machine['device']} ({machine['backend']}, {machine['cores']} "
        f"cores, {machine['workers']} of them measuring meanwhile), one clip at a time: encode "
        f"{speed['encode_real_time_factor']:.4f}; decode {decode}.",
    ]
    missing: collections.Counter[str] = collections.Counter()
    for name, system in content["systems"].items():
        for metric, reasons in system["left_out"].items():
            for reason, count in reasons.items():
                if not (name == "source" and metric == "si_sdr"):  # infinite by definition
                    missing[f"{COLUMNS[metric].label} of {label(name)}: {reason}"] += count
    lines += ["", *(f"Left out, {count} x {reason}" for reason, count in missing.items())] if missing else []
    lines += (
        ["", *(f"Not read, {count} x {reason}" for reason, count in content["failed"].items())]
        if content["failed"]
        else []
    )
    return "\n".join(lines) + "\n"


def _system_table(systems: Mapping[str, Any]) -> list[str]:
    return _rows([(label(name), system) for name, system in systems.items()])


def _rows(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    shown = [m for m in _SHOWN if any(m in system["metrics"] for _, system in rows)]
    head = ["system", "kbit/s", *(f"{COLUMNS[m].label} {'↑' if COLUMNS[m].more_is_better else '↓'}" for m in shown)]
    body = []
    for name, system in rows:
        rate = system.get("bitrate")
        cells = [_cell(m, system["metrics"].get(m)) for m in shown]
        body.append([name, f"{rate / 1000:.2f}" if rate else "", *cells])
    return _table([head, *body])


def _cell(metric: str, value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    digits = _DIGITS.get(metric, 2)
    return f"{value['value']:.{digits}f} ±{(value['high'] - value['low']) / 2:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown whose columns are flush for readers of plain text: the first left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


# ----------------------------------------------------------------------------------------------------------
# Two evaluations


def load_result(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `reconstruction.json` of a finished evaluation. Raises ConfigError: there is none."""
    path = Path(folder) / RESULT
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a finished evaluation, found none") from None
    except ValueError as error:
        raise ConfigError(f"{path}: expected a JSON file ({error})") from None
    if not isinstance(content, dict) or not {"settings", "systems", "files"} <= content.keys():
        raise ConfigError(f"{path}: expected the result of `eval reconstruction`")
    return content


def compare(this: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Paired differences, this evaluation minus the other, of every system and metric that both have.

    Returns:
        `systems`: per system and metric the mean difference over the recordings that both have a value of, its
        bootstrap interval over recordings, their number, and `better`: True or False where the interval excludes 0.

    Raises:
        ConfigError: they measured other recordings, or measured otherwise.
    """
    for name in ("format", "speaker_model"):
        if this["settings"][name] != other["settings"][name]:
            raise ConfigError(
                f"--compare: {name} is {this['settings'][name]!r} here and {other['settings'][name]!r} there"
            )
    versions = [side["settings"]["packages"] for side in (this, other)]
    for package in ("pesq", "pystoi", "resemblyzer", "speechmos"):
        here, there = (v.get(package) for v in versions)
        if here and there and here != there:
            raise ConfigError(f"--compare: {package} is {here} here and {there} there")
    here_files, there_files = (
        [(f["index"], f["id"], f.get("sha256")) for f in side["files"]] for side in (this, other)
    )
    if here_files != there_files:
        found = next((a for a, b in zip(here_files, there_files, strict=False) if a != b), None)
        what = (
            f"{len(here_files)} and {len(there_files)} recordings"
            if found is None
            else f"the first that differs is {found[1]}"
        )
        raise ConfigError(f"--compare: expected an evaluation of the same recordings; {what}")
    pairs = [
        (a["systems"], b["systems"])
        for a, b in zip(this["files"], other["files"], strict=True)
        if "systems" in a and "systems" in b
    ]
    systems: dict[str, Any] = {}
    for name in this["systems"]:
        if name not in other["systems"] or not name.startswith("levels-"):
            continue
        systems[name] = {}
        for metric, column in COLUMNS.items():
            values = [(a[name]["values"].get(metric), b[name]["values"].get(metric)) for a, b in pairs]
            difference_N = np.asarray([x - y for x, y in values if x is not None and y is not None])
            if not len(difference_N):
                continue
            interval = mean_interval(difference_N, np.ones(len(difference_N)))
            better = None
            if interval.low > 0 or interval.high < 0:
                better = (interval.value > 0) == column.more_is_better
            systems[name][metric] = {**interval.to_json(), "recordings": len(difference_N), "better": better}
    return {"this": this["tokenizer"], "other": other["tokenizer"], "systems": systems}


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The table of a comparison; `+` and `-` stand where this tokenizer is better or worse beyond chance."""
    systems = comparison["systems"]
    shown = [m for m in _SHOWN if any(m in metrics for metrics in systems.values())]
    head = ["difference", *(f"{COLUMNS[m].label} {'↑' if COLUMNS[m].more_is_better else '↓'}" for m in shown)]
    rows = [head]
    for name, metrics in systems.items():
        cells = []
        for metric in shown:
            found = metrics.get(metric)
            digits = _DIGITS.get(metric, 2)
            mark = "" if found is None else {True: " +", False: " -", None: "  "}[found["better"]]
            cells.append(
                ""
                if found is None
                else f"{found['value']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]{mark}"
            )
        rows.append([label(name), *cells])
    intro = (
        "This tokenizer minus the other, mean over recordings [95 % bootstrap interval]; "
        "+ better, - worse, beyond chance."
    )
    return "\n".join(["# Comparison", "", intro, "", *_table(rows)]) + "\n"


def write_comparison(out: str | os.PathLike[str], comparison: Mapping[str, Any]) -> str:
    """Writes `comparison.json` and `comparison.md`; returns the text of the second."""
    text = comparison_markdown(comparison)
    atomic_write(Path(out) / "comparison.md", text.encode())
    atomic_write(Path(out) / "comparison.json", (json.dumps(comparison, indent=1, allow_nan=False) + "\n").encode())
    return text
