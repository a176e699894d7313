"""Times of one linear by every kernel there is, beside the floor: `salience bench kernels`."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from salience import kernels
from salience.bench.measure import (
    Call,
    Rates,
    Timing,
    measure,
    measure_rates,
    require_memory,
    weight_bytes,
)
from salience.bench.peers import Kernel, Prepared, candidates, pick_rows
from salience.bench.weights import random_weight
from salience.errors import SalienceError
from salience.machine import describe
from salience.scheme import Scheme

GPU_SHAPES = (
    *((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096)),  # of Llama-3-8B
    *((8192, 8192), (8192, 57344), (28672, 8192)),  # of Llama-3-70B
)
CPU_SHAPES = ((576, 1536), (4096, 4096))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
CPU_TOKENS = (1, 4, 8, 16, 64, 256)
# What rounding x, scales and y to half precision may cost; a wrong kernel is off by far more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
_BF16_INSIDE = ("cpu_int4", "tinygemm")
_CACHES = 3.2  # copies of the weight hold so many times what the cache does
_CPU_CACHE_BYTES = 32 * 2**20
_CHECKED_ROWS, _CHECKED_TOKENS = 512, 32

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """A shape and a number of tokens.

    Args:
        columns: inputs.
        rows: outputs.
        floor: seconds below which no kernel can be.
        floor_bytes: that it must move.
        auto: the backend that `auto` chooses.
        seconds: median of a call, by kernel.
        best: the least, by kernel.
        error: of the result relative to fp64, by kernel.
    """

    scheme: str
    columns: int
    rows: int
    tokens: int
    floor: float
    floor_bytes: float
    auto: str
    seconds: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def over_floor(self, kernel: str) -> float:
        """How many times the floor a kernel takes; NaN where it did not run."""
        return self.seconds.get(kernel, math.nan) / self.floor


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured.

    Args:
        failed: what did not run, or was wrong, with the first reason: kernel -> one line.
        wrong: those of ours among them.
    """

    device: str
    dtype: str
    rates: Rates
    rows: list[Row]
    failed: dict[str, str]
    wrong: list[str]

    def kernels(self) -> list[str]:
        """All that ran somewhere, peers first."""
        ran = {name for row in self.rows for name in row.seconds}
        return [each.name for each in candidates() if each.name in ran]

    def ratio(self, peer: str) -> float | None:
        """Time of what `auto` chooses over a peer's, the geometric mean of where both ran."""
        logs = [
            math.log(row.seconds[row.auto] / row.seconds[peer])
            for row in self.rows
            if peer in row.seconds and row.auto in row.seconds
        ]
        return math.exp(sum(logs) / len(logs)) if logs else None

    def as_json(self) -> dict[str, Any]:
        """With device, versions and date; times in seconds."""
        against = {name: self.ratio(name) for name in self.kernels()}
        return {**asdict(self), "auto_over": against, "machine": describe()}


def bench_kernels(
    schemes: Sequence[Scheme],
    shapes: Iterable[tuple[int, int]],
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str] = (),
    progress: Progress | None = None,
) -> Table:
    """Measure every kernel on every shape, correctness first.

    Args:
        schemes: of the weights.
        shapes: (inputs, outputs).
        tokens: numbers of rows of x.
        dtype: of x.
        device: where.
        names: kernels to measure, none for all.
        progress: called with (what, done, total).

    Raises:
        SalienceError: an unknown name, or a scheme that does not fit a shape.
        DoesNotFitError: a shape that memory does not hold.
    """
    chosen = _named(names)
    work = [(scheme, shape) for scheme in schemes for shape in shapes]
    for scheme, (columns, rows) in work:
        scheme.groups(columns)
        most = _memory(chosen, scheme, columns, rows, max(tokens), dtype, device)
        what = f"shape {columns}x{rows} of {scheme}"
        require_memory(most, device, what, "use smaller --shapes or fewer --tokens")
    rates = measure_rates(device, dtype)
    found: list[Row] = []
    failed: dict[str, str] = {}
    wrong: dict[str, None] = {}
    done, total = 0, len(work) * len(tokens)
    for scheme, (columns, rows) in work:
        with torch.inference_mode():
            bench = _Shape(chosen, scheme, columns, rows, dtype, device, failed, wrong)
            for count in tokens:
                if progress:
                    progress(f"{scheme} {columns}x{rows}, {count} tokens", done, total)
                found.append(bench.row(count, rates))
                done += 1
        del bench
    return Table(str(device), str(dtype).removeprefix("torch."), rates, found, failed, list(wrong))


