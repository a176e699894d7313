"""Small static plots as inline SVG, drawn by matplotlib (the extra `plots`).

matplotlib writes fixed colours, and a page that follows the reader's dark or light setting needs
variables. So everything is drawn in placeholder colours, each of which becomes a CSS variable in
the SVG afterwards; `STYLE` gives the variables their values for both settings. The two colours of
data (blue and orange of Okabe and Ito) are told apart by all kinds of colour vision, and what they
draw differs in shape too. Text stays text. Titles and legends are left to the page, whose lines
wrap on a narrow screen as an SVG's do not; `key` draws the legend's marks.

The trade-off against a plotting library in JavaScript: no zoom and no tooltips, but a page of a few
hundred kilobytes that opens from disk, runs no script and prints.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import inf, isfinite, log10, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from salience.errors import SalienceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = """
:root { --ink: #1a1c1f; --muted: #5b6169; --grid: #d5d9de; --first: #0072b2; --second: #c75000; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e8eaed; --muted: #a4abb5; --grid: #3a4048; --first: #56b4e9; --second: #f0a000; } }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
svg text { font-family: inherit; }
"""

_MUTED, _GRID, _FIRST, _SECOND = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {_MUTED: "--muted", _GRID: "--grid", _FIRST: "--first", _SECOND: "--second"}
# A series is told by its place: the first is solid with full marks, the second dashed with open.
_SERIES: tuple[dict[str, Any], ...] = (
    {"color": _FIRST, "marker": "o", "linestyle": "-", "zorder": 3},
    {"color": _SECOND, "marker": "s", "linestyle": (0, (3, 2)), "markerfacecolor": "none"},
)
_WIDTH, _HEIGHT = 4.4, 2.2  # inches; small, so that ten points can be read on a phone
_WIDE, _TALL = 7.0, 3.2  # of a plot that has the whole width
_LABEL_LENGTH = 20
_LARGEST = 1e30  # beyond it axes overflow

Limits = tuple[float, float]


def lines(
    label: str,
    series: Sequence[Sequence[float]],
    *,
    log: bool = False,
    limits: Limits | None = None,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
) -> str:
    """One or two series over the blocks.

    Args:
        label: what is drawn, for those who hear the page.
        series: a value for each block; what cannot be drawn leaves a gap.
        log: whether the axis of the values is logarithmic.
        limits: of that axis, to draw several plots alike.
        band: lower and upper bounds, drawn in the first series' colour.

    Returns:
        An `<svg>` element.

    Raises:
        SalienceError: matplotlib is not installed.
    """
    figure, axes = _new(_HEIGHT)
    for values, style in zip(series, _SERIES, strict=False):
        shown = [_drawable(value, log) for value in values]
        size = 4.0 if len(shown) <= 40 else 2.6
        axes.plot(shown, linewidth=1.2, markersize=size, markeredgewidth=0.9, **style)
    if band:
        low, high = ([_drawable(value, log) for value in bound] for bound in band)
        axes.fill_between(range(len(low)), low, high, color=_FIRST, alpha=0.2, linewidth=0)
    if limits:
        axes.set_ylim(*limits)
    if log:
        _log_ticks(axes)
    else:
        axes.locator_params("y", nbins=5)
    axes.set_xlim(-0.5, max(len(values) for values in series) - 0.5)
    axes.locator_params("x", integer=True, nbins=7)
    axes.set_xlabel("block")
    axes.grid(axis="y")
    return _svg(figure, label)


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a `scatter`, with the bounds of y and the mark that the page explains.

    Args:
        second: drawn as the second series is.
        front: whether the line of the best goes through it.
    """

    x: float
    y: float
    low: float
    high: float
    mark: str
    second: bool = False
    front: bool = False


def scatter(label: str, xlabel: str, ylabel: str, points: Sequence[Point], log: bool) -> str:
    """Points with their intervals, and a line through the best of them.

    Args:
        log: whether the y axis is logarithmic.

    Returns:
        An `<svg>` element.

    Raises:
        SalienceError: matplotlib is not installed.
    """
    figure, axes = _new(_TALL, _WIDE)
    shown = [p for p in points if isfinite(_drawable(p.x)) and isfinite(_drawable(p.y, log))]
    front = sorted((p.x, p.y) for p in shown if p.front)
    axes.plot(*zip(*front, strict=True), color=_MUTED, linewidth=1, linestyle=(0, (1, 2)))
    for point in shown:
        style = _SERIES[point.second]
        low, high = (_drawable(bound, log) for bound in (point.low, point.high))
        axes.plot([point.x, point.x], [low, high], color=style["color"], linewidth=1.2)
        axes.plot([point.x], [point.y], **{**style, "linestyle": "none"}, markersize=5)
    if log:
        _log_ticks(axes)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="both")
    _name_points(axes, shown, log)
    return _svg(figure, label)


def curves(
    label: str,
    xlabel: str,
    series: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    log: bool = False,
    limits: Limits | None = None,
    ticks: Sequence[float] | None = None,
    begun: Sequence[float] = (),
) -> str:
    """One or two series of (x, y).

    Args:
        log: whether y is logarithmic.
        limits: of y.
        ticks: of x, which is then logarithmic; None for a plain axis, without marks on the lines.
        begun: x where something began: upright lines.

    Returns:
        An `<svg>` element.

    Raises:
        SalienceError: matplotlib is not installed.
    """
    figure, axes = _new(_HEIGHT)
    for x in begun:
        axes.axvline(x, color=_GRID, linewidth=0.8)
    for (xs, ys), style in zip(series, _SERIES, strict=False):
        plain = {} if ticks is not None else {"marker": None}
        shown = [_drawable(value, log) for value in ys]
        axes.plot(xs, shown, **{**style, **plain}, linewidth=1.2, markersize=4.0)
    if limits:
        axes.set_ylim(*limits)
    if log:
        _log_ticks(axes)
    else:
        axes.locator_params("y", nbins=5)
    if ticks is not None:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y")
    return _svg(figure, label)


