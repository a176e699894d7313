"""The memory of this process and of its devices, now and over time.

Three different numbers are called "GPU memory": what torch's tensors take, what torch has reserved
for them, and what all programs on the device take, which the driver tells. Resident memory counts
mapped weights that were touched, and a container's limit is its cgroup's, not the machine's.
"""

from dataclasses import dataclass

import psutil
import torch

from salience.machine import available_ram_bytes


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
    """

    resident: int
    available: int
    gpu_tensors: int = 0
    gpu_reserved: int = 0
    gpu_used: int = 0
    gpu_total: int = 0


def memory() -> Memory:
    """What is taken now."""
    resident, available = psutil.Process().memory_info().rss, available_ram_bytes()
    if not torch.cuda.is_initialized():  # reading it would take memory on the device
        return Memory(resident, available)
    devices = range(torch.cuda.device_count())
    free_total = [torch.cuda.mem_get_info(device) for device in devices]
    return Memory(
        resident=resident,
        available=available,
        gpu_tensors=sum(torch.cuda.memory_allocated(device) for device in devices),
        gpu_reserved=sum(torch.cuda.memory_reserved(device) for device in devices),
        gpu_used=sum(total - free for free, total in free_total),
        gpu_total=sum(total for _, total in free_total),
    )
