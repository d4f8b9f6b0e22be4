"""The picture of an evaluation: metrics against bitrate, the tokenizer's levels as a curve beside the baselines."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mimo_jax.audio.pictures import COLOURS, GRID, INK
from mimo_jax.evals.quality import COLUMNS

_WIDTH = 3  # panels in a row


def plot(content: Mapping[str, Any]) -> bytes:
    """Draws what `evaluate_reconstruction` returns: a PNG file."""
    from matplotlib.figure import Figure as Canvas

    systems = content["systems"]
    shown = [m for m in COLUMNS if any(m in s["metrics"] for s in systems.values()) and not m.startswith("stft_")]
    height = -(-len(shown) // _WIDTH)
    canvas = Canvas(figsize=(4.2 * _WIDTH, 3.1 * height), dpi=110, layout="constrained")
    panels = list(canvas.subplots(height, _WIDTH, squeeze=False).flat)
    for axes, metric in zip(panels, shown, strict=False):
        _panel(axes, metric, systems)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", frameon=False, fontsize=9, ncols=len(labels))
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Any, metric: str, systems: Mapping[str, Any]) -> None:
    def curve(prefix: str, name: str, colour: str, marker: str) -> Sequence[str]:
        chosen = [s for s in systems if s.startswith(prefix) and metric in systems[s]["metrics"]]
        if chosen:
            found = [systems[s]["metrics"][metric] for s in chosen]
            x = [systems[s]["bitrate"] / 1000 for s in chosen]
            value, low, high = np.asarray([(f["value"], f["low"], f["high"]) for f in found]).T
            axes.plot(x, value, color=colour, marker=marker, markersize=4, linewidth=1.8, label=name)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            for position, y, system in zip(x, value, chosen, strict=True):
                if prefix == "levels-":
                    number = system.removeprefix(prefix)
                    axes.annotate(
                        number, (position, y), (0, 5), textcoords="offset points", fontsize=7, ha="center", color=INK
                    )
        return chosen

    curve("levels-", "tokenizer (number of levels)", COLOURS[0], "o")
    curve("opus-", "Opus", COLOURS[1], "s")
    lines = (
        ("griffin-lim", "Griffin-Lim of the mel spectrogram", COLOURS[2], "--"),
        ("source", "source", "#666666", ":"),
    )
    for name, title, colour, style in lines:
        if name in systems and (found := systems[name]["metrics"].get(metric)):
            axes.axhline(found["value"], color=colour, linestyle=style, linewidth=1.4, label=title)
            axes.axhspan(found["low"], found["high"], color=colour, alpha=0.12, linewidth=0)
    column = COLUMNS[metric]
    better = "more is better" if column.more_is_better else "less is better"
    axes.set_title(f"{column.label} ({better})", fontsize=9, color=INK, loc="left", fontweight="bold")
    axes.set_xscale("log")
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 6, 12, 24) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("kbit/s", fontsize=8)
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK, length=3)
