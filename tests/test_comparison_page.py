"""The page and the Markdown of a comparison: whole, of one file, and trusting nothing in it."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers_compare import many, receipt
from helpers_svg import marks
from salience.evaluation.comparison import Comparison, Row, judge, make_row
from salience.evaluation.comparison_page import page
from salience.evaluation.comparison_text import markdown, show
from salience.evaluation.gate import parse_gate
from salience.reports import plots
from test_report_page import Page

NASTY = '<script>alert(1)</script> "&|` $x^2$'
pytest_plugins = ["fixtures_page"]  # chromium


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    found = many()
    gate = "perplexity<=1.10x; decode>=1.2x; arc_easy>=-5"
    judge(found, gate, parse_gate(gate, ["arc_easy"], (1, 4, 16)))
    return found


@pytest.fixture(scope="module")
def text(comparison: Comparison) -> str:
    return page(comparison)


def test_the_page_is_whole_and_loads_nothing(text: str) -> None:
    found = Page(text)
    tags = [tag for tag, _ in found.tags]
    assert "script" not in tags and "link" not in tags and "img" not in tags
    assert not re.findall(r"https?://", text)
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src"):
            assert attributes.get(name, "#").startswith("#"), tag
    policy = next(a for t, a in found.tags if t == "meta" and "http-equiv" in a)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_verdict_comes_first(comparison: Comparison, text: str) -> None:
    body = text[text.index("<body>") :]
    places = [
        body.index(each) for each in ('class="lead"', "<table", "<svg", "How it was measured")
    ]
    assert places == sorted(places)
    for line in comparison.conclusion():
        assert line.replace("&", "&amp;") in body
    assert "The gate holds for awq w4g64, gptq w4g64 and balanced w4g64" in body
    assert "could not be measured: out of memory on cuda; &lt;b&gt;give&lt;/b&gt; less" in body
    assert comparison.command in body


def test_the_table_has_each_value(comparison: Comparison, text: str) -> None:
    cells = Page(text).text("b")
    for row in comparison.rows:
        for metric, cell in row.cells.items():
            assert show(metric, cell)[0] in cells
    perplexity = comparison.rows[2].cells["perplexity"].value.value
    assert f"{perplexity:.2f}" in cells


def test_the_points_are_where_the_models_are(comparison: Comparison) -> None:
    points = [
        plots.Point(x, y, y * 0.9, y * 1.1, str(x), second=x == 1, front=x < 3)
        for x, y in ((1.0, 1.0), (2.0, 4.0), (4.0, 3.0), (8.0, 1.5))
    ]
    svg = plots.scatter("points", "x", "y", points, False)
    found = marks(svg, "--first")
    assert len(found) == 3 and len(marks(svg, "--second")) == 1
    slope = np.diff(found[:, 0]) / np.diff([2.0, 4.0, 8.0])
    np.testing.assert_allclose(slope[0], slope[1], rtol=1e-3)
    fall = np.diff(found[:, 1]) / np.diff([4.0, 3.0, 1.5])
    np.testing.assert_allclose(fall[0], fall[1], rtol=1e-3)
    assert fall[0] < 0  # up is more


def test_curves_leave_out_what_cannot_be_drawn() -> None:
    svg = plots.curves(
        "c", "x", [([1, 4, 16], [2.0, float("nan"), 8.0])], log=True, ticks=[1, 4, 16]
    )
    assert len(marks(svg, "--first")) == 2
    assert ">16<" in svg


def test_names_are_text() -> None:
    rng = np.random.default_rng(0)
    hard = [3.0] * 10
    rows = [
        Row(NASTY, NASTY, receipt=receipt(rng, hard, first=True)),
        Row(f"{NASTY} 2", NASTY, NASTY, receipt=receipt(rng, hard, loss=0.1, layers=2)),
        Row(f"{NASTY} 3", NASTY, error=NASTY),
    ]
    make_row(rows[0], None)
    make_row(rows[1], rows[0])
    found = Comparison(rows, {NASTY: NASTY}, NASTY, {NASTY: NASTY})
    tags = [tag for tag, _ in Page(page(found)).tags]
    assert "script" not in tags
    lines = [line for line in markdown(found).splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert all("<" not in line.replace("\\<", "") for line in lines)


def test_without_matplotlib_there_are_no_plots(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = page(comparison)
    assert "There are none: plots need matplotlib" in text
    assert "pip install" in text and "How it was measured" in text
    Page(text)


def test_little_was_measured() -> None:
    """One chunk, and neither speed nor tasks nor layers."""
    rng = np.random.default_rng(0)
    made = [receipt(rng, [3.0], first=True), receipt(rng, [3.0], loss=0.1)]
    for each in made:
        each.speed, each.timeline, each.marks = [], [], []
    rows = [Row("A", "a", receipt=made[0]), Row("B", "b", receipt=made[1])]
    make_row(rows[0], None)
    make_row(rows[1], rows[0])
    found = Comparison(rows, {}, "", {})
    assert found.conclusion() == ["Too little was measured to judge B."]
    assert "unknown" in page(found) and "unknown" in markdown(found)
    Page(page(found))


@pytest.mark.slow
def test_a_browser_shows_it_without_a_word(text: str, tmp_path: Path, chromium: Any) -> None:
    """No console message, no request, and nothing wider than a phone but the table."""
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    for scheme, width in (("light", 1250), ("dark", 1250), ("light", 390)):
        tab: Any = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message, said=said: said.append(message.text))
        tab.on("pageerror", lambda error, said=said: said.append(str(error)))
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.goto(file.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body)"
        ink, paper = tab.evaluate(f"{colours}.backgroundColor]")
        assert (_brightness(ink) > _brightness(paper)) == (scheme == "dark")
        assert said == [] and asked == [file.as_uri()]
        tab.close()


def _brightness(colour: str) -> int:
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])
