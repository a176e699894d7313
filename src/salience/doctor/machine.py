"""What this machine has, what works on it, and what is known not to."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch

from salience.doctor.fits import Fit, fits_on
from salience.doctor.known import bad_pairs, bad_settings, own_needs, unmet
from salience.doctor.trials import Trial, all_trials
from salience.machine import available_ram_bytes, cache_folder, describe, free_disk_bytes

_PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "safetensors", "gguf", "tokenizers"),
    *("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-ml-py", "humming-kernels"),
    *("vllm", "sglang", "gptqmodel", "optimum", "compressed-tensors", "bitsandbytes", "autoawq"),
    *("auto-gptq", "lm-eval", "fastapi", "xgrammar", "matplotlib", "datasets", "ray"),
)
# What decides how fast a product of low-bit weights can be, as /proc/cpuinfo has it.
_FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that torch sees. Sizes in bytes."""

    name: str
    capability: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What `doctor` says of a machine.

    Args:
        gpus: that torch sees.
        driver: NVIDIA's, None if there is none.
        cuda: the version that torch was made for, None of a torch for CPUs.
        cpu: its name.
        cpu_features: that low-bit products gain by.
        cpu_capability: what torch chose its own kernels for.
        cpus: processors that this process may use, by its affinity and its cgroup.
        threads: of torch.
        ram, ram_free: of the machine, and what can be taken.
        ram_limit: of the cgroup, None without one.
        disk_free: of the working folder, the cache and the folder for temporary files.
        compiler: that Triton would call.
        versions: of packages.
        trials: what was tried.
        fits: which models run.
        warnings: what is known not to go together here.
    """

    gpus: list[Gpu]
    driver: str | None
    cuda: str | None
    cpu: str
    cpu_features: list[str]
    cpu_capability: str
    cpus: float
    threads: int
    ram: int
    ram_free: int
    ram_limit: int | None
    disk_free: dict[str, int]
    compiler: str | None
    versions: dict[str, str]
    trials: list[Trial]
    fits: list[Fit]
    warnings: list[str]

    @property
    def works(self) -> bool:
        """Whether all that should work does."""
        return all(trial.status != "fails" for trial in self.trials)


def examine() -> Machine:
    """Look at this machine and try everything on it: some seconds."""
    said = describe()
    count = torch.cuda.device_count()
    driver = driver_version()
    installed = _installed()
    versions = {"python": platform.python_version()}
    versions |= {name: installed[name] for name in _PACKAGES if name in installed}
    cpus, threads = usable_cpus(), torch.get_num_threads()
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if count else [])
    settings = bad_settings(installed, torch.version.cuda, driver, count, threads, cpus)
    folders = {str(Path.cwd()): Path.cwd(), "cache": cache_folder("")}
    return Machine(
        gpus=[_gpu(index) for index in range(count)],
        driver=driver,
        cuda=torch.version.cuda,
        cpu=str(said["cpu"]),
        cpu_features=cpu_features(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpus=cpus,
        threads=threads,
        ram=psutil.virtual_memory().total,
        ram_free=available_ram_bytes(),
        ram_limit=_number(Path("/sys/fs/cgroup/memory.max")),
        disk_free={name: free_disk_bytes(path) for name, path in folders.items()},
        compiler=_compiler(),
        versions=versions,
        trials=list(all_trials(devices)),
        fits=[fit for device in devices for fit in fits_on(device)],
        warnings=[*settings, *bad_pairs(installed), *unmet(installed, own_needs())],
    )


def cpu_features(info: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instructions that low-bit products gain by; none known where there is no such file."""
    try:
        lines = info.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = [line.partition(":")[2].split() for line in lines if line[:5] in ("flags", "Featu")]
    flags = set(found[0]) if found else set()
    return [name for name in _FEATURES if name in flags]


def usable_cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Processors that this process may use: by its affinity, and its cgroup's share of time."""
    count = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        count = float(len(os.sched_getaffinity(0)))
    try:
        most, period = quota.read_text(encoding="utf-8").split()
        return min(count, int(most) / int(period))
    except (OSError, ValueError):
        return count  # no cgroup, or "max"


def driver_version() -> str | None:
    """NVIDIA's driver, None if there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = said.stdout.split()
    return lines[0] if lines and lines[0][0].isdigit() else None


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return Gpu(
        properties.name, capability, properties.total_memory, torch.cuda.mem_get_info(index)[0]
    )


def _installed() -> Mapping[str, str]:
    """Versions of all packages, by name; the first on the path wins."""
    found: dict[str, str] = {}
    for each in distributions():
        name = each.metadata["Name"]
        if name is not None:
            found.setdefault(name.lower().replace("_", "-"), each.version)
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    return next((found for name in names if name and (found := shutil.which(name))), None)
