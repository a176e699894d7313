"""Work that is done again and again on the same tensors, as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


def captured(body: Callable[[], None], state: list[Tensor]) -> Callable[[], None]:
    """`body` as one CUDA graph: hundreds of small kernels cost one start.

    Args:
        body: work that reads and writes the same tensors each time.
        state: those of them that it changes, which are put back after it was tried.

    Returns:
        The body itself on a CPU, and where it cannot be captured because it waits for the GPU, as
        some mixtures of experts do.
    """
    device = state[0].device
    if device.type != "cuda":
        return body
    before = [tensor.clone() for tensor in state]
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(2):
            body()
    current.wait_stream(side)
    try:
        with torch.cuda.graph(graph, stream=side):
            body()
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize(device)
        replay = body
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    return replay
