"""A comparison as one HTML page: the verdict in words, the table, the plots, how to read them."""

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite, nan
from typing import Any

from salience.errors import SalienceError
from salience.evaluation.comparison import Cell, Comparison, Row
from salience.evaluation.comparison_text import (
    beside,
    is_speed,
    ordered,
    row_verdict,
    show,
    title,
)
from salience.evaluation.statistics import Interval, exact
from salience.reports import plots
from salience.reports.html import document, figure, figures, seconds

_MOST_PLOTS = 24  # of one sort
_FEW = 5  # lines that are shown unfolded

_STYLE = """
.lead { background: var(--card); border-radius: 8px; padding: 14px 18px; margin: 16px 0; }
.lead p { color: var(--ink); font-size: 1.15rem; margin: 4px 0; max-width: none; }
.lead ul { margin: 8px 0 0; padding-left: 1.2rem; }
.kind { display: inline-block; border-radius: 4px; padding: 0 7px; font-size: .8rem;
  border: 1px solid; white-space: nowrap; }
.same, .pass { color: var(--good); } .better { color: var(--good); }
.worse, .fail { color: var(--bad); } .unknown { color: var(--muted); }
:root { --good: #00664b; --bad: #a32d00; }
@media (prefers-color-scheme: dark) { :root { --good: #4fd0a5; --bad: #ff9d6b; } }
.models { min-width: 100%; }
.models th { vertical-align: bottom; white-space: normal; min-width: 5.5rem; }
.models td { padding-right: 18px; }
.models tbody th { vertical-align: top; }
.models b { font-weight: 600; }
.models small { display: block; color: var(--muted); font-size: .8rem; }
.models .model, .models thead th:first-child { position: sticky; left: 0;
  background: var(--page); z-index: 1; max-width: 11rem; white-space: normal;
  overflow-wrap: anywhere; padding-right: 12px; }
.models .model { color: var(--ink); font-weight: 600; }
.models .model i { color: var(--muted); font-style: normal; font-weight: 400; }
.models .verdict { min-width: 15rem; white-space: normal; }
.one figure svg { max-width: 760px; }
pre { background: var(--card); border-radius: 8px; padding: 10px 14px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .875rem; }
dt { font-weight: 600; margin-top: 10px; } dd { margin: 0; color: var(--muted); max-width: 75ch; }
"""

_BADGES = {
    "same": "not distinguishable",
    "worse": "worse",
    "better": "better",
    "unknown": "unknown",
}

_READING = {
    "perplexity": "How surprised the model is by the text, as a number of equally likely next "
    "words; lower is better. Compare it only with numbers of the same text and context.",
    "KL": "How far each predicted distribution is from the reference's, in nats a token; 0 is "
    "the same model. It sees small damage that perplexity averages away.",
    "agreement": "The share of tokens where both models would say the same next word.",
    "intervals": "The small numbers below a value hold the true value in 95 of 100 such "
    "measurements. Intervals of two models may overlap although the models differ: the verdict "
    "is not taken from them but from the differences on the same chunks or documents.",
    "not distinguishable": "The interval of the difference holds 0. That is no proof that the "
    "models are equal: with more text a smaller difference can be told. What it still allows is "
    "in brackets.",
    "many comparisons": "Of twenty models that equal the reference, one will be told apart by "
    "chance at 95 %.",
    "memory": "Of the whole process, so that Python and its libraries are in it; compare "
    "differences where models are small.",
}


def page(comparison: Comparison) -> str:
    """The whole page; without matplotlib it has no plots and says so."""
    reference, others = comparison.reference, len(comparison.rows) - 1
    heading = escape(f"{reference.name} and {others} other{'s' if others != 1 else ''}")
    try:
        drawn = "".join(part(comparison) for part in (_quality, _latency, _memory, _layers))
    except SalienceError as error:
        drawn = f"<h2>Plots</h2><p>There are none: {escape(str(error))}.</p>"
    body = f"""<h1>{heading}</h1>
{_lead(comparison)}
{_table(comparison)}
{drawn}
{_reading()}
{_protocol(comparison)}"""
    return document(f"{heading} - salience compare", body, _STYLE)


def _lead(comparison: Comparison) -> str:
    lines = [f"<p>{escape(line)}</p>" for line in comparison.conclusion()]
    if comparison.failures is not None:
        kind, word = ("fail", "gate failed") if comparison.failures else ("pass", "gate passed")
        wanted = f'<span class="kind {kind}">{word}</span> <code>{escape(comparison.gate)}</code>'
        items = "".join(f"<li>{escape(str(each))}</li>" for each in comparison.failures)
        count = len(comparison.failures)
        opened = " open" if count <= _FEW else ""
        what = f"{count} condition{'s' if count != 1 else ''} not met"
        details = f"<details{opened}><summary>{what}</summary><ul>{items}</ul></details>"
        lines.append(f"<p>{wanted}</p>" + (details if count else ""))
    return f'<div class="lead">{"".join(lines)}</div>'


