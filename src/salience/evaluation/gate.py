"""The gate: conditions that a model must meet to replace another, for use in CI.

    perplexity<=1.03x; kl<=0.05; agreement>=0.9; mmlu>=-1.0; decode>=1.5x; disk<=0.35x

Conditions are parted by `;`. Each is a metric, `<=` or `>=`, and a limit:

    1.03x   a ratio to the reference: perplexity, prefill, decode, disk, bits, ram, vram
    0.05    the value itself: perplexity, kl, agreement, decode and prefill (tokens/s), bits
    -1.0    with a sign: points (hundredths) of difference to the reference, for tasks;
            without one, 61.5, the score itself in points
    8GiB    a size: disk, ram, vram

`ppl` is perplexity. `decode` is at the smallest batch timed, `decode@16` at that one. `ram`, `vram`
are the peaks while text is generated, `ram@load` and `vram@load` what the loaded model takes. Any
other name is a task's.

A condition holds only when it holds with 95 % confidence: the bound of the interval on the limit's
side must meet it. What could not be measured does not hold.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from salience.errors import SalienceError
from salience.evaluation.statistics import Interval

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_CONDITION = re.compile(
    r"(?P<metric>[A-Za-z_][\w@./|-]*?) *(?P<sign><=|>=) *"
    r"(?P<number>[+-]?[0-9]{1,15}(?:\.[0-9]{1,15})?) *(?P<unit>x|[KMG]i?B)?",
    re.ASCII,
)
_ALIASES = {"ppl": "perplexity"}

# How a limit may be written, by metric.
RATIO, VALUE, POINTS, SIZE = "ratio", "value", "points", "size"
_KINDS = {
    "perplexity": (RATIO, VALUE),
    "kl": (VALUE,),
    "agreement": (VALUE,),
    "prefill": (RATIO, VALUE),
    "decode": (RATIO, VALUE),
    "bits": (RATIO, VALUE),
    "disk": (RATIO, SIZE),
    "ram": (RATIO, SIZE),
    "vram": (RATIO, SIZE),
    "ram@load": (RATIO, SIZE),
    "vram@load": (RATIO, SIZE),
}
_EXAMPLES = {RATIO: "1.05x", VALUE: "0.05", POINTS: "-1.0", SIZE: "500MiB"}


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition.

    Args:
        metric: its name, such as "perplexity" or "decode@4", or a task's.
        at_most: whether the limit is an upper one.
        limit: in the metric's own unit: ratio, value, bytes or points.
        kind: "ratio", "value", "size", or "points" (of difference where `relative`).
        text: as it was written.
        relative: whether it compares with the reference.
    """

    metric: str
    at_most: bool
    limit: float
    kind: str
    text: str
    relative: bool

    def holds(self, measured: Interval | None) -> bool:
        """Whether it holds with 95 % confidence; never for what was not measured."""
        if measured is None or any(math.isnan(v) for v in (measured.low, measured.high)):
            return False
        return measured.high <= self.limit if self.at_most else measured.low >= self.limit


@dataclass(frozen=True, slots=True)
class Failure:
    """A condition that does not hold for a model: the line to print.

    Args:
        measured: None for what was not measured.
        reason: why nothing was.
    """

    model: str
    condition: Condition
    measured: Interval | None
    reason: str = ""

    def __str__(self) -> str:
        wanted = f"wanted {'at most' if self.condition.at_most else 'at least'} "
        wanted += _shown(self.condition, self.condition.limit)
        if self.reason:
            return f"{self.model}: it could not be measured: {self.reason}"
        if self.measured is None:
            return f"{self.model}: {self.condition.metric} was not measured, {wanted}"
        value, low, high = (
            _shown(self.condition, each)
            for each in (self.measured.value, self.measured.low, self.measured.high)
        )
        return (
            f"{self.model}: {self.condition.metric} is {value} (95 %: {low} to {high}), {wanted}"
            + ("" if self._is_off else " with 95 % confidence")
        )

    @property
    def _is_off(self) -> bool:
        """Whether the value itself is beyond the limit, not only its bound."""
        value, limit = self.measured.value if self.measured else math.nan, self.condition.limit
        return value > limit if self.condition.at_most else value < limit


def parse_gate(text: str, tasks: Collection[str], batches: Collection[int] = ()) -> list[Condition]:
    """The conditions of a gate.

    Args:
        text: such as "perplexity<=1.03x; kl<=0.05".
        tasks: names of the tasks that will be run.
        batches: batch sizes that will be timed; none when speed is not measured.

    Raises:
        SalienceError: a condition that is not understood, or of what is not measured.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if not parts:
        raise SalienceError('--gate is empty; write it like "perplexity<=1.03x; kl<=0.05"')
    return [_condition(part, tasks, batches) for part in parts]


def check_gate(
    conditions: Iterable[Condition], measured: Mapping[str, Mapping[Condition, Interval | None]]
) -> list[Failure]:
    """The conditions that do not hold, model by model.

    Args:
        conditions: of the gate.
        measured: for each model, what it came to for each condition, in the unit of its limit.
    """
    conditions = list(conditions)
    return [
        Failure(model, each, values.get(each))
        for model, values in measured.items()
        for each in conditions
        if not each.holds(values.get(each))
    ]


def _condition(part: str, tasks: Collection[str], batches: Collection[int]) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise SalienceError(
            f"--gate {part!r} is not understood; write METRIC<=LIMIT or METRIC>=LIMIT, such as "
            '"perplexity<=1.03x" or "mmlu>=-1.0", parted by ;'
        )
    metric = _ALIASES.get(match["metric"], match["metric"])
    number, unit = match["number"], match["unit"]
    kinds = (POINTS,) if metric in tasks else _KINDS.get(_timed(metric, batches))
    if kinds is None:
        known = ", ".join([*_KINDS, *tasks])
        raise SalienceError(
            f"--gate {part!r}: {metric!r} is no metric and none of --tasks; use {known}"
        )
    kind = RATIO if unit == "x" else SIZE if unit else kinds[-1]
    if kind not in kinds or (kind == SIZE and unit is None):
        wanted = " or ".join(_EXAMPLES[each] for each in kinds)
        raise SalienceError(f"--gate {part!r}: a limit of {metric} is written like {wanted}")
    signed = number[0] in "+-"
    if signed and kind != POINTS:
        raise SalienceError(f"--gate {part!r}: a sign is for points of a task; leave it away")
    limit = float(number) * (_UNITS[unit] if kind == SIZE else 1)
    relative = kind == RATIO or (kind == POINTS and signed)
    return Condition(metric, match["sign"] == "<=", limit, kind, part, relative)


def _timed(metric: str, batches: Collection[int]) -> str:
    """The metric without its batch.

    Raises:
        SalienceError: that batch is not timed.
    """
    name, at, batch = metric.partition("@")
    if name not in ("decode", "prefill") or (at and not batch.isdecimal()):
        return metric
    if not batches:
        raise SalienceError(f"--gate asks for {metric}, and --no-speed measures none")
    if int(batch or min(batches)) not in batches:
        timed = ", ".join(map(str, batches))
        raise SalienceError(f"--gate asks for {metric}, and the batches timed are {timed}")
    return name


def _shown(condition: Condition, value: float) -> str:
    if condition.kind == RATIO:
        return f"{value:.4g}x"
    if condition.kind == SIZE:
        return f"{value / 2**20:.1f} MiB"
    if condition.kind == POINTS:
        return f"{value:{'+' if condition.relative else ''}.4g} points"
    return f"{value:.4g}"
