"""Attention of one query a row to its cache, in one launch: `cuda/attention.cu` says how.

For NVIDIA GPUs from sm90 on, whose thread blocks can form clusters and write into each other's
memory: what a first kernel would leave in global memory for a second one (`attention_triton`) stays
on the processors, and a step has one launch a layer less. A head's context is cut into at most 8
pieces, since no larger cluster is portable. Like all that a CUDA graph keeps, the cut depends on
shapes only; how long the pieces are, the blocks find out from their row's position.
"""

import torch
from torch import Tensor

from salience.kernels import cuda_program
from salience.kernels.fused.plain import heads

_TILE = 16  # keys that a warp takes at once
_MOST_SPLITS = 8
_WIDE = 384  # columns of a key and a value that a warp holds at once, with 8 heads
_L2_BYTES = 16e6  # to ask for before the kernel ahead has ended: well below what any such GPU has
_LIMIT = 2**31


def supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> bool:
    """Whether this kernel is for these tensors: half precision, heads of a multiple of 16 columns
    up to 256, memory in pieces of 16 bytes, and a GPU from sm90 on with cuda-core.
    """
    if not q.is_cuda or not cuda_program.available():
        return False
    return cuda_program.capability(q.device.index) >= 90 and takes(q, k_cache, v_cache, positions)


def takes(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> bool:
    """`supports`, as far as the GPU does not matter."""
    dims = k_cache.shape[-1], v_cache.shape[-1]
    queries = _queries(q, dims[0])
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and k_cache.dtype == v_cache.dtype == q.dtype
        and positions.dtype in (torch.int64, torch.int32)
        and all(dim % 16 == 0 and 16 <= dim <= 256 for dim in dims)
        and all(_in_pieces(x) for x in (queries, k_cache, v_cache))
    )


def _queries(q: Tensor, dim: int) -> Tensor:
    return heads(q, dim) if q.stride(-1) == 1 else heads(q.contiguous(), dim)


def _in_pieces(x: Tensor) -> bool:
    """Whether each row is contiguous, and at 16 bytes."""
    steps = [s for s, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    return aligned and all(s % 8 == 0 and s < _LIMIT for s in steps)


def cut(pairs: int, length: int, processors: int) -> tuple[int, int]:
    """Pieces of a context, and warps of a block that share one.

    Args:
        pairs: rows times heads of the cache, each a cluster.
        length: of the cache.
        processors: of the GPU.
    """
    splits = 1
    while (
        splits < _MOST_SPLITS and 2 * splits * pairs <= 2 * processors and splits * _TILE < length
    ):
        splits *= 2
    # With few blocks, each has a processor for itself, and must keep the memory busy alone.
    alone = splits * pairs <= processors and length > 4 * _TILE * splits
    return splits, 8 if alone else 4


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    splits: int = 0,
    warps: int = 0,
) -> Tensor:
    """As `salience::decode_attention`, of tensors that `takes` is true for; `splits` and `warps`
    are for measurements.
    """
    kv_heads, length, dim = k_cache.shape[1:]
    values = v_cache.shape[-1]
    q = _queries(q, dim)
    batch, all_heads = q.shape[:2]
    group, pairs = all_heads // kv_heads, batch * kv_heads
    high = 2 if group > 8 and max(dim, values) <= 128 else 1
    usual = cut(pairs, length, _processors(q))
    splits, warps = splits or usual[0], warps or usual[1]
    own = min(group, 8 * high)  # heads of a block
    strips = -(-group // own)
    out = torch.empty(batch, all_heads * values, dtype=q.dtype, device=q.device)
    given = out if sinks is None else sinks.contiguous()
    macros = {
        "DIM": dim,
        "VALUES": values,
        "GROUP": group,
        "HIGH": high,
        "WARPS": warps,
        "SPLITS": splits,
        "BF16": int(q.dtype == torch.bfloat16),
        "SOFTCAP": int(softcap > 0),
        "SINKS": 0 if sinks is None else 1 + cuda_program.SCALES[sinks.dtype],
        "POSITION_BYTES": positions.element_size(),
    }
    index = q.device.index
    kernel = cuda_program.kernel("attention.cu", "attend", tuple(macros.items()), index)
    ahead = _L2_BYTES // (pairs * strips * splits * 2 * (dim + values))
    strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], positions.stride(0))
    with torch.cuda.device_of(q):
        kernel.launch(
            (pairs, strips, 1),
            32 * warps,
            (
                *(q, k_cache, v_cache, positions, given, out),
                *(stride % _LIMIT for stride in strides),  # those of axes of one don't matter
                *(kv_heads, length, min(window, length), min(int(ahead), length)),
                *(float(scale), float(softcap)),
            ),
            shared=_shared(own, dim, values, warps, splits),
            cluster=splits,
            overlap=True,
        )
    return out


def _shared(own: int, dim: int, values: int, warps: int, splits: int) -> int:
    """Bytes of shared memory: `Shared` of attention.cu, and what aligning it may take."""
    received = splits * (-(-own * (values // 4) // splits) * 16 + own * 8 + 8) if splits > 1 else 0
    queries = own * (dim + 8) * 2 if dim + values > _WIDE else 16
    parts = warps * own * (8 + (values + 4) * 4)
    return -(-(received + queries + parts + own * 4) // 16) * 16 + 48


def _processors(q: Tensor) -> int:
    if not q.is_cuda:  # emulated
        return 132
    return torch.cuda.get_device_properties(q.device).multi_processor_count
