"""A comparison as text: the words and numbers that the terminal, Markdown and the page share."""

from salience.evaluation.comparison import Cell, Comparison, Row
from salience.evaluation.statistics import digits
from salience.reports.html import size

# What is shown of each metric: title, and how.
_TITLES = {
    "disk": "disk",
    "bits": "bits a weight",
    "ram@load": "RAM loaded",
    "ram": "RAM peak",
    "vram@load": "VRAM loaded",
    "vram": "VRAM peak",
    "perplexity": "perplexity",
    "kl": "KL",
    "agreement": "agreement",
}


def title(metric: str) -> str:
    """A metric's name in a table."""
    name, at, batch = metric.partition("@")
    if at and name in ("prefill", "decode"):
        return f"{name} tokens/s, batch {batch}"
    return _TITLES.get(metric, metric)


def ordered(comparison: Comparison) -> list[str]:
    """The metrics, those of quality first."""
    metrics = comparison.metrics
    first = [name for name in ("perplexity", "kl", "agreement") if name in metrics]
    tasks = [name for name in metrics if name not in _TITLES and not is_speed(name)]
    speed = [name for name in metrics if is_speed(name)]
    rest = [name for name in metrics if name not in (*first, *tasks, *speed)]
    return [*first, *tasks, *rest, *speed]


def show(metric: str, cell: Cell | None) -> tuple[str, str]:
    """A value, and its interval as "low to high"; empty where there is none."""
    if cell is None:
        return "", ""
    value, low, high = cell.value.value, cell.value.low, cell.value.high
    if metric == "disk" or metric.startswith(("ram", "vram")):
        return size(value), ""
    if low == high:
        return f"{value:.2f}", ""
    scale = 1.0 if metric in _TITLES or is_speed(metric) else 100.0  # tasks in points
    scale = 100.0 if metric == "agreement" else scale
    spread = cell.value.half * scale
    texts = [digits(each * scale, spread) for each in (value, low, high)]
    if metric == "perplexity":  # whose value is compared with others' to two places
        texts[0] = f"{value:.2f}"
    unit = " %" if metric == "agreement" else ""
    return f"{texts[0]}{unit}", f"{texts[1]} to {texts[2]}" if spread < 1e300 else "unknown"


def beside(metric: str, cell: Cell | None) -> str:
    """What a cell says beside the reference: its verdict, or its ratio."""
    if cell is None or cell.change is None:
        return ""
    if cell.verdict is not None and not is_speed(metric):
        return cell.verdict.text
    change = cell.change
    if change.low == change.high:
        return f"{change.value:.2f} \u00d7"
    value, half = digits(change.value, change.half), digits(change.half, change.half)
    return f"{value} \u00b1 {half} \u00d7" if change.half < 1e300 else f"{change.value:.2f} \u00d7"


def markdown(comparison: Comparison) -> str:
    """The whole comparison as Markdown."""
    metrics = ordered(comparison)
    lines = [f"# {_plain(comparison.reference.name)} and {len(comparison.rows) - 1} others", ""]
    lines += [f"**{_plain(line)}**" for line in comparison.conclusion()] + [""]
    for failure in comparison.failures or ():
        lines.append(f"- gate: {_plain(str(failure))}")
    if comparison.failures:
        lines.append("")
    lines.append("| model | verdict | " + " | ".join(_plain(title(m)) for m in metrics) + " |")
    lines.append("|---|---|" + "---|" * len(metrics))
    for row in comparison.rows:
        cells = [_markdown_cell(metric, row) for metric in metrics]
        name, said = _plain(row.name), _plain(row_verdict(row, comparison.reference))
        lines.append(f"| {name} | {said} | {' | '.join(cells)} |")
    lines += ["", "Intervals are of 95 %.", ""]
    lines += [f"- {_plain(name)}: {_plain(text)}" for name, text in comparison.protocol.items()]
    if comparison.command:
        lines += ["", "```", comparison.command.replace("```", "` ` `"), "```"]
    return "\n".join(lines) + "\n"


def row_verdict(row: Row, reference: Row) -> str:
    """What is said of a model in one cell."""
    if row is reference:
        return "the reference"
    if row.error:
        return f"could not be measured: {row.error}"
    return row.verdict.text if row.verdict is not None else "quality was not measured"


def _markdown_cell(metric: str, row: Row) -> str:
    value, interval = show(metric, row.cells.get(metric))
    said = beside(metric, row.cells.get(metric)) if is_speed(metric) or metric == "disk" else ""
    return " ".join(part for part in (value, f"({interval})" if interval else "", said) if part)


def is_speed(metric: str) -> bool:
    """Whether a metric is tokens a second."""
    name, at, batch = metric.partition("@")
    return name in ("prefill", "decode") and bool(at) and batch.isdecimal()


def _plain(text: str) -> str:
    """Text of unknown origin in a Markdown table."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.splitlines())
