"""What `quantize` did, as a value: printed, and written to `salience_report.json`."""

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from salience import __version__

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
    """

    name: str
    error_rtn: float
    error: float
    folds: int
    seconds: float
    peak_rss_bytes: int
    peak_vram_bytes: int


@dataclass(slots=True)
class Report:
    """The whole run: what went in, what was found in each linear, what it cost."""

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
    bits_per_weight: float = 0.0
    error_rtn: float = 0.0
    error: float = 0.0
    kept_modules: list[str] = field(default_factory=list)
    folds: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    linears: list[LinearReport] = field(default_factory=list)

    def summarize(self) -> None:
        """Fill in the totals from the linears."""
        count = max(len(self.linears), 1)
        self.error_rtn = sum(linear.error_rtn for linear in self.linears) / count
        self.error = sum(linear.error for linear in self.linears) / count


def versions() -> dict[str, str]:
    """Versions of what made the result."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"salience": __version__, **packages}