def ranges(label: str, xlabel: str, groups: Mapping[str, Sequence[float]]) -> str:
    """Smallest, quartiles, median and largest of each group, one row each.

    Returns:
        An `<svg>` element.

    Raises:
        SalienceError: matplotlib is not installed.
    """
    shown = {name: [v for v in values if isfinite(_drawable(v))] for name, values in groups.items()}
    figure, axes = _rows([name for name, values in shown.items() if values])
    for row, values in enumerate(values for values in shown.values() if values):
        low, first, median, third, high = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
        axes.hlines(row, low, high, color=_FIRST, linewidth=1.2)
        axes.hlines(row, first, third, color=_FIRST, linewidth=7, alpha=0.4)
        axes.plot([median], [row], color=_FIRST, marker="o", markersize=4)
    axes.set_xlabel(xlabel)
    axes.locator_params("x", nbins=6)
    return _svg(figure, label)


def bars(label: str, xlabel: str, values: Mapping[str, float]) -> str:
    """A bar for each value, one row each.

    Returns:
        An `<svg>` element.

    Raises:
        SalienceError: matplotlib is not installed.
    """
    figure, axes = _rows(list(values))
    shown = [_drawable(value) for value in values.values()]
    axes.barh(range(len(shown)), shown, height=0.55, color=_FIRST)
    axes.set_xlabel(xlabel)
    axes.locator_params("x", nbins=6)
    return _svg(figure, label)


def shared_limits(series: Sequence[Sequence[float]]) -> Limits | None:
    """Limits of a logarithmic axis that hold all values, None when there is nothing to draw."""
    shown = [value for values in series for value in values if isfinite(_drawable(value, True))]
    if not shown:
        return None
    return min(shown) / 1.5, max(shown) * 1.5


def key(names: Sequence[str]) -> str:
    """The legend of one or two series, as HTML."""
    marks = (
        '<path d="M0 6H28" style="stroke: var(--first); stroke-width: 2"/>'
        '<circle cx="14" cy="6" r="4" style="fill: var(--first)"/>',
        '<path d="M0 6H9M19 6H28" style="stroke: var(--second); stroke-width: 2"/>'
        '<path d="M10 2H18V10H10Z" style="fill: none; stroke: var(--second); stroke-width: 1.5"/>',
    )
    items = (
        f'<span><svg viewBox="0 0 28 12" aria-hidden="true">{mark}</svg>{escape(name)}</span>'
        for name, mark in zip(names, marks, strict=False)
    )
    return f'<p class="key">{"".join(items)}</p>'


def _name_points(axes: "Axes", points: Sequence[Point], log: bool) -> None:
    """Write each point's mark beside it; the marks of points that lie together stand together."""
    if not points:
        return
    heights = [log10(point.y) if log else point.y for point in points]
    widths = [point.x for point in points]
    tall = (max(heights) - min(heights)) or 1.0
    wide = (max(widths) - min(widths)) or 1.0
    clusters: list[list[tuple[float, float, Point]]] = []
    for point, height in sorted(zip(points, heights, strict=True), key=lambda pair: -pair[1]):
        place = (point.x / wide, height / tall, point)
        near = [c for c in clusters if abs(c[-1][0] - place[0]) < 0.08]
        near = [c for c in near if abs(c[-1][1] - place[1]) < 0.07]
        if near:
            near[0].append(place)
        else:
            clusters.append([place])
    for cluster in clusters:
        middle = cluster[len(cluster) // 2][2]
        axes.annotate(
            ", ".join(point.mark for _, _, point in cluster),
            (max(point.x for _, _, point in cluster), middle.y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=_MUTED,
        )


def _new(height: float, width: float = _WIDTH) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SalienceError("plots need matplotlib; pip install 'salience[plots]'") from None
    with _settings(""):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _rows(names: Sequence[str]) -> "tuple[Figure, Axes]":
    figure, axes = _new(0.75 + 0.24 * len(names))
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return figure, axes


def _settings(salt: str) -> Any:
    """matplotlib's own defaults, whatever the user's are, with our colours."""
    from matplotlib import style

    ours = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": ascii(salt),  # ids are the figure's own, and the same in each run
        "text.parse_math": False,  # a name may hold dollar signs
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _MUTED,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "text.color": _MUTED,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
    }
    return style.context(["default", ours])


def _log_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    span = log10(high / low)
    steps = (1.0, 2.0, 5.0) if span < 1.3 else (1.0, 3.0) if span < 2.5 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    # matplotlib's own would write powers of ten as formulas.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _drawable(value: float, log: bool = False) -> float:
    """A value an axis can hold, or a gap."""
    lowest = 1 / _LARGEST if log else -inf
    return value if lowest <= value and abs(value) <= _LARGEST else nan


def _label(text: str) -> str:
    """Text from a file, short and in characters that every font has."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return plain if len(plain) <= _LABEL_LENGTH else plain[: _LABEL_LENGTH - 3] + "..."


def _svg(figure: "Figure", label: str) -> str:
    """The figure as an element that a page can hold many of, in the page's colours."""
    stream = io.StringIO()
    # Without these, none of the metadata is written.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _settings(label):
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    box = head[head.index("viewBox=") :].split('"')[1]
    # Inline, its style would be of the whole page; `STYLE` has it.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*; ?", "", body).replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="|url\()#(\w+)', body))
    body = re.sub(r' id="([^"]*)"', lambda id_: id_[0] if id_[1] in used else "", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{body.strip()}'
