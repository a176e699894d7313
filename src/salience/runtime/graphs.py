"""Captured steps: what a step launches is recorded once and replayed with one call.

Between two replays only the contents of the tensors change that the step reads and writes. Running
a step to warm up, as a capture wants, changes them too, so they are put back after it.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

_WARM_UPS = 2


def bucket(rows: int, most: int) -> int:
    """The number of rows that is computed for `rows`: the next power of four, at most `most`.

    Each number is traced and captured once, which takes a second; a few rows more take none.
    """
    return min(1 << ((rows - 1).bit_length() + 1) // 2 * 2, most)


class Graphs:
    """CUDA graphs by key, captured when first needed, in one pool of memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, body: Callable[[], None], state: Sequence[Tensor]) -> None:
        """Replay the graph of `key`, which is that of `body`.

        Args:
            key: of the graph.
            body: what is captured.
            state: the tensors that it changes and that must not change while it is captured.

        Raises:
            RuntimeError: the body cannot be captured, for it waits for the device.
        """
        if key not in self._graphs:
            self._graphs[key] = self._capture(body, state)
        self._graphs[key].replay()

    def _capture(self, body: Callable[[], None], state: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in state]
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                body()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        return graph
