"""What `quantize` did, as a value: printed, and written to `salience_report.json`."""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from salience import __version__
from salience.checkpoint import read_json
from salience.errors import SalienceError

REPORT_NAME = "salience_report.json"


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What was done to one linear.

    The errors are the output's mean squared error relative to the output's energy, on the
    calibration text (on inputs of unit covariance for a method that looks at no text).

    Args:
        name: full module path.
        scheme: its name, such as "w4g128".
        alpha: exponent of the activations in its input's scale, 0 when there is none.
        beta: exponent of the weights in its input's scale.
        clip: mean ratio of its grid's step to that of plain rounding.
        error_rtn: of rounding the float weight to nearest.
        error: of what was written.
        kept_rtn: whether the method did not help, so that plain rounding was written.
    """

    name: str
    in_features: int
    out_features: int
    scheme: str
    alpha: float
    beta: float
    clip: float
    error_rtn: float
    error: float
    kept_rtn: bool


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What one block took.

    Args:
        name: full module path.
        error_rtn: mean over its linears of plain rounding's error.
        error: mean over its linears of the error of what was written.
        folds: how many scales were folded into it.
        seconds: spent on it.
        peak_rss_bytes: most memory of the process up to its end.
        peak_vram_bytes: most GPU memory of tensors up to its end, 0 on CPUs.
        loss_start: of a block that learns, the squared error of its output before, relative to
            each token's, on the micro-batches it did not learn from.
        loss: the same of what was written.
        iterations: after which that was reached; 0 where the start stayed.
    """

    name: str
    error_rtn: float
    error: float
    folds: int
    seconds: float
    peak_rss_bytes: int
    peak_vram_bytes: int
    loss_start: float | None = None
    loss: float | None = None
    iterations: int = 0


@dataclass(slots=True)
class Report:
    """The whole run: what went in, what was found in each linear, what it cost.

    `serving` is what vLLM and SGLang would mind of it (`salience.serving.Finding`), `allocation`
    how bits were chosen, if they were (`salience.pipeline.target.Choice.describe`). `end_to_end` is
    what tuning the whole model did (`salience.learning.end_to_end`), after which the errors of the
    linears were not measured again; None where it was not asked for.
    """

    model: str
    out: str
    method: str
    effort: str
    scheme: str
    format: str
    calibration: dict[str, Any] | None
    device: str
    versions: dict[str, str]
    seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    peak_vram_bytes: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    bits_per_weight: float = 0.0
    error_rtn: float = 0.0
    error: float = 0.0
    kept_modules: list[str] = field(default_factory=list)
    serving: list[dict[str, Any]] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)
    end_to_end: dict[str, Any] | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    linears: list[LinearReport] = field(default_factory=list)

    def summarize(self) -> None:
        """Fill in the totals from the linears."""
        count = max(len(self.linears), 1)
        self.error_rtn = sum(linear.error_rtn for linear in self.linears) / count
        self.error = sum(linear.error for linear in self.linears) / count


def widths(allocation: dict[str, Any]) -> str:
    """How many linears were given how many bits, for people; "" of what is no allocation."""
    counts = allocation.get("linears_of_bits")
    if not isinstance(counts, dict):
        return ""
    return ", ".join(f"{bits} in {count} linears" for bits, count in counts.items())


def versions() -> dict[str, str]:
    """Versions of what made the result."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"salience": __version__, **packages}


def read_report(path: Path) -> Report:
    """The report of a finished quantization.

    Reports of other versions are read too: what this version does not know is left out, and what
    that version did not know has its default, or the zero of its type.

    Args:
        path: the folder that `quantize` wrote, or the report in it.

    Raises:
        SalienceError: no such file, not JSON, or not a report.
    """
    file = path / REPORT_NAME if path.is_dir() else path
    if not file.is_file():
        raise SalienceError(f"{file} does not exist; name a folder that salience quantize wrote")
    try:
        return cast(Report, _made(Report, read_json(file), ""))
    except _NoReportError as error:
        raise SalienceError(f"{file} is not a salience report: {error}") from None


# What reports of all versions have.
_ESSENTIAL: dict[type, set[str]] = {
    Report: {"method", "linears"},
    LinearReport: {"name", "error_rtn", "error"},
}
_LARGEST_INT = 2**63 - 1


class _NoReportError(Exception):
    """Says what is wrong, and where."""


def _made(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from a JSON object."""
    if not isinstance(value, dict):
        raise _NoReportError(f"{where} is not an object")
    hints = get_type_hints(kind)
    known = {}
    for each in fields(kind):
        place = f"{where}.{each.name}".removeprefix(".")
        if each.name in value:
            known[each.name] = _checked(hints[each.name], value[each.name], place)
        elif each.name in _ESSENTIAL.get(kind, ()):
            raise _NoReportError(f"{place} is missing")
        elif each.default is MISSING and each.default_factory is MISSING:
            known[each.name] = _zero(hints[each.name])
    return kind(**known)


def _checked(kind: Any, value: Any, where: str) -> Any:
    """A value of an annotated type from JSON."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:  # only ever "or None"
        return None if value is None else _checked(inner[0], value, where)
    if is_dataclass(kind):
        return _made(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        kind = int
    wanted = origin or kind
    if wanted is Any:
        return value
    # In Python a bool is an int.
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise _NoReportError(f"{where} is no {wanted.__name__}")
    if wanted is list:
        return [_checked(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if wanted is dict:
        return {key: _checked(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if wanted is int and abs(value) > _LARGEST_INT:
        raise _NoReportError(f"{where} is out of range")
    return value


def _zero(kind: Any) -> Any:
    return None if get_origin(kind) is UnionType else (get_origin(kind) or kind)()
