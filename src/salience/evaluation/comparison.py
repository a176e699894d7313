"""A comparison: rows of measurements with their intervals, and verdicts against the reference.

Made of receipts alone (`salience.evaluation.receipt`), so that a table can be made again without
measuring again. Everything a page or a file says is computed here, once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from salience.evaluation.gate import POINTS, RATIO, Condition, Failure, check_gate
from salience.evaluation.receipt import Receipt
from salience.evaluation.statistics import (
    Interval,
    Verdict,
    exact,
    mean_interval,
    perplexity_interval,
    perplexity_ratio,
    rate_interval,
    rate_ratio,
    score_difference,
    score_interval,
    sign_test,
    verdict,
)

# Of several metrics of a task the first of these is its score.
_SCORES = ("acc_norm", "acc", "exact_match", "f1")


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one model.

    Args:
        value: with its interval, in the metric's unit.
        change: to the reference on the same chunks, documents or tokens: a ratio, or for a task's
            score a difference; None for the reference and where there is nothing to compare.
        verdict: what that says; None where it is not computed.
        sign: of tasks, the chance that a fair coin parts the documents as unevenly.
    """

    value: Interval
    change: Interval | None = None
    verdict: Verdict | None = None
    sign: float | None = None


@dataclass(slots=True)
class Row:
    """One model.

    Args:
        name: in tables.
        model: what was loaded.
        cells: by metric; empty for what could not be measured.
        error: why it could not be.
        receipt: what was measured.
        verdict: on its quality, in words.
        recipe: how it was made, "" for a checkpoint.
    """

    name: str
    model: str
    recipe: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)
    error: str = ""
    verdict: Verdict | None = None
    receipt: Receipt | None = None
    quantize_seconds: float = 0.0


