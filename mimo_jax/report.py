"""Pages for people: one HTML file that holds its figures, sounds and styles, and needs nothing from anywhere else.

A page is a list of sections, a section a list of blocks (tables, figures, samples); `render` turns it into HTML. The
figures are drawn with matplotlib, without a display.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mimo_jax.atomic import atomic_write
from mimo_jax.audio.pictures import COLOURS, GRID, INK, spectrograms


@dataclass(frozen=True)
class Cell:
    """A table cell. `number` is set flush right; `code` in a fixed font; `good` and `bad` are coloured verdicts."""

    text: str
    kind: Literal["text", "number", "code", "good", "bad"] = "text"


@dataclass(frozen=True)
class Table:
    """A table; a plain string is a text cell. `note` is set below it."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""

    @property
    def cells(self) -> list[list[Cell]]:
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """A drawn figure: `image` is a data URL, `alt` says in words what is seen."""

    image: str
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Clip:
    """A sound with its player and spectrogram; `wav` is float [S]."""

    label: str
    wav: np.ndarray
    sample_rate: int = 24_000

    @property
    def audio(self) -> str:
        return audio_url(self.wav, self.sample_rate)

    @property
    def spectrogram(self) -> str:
        return spectrogram(self.wav, self.sample_rate)

    @property
    def seconds(self) -> float:
        return len(self.wav) / self.sample_rate


@dataclass(frozen=True)
class Sample:
    """An example: a title, labelled lines of text, and sounds side by side."""

    title: str
    texts: Sequence[tuple[str, str]] = ()
    clips: Sequence[Clip] = ()


Block = Table | Figure | Sample


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Page:
    """A whole page. `facts` are the few figures that stand at its head: (label, value)."""

    title: str
    sections: Sequence[Section]
    subtitle: str = ""
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def render(page: Page) -> str:
    """The page as one HTML document."""
    import jinja2

    source = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=strict)
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["figure"] = lambda block: isinstance(block, Figure)
    return environment.from_string(source).render(page=page)


def write_page(path: str | Path, page: Page) -> None:
    """Renders a page to a file, atomically."""
    atomic_write(path, render(page).encode())


# ----------------------------------------------------------------------------------------------------------
# Sounds and figures as data URLs


def audio_url(wav: np.ndarray, sample_rate: int) -> str:
    """A sound as a 16-bit WAV data URL; `wav` is float [S]."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wav, -1.0, 1.0), sample_rate, format="WAV", subtype="PCM_16")
    return _data_url("audio/wav", buffer.getvalue())


@dataclass(frozen=True)
class Series:
    """A line of a chart; points whose y is None or not finite are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Literal["line", "marked", "faint"] = "line"
    colour: int | None = None


def line_chart(series: Sequence[Series], title: str, y_label: str = "", logarithmic: bool = False) -> Figure:
    """A chart of lines over training steps."""
    figure, axes = _axes(title, 5.6, 3.3)
    for i, line in enumerate(series):
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and np.isfinite(y)]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        colour = COLOURS[(i if line.colour is None else line.colour) % len(COLOURS)]
        marker: Any = "o" if line.style == "marked" or len(points) == 1 else None
        alpha, width = (0.35, 1.1) if line.style == "faint" else (1.0, 1.8)
        axes.plot(x, y, color=colour, label=line.label, marker=marker, markersize=4, alpha=alpha, linewidth=width)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    if logarithmic:
        axes.set_yscale("log")
    if len(series) > 1 and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, ncols=2 if len(series) > 5 else 1)
    return Figure(_svg(figure), f"Line chart: {title}")


def level_chart(
    values: Sequence[tuple[str, Sequence[float]]], sizes: Sequence[int], title: str, y_label: str
) -> Figure:
    """Bars for each RVQ level, with a mark at the level's codebook size; `values` are (label, one number a level)."""
    figure, axes = _axes(title, 11.6, 3.3)
    positions = np.arange(len(sizes))
    width = 0.8 / len(values)
    for i, (label, heights) in enumerate(values):
        axes.bar(positions + (i - (len(values) - 1) / 2) * width, heights, width, label=label, color=COLOURS[i])
    axes.hlines(sizes, positions - 0.45, positions + 0.45, color=INK, linewidth=1.2, label="codebook size")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)
    axes.set_xticks(positions, [str(i + 1) for i in positions])
    axes.set_xlabel("RVQ level")
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=8, ncols=len(values) + 1, loc="upper right")
    return Figure(_svg(figure), f"Bar chart: {title}", wide=True)


def interval_chart(
    labels: Sequence[str], series: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], title: str, y_label: str
) -> Figure:
    """Points with intervals, grouped by label; each series is (name, [(value, low, high) of each label])."""
    figure, axes = _axes(title, 11.6, 3.3)
    positions = np.arange(len(labels))
    for i, (name, points) in enumerate(series):
        value, low, high = np.asarray(points, float).T
        x = positions + (i - (len(series) - 1) / 2) * 0.18
        errors = np.maximum([value - low, high - value], 0.0)
        axes.errorbar(x, value, errors, fmt="o", markersize=5, capsize=3, color=COLOURS[i], label=name)
    axes.set_xticks(positions, list(labels))
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=8, ncols=len(series))
    return Figure(_svg(figure), f"Chart with intervals: {title}", wide=True)


def spectrogram(wav: np.ndarray, sample_rate: int) -> str:
    """Log-mel spectrogram of float [S], as a PNG data URL."""
    return _data_url("image/png", spectrograms({"": wav}, sample_rate))


def _axes(title: str, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), layout="constrained")
    axes = canvas.add_subplot()
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aab2bf")
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    return canvas, axes


def _svg(canvas: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Without date and with fixed ids, so that equal figures are equal bytes; outlines, so that no font is needed.
    with matplotlib.rc_context({"svg.hashsalt": "mimo_jax", "svg.fonttype": "path"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_url("image/svg+xml", buffer.getvalue().encode())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
