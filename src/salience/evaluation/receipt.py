"""What goes to the process that measures a model, and what comes back: two JSON files."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from salience.checkpoint import read_json
from salience.errors import SalienceError


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure.

    Args:
        model: a checkpoint.
        receipt: the file for the result.
        options: `text`, `context`, `max_chunks`, `batches`, `prompt`, `new`, `repeats`, `tasks`,
            `task_folder`, `limit`, `device`, `kernel`, `trust_remote_code`.
        reference: of the model to compare with: `model` and its `receipt`; None for the reference.
        hidden: folder of the reference's hidden states.
    """

    model: str
    receipt: str
    options: dict[str, Any]
    reference: dict[str, str] | None
    hidden: str


@dataclass(slots=True)
class Receipt:
    """What was measured of one model, as the file has it.

    Args:
        bits: stored bits a weight of the linears.
        disk: bytes of its tensors.
        timeline: [seconds, bytes resident, bytes on the GPU] of loading and generating.
        marks: [seconds, what began].
        memory: bytes at "load" and at "peak", of "ram" and "vram".
        speed: a row for each batch: `batch`, and rates of the repeats `prefill` and `decode`.
        text: `Scores`, None without a text.
        tasks: scores of documents in their order, by task and metric.
        layers: of each linear its name, output error and plain rounding's, where the checkpoint
            brings its report.
        seconds: by phase.
    """

    format: str
    scheme: str
    dtype: str
    bits: float
    disk: int
    timeline: list[list[float]] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    text: dict[str, Any] | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: list[list[Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


def read_receipt(path: Path) -> Receipt:
    """The receipt in a file.

    Raises:
        SalienceError: it is none.
    """
    values = read_json(path)
    names = {each.name for each in fields(Receipt)}
    if not isinstance(values, dict) or set(values) != names:
        raise SalienceError(f"{path} is no receipt of this version; delete it")
    return Receipt(**values)
