"""Activation-aware low-bit weights for language models, from the search to the chat.

    import salience

    report = salience.quantize("smollm2-135m", "smollm2-w4", scheme="w4g64")
    model = salience.load("smollm2-w4")

Importing this package imports nothing heavy; names load what they need when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salience.calibration import Calibration
    from salience.converting import convert
    from salience.errors import DoesNotFitError, SalienceError
    from salience.evaluation.perplexity import perplexity
    from salience.loading import load
    from salience.pipeline.quantize import quantize
    from salience.qtensor import QTensor
    from salience.scheme import Scheme

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "DoesNotFitError",
    "QTensor",
    "SalienceError",
    "Scheme",
    "convert",
    "load",
    "perplexity",
    "quantize",
]

_HOMES = {
    "Calibration": "calibration",
    "DoesNotFitError": "errors",
    "QTensor": "qtensor",
    "SalienceError": "errors",
    "Scheme": "scheme",
    "convert": "converting",
    "load": "loading",
    "perplexity": "evaluation.perplexity",
    "quantize": "pipeline.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'salience' has no attribute {name!r}")
    return getattr(import_module(f"salience.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