@dataclass(slots=True)
class Comparison:
    """All of it; the first row is the reference.

    Args:
        protocol: how each thing was measured, in words, by its name.
        command: that made it.
        failures: of the gate; None without one.
        gate: as it was written.
        seconds: the whole took.
    """

    rows: list[Row]
    protocol: dict[str, str]
    command: str
    versions: dict[str, Any]
    seconds: float = 0.0
    gate: str = ""
    failures: list[Failure] | None = None

    @property
    def reference(self) -> Row:
        return self.rows[0]

    @property
    def metrics(self) -> list[str]:
        """Those that any row has, in their order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.cells))

    def conclusion(self) -> list[str]:
        """What it came to, in sentences."""
        return _conclusion(self)

    def as_json(self) -> dict[str, Any]:
        """All values, verdicts and receipts, as plain JSON; what is unknown is null."""
        values = asdict(self)
        values["failures"] = None if self.failures is None else [str(f) for f in self.failures]
        values["conclusion"] = self.conclusion()
        return _plain(values)


def make_row(row: Row, reference: Row | None) -> None:
    """Fill in the cells and the verdict of a row that was measured.

    Args:
        row: with its receipt.
        reference: the row of the reference, with its receipt; None for itself or without one.
    """
    own = row.receipt
    if own is None:
        return
    other = reference.receipt if reference is not None else None
    cells = row.cells
    cells["disk"] = _counted(own.disk, other.disk if other else None)
    cells["bits"] = _counted(own.bits, other.bits if other else None)
    for when in ("load", "peak"):
        for kind in ("ram", "vram"):
            value = own.memory[when][kind]
            theirs = other.memory[when][kind] if other else None
            if value:
                cells[f"{kind}@load" if when == "load" else kind] = _counted(value, theirs)
    theirs_by_batch = {each["batch"]: each for each in other.speed} if other else {}
    for what in ("prefill", "decode"):
        for each in own.speed:
            batch = each["batch"]
            rates = theirs_by_batch.get(batch)
            change = rate_ratio(each[what], rates[what]) if rates else None
            cells[f"{what}@{batch}"] = Cell(
                rate_interval(each[what]), change, _said(change, reference, True)
            )
    if own.text is not None:
        _text_cells(cells, own.text, other.text if other else None, reference)
    for task, metrics in own.tasks.items():
        theirs_of = other.tasks.get(task, {}) if other else {}
        _task_cell(cells, task, metrics, theirs_of, reference)
    row.verdict = _quality(cells, own, reference)


def measured_for(row: Row, conditions: Sequence[Condition]) -> dict[Condition, Interval | None]:
    """What a row came to for each condition of a gate, in the unit of its limit."""
    return {each: _measured(row, each) for each in conditions}


def judge(comparison: Comparison, text: str, conditions: Sequence[Condition]) -> None:
    """Hold all models but the reference against a gate."""
    comparison.gate = text
    failures: list[Failure] = []
    for row in comparison.rows[1:]:
        if row.error:
            failures.append(Failure(row.name, conditions[0], None, row.error))
        else:
            failures += check_gate(conditions, {row.name: measured_for(row, conditions)})
    comparison.failures = failures


def _measured(row: Row, condition: Condition) -> Interval | None:
    name = condition.metric
    if name in ("decode", "prefill"):
        timed = [metric for metric in row.cells if metric.startswith(f"{name}@")]
        name = min(timed, key=lambda metric: int(metric.partition("@")[2]), default=name)
    cell = row.cells.get(name)
    if cell is None:
        return None
    found = cell.change if condition.relative else cell.value
    if found is None or condition.kind != POINTS:
        return found
    return found.scaled(100)


def _counted(value: float, reference: float | None) -> Cell:
    return Cell(exact(value), exact(value / reference) if reference else None)


def _text_cells(
    cells: dict[str, Cell],
    own: Mapping[str, Any],
    other: Mapping[str, Any] | None,
    reference: Row | None,
) -> None:
    tokens = own["tokens"]
    change = perplexity_ratio(own["nll"], other["nll"], tokens) if other else None
    cells["perplexity"] = Cell(
        perplexity_interval(own["nll"], tokens), change, _said(change, reference, False)
    )
    if own["kl"] is not None:
        cells["kl"] = Cell(mean_interval(own["kl"], tokens))
        agreement = mean_interval(own["agree"], tokens)
        bounded = Interval(agreement.value, max(0.0, agreement.low), min(1.0, agreement.high))
        cells["agreement"] = Cell(bounded)


def _task_cell(
    cells: dict[str, Cell],
    task: str,
    metrics: Mapping[str, Mapping[str, float]],
    theirs: Mapping[str, Mapping[str, float]],
    reference: Row | None,
) -> None:
    metric = score_metric(metrics)
    if metric is None:
        return
    documents = metrics[metric]
    value = score_interval(list(documents.values()))
    same = [key for key in documents if key in theirs.get(metric, {})]
    if not same or reference is None:
        cells[task] = Cell(value)
        return
    pair = [documents[key] for key in same], [theirs[metric][key] for key in same]
    change = score_difference(*pair)
    said = verdict(change.scaled(100), "points", reference.name, True)
    cells[task] = Cell(value, change, said, sign_test(*pair))


def score_metric(metrics: Mapping[str, Any]) -> str | None:
    """The metric of a task that is its score: lm-eval names them "acc,none"."""
    for wanted in _SCORES:
        for name in metrics:
            if name.partition(",")[0] == wanted and metrics[name]:
                return name
    return next((name for name in metrics if metrics[name]), None)


def _said(change: Interval | None, reference: Row | None, higher: bool) -> Verdict | None:
    """The verdict on a ratio, in percent."""
    if change is None or reference is None:
        return None
    percent = Interval(*(100 * (each - 1) for each in (change.value, change.low, change.high)))
    return verdict(percent, "%", reference.name, higher)


def _quality(cells: Mapping[str, Cell], own: Receipt, reference: Row | None) -> Verdict | None:
    """The verdict on all that was measured of quality."""
    if reference is None:
        return None
    said = [(name, cells[name].verdict) for name in ("perplexity", *own.tasks) if name in cells]
    known = [(name, each) for name, each in said if each is not None]
    if not known:
        return None
    kinds = {each.kind for _, each in known}
    order = ("worse", "better", "same", "unknown")
    kind = next(each for each in order if each in kinds)
    apart = [f"{name} {each.text}" for name, each in known if each.kind in ("worse", "better")]
    if not apart:
        names = " and ".join(name for name, _ in known)
        return Verdict(
            kind, f"{known[0][1].text} on {names}" if len(known) > 1 else known[0][1].text
        )
    alike = [name for name, each in known if each.kind == "same"]
    tail = f"; {', '.join(alike)} not distinguishable" if alike else ""
    return Verdict(kind, "; ".join(apart) + tail)


def _conclusion(comparison: Comparison) -> list[str]:
    reference, others = comparison.reference, comparison.rows[1:]
    lines = []
    if comparison.failures is not None:
        failing = {failure.model for failure in comparison.failures}
        held = [row.name for row in others if row.name not in failing]
        lost = [row.name for row in others if row.name in failing]
        held_text = f"The gate holds for {_and(held)}" if held else "The gate holds for no model"
        lines.append(f"{held_text}{f', and not for {_and(lost)}' if held and lost else ''}.")
    if reference.error:
        return [*lines, f"The reference could not be measured: {reference.error}"]
    judged = [row for row in others if row.verdict is not None]
    same = [row for row in judged if row.verdict and row.verdict.kind in ("same", "better")]
    if same:
        small = min(same, key=lambda row: row.cells["disk"].value.value)
        names = _and([row.name for row in same])
        are = "is" if len(same) == 1 else "are"
        lines.append(
            f"{names} {are} not worse than {reference.name} in what was measured"
            + (
                f"; the smallest of them is {_traits(small)}."
                if len(same) > 1
                else f": {_traits(small)}."
            )
        )
    worse = [row for row in judged if row.verdict and row.verdict.kind == "worse"]
    with_text = [row for row in worse if "perplexity" in row.cells]
    if worse and not same and with_text:
        best = min(with_text, key=lambda row: row.cells["perplexity"].value.value)
        text = best.cells["perplexity"].verdict
        who = "Every other model is" if len(worse) > 1 else f"{best.name} is"
        lines.append(
            f"{who} measurably worse than {reference.name}"
            + (
                f". The nearest is {_traits(best)}: perplexity {text.text}."
                if text and len(worse) > 1
                else f": perplexity {text.text}. It is {_traits(best, False)}."
                if text
                else "."
            )
        )
    elif worse:
        lines.append(f"Measurably worse: {_and([row.name for row in worse])}.")
    unknown = [row.name for row in judged if row.verdict and row.verdict.kind == "unknown"]
    if unknown:
        lines.append(f"Too little was measured to judge {_and(unknown)}.")
    failed = [row.name for row in others if row.error]
    if failed:
        lines.append(f"Could not be measured: {_and(failed)}.")
    return lines


def _traits(row: Row, named: bool = True) -> str:
    """A model's name, size and speed beside the reference's."""
    parts = []
    disk = row.cells["disk"].change
    if disk is not None:
        parts.append(f"{disk.value:.2f} times the bytes")
    for name, cell in row.cells.items():
        if name.startswith("decode@") and cell.change is not None:
            batch = name.partition("@")[2]
            parts.append(f"{cell.change.value:.2f} times the tokens a second (batch {batch})")
            break
    text = ", ".join(parts)
    return f"{row.name} ({text})" if named else text


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["RATIO", "Cell", "Comparison", "Row", "judge", "make_row", "score_metric"]
