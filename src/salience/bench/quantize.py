"""Seconds and memory of each phase of a quantization: `salience bench quantize`.

A thread looks at the memory every few milliseconds, so that each phase has a peak of its own: what
the system counts (the largest resident size ever) only grows. What lives shorter than that is not
seen. On a GPU it is the memory of tensors.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from salience.bench.shapes import shape_config, write_checkpoint
from salience.calibration import Calibration
from salience.machine import describe
from salience.pipeline.quantize import quantize
from salience.reports.report import Report

Progress = Callable[[str, int, int], None]

_LOOK_SECONDS = 0.005
_OTHER = "other"  # between phases, with what comes before them


@dataclass(slots=True)
class Phase:
    """Most memory seen in a phase: resident, and of tensors on the GPU; and its seconds."""

    seconds: float = 0.0
    rss_bytes: int = 0
    vram_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a quantization took.

    Args:
        checkpoint_bytes: of a random model that was made for it, 0 for one that was there.
        make_seconds: that making it took.
        seconds: of the quantization, by the wall clock.
        phases: by name, in order.
    """

    model: str
    options: dict[str, Any]
    checkpoint_bytes: int
    make_seconds: float
    seconds: float
    phases: dict[str, Phase]
    report: Report = field(repr=False)

    @property
    def rss_bytes(self) -> int:
        """Most resident memory in any phase."""
        return max(phase.rss_bytes for phase in self.phases.values())

    @property
    def vram_bytes(self) -> int:
        """Most GPU memory of tensors in any phase, as the allocator counted it."""
        return self.report.peak_vram_bytes

    def as_json(self) -> dict[str, Any]:
        """With device, versions and date; times in seconds."""
        keys = ("method", "effort", "scheme", "format", "bits_per_weight", "error_rtn", "error")
        values = {key: getattr(self.report, key) for key in keys}
        return {
            "model": self.model,
            "options": self.options,
            "checkpoint_bytes": self.checkpoint_bytes,
            "make_seconds": self.make_seconds,
            "seconds": self.seconds,
            "rss_bytes": self.rss_bytes,
            "vram_bytes": self.vram_bytes,
            "phases": {name: asdict(phase) for name, phase in self.phases.items()},
            "quantization": values,
            "machine": describe(),
        }


def bench_quantize(
    model: str | None,
    shape: str | None,
    layers: int | None,
    calibration: Calibration,
    device: torch.device,
    progress: Progress | None = None,
    **options: Any,
) -> Quantization:
    """Quantize a model into a folder that is thrown away, and say what each phase took.

    Args:
        model: as `salience.quantize` has it, or None for
        shape: random weights of this shape (`salience.bench.shapes`), with
        layers: so many blocks, None for all.
        calibration: the text; random weights have a tokenizer of 512 entries.
        device: where.
        progress: called with (phase, done, total).
        options: of `salience.quantize`: method, effort, scheme, max_memory.

    Raises:
        SalienceError: whatever `salience.quantize` refuses; an unknown shape.
    """
    said: dict[str, Any] = {key: str(value) for key, value in options.items() if value is not None}
    said |= {"samples": calibration.samples, "seqlen": calibration.seqlen}
    with tempfile.TemporaryDirectory(prefix="salience-bench-") as name:
        source, total, started = model or "", 0, time.perf_counter()
        if shape is not None:
            if progress:
                progress("make random weights", 0, 1)
            folder = Path(name) / "model"
            folder.mkdir()
            total = write_checkpoint(shape_config(shape, layers), folder, device)
            source = str(folder)
        made = time.perf_counter() - started
        watch = _Watch(device)
        started = time.perf_counter()
        with watch.running():
            report = quantize(
                source,
                Path(name) / "out",
                calibration=calibration,
                device=str(device),
                progress=progress,
                on_phase=watch.enter,
                **options,
            )
        seconds = time.perf_counter() - started
    for phase, took in report.phase_seconds.items():
        watch.phases[phase].seconds = took
    watch.phases[_OTHER].seconds = seconds - sum(report.phase_seconds.values())
    return Quantization(shape or source, said, total, made, seconds, watch.phases, report)


class _Watch:
    """Looks at the memory while phases pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, Phase] = {}
        self._process = psutil.Process()
        self._stop = threading.Event()
        self.enter("")

    def enter(self, name: str) -> None:
        """From now on it is this phase."""
        self._phase = self.phases.setdefault(name or _OTHER, Phase())
        self._look()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look until the end of it."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        phase = self._phase
        phase.rss_bytes = max(phase.rss_bytes, self._process.memory_info().rss)
        if self.device.type == "cuda":
            held = torch.cuda.memory_allocated(self.device)
            phase.vram_bytes = max(phase.vram_bytes, held)
