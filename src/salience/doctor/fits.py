"""Which models fit a machine.

A model fits where its resident weights, a cache of 4096 tokens and a tenth for the rest do. The
weights are counted as `plan` counts them, tensor by tensor, with the bits that the kernel of the
device keeps for each weight; floats are fp16 on GPUs and fp32 on CPUs, as `load` has them.
"""

from dataclasses import dataclass

import torch

from salience.linear import packed_bytes
from salience.machine import available_ram_bytes
from salience.scheme import Scheme

CONTEXT = 4096
SCHEMES = ("w4g128", "w3g128")
_OVERHEAD = 1.1


@dataclass(frozen=True, slots=True)
class Size:
    """A usual model: of the Llama and Qwen families, whose blocks have seven linears.

    Args:
        name: for people.
        hidden, inner, layers, vocabulary: of its config.
        heads, kv_heads: outputs of q, and of k and of v.
        tied: the head is the embeddings.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def coded(self) -> int:
        """Weights that are quantized: those of the linears in the blocks."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def floats(self) -> int:
        """Weights that are not: embeddings and head."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Of keys and values."""
        return 2 * self.layers * self.kv_heads * tokens * itemsize


SIZES = (
    Size("1B", 2048, 8192, 16, 2048, 512, 128256, tied=True),  # Llama-3.2-1B
    Size("3B", 3072, 8192, 28, 3072, 1024, 128256, tied=True),  # Llama-3.2-3B
    Size("8B", 4096, 14336, 32, 4096, 1024, 128256),  # Llama-3.1-8B
    Size("14B", 5120, 17408, 40, 5120, 1024, 151936),  # Qwen3-14B
    Size("32B", 5120, 25600, 64, 8192, 1024, 151936),  # Qwen3-32B
    Size("70B", 8192, 28672, 80, 8192, 1024, 128256),  # Llama-3.1-70B
)


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a size of model runs on a device by a scheme.

    Args:
        size, scheme, device: which.
        bytes: that it takes.
        has: that the device has free.
    """

    size: str
    scheme: str
    device: str
    bytes: int
    has: int

    @property
    def fits(self) -> bool:
        return self.bytes <= self.has


def fits_on(device: torch.device, has: int | None = None) -> list[Fit]:
    """Which sizes run on a device, by scheme.

    Args:
        device: a CPU, or all GPUs together.
        has: its bytes; None for what is free now.
    """
    gpu = device.type == "cuda"
    if has is None:
        has = available_ram_bytes()
        if gpu:
            has = sum(
                torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())
            )
    return [
        Fit(size.name, scheme, device.type, bytes, has)
        for size in SIZES
        for scheme, each in _weight_bytes(device).items()
        for bytes in [_bytes(size, each, 2 if gpu else 4)]
    ]


def _bytes(size: Size, each: float, itemsize: int) -> int:
    weights = size.coded * each + size.floats * itemsize
    return round(_OVERHEAD * (weights + size.cache_bytes(CONTEXT, itemsize)))


def _weight_bytes(device: torch.device) -> dict[str, float]:
    """Resident bytes a weight, by scheme: found by packing some."""
    shape = (512, 4096)
    count = shape[0] * shape[1]
    found = {name: packed_bytes(Scheme.parse(name), shape, device) / count for name in SCHEMES}
    return found | ({"fp16": 2.0} if device.type == "cuda" else {"fp32": 4.0})
