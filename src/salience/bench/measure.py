"""How long calls take, and what no call can be faster than.

On a GPU a time is that of a CUDA graph of many calls: launching a small kernel from Python takes
longer than running it, and a graph leaves that out, as the decode engine does. Each call of a graph
reads a copy of the weight of its own, so many that the L2 cache holds none of them when their turn
comes again. On a CPU it is the wall time of one call.

What is compared runs in turns, round after round, so that a GPU that grows warm or a neighbour on
the machine slows all of them alike: the ratios can be trusted more than the times.

The floor of a call is the longer of two times: to read its weight and activations and write its
result once, at the bandwidth that was measured here, and to do its multiplications, at the rate
that was measured here. The bandwidth is the better of a copy's, reads and writes together, and of a
sum's, which only reads: a floor must not be one that a good kernel falls through.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salience.errors import DoesNotFitError
from salience.machine import free_bytes
from salience.scheme import NESTED_BLOCK, Scheme

Call = Callable[[], object]

_GPU_BYTES, _CPU_BYTES = 2**30, 2**28  # of what is copied
_GPU_SIZE, _CPU_SIZE = 8192, 1024  # of the product
_RATE_TRIES = 8
_GRAPH_SECONDS = 0.01  # of one replay; slower calls need fewer copies
_GRAPH_ROUNDS = 7
_CPU_SECONDS = 0.4  # for each of what is compared
_CPU_ROUNDS = (3, 50)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does at best.

    Args:
        copy: bytes a second of a copy, those read and those written.
        read: bytes a second of a sum.
        flops: operations a second of a large matrix product.
    """

    copy: float
    read: float
    flops: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second, the better of both."""
        return max(self.copy, self.read)

    def floor(self, moved: float, operations: float = 0.0) -> float:
        """Seconds below which no call can be that moves so many bytes."""
        return max(moved / self.bandwidth, operations / self.flops)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a call: the least and the median of all rounds."""

    best: float
    median: float


def weight_bytes(scheme: Scheme, in_features: int, out_features: int) -> float:
    """Bytes of a weight that every call must read: codes, scales, and zeros where there are any."""
    groups = out_features * scheme.groups(in_features)
    if scheme.codebook is None:
        each = 2.0 if scheme.sym else 3.0  # fp16 scale, uint8 zero
    else:
        each = 1 + 4 / NESTED_BLOCK if scheme.double_quant else 4.0
    return in_features * out_features * scheme.bits / 8 + groups * each


def require_memory(need: float, device: torch.device, what: str, mend: str) -> None:
    """Refuse what needs more memory than is free, before any of it is taken.

    Raises:
        DoesNotFitError: naming `what`, and `mend`, what to use in its place.
    """
    free = free_bytes(device)
    if need > free:
        raise DoesNotFitError(
            f"{what} needs {need / 2**30:.2f} GiB on {device.type}, where {free / 2**30:.2f} GiB "
            f"are free; {mend}"
        )


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Copy, sum and multiply something large, and take the fastest of a few tries."""
    gpu = device.type == "cuda"
    moved = _GPU_BYTES if gpu else _CPU_BYTES
    copied, summed = _memory_seconds(moved, device)
    size = _GPU_SIZE if gpu else _CPU_SIZE
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = _fastest(lambda: torch.mm(a, b), device)
    return Rates(2 * moved / copied, moved / summed, 2 * size**3 / product)


def _memory_seconds(nbytes: int, device: torch.device) -> tuple[float, float]:
    """Of copying so many bytes, and of adding them up."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return _fastest(lambda: target.copy_(source), device), _fastest(source.sum, device)


def measure(calls: Mapping[str, Sequence[Call]], device: torch.device) -> dict[str, Timing]:
    """Time of one call of each name, all names in turns.

    Args:
        calls: for each name the same call on copies of the weight; each has been made before, so
            that nothing is compiled now.
        device: where they run.
    """
    return _graphs(calls) if device.type == "cuda" else _interleaved(calls)


def _graphs(calls: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
    replays: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, same in calls.items():
        some = same[: max(1, int(_GRAPH_SECONDS / _once(same[0])))]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in some:
                call()
        graph.replay()
        replays[name] = graph, len(some)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_GRAPH_ROUNDS):
        for name, (graph, count) in replays.items():
            took[name].append(_gpu_seconds(graph.replay) / count)
    return {name: Timing(min(each), statistics.median(each)) for name, each in took.items()}


def _once(call: Call) -> float:
    """Seconds of a call, on a stream of its own as capturing wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        seconds = _gpu_seconds(call)
    torch.cuda.current_stream().wait_stream(side)
    return max(seconds, 1e-7)


def _gpu_seconds(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _interleaved(calls: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
    least, most = _CPU_ROUNDS
    took: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + _CPU_SECONDS * len(calls)
    for i in range(most):
        for name, same in calls.items():
            call = same[i % len(same)]
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
        if i + 1 >= least and time.perf_counter() > stop:
            break
    return {name: Timing(min(each), statistics.median(each)) for name, each in took.items()}


def _fastest(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the fastest of a few calls, after one that does not count."""
    call()
    if device.type == "cuda":
        return min(_gpu_seconds(call) for _ in range(_RATE_TRIES))
    took = []
    for _ in range(_RATE_TRIES):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)
