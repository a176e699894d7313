"""What this machine has: memory, and how fast it multiplies."""

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from salience import __version__


def peak_rss_bytes() -> int:
    """The most memory this process has had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_ram_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or a cgroup's if that is less."""
    free = psutil.virtual_memory().available
    return max(0, min([free, *(limit - used for used, limit in cgroup_memory())]))


def cgroup_memory(proc: Path = Path("/proc/self")) -> list[tuple[int, int]]:
    """Bytes taken and allowed of each cgroup that this process is in and that has a limit.

    Limits hold for all cgroups up to the root, versions 1 and 2. Page cache that can be dropped at
    once does not count as taken.

    Args:
        proc: where the kernel says which cgroups those are and where they are mounted.
    """
    found = []
    for folder, root, names in _cgroups(proc):
        while True:
            pair = _cgroup_pair(folder, names)
            if pair is not None:
                found.append(pair)
            if folder == root or folder == folder.parent:
                break
            folder = folder.parent
    return found


# Files of a limit and of what is taken, and what the page cache's inactive part is called.
_CgroupFiles = tuple[str, str, str]
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")
_NO_LIMIT = 2**60


def _cgroups(proc: Path) -> Iterator[tuple[Path, Path, _CgroupFiles]]:
    """The folder of this process in each hierarchy that counts memory, and where that begins."""
    try:
        own = (proc / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (proc / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    paths: dict[str, str] = {}
    for line in own:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in mounts:
        before, _, after = line.partition(" - ")
        inside, point = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        # In a container the mount shows a part of the tree, often just the container's own.
        path = paths[kind]
        local = path[len(inside.rstrip("/")) :] if path.startswith(inside) else "/"
        folder = Path(point) / local.lstrip("/")
        yield folder, Path(point), _CGROUP_2 if kind == "cgroup2" else _CGROUP_1


def _cgroup_pair(folder: Path, files: _CgroupFiles) -> tuple[int, int] | None:
    try:
        limit = (folder / files[0]).read_text(encoding="utf-8").strip()
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        used = int((folder / files[1]).read_text(encoding="utf-8"))
        statistics = (folder / "memory.stat").read_text(encoding="utf-8").split()
    except OSError:
        return None
    values = dict(zip(statistics[::2], statistics[1::2], strict=False))
    return max(0, used - int(values.get(files[2], 0))), int(limit)


def cache_folder(name: str) -> Path:
    """Where this program keeps what it can make again, as the XDG standard says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "salience" / name


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can be taken now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_ram_bytes()


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` is or would be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps pieces of up to 32 MiB for later, more of them with every block of weights.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return  # another C library
    trim(0)


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Let a GPU round the factors of fp32 products to 10 bits of mantissa (TF32), for statistics.

    They are averages over many tokens, and half-precision models have no more bits to begin with.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def matmul_flops(device: torch.device, size: int = 1024, seconds: float = 0.2) -> float:
    """fp32 operations a second of a [size, size] product on `device`, by trying."""
    a, b = torch.randn(2, size, size, device=device)

    def product() -> None:
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        product()
        count += 1
    return 2 * size**3 * count / elapsed


def describe() -> dict[str, Any]:
    """What a result was measured on, to be written beside it: device, versions and date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "vram_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else 0,
        "salience": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
