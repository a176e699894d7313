"""The sampler sees what was taken; limits of cgroups are found wherever they are."""

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from salience import machine, monitor
from salience.machine import available_ram_bytes, cgroup_memory
from salience.monitor import Memory, Sampler, memory

MIB = 2**20


def test_the_sampler_sees_what_is_taken() -> None:
    gc.collect()  # what other tests left must not go in the middle
    with Sampler(interval=0.01) as sampler:
        before = sampler.sample().resident
        sampler.mark("rest")
        time.sleep(0.03)
        sampler.mark("take")
        held = torch.ones(200 * MIB // 4)
        seen = len(sampler.timeline)
        while len(sampler.timeline) < seen + 2:  # one may have begun before all was taken
            time.sleep(0.01)
        del held
        sampler.mark("after")
        time.sleep(0.03)
    assert sampler.peak.resident >= before + 195 * MIB
    assert sampler.peak_of("take").resident >= before + 195 * MIB
    assert sampler.peak_of("rest").resident < before + 50 * MIB
    assert sampler.peak.available <= min(each.memory.available for each in sampler.timeline)
    assert [mark.name for mark in sampler.marks] == ["rest", "take", "after"]
    seconds = [each.seconds for each in sampler.timeline]
    assert seconds == sorted(seconds) and len(seconds) > 6
    assert max(each.memory.resident for each in sampler.timeline) == sampler.peak.resident
    found = json.loads(json.dumps(sampler.as_json()))
    assert found["peak"]["resident"] == sampler.peak.resident
    assert [mark["name"] for mark in found["marks"]] == ["rest", "take", "after"]
    assert len(found["timeline"]["resident"]) == len(found["timeline"]["seconds"]) == len(seconds)
    assert "gpu_used" not in found["timeline"] or torch.cuda.is_available()


def test_a_long_run_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are dropped, peaks never are."""
    monkeypatch.setattr(monitor, "_MOST_SAMPLES", 20)
    values = [100 + i % 7 for i in range(500)]
    values[333] = 10_000
    moments = iter(values)
    last = Memory(0, 0)

    def one() -> Memory:
        return replace(last, resident=next(moments), available=5)

    monkeypatch.setattr(monitor, "memory", one)
    sampler = Sampler()
    for _ in values:
        sampler.sample()
        assert len(sampler.timeline) <= 21
    assert sampler.peak.resident == 10_000
    assert 10_000 in [each.memory.resident for each in sampler.timeline]
    assert sampler._every >= sampler.interval * 2**4


def test_an_error_ends_the_thread() -> None:
    with pytest.raises(KeyError), Sampler(interval=0.01) as sampler:
        raise KeyError
    assert not sampler._thread.is_alive()


def test_memory_is_this_process() -> None:
    found = memory()
    resident = psutil.Process().memory_info().rss
    assert abs(found.resident - resident) < 20 * MIB
    assert 0 < found.available <= psutil.virtual_memory().total


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has on the devices that torch sees, and 0 where NVML does not tell."""

    class NVMLError(Exception):
        pass

    processes = {"GPU-a": [(1, 10), (0, 300)], "GPU-b": [(0, None), (0, 7)]}
    own = monitor.os.getpid()

    def running(handle: str) -> list[Any]:
        if handle not in processes:
            raise NVMLError
        return [
            SimpleNamespace(pid=own if pid == 0 else pid, usedGpuMemory=used)
            for pid, used in processes[handle]
        ]

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetComputeRunningProcesses=running,
    )
    uuids = ["a", "b", "c"]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device])
    )
    assert monitor._process_bytes([0, 1]) == 307
    assert monitor._process_bytes([0, 2]) == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert monitor._process_bytes([0]) == 0


class Cgroups:
    """A /proc/self and the trees it names."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        self.proc.mkdir()
        self._own: list[str] = []
        self._mounts: list[str] = ["22 1 0:21 / /proc rw - proc proc rw"]

    def mount(self, kind: str, inside: str, own: str, options: str = "rw") -> Path:
        point = self.root / f"{kind}-{len(self._mounts)}"
        point.mkdir()
        number, names = ("0", "") if kind == "cgroup2" else ("4", options.removeprefix("rw,"))
        self._own.append(f"{number}:{names}:{own}")
        count = len(self._mounts)
        self._mounts.append(
            f"3{count} 22 0:3{count} {inside} {point} rw,nosuid shared:9 - {kind} {kind} {options}"
        )
        (self.proc / "cgroup").write_text("\n".join(self._own) + "\n")
        (self.proc / "mountinfo").write_text("\n".join(self._mounts) + "\n")
        return point

    def limit(self, folder: Path, version: int, limit: str, used: int, cache: int = 0) -> None:
        names, name = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
        if version == 2:
            names, name = ("memory.max", "memory.current"), "inactive_file"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{name} {cache}\n")


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path)


def test_limits_up_to_the_root(cgroups: Cgroups) -> None:
    point = cgroups.mount("cgroup2", "/", "/user/shell/job")
    cgroups.limit(point / "user/shell/job", 2, "max", 700)
    cgroups.limit(point / "user/shell", 2, "1000", 800, cache=50)
    cgroups.limit(point / "user", 2, "5000", 900)
    assert cgroup_memory(cgroups.proc) == [(750, 1000), (900, 5000)]


def test_in_a_container(cgroups: Cgroups) -> None:
    """The mount shows only a part of the tree, and the process is named by the whole path."""
    point = cgroups.mount("cgroup2", "/docker/1f", "/docker/1f/inner")
    cgroups.limit(point / "inner", 2, "100", 40)
    cgroups.limit(point, 2, "90", 50)
    assert cgroup_memory(cgroups.proc) == [(40, 100), (50, 90)]


def test_version_1(cgroups: Cgroups) -> None:
    cgroups.mount("cgroup", "/", "/elsewhere", "rw,cpu,cpuacct")
    point = cgroups.mount("cgroup", "/", "/job", "rw,memory")
    cgroups.mount("cgroup2", "/", "/")
    cgroups.limit(point / "job", 1, "2000", 1500, cache=500)
    cgroups.limit(point, 1, str(2**63 - 4096), 9000)
    assert cgroup_memory(cgroups.proc) == [(1000, 2000)]


def test_no_cgroups(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) == []


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_free = psutil.virtual_memory().available
    monkeypatch.setattr(machine, "cgroup_memory", lambda: [(700, 1000), (900, 5000)])
    assert available_ram_bytes() == 300
    monkeypatch.setattr(machine, "cgroup_memory", lambda: [(1100, 1000)])
    assert available_ram_bytes() == 0
    monkeypatch.setattr(machine, "cgroup_memory", list)
    assert abs(available_ram_bytes() - machine_free) < 2**30
    monkeypatch.setattr(monitor, "cgroup_memory", lambda: [(700, 1000), (4900, 5000)])
    found = memory()
    assert (found.cgroup_used, found.cgroup_limit) == (4900, 5000)
