"""The report page: whole in itself, safe against what it shows, and readable figures."""

from __future__ import annotations

import base64
import html.parser
import io
import re

import numpy as np
import pytest
import soundfile

from mimo_jax import report
from mimo_jax.report import Cell, Clip, Page, Sample, Section, Series, Table

TONE = np.sin(2 * np.pi * 1000 * np.arange(24_000) / 24_000).astype(np.float32) * 0.5


@pytest.fixture(scope="module")
def page():
    return Page(
        "A page & its title",
        subtitle="said <simply>",
        facts=[("Wall time", "9 min")],
        sections=[
            Section(
                "What ran",
                [
                    Table(
                        ["Stage", "Wall"],
                        [["corpus", Cell("6.1 s", "number")], [Cell("x < y", "code"), Cell("no", "bad")]],
                    )
                ],
                intro="All of it.",
            ),
            Section(
                "Loss curves",
                [
                    report.line_chart(
                        [Series("train", [1, 2, 3], [3.0, None, 1.0]), Series("held out", [2], [float("nan")])], "Loss"
                    ),
                    report.level_chart(
                        [("start", [3.0, 2.0]), ("end", [9.0, 5.0])], [16, 8], "Perplexity", "perplexity"
                    ),
                    report.interval_chart(["a", "b"], [("model", [(1, 0.9, 1.2), (2, 1.9, 2.1)])], "Entropy", "nats"),
                ],
            ),
            Section("Samples", [Sample("A tone", [("Text", "<script>alert(1)</script>")], [Clip("original", TONE)])]),
        ],
    )


@pytest.fixture(scope="module")
def content(page):
    return report.render(page)


class Outline(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects attributes."""

    VOID = ("meta", "img", "br")

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_links_stay_inside(content):
    outline = Outline(content)
    assert outline.open == []
    anchors = {a["href"][1:] for t, a in outline.seen if t == "a"}
    assert anchors == {a["id"] for t, a in outline.seen if t == "section"} and len(anchors) == 3


def test_long_commands_are_folded_and_whole():
    command = "mimo-jax train \\\n  --config a.py:tiny"
    content = report.render(Page("t", [Section("s", [Table(["c"], [[Cell(command, "code")]])])]))
    assert "<summary>mimo-jax train </summary>mimo-jax train \\\n  --config a.py:tiny</details>" in content


def test_page_loads_nothing_from_anywhere(content):
    outline = Outline(content)
    sources = [a[k] for _, a in outline.seen for k in ("src", "href") if k in a]
    assert sources and all(s.startswith(("data:", "#")) for s in sources)
    assert not re.search(r"url\(|@import|<link|<script", content)


def test_shown_text_cannot_become_markup(content):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in content
    assert "x &lt; y" in content and "said &lt;simply&gt;" in content


def test_all_figures_and_sounds_are_in_the_page(content):
    outline = Outline(content)
    images = [a for t, a in outline.seen if t == "img"]
    assert len(images) == 4 and all(a["alt"] for a in images)
    for image in images:
        kind, _, data = image["src"].partition(";base64,")
        start = base64.b64decode(data)[:8]
        assert start == (b"\x89PNG\r\n\x1a\n" if kind == "data:image/png" else b"<?xml ve")
    sound = next(a["src"] for t, a in outline.seen if t == "audio")
    wav, rate = soundfile.read(io.BytesIO(base64.b64decode(sound.partition(";base64,")[2])), dtype="float32")
    assert rate == 24_000
    np.testing.assert_allclose(wav, TONE, atol=1e-4)


def test_same_page_gives_the_same_bytes(page, content):
    assert report.render(page) == content
    again = report.line_chart([Series("a", [1, 2], [1.0, 2.0])], "t")
    assert again == report.line_chart([Series("a", [1, 2], [1.0, 2.0])], "t")


def test_spectrogram_shows_a_tone_where_its_frequency_is():
    from matplotlib.image import imread

    image = imread(io.BytesIO(base64.b64decode(report.spectrogram(TONE, 24_000).partition(",")[2])))
    brightness = image[:, image.shape[1] // 2, :3].sum(axis=1)
    dark = brightness < 2.9
    top = int(np.argmax(dark))  # the axes are the first run of rows that are not white; labels come below
    bottom = top + int(np.argmin(dark[top:])) - 1
    rows = np.arange(top, bottom + 1)
    bright = rows[np.argmax(brightness[rows])]
    mel = np.log10(1 + np.array([1000, 12_000]) / 700)
    assert (bottom - bright) / (bottom - top) == pytest.approx(mel[0] / mel[1], abs=0.12)


@pytest.mark.parametrize("wav", [np.zeros(24_000, np.float32), np.zeros(10, np.float32)], ids=["silent", "very short"])
def test_silent_and_very_short_sounds_can_be_shown(wav):
    assert Clip("x", wav).spectrogram.startswith("data:image/png")
    assert Clip("x", wav).audio.startswith("data:audio/wav")


def test_page_is_written_whole_or_not_at_all(page, tmp_path):
    path = tmp_path / "sub" / "report.html"
    report.write_page(path, page)
    assert path.read_text(encoding="utf-8") == report.render(page)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
