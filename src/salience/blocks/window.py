"""How many blocks are solved side by side."""

import torch
from torch import nn

from salience.structure import linears, weight_of

WINDOW_BYTES = 2**29


def window(blocks: nn.ModuleList, device: torch.device, learns: bool) -> int:
    """How many blocks are solved side by side: what fits `WINDOW_BYTES`; one on a CPU, and where
    each learns from what those before it became.
    """
    if device.type == "cpu" or learns:
        return 1
    largest = max(solved_bytes(block) for block in blocks)
    return max(1, min(len(blocks), WINDOW_BYTES // largest))


def solved_bytes(block: nn.Module) -> int:
    """Weights and second moments of a block, in fp32."""
    return 4 * (sum(p.numel() for p in block.parameters()) + moment_floats(block))


def moment_floats(block: nn.Module) -> int:
    """Numbers in a second moment for each linear of a block."""
    return sum(weight_of(linear).shape[1] ** 2 for linear in linears(block).values())
