"""Captured steps: what a step launches is recorded once and replayed with one call.

Between two replays only the contents of the tensors change that the step reads and writes. Running
a step to warm up, as a capture wants, changes them too, so they are put back after it.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

_WARM_UPS = 2


def bucket(rows: int, most: int) -> int:
    """The number of rows that is computed for `rows`: the next power of two, at most `most`."""
    return min(1 << (rows - 1).bit_length(), most)


class Graphs:
    """CUDA graphs by key, captured when first needed, in one pool of memory.

    Args:
        device: a CUDA device.
        state: the tensors that a step changes and that must not change while capturing.
    """

    def __init__(self, device: torch.device, state: Sequence[Tensor]) -> None:
        self._device = device
        self._state = state
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Replay the graph of `key`, which is that of `body`.

        Raises:
            RuntimeError: the body cannot be captured, for it waits for the device.
        """
        if key not in self._graphs:
            self._graphs[key] = self._capture(body)
        self._graphs[key].replay()

    def _capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                body()
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        return graph
