"""Plots as inline SVG: the marks are where the values are, and the page decides the colours."""

import re
import sys
import warnings
from collections.abc import Callable
from math import inf, nan
from xml.etree import ElementTree

import numpy as np
import pytest

from helpers_svg import assert_affine, marks
from salience.errors import SalienceError
from salience.reports import plots

RAMP = [0.001, 0.01, 0.02, 0.5, 0.03]


@pytest.mark.parametrize("log", [False, True])
def test_marks_are_where_the_values_are(log: bool) -> None:
    svg = plots.lines("x", [RAMP, [2 * v for v in RAMP]], log=log)
    first, second = marks(svg, "--first"), marks(svg, "--second")
    assert first.shape == second.shape == (5, 2)
    assert_affine(first[:, 0], np.arange(5.0), 1)
    values = np.array([RAMP, RAMP]) * [[1], [2]]  # both series are on one axis
    heights = np.stack([first[:, 1], second[:, 1]])
    # In an SVG y grows downwards.
    assert_affine(heights.ravel(), (np.log10(values) if log else values).ravel(), -1)


def test_shared_limits_make_plots_alike() -> None:
    other = [0.02, 0.3]
    limits = plots.shared_limits([RAMP, other, [nan, 0.0, -1.0, inf]])
    assert limits is not None and limits[0] < 0.001 and limits[1] > 0.5
    one, two = (marks(plots.lines("x", [v], log=True, limits=limits), "--first")[:, 1]
                for v in (RAMP, other))  # fmt: skip
    assert one[2] == pytest.approx(two[0], abs=1e-3)
    assert plots.shared_limits([[nan, 0.0], []]) is None


@pytest.mark.parametrize("log", [False, True])
def test_what_cannot_be_drawn_leaves_a_gap(log: bool) -> None:
    bad = [nan, inf, -inf, 1e300, *([0.0, -1.0, 1e-300] if log else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plots.lines("x", [[0.1, *bad, 0.2]], log=log)
        plots.lines("x", [[nan, nan]], log=log)
        plots.lines("x", [[0.5]], log=log)
    found = marks(svg, "--first")
    assert len(found) == 2
    for wrong in ("nan", "inf"):
        assert wrong not in svg


def test_ranges() -> None:
    groups = {"a": [0.1, 0.2, 0.9], "none": [nan], "b": [0.4], "c": [0.5, 0.7]}
    svg = plots.ranges("x", "ratio", groups)
    found = marks(svg, "--first")
    assert_affine(found[:, 0], np.array([0.2, 0.4, 0.6]), 1)  # medians
    assert_affine(found[:, 1], np.arange(3.0), 1)
    assert ">none<" not in svg and ">a</text>" in svg


def test_bars() -> None:
    svg = plots.bars("x", "seconds", {"one": 1.0, "two": 3.0, "zero": 0.0})
    paths = [
        path.get("d", "")
        for path in ElementTree.fromstring(svg).iter("path")
        if path.get("style", "").startswith("fill: var(--first)")
    ]
    xs = [[float(x) for x in re.findall(r"[ML] ([-\d.]+)", path)] for path in paths]
    widths = [max(x) - min(x) for x in xs]
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-4) and widths[2] == 0


def drawings() -> list[Callable[[], str]]:
    return [
        lambda: plots.lines("a < b", [RAMP, RAMP], log=True),
        lambda: plots.lines("band", [RAMP], band=(RAMP, RAMP)),
        lambda: plots.ranges("ranges", "x", {"q_proj": RAMP}),
        lambda: plots.bars("bars", "x", {"q_proj": 1.0}),
    ]


@pytest.mark.parametrize("draw", drawings())
def test_svg_takes_its_looks_from_the_page(draw: Callable[[], str]) -> None:
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()  # no colour of its own
    variables = set(re.findall(r"var\((--\w+)\)", svg))
    assert variables <= set(re.findall(r"(--\w+):", plots.STYLE)) and "--first" in variables
    assert "font-family" not in svg and "<style" not in svg
    assert "xmlns" not in svg and "http" not in svg
    assert "".join(text.text or "" for text in root.iter("text"))
    assert draw() == svg


def test_the_style_has_both_settings() -> None:
    light, dark = plots.STYLE.split("prefers-color-scheme: dark")
    for variable in ("ink", "muted", "grid", "first", "second"):
        assert re.search(rf"--{variable}: #\w+", light) and re.search(rf"--{variable}: #\w+", dark)


@pytest.mark.parametrize(
    "name", ["$x$", r"$\frac$", "<b>&amp;", "_hidden", "x\n" * 50, "é漢\ud800", "", "#010101"]
)
def test_labels_of_any_text(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plots.bars(name, "x", {name: 1.0, "plain": 2.0})
    root = ElementTree.fromstring(svg.encode("utf-8", "replace"))
    texts = [text.text or "" for text in root.iter("text")]
    assert "plain" in texts and all(len(text) <= 20 for text in texts)


def test_the_users_settings_do_not_matter() -> None:
    import matplotlib

    expected = plots.lines("x", [RAMP])
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9}):
        assert plots.lines("x", [RAMP]) == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SalienceError, match=r"pip install .salience.plots") as caught:
        plots.lines("x", [RAMP])
    assert "\n" not in str(caught.value)
