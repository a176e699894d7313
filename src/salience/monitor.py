"""The memory of this process and of its devices, now and over time.

Three different numbers are called "GPU memory": what torch's tensors take, what torch has reserved
for them, and what all programs on the device take, which the driver tells. A fourth, what this one
process takes with CUDA's own context, only NVML tells (package nvidia-ml-py). Resident memory
counts mapped weights that were touched, and a container's limit is its cgroup's, not the
machine's.

A peak is not to be had by asking before and after: `Sampler` asks ten times a second in a thread of
its own. When it has asked often it drops every second sample but those that are a peak so far, and
asks half as often, so that a night takes no more memory than a minute.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any

import psutil
import torch

from salience.machine import available_ram_bytes, cgroup_memory

_MOST_SAMPLES = 4096


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at one moment. The GPU's are of all visible GPUs together, 0 without one.

    Args:
        resident: of this process, in RAM.
        available: RAM that could still be taken, by the machine or its cgroup.
        gpu_tensors: of torch's tensors.
        gpu_reserved: held by torch for tensors.
        gpu_used: taken on the devices by all programs.
        gpu_total: of the devices.
        gpu_process: taken on the devices by this process, as NVML says; 0 where it does not.
        cgroup_used: RAM taken by the cgroup with the tightest limit, 0 without a limit.
        cgroup_limit: that limit, 0 without one.
    """

    resident: int
    available: int
    gpu_tensors: int = 0
    gpu_reserved: int = 0
    gpu_used: int = 0
    gpu_total: int = 0
    gpu_process: int = 0
    cgroup_used: int = 0
    cgroup_limit: int = 0

    def larger(self, other: "Memory") -> "Memory":
        """The most of each number, and the least that was available."""
        most = {f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Memory(**{**most, "available": min(self.available, other.available)})


def memory() -> Memory:
    """What is taken now."""
    resident, available = psutil.Process().memory_info().rss, available_ram_bytes()
    limits = cgroup_memory()
    used, limit = min(limits, key=lambda pair: pair[1] - pair[0]) if limits else (0, 0)
    if not torch.cuda.is_initialized():  # reading it would take memory on the device
        return Memory(resident, available, cgroup_used=used, cgroup_limit=limit)
    devices = range(torch.cuda.device_count())
    free_total = [torch.cuda.mem_get_info(device) for device in devices]
    return Memory(
        resident=resident,
        available=available,
        gpu_tensors=sum(torch.cuda.memory_allocated(device) for device in devices),
        gpu_reserved=sum(torch.cuda.memory_reserved(device) for device in devices),
        gpu_used=sum(total - free for free, total in free_total),
        gpu_total=sum(total for _, total in free_total),
        gpu_process=_process_bytes(devices),
        cgroup_used=used,
        cgroup_limit=limit,
    )


def _process_bytes(devices: Sequence[int]) -> int:
    """GPU memory of this process on devices, by NVML; 0 where it cannot tell.

    In a container it sees processes by the numbers that the host has for them.
    """
    try:
        import pynvml
    except ImportError:
        return 0
    total = 0
    try:
        pynvml.nvmlInit()  # counts its calls, and does nothing after the first
        for device in devices:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid():
                    total += process.usedGpuMemory or 0
    except pynvml.NVMLError:
        return 0
    return total


@dataclass(frozen=True, slots=True)
class Sample:
    """What was taken, `seconds` after the sampler began."""

    seconds: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class Mark:
    """Something began, `seconds` after the sampler did; it lasts until the next mark."""

    seconds: float
    name: str


class Sampler:
    """Takes down the memory of this process, in a thread, as long as the context lasts.

        with Sampler() as sampler:
            sampler.mark("load")
            ...
        sampler.peak.resident

    Args:
        interval: seconds between two samples; more when there are many.

    What is taken for less than the interval can go unseen.
    """

    def __init__(self, interval: float = 0.1) -> None:
        self.interval = interval
        self._every = interval
        self._samples: list[Sample] = []
        self._marks: list[Mark] = []
        self._peaks: dict[str, Memory] = {}
        self._peak: Memory | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory sampler", daemon=True)
        self._start = time.perf_counter()

    def __enter__(self) -> "Sampler":
        self._start = time.perf_counter()
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.sample()

    def mark(self, name: str) -> None:
        """Say that something begins."""
        self.sample()
        with self._lock:
            self._marks.append(Mark(time.perf_counter() - self._start, name))
            self._peaks.pop(name, None)
        self.sample()

    def sample(self) -> Memory:
        """Take one down now."""
        now = memory()
        with self._lock:
            self._samples.append(Sample(time.perf_counter() - self._start, now))
            self._peak = now.larger(self._peak or now)
            if self._marks:
                name = self._marks[-1].name
                self._peaks[name] = now.larger(self._peaks.get(name, now))
            if len(self._samples) > _MOST_SAMPLES:
                self._samples = _thinned(self._samples)
                self._every *= 2
        return now

    @property
    def peak(self) -> Memory:
        """The most of each number so far, and the least that was available."""
        return self._peak or self.sample()

    def peak_of(self, name: str) -> Memory:
        """The peak from the last mark of that name to the mark after it, or until now."""
        self.sample()
        return self._peaks[name]

    @property
    def timeline(self) -> list[Sample]:
        """What was taken down, all peaks in it."""
        with self._lock:
            return list(self._samples)

    @property
    def marks(self) -> list[Mark]:
        """In their order."""
        with self._lock:
            return list(self._marks)

    def as_json(self) -> dict[str, Any]:
        """Peak, marks with the peak of each, and columns of the timeline."""
        samples, columns = self.timeline, {}
        for name in (field.name for field in fields(Memory)):
            column = [getattr(sample.memory, name) for sample in samples]
            if any(column):
                columns[name] = column
        return {
            "peak": asdict(self.peak),
            "marks": [
                {**asdict(mark), "peak": asdict(self._peaks[mark.name])} for mark in self.marks
            ],
            "timeline": {"seconds": [round(s.seconds, 3) for s in samples], **columns},
        }

    def _run(self) -> None:
        while not self._done.wait(self._every):
            self.sample()


def _thinned(samples: list[Sample]) -> list[Sample]:
    """Every second one, with the first, the last and those with the most of some number."""
    keep = {0, len(samples) - 1, *range(0, len(samples), 2)}
    for field in fields(Memory):
        keep.add(max(range(len(samples)), key=lambda i: getattr(samples[i].memory, field.name)))
    return [samples[i] for i in sorted(keep)]
