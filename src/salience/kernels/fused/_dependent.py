"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Between two kernels of a CUDA graph lies about a microsecond, as long as the small ones take. Since
sm90 a kernel may tell the GPU that the next can come (`gdc_launch_dependents`), and the next one
waits by itself (`gdc_wait`) until all that the one before wrote is there. Each kernel here does
both first of all: only weights, which nothing writes, are read before the wait. A kernel that waits
for nothing would break the chain, since the one after it would wait for that one only.
"""

import torch
from torch import Tensor


def launch_options(x: Tensor) -> dict[str, bool]:
    """Arguments of the launch of a kernel with a constexpr PDL."""
    dependent = (
        x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )
    return {"PDL": True, "launch_pdl": True} if dependent else {"PDL": False}
