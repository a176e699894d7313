"""Keys and values of several sequences in fixed places: a slot each, each at its own length.

    keys, values of a layer: [slots, kv_heads, capacity, head_dim]

A prefill writes a range of one slot, or the same range of neighbouring ones. A decode step writes
one token in each of several neighbouring slots, row b at positions[b], by an index that lies on the
device: the host need not know a position, so the step can be captured in a CUDA graph. The
Transformers module reads the cache through `Cache.update` as it would its own.

Transformers builds the masks itself, for whatever pattern a layer has (causal, sliding window,
chunks), out of two indices: of queries, an `arange` plus the offset that the cache tells, and of
keys. In a decode step the offset is `_RowOffsets`: the sum with it has one row per slot instead of
one for all. Layers with a sliding window keep the whole context here, which costs memory and lets
any prefix be used again.

Buffers are made when a layer is first written, on its device. `reserve` makes them longer, up to
what a request needs, where no graph holds on to their address.
"""

import math
import mmap
import os
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_HAS_QUERY_OFFSET = hasattr(Cache, "get_query_offset")
STRIDE = 64  # lengths that attention reads are multiples of this


def padded(length: int) -> int:
    """The next multiple of STRIDE."""
    return -(-length // STRIDE) * STRIDE


class _RowOffsets:
    """Where each row's queries begin; adds to the indices of queries and is indexed like them.

    Transformers computes `(arange(queries) + offset)[None, None, :, None]`, to be broadcast as
    [batch, head, query, key]. For one offset per row that is [rows, 1, queries, 1].
    """

    def __init__(self, positions: Tensor, queries: Tensor | None = None) -> None:
        self.positions = positions
        self.queries = queries

    def __radd__(self, queries: Any) -> "_RowOffsets":
        return _RowOffsets(self.positions, queries)

    def __add__(self, queries: Any) -> "_RowOffsets":
        return _RowOffsets(self.positions, queries)

    def __getitem__(self, index: object) -> Tensor:
        del index  # always [None, None, :, None]
        return self.positions[:, None, None, None] + self.queries[None, None, :, None]  # type: ignore[index]


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer."""

    keys: Tensor
    values: Tensor
    is_compileable = True  # so that a mask is always made for single queries
    is_sliding = False

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._buffer(key_states)
        self.values = self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, like: Tensor) -> Tensor:
        _, heads, _, dim = like.shape
        # Zeros: what is masked has weight 0, and 0 times what memory held may be NaN.
        shape = (self.cache.slots, heads, self.cache.capacity, dim)
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        # Zeros that take memory only where they are written, as PyTorch's do not.
        size = math.prod(shape) * like.element_size()
        if os.name != "posix":
            return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(shape)
        # Private, for a shared page would be taken when it is read, too.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux: a large page is a head's whole context
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(memory, dtype=like.dtype).view(shape)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, tokens, head_dim]; what the rows' attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, buffer: Tensor, states: Tensor) -> Tensor:
        cache = self.cache
        part = buffer[cache.first : cache.first + states.shape[0]]
        if cache.positions is None:
            part[:, :, cache.start : cache.start + states.shape[2]] = states
        else:
            rows = torch.arange(states.shape[0], device=buffer.device)
            positions = cache.positions.to(buffer.device)
            part[rows, :, positions] = states[:, :, 0]
        return part[:, :, : cache.length]

    def grow(self) -> None:
        """Make the buffers as long as the cache is to be."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._buffer(old)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_max_length(self) -> int:
        return self.cache.capacity

    def get_max_cache_shape(self) -> int:
        return self.cache.capacity


class SlotCache(Cache):
    """The cache of all layers. `at_chunk` and `at_rows` say where the next forward writes.

    Args:
        slots: sequences that it holds.
        capacity: tokens that each may have.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))  # type: ignore[arg-type]
        self.slots = slots
        self.capacity = capacity
        self.first = 0  # the slot of row 0
        self.start = 0  # a prefill writes from here on
        self.length = capacity  # attention reads as many tokens
        self.positions: Tensor | None = None  # [rows] of a decode step

    def at_chunk(self, slot: int, start: int, tokens: int) -> None:
        """The next forward has `tokens` tokens at `start`, row b for the slot `slot` + b."""
        self.first, self.start, self.length = slot, start, start + tokens
        self.positions = None

    def at_rows(self, positions: Tensor, first: int = 0, length: int | None = None) -> None:
        """The next forward has one token for each of the slots from `first` on.

        Args:
            positions: [rows] int64, where each is written.
            first: the slot of row 0.
            length: attention reads as many tokens, all for None; above every position.
        """
        self.first, self.length = first, self.capacity if length is None else length
        self.positions = positions

    def reserve(self, capacity: int) -> None:
        """Make the buffers at least this long."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        for layer in self._written():
            layer.grow()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give the slot `target` the first tokens of `source`."""
        for layer in self._written():
            for buffer in (layer.keys, layer.values):
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first tokens of two slots."""
        for layer in self._written():
            for buffer in (layer.keys, layer.values):
                before = buffer[a, :, :tokens].clone()
                buffer[a, :, :tokens] = buffer[b, :, :tokens]
                buffer[b, :, :tokens] = before

    def _written(self) -> list["SlotLayer"]:
        return [each for each in self.layers if isinstance(each, SlotLayer) and each.is_initialized]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.start if self.positions is None else _RowOffsets(self.positions)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        if self.positions is not None and not _HAS_QUERY_OFFSET:
            return _RowOffsets(self.positions)  # Transformers takes this for the offset, too
        # In a decode step the rows differ; as long as what attention reads is what a length is for.
        return self.start if self.positions is None else self.length - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length, 0

    @property
    def is_compileable(self) -> bool:
        return True