class _Shape:
    """One weight, as each kernel holds it."""

    def __init__(
        self,
        chosen: Sequence[Kernel],
        scheme: Scheme,
        columns: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        failed: dict[str, str],
        wrong: dict[str, None],
    ) -> None:
        self.scheme, self.columns, self.rows, self.dtype = scheme, columns, rows, dtype
        self.device, self.failed, self.wrong = device, failed, wrong
        qt = random_weight(columns, rows, scheme, device)
        self.auto = kernels.choose(scheme, device, columns, rows).name
        self.kernels: dict[str, tuple[Kernel, list[Prepared]]] = {}
        for kernel in chosen:
            if kernel.supports(qt):
                with _Failing(kernel, failed):
                    first = kernel.prepare(qt, kernel.takes(dtype))
                    count = _copies(kernel, scheme, columns, rows, device)
                    copies = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
                    self.kernels[kernel.name] = kernel, copies
        # The first rows, the last, and some between.
        checked = torch.linspace(0, rows - 1, min(rows, _CHECKED_ROWS), device=device).long()
        self.checked = checked
        self.exact = pick_rows(qt, checked).dequantize().double()

    def row(self, tokens: int, rates: Rates) -> Row:
        """Check all kernels on fresh inputs, then time those that are right."""
        x = torch.randn(tokens, self.columns, device=self.device).to(self.dtype)
        some = torch.linspace(0, tokens - 1, min(tokens, _CHECKED_TOKENS), device=x.device).long()
        moved = weight_bytes(self.scheme, self.columns, self.rows)
        moved += x.element_size() * tokens * (self.columns + self.rows)
        floor = rates.floor(moved, 2.0 * tokens * self.columns * self.rows)
        row = Row(str(self.scheme), self.columns, self.rows, tokens, floor, moved, self.auto)
        calls: dict[str, list[Call]] = {}
        for name, (kernel, copies) in self.kernels.items():
            with _Failing(kernel, self.failed):
                taken = x.to(kernel.takes(self.dtype))
                y = copies[0](taken)
                want = taken[some].double() @ self.exact.T
                row.error[name] = error = _error(y, want, some, self.checked)
                if error <= _tolerance(name, taken.dtype):
                    calls[name] = [partial(each, taken) for each in copies]
                else:
                    where = f"{self.columns}x{self.rows} of {self.scheme}, {tokens} tokens"
                    reason = f"wrong: relative error {error:.1e} on {where}"
                    self.failed.setdefault(name, reason)
                    if kernel.ours:
                        self.wrong[name] = None
        for name, timing in self._measured(calls).items():
            row.seconds[name], row.best[name] = timing.median, timing.best
        return row

    def _measured(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
        return measure(calls, self.device) if calls else {}


class _Failing:
    """Notes what a peer raises in place of ending the table; what ours raise is passed on."""

    def __init__(self, kernel: Kernel, failed: dict[str, str]) -> None:
        self.kernel, self.failed = kernel, failed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> bool:
        # Compilers and CUDA raise errors of any kind.
        if self.kernel.ours or not isinstance(error, Exception):
            return False
        reason = (str(error).strip().splitlines() or [""])[0]
        self.failed.setdefault(self.kernel.name, f"{type(error).__name__}: {reason}"[:200])
        return True


def _named(names: Sequence[str]) -> list[Kernel]:
    every = {kernel.name: kernel for kernel in candidates()}
    for name in names:
        if name not in every:
            raise SalienceError(f"there is no kernel {name!r}; use {', '.join(every)}")
    return [every[name] for name in dict.fromkeys(names or every)]


def _error(y: Tensor, want: Tensor, tokens: Tensor, rows: Tensor) -> float:
    """Relative error of the checked part; infinite when any of y is not finite."""
    if not torch.isfinite(y).all():
        return math.inf
    found = y[tokens][:, rows].double()
    return float((found - want).norm() / want.norm())


def _tolerance(kernel: str, dtype: torch.dtype) -> float:
    return TOLERANCE[torch.bfloat16 if kernel in _BF16_INSIDE else dtype]


def _copies(kernel: Kernel, scheme: Scheme, columns: int, rows: int, device: torch.device) -> int:
    """So many that the cache holds none when its turn comes again."""
    cache = _CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(_CACHES * cache / kernel.nbytes(scheme, columns, rows)))


def _memory(
    chosen: Sequence[Kernel],
    scheme: Scheme,
    columns: int,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """About the bytes that a shape takes at most: all copies, packing one, inputs and outputs."""
    held = sum(
        _copies(kernel, scheme, columns, rows, device) * kernel.nbytes(scheme, columns, rows)
        for kernel in chosen
    )
    activations = tokens * (columns + rows) * (len(chosen) + 1)
    return dtype.itemsize * (held / 2 + activations) + 12.0 * columns * rows