def _table(comparison: Comparison) -> str:
    metrics = ordered(comparison)
    head = "".join(f'<th scope="col">{escape(title(metric))}</th>' for metric in metrics)
    rows = []
    for number, row in enumerate(comparison.rows, 1):
        name = f'<th scope="row" class="model"><i>{number}</i> {escape(row.name)}</th>'
        cells = [_cell(metric, row.cells.get(metric)) for metric in metrics]
        said = _verdict(row, comparison.reference)
        rows.append(f'<tr>{name}<td class="verdict">{said}</td>{"".join(cells)}</tr>')
    return (
        "<h2>All models</h2><p>Below each value its interval of 95 %, and what it comes to beside "
        "the reference. On a narrow screen the table scrolls.</p>"
        '<div class="wide" tabindex="0"><table class="models"><thead><tr>'
        f'<th scope="col">model</th><th scope="col">verdict</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _verdict(row: Row, reference: Row) -> str:
    text = escape(row_verdict(row, reference))
    if row is reference:
        return f"<small>{text}</small>"
    if row.error:
        return f'<span class="kind fail">failed</span><small>{text}</small>'
    if row.verdict is None:
        return f"<small>{text}</small>"
    kind = row.verdict.kind
    return f'<span class="kind {kind}">{_BADGES[kind]}</span><small>{text}</small>'


def _cell(metric: str, cell: Cell | None) -> str:
    value, interval = show(metric, cell)
    if not value:
        return "<td></td>"
    # The verdict on quality has a column of its own.
    said = beside(metric, cell) if is_speed(metric) or (cell and cell.verdict is None) else ""
    notes = "".join(f"<small>{escape(text)}</small>" for text in (interval, said) if text)
    return f"<td><b>{escape(value)}</b>{notes}</td>"


def _quality(comparison: Comparison) -> str:
    """Perplexity beside the reference's, or what else there is of quality, against bytes."""
    tasks = [task for row in comparison.rows if row.receipt for task in row.receipt.tasks]
    known = [name for name in ("perplexity", *tasks) if name in comparison.metrics]
    if not known:
        return ""
    metric = known[0]
    found: list[tuple[int, Row, Interval]] = []
    for number, row in enumerate(comparison.rows, 1):
        cell = row.cells.get(metric)
        if cell is not None:
            found.append((number, row, _beside_reference(metric, cell)))
    sign = 1.0 if metric == "perplexity" else -1.0
    sizes = [(row.cells["disk"].value.value, sign * y.value) for _, row, y in found]
    points = [
        plots.Point(
            x=row.cells["disk"].value.value / 2**20,
            y=y.value,
            low=y.low,
            high=y.high,
            mark=str(number),
            second=row is comparison.reference,
            front=not any(
                other[0] <= own[0] and other[1] <= own[1] and other != own for other in sizes
            ),
        )
        for (number, row, y), own in zip(found, sizes, strict=True)
    ]
    if len(points) < 2:
        return ""
    what = "perplexity / reference's" if metric == "perplexity" else f"{metric}, points beside"
    low, high = min(p.y for p in points), max(p.y for p in points)
    log = metric == "perplexity" and low > 0 and high / low > 1.5
    svg = plots.scatter(f"{what} against bytes", "disk, MiB", what, points, log)
    names = ", ".join(f"{number} {row.name}" for number, row, _ in found)
    better = "up" if sign < 0 else "down"
    note = (
        f"left is smaller, {better} is better; the dotted line joins the models that no other "
        f"beats in both; upright lines: 95 %. {names}."
    )
    return (
        "<h2>Quality against bytes</h2>"
        + plots.key(["a model", "the reference"])
        + f'<div class="one">{figure("", svg, note)}</div>'
    )


def _beside_reference(metric: str, cell: Cell) -> Interval:
    """The value to draw: relative to the reference, for its interval is the narrower one."""
    if metric == "perplexity":
        return cell.change or exact(1.0)
    return cell.change.scaled(100) if cell.change else exact(0.0)


def _latency(comparison: Comparison) -> str:
    series = {row.name: _milliseconds(row) for row in comparison.rows if row.receipt}
    series = {name: pair for name, pair in series.items() if pair[0]}
    own = series.get(comparison.reference.name)
    if not series or own is None:
        return ""
    limits = plots.shared_limits([ys for _, ys in series.values()])
    ticks = sorted({x for xs, _ in series.values() for x in xs})
    drawn = [
        figure(
            name,
            plots.curves(
                f"milliseconds a token of {name}",
                "replies at once",
                [pair, own],
                log=True,
                limits=limits,
                ticks=ticks,
            ),
        )
        for name, pair in _first(series, comparison)
    ]
    return (
        "<h2>Latency against batch</h2><p>Milliseconds until each reply has its next token; lower "
        "is better. All plots have the same axes.</p>"
        + plots.key(["the model", "the reference"])
        + figures(drawn)
    )


def _milliseconds(row: Row) -> tuple[list[float], list[float]]:
    pairs = [
        (float(name.partition("@")[2]), cell.value.value)
        for name, cell in row.cells.items()
        if name.startswith("decode@")
    ]
    return [batch for batch, _ in pairs], [1e3 * batch / rate for batch, rate in pairs]


def _memory(comparison: Comparison) -> str:
    with_gpu = any(row.receipt and row.receipt.memory["peak"]["vram"] for row in comparison.rows)
    column = 2 if with_gpu else 1
    series = {
        row.name: (
            [line[0] for line in row.receipt.timeline],
            [line[column] / 2**20 for line in row.receipt.timeline],
        )
        for row in comparison.rows
        if row.receipt is not None and row.receipt.timeline
    }
    own = series.get(comparison.reference.name)
    if own is None:
        return ""
    top = max(max(ys) for _, ys in series.values()) or 1.0
    begun = {
        row.name: [mark[0] for mark in row.receipt.marks] for row in comparison.rows if row.receipt
    }
    drawn = [
        figure(
            name,
            plots.curves(
                f"memory of {name} over time, MiB",
                "seconds",
                [pair, own],
                limits=(0.0, 1.08 * top),
                begun=begun[name],
            ),
        )
        for name, pair in _first(series, comparison)
    ]
    kind = "torch has reserved on the GPU" if with_gpu else "the process has in RAM"
    marks = comparison.reference.receipt.marks if comparison.reference.receipt else []
    steps = ", ".join(str(mark[1]) for mark in marks)
    return (
        f"<h2>Memory over time</h2><p>MiB that {kind}, from the start of loading to the end of "
        f"generating. An upright line is where something of the model's began: {escape(steps)}.</p>"
        + plots.key(["the model", "the reference"])
        + figures(drawn)
    )


def _layers(comparison: Comparison) -> str:
    series = {
        row.name: (_blocks(row.receipt.layers, 1), _blocks(row.receipt.layers, 2))
        for row in comparison.rows
        if row.receipt is not None and row.receipt.layers
    }
    limits = plots.shared_limits([values for pair in series.values() for values in pair])
    if limits is None:
        return ""
    drawn = [
        figure(name, plots.lines(f"output error of {name}", pair, log=True, limits=limits))
        for name, pair in list(series.items())[:_MOST_PLOTS]
    ]
    return (
        "<h2>Error over the layers</h2><p>Mean over a block's linears of the error of the output, "
        "relative to its energy, as it was found when the model was quantized (on the calibration "
        "text; without one, as if inputs were alike). Lower is better.</p>"
        + plots.key(["what was written", "plain rounding"])
        + figures(drawn)
    )


def _blocks(layers: Sequence[Sequence[Any]], column: int) -> list[float]:
    """The mean of each block, which ends with the first number of a linear's name."""
    blocks: dict[str, list[float]] = {}
    for layer in layers:
        parts = str(layer[0]).split(".")
        end = next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)
        blocks.setdefault(".".join(parts[:end]), []).append(float(layer[column]))
    means = [sum(values) / len(values) for values in blocks.values()]
    return [mean if isfinite(mean) else nan for mean in means]


def _first(series: Mapping[str, Any], comparison: Comparison) -> list[tuple[str, Any]]:
    """The others, as many as are drawn; the reference is in each plot."""
    own = comparison.reference.name
    return [pair for pair in series.items() if pair[0] != own][:_MOST_PLOTS]


def _reading() -> str:
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in _READING.items())
    return f"<h2>How to read it</h2><dl>{items}</dl>"


def _protocol(comparison: Comparison) -> str:
    facts = dict(comparison.protocol)
    made = [
        f"{row.name}: {row.recipe} of {row.model}, {seconds(row.quantize_seconds)}"
        for row in comparison.rows
        if row.recipe and not row.error
    ]
    if made:
        facts["made on the fly"] = "; ".join(made)
    facts["all of it"] = seconds(comparison.seconds)
    facts["machine"] = ", ".join(
        f"{name} {value}" for name, value in comparison.versions.items() if value is not None
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    command = f"<pre>{escape(comparison.command)}</pre>" if comparison.command else ""
    return (
        f'<h2>How it was measured</h2>{command}<table class="facts"><tbody>{rows}</tbody></table>'
    )
