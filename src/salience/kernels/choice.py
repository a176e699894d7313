"""Which variant multiplies a weight on a GPU: the fastest, by a table measured before.

What is fastest depends on the GPU, the bits, the shape and the number of tokens, and no formula
says it. So it is measured once for each GPU, never at first use in front of a user:

    {"gpu": "NVIDIA H100 80GB HBM3",
     "entries": [{"bits": 4, "group_size": 128, "columns": 4096, "rows": 28672, "dtype": "float16",
                  "buckets": [{"tokens": 16, "order": [["triton", {"split": 2}, 24.1], ...]}]}]}

A bucket holds for up to that many tokens; its order is name, options and microseconds, fastest
first: a machine that lacks what one needs takes the next. Tables of GPUs that we measured come with
the package; `save` writes a user's own beside other caches, and what it has goes before ours. A
shape that is in neither takes the nearest one, by the ratio of its sides.
"""

import functools
import json
import math
import os
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from salience.errors import StorageError
from salience.kernels._fragments import BLOCK, ROWS, TILE
from salience.machine import cache_folder, matmul_flops

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
_OTHER_GROUP = 1.0  # as far as twice the columns
_COPIES_OF_L2 = 3
_REPLAYS = 5
_SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight and the dtype of what it is multiplied with; group_size is never -1."""

    bits: int
    group_size: int
    columns: int
    rows: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Timed:
    """A variant, its options, and the microseconds it took."""

    variant: str
    options: Mapping[str, int]
    microseconds: float


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured of a shape: for up to so many tokens, variants, fastest first."""

    shape: Shape
    buckets: Mapping[int, Sequence[Timed]]


class Variant(Protocol):
    """One way to multiply the weights of backend `gpu`."""

    name: str

    def supports(self, shape: Shape, tokens: int, device: torch.device) -> bool:
        """Whether it works for any number of tokens above tokens / 2, a power of 2, up to it."""
        ...

    def options(self, shape: Shape, tokens: int) -> list[dict[str, int]]:
        """What is worth measuring: arguments of `multiply`."""
        ...

    def multiply(
        self,
        x: Tensor,
        packed: list[Tensor],
        bits: int,
        group_size: int,
        out_features: int,
        **options: int,
    ) -> Tensor:
        """x [tokens, in] times the packed weight: [tokens, out_features] in the dtype of x."""
        ...


def bucket(tokens: int) -> int:
    """The next power of 2."""
    return 1 << (tokens - 1).bit_length()


def order(gpu: str, shape: Shape, tokens: int) -> Sequence[Timed]:
    """What the tables say of a weight, or of the nearest to it: variants, fastest first; nothing
    when there is no table of this GPU, none of its entries is of these bits, or so many tokens were
    not measured.
    """
    like = [
        entry
        for entry in _table(gpu)
        if entry.shape.bits == shape.bits
        and (entry.shape.dtype == torch.float32) == (shape.dtype == torch.float32)
    ]
    if not like:
        return ()
    nearest = min(like, key=lambda entry: _distance(entry.shape, shape))
    limit = min((limit for limit in nearest.buckets if tokens <= limit), default=None)
    return () if limit is None else nearest.buckets[limit]


def _distance(a: Shape, b: Shape) -> float:
    sides = abs(math.log2(a.columns / b.columns)) + abs(math.log2(a.rows / b.rows))
    return sides + _OTHER_GROUP * (a.group_size != b.group_size) + 0.1 * (a.dtype != b.dtype)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


@functools.cache
def _table(gpu: str) -> tuple[Entry, ...]:
    """All entries of a GPU, the user's before ours."""
    folders = (cache_folder("kernels"), _SHIPPED)
    return tuple(entry for folder in folders for entry in _read(folder / _file_name(gpu)))


def _read(path: Path) -> list[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, error)
    try:
        return [_entry(entry) for entry in json.loads(text)["entries"]]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        return _ignored(path, error)


def _ignored(path: Path, error: Exception) -> list[Entry]:
    line = " ".join(str(error).split())
    warnings.warn(
        f"{path} is no table of kernels ({line}) and is ignored; delete it or measure again",
        stacklevel=2,
    )
    return []


