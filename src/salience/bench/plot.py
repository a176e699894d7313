"""Lines of a benchmark as a PNG, drawn by matplotlib (the extra `plots`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from salience.errors import SalienceError

if TYPE_CHECKING:
    from matplotlib.artist import Artist

# Okabe and Ito's, which all kinds of colour vision tell apart; the marks differ too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKS = "osv^Dx+"
_COLUMNS = 4
_WIDTH, _HEIGHT = 3.6, 3.0  # inches of a panel


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes.

    Args:
        title: above it.
        lines: name -> (x, y) pairs.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel], xlabel: str, ylabel: str, path: Path, level: bool) -> None:
    """Panels side by side, both axes logarithmic, with the same lines in the same colours.

    Args:
        panels: at least one.
        xlabel: below each.
        ylabel: at the left.
        path: of the PNG.
        level: draw a line at 1, where a kernel would be at its floor.

    Raises:
        SalienceError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        raise SalienceError("--plot needs matplotlib; pip install matplotlib") from None
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, points in panel.lines.items():
            i = names.index(name)
            style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKS[i % len(_MARKS)]}
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, label=name, linewidth=1.2, markersize=4, **style)
        if level:
            axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(xlabel)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(color="#dddddd", linewidth=0.6)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    handles: dict[str, Artist] = {}
    for axes in grid.flat:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles)
    )
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise SalienceError(f"{path} cannot be written: {error.strerror}") from None