def _entry(raw: dict[str, Any]) -> Entry:
    """What a table says of a shape.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: something else.
    """
    bits, group, columns, rows = (int(raw[k]) for k in ("bits", "group_size", "columns", "rows"))
    dtype = getattr(torch, raw["dtype"])
    buckets = {
        int(some["tokens"]): [
            Timed(str(name), {key: int(value) for key, value in options.items()}, float(took))
            for name, options, took in some["order"]
        ]
        for some in raw["buckets"]
    }
    if min(bits, group, columns, rows) < 1 or not isinstance(dtype, torch.dtype) or not buckets:
        raise ValueError(f"an entry of {rows} x {columns}, {dtype}, with {len(buckets)} buckets")
    return Entry(Shape(bits, group, columns, rows, dtype), buckets)


def measure(
    variants: Sequence[Variant],
    shape: Shape,
    device: torch.device,
    tokens: Sequence[int] = TOKENS,
    time: "Callable[[Sequence[Callable[[], Tensor]]], float] | None" = None,
) -> Entry:
    """Time every variant, with every option worth trying, on random weights of a shape.

    Args:
        variants: of backend `gpu`.
        shape: of the weight, which is made in so many copies that the GPU's cache holds none.
        device: a GPU.
        tokens: powers of 2.
        time: microseconds a call, of calls that differ in their weight; None for graph replay.
    """
    copies = _random_weights(shape, device)
    if time is None:
        warm_up(device)
    buckets = {}
    for count in tokens:
        x = torch.randn(count, shape.columns, device=device).to(shape.dtype)
        found = []
        for variant in variants:
            if not variant.supports(shape, count, device):
                continue
            timed = [
                Timed(
                    variant.name,
                    options,
                    (time or microseconds)(
                        [
                            functools.partial(
                                variant.multiply,
                                x, packed, shape.bits, shape.group_size, shape.rows, **options,
                            )
                            for packed in copies
                        ]
                    ),
                )
                for options in variant.options(shape, count)
            ]  # fmt: skip
            found.append(min(timed, key=lambda one: one.microseconds))
        if found:
            buckets[count] = sorted(found, key=lambda one: one.microseconds)
    return Entry(shape, buckets)


def _random_weights(shape: Shape, device: torch.device) -> list[list[Tensor]]:
    tiles, blocks = -(-shape.rows // ROWS) * ROWS // TILE, -(-shape.columns // BLOCK)
    size = (tiles, shape.columns // shape.group_size, TILE)
    made = [
        torch.randint(-(2**31), 2**31, (tiles, blocks, 64 * shape.bits), device=device).int(),
        torch.rand(size, device=device).add_(0.5).mul_(0.01).half(),
        torch.randint(2**shape.bits, size, dtype=torch.uint8, device=device),
    ]
    cache = 0
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, _COPIES_OF_L2 * cache // made[0].nbytes + 1)
    return [[tensor.clone() for tensor in made] for _ in range(count)]


def warm_up(device: torch.device) -> None:
    """Keep a GPU busy until its clock is up, or what is timed first takes up to a fifth longer."""
    matmul_flops(device, 4096, seconds=0.5)


def microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Time of a call on the current GPU: the median of replays of a graph of all of them."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    took = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(took)


def save(gpu: str, entries: Sequence[Entry], folder: Path | None = None) -> Path:
    """Write entries into the table of a GPU; its entries of other shapes stay.

    Args:
        gpu: its name, as torch has it.
        entries: as `measure` makes them.
        folder: None for the user's cache.

    Returns:
        The file written.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = (folder or cache_folder("kernels")) / _file_name(gpu)
    fresh = {entry.shape for entry in entries}
    kept = [entry for entry in _read(path) if entry.shape not in fresh]
    rows = ",\n".join(f"  {json.dumps(_raw(entry))}" for entry in (*kept, *entries))
    partial = path.with_suffix(f".{os.getpid()}")
    text = f'{{"gpu": {json.dumps(gpu)},\n "entries": [\n{rows}\n]}}\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        line = f"cannot write {path} ({error.strerror}); set XDG_CACHE_HOME to a folder that can be"
        raise StorageError(line) from error
    _table.cache_clear()
    return path


def _raw(entry: Entry) -> dict[str, Any]:
    return asdict(entry.shape) | {
        "dtype": str(entry.shape.dtype).removeprefix("torch."),
        "buckets": [
            {
                "tokens": tokens,
                "order": [
                    [one.variant, dict(one.options), round(one.microseconds, 2)] for one in found
                ],
            }
            for tokens, found in entry.buckets.items()
        ],
    }
