"""A linear of 4-bit weights on a GPU, beside cuBLAS in fp16 and the floor that memory sets.

    python benchmarks/linear_gpu.py -o benchmarks/results/linear_gpu_h100.json

Each time is the median of replays of a CUDA graph over so many copies of the weight that the L2
cache holds none. All in one process, kernel after kernel on each shape: compare ratios. Correctness
against fp64 comes first. The floor is the bytes of codes, scales, zeros and activations at
2.96 TB/s, or the operations at 790 TFLOP/s.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from main_job import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from salience import kernels
from salience.qtensor import QTensor
from salience.scheme import Scheme

SHAPES = ((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192), (8192, 57344))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
COPIES_BYTES = 160e6  # three times an H100's L2


def weight(columns: int, rows: int, scheme: Scheme) -> QTensor:
    """Random codes, scales and zeros."""
    size = (rows, scheme.groups(columns))
    return QTensor(
        torch.randint(2**scheme.bits, (rows, columns), dtype=torch.uint8, device="cuda"),
        (torch.rand(size, device="cuda") * 0.01 + 0.005).half(),
        torch.randint(2**scheme.bits, size, dtype=torch.uint8, device="cuda"),
        scheme,
    )


def microseconds(calls: Sequence[Callable[[], Tensor]], replays: int = 5) -> float:
    """Median time of a call."""
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
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(took)


def floor(columns: int, rows: int, tokens: int, scheme: Scheme) -> float:
    """Microseconds below which no kernel can be."""
    stored = rows * columns * scheme.bits / 8 + rows * scheme.groups(columns) * 3
    moved = (stored + 2 * tokens * (rows + columns)) / 2.96e6
    return max(moved, 2 * tokens * rows * columns / 790e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    scheme, dtype = Scheme.parse(args.scheme), getattr(torch, args.dtype)
    table = Table("in", "out", "tokens", "floor", "cuBLAS", "ours", "ours / floor", "error")
    rows = []
    for columns, outputs in SHAPES:
        qt = weight(columns, outputs, scheme)
        backend = kernels.choose(scheme, qt.q.device, columns, outputs)
        copies = max(2, int(COPIES_BYTES / (outputs * columns * scheme.bits / 8)))
        packed = [backend.pack(qt) for _ in range(copies)]
        dense = [
            torch.randn(outputs, columns, device="cuda", dtype=dtype)
            for _ in range(max(2, int(COPIES_BYTES / (outputs * columns * 2))))
        ]
        exact = qt.dequantize(torch.float32)
        del qt
        for tokens in args.tokens:
            x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
            want = x[:16].double() @ exact[:512].double().T
            size = scheme.group_size
            found = backend.matmul(x, packed[0], scheme.bits, size, outputs)[:16, :512].double()
            row = {
                "in": columns,
                "out": outputs,
                "tokens": tokens,
                "floor": floor(columns, outputs, tokens, scheme),
                "cublas": microseconds([partial(torch.nn.functional.linear, x, w) for w in dense]),
                backend.name: microseconds(
                    [
                        partial(backend.matmul, x, each, scheme.bits, size, outputs)
                        for each in packed
                    ]
                ),
                "error": float((found - want).norm() / want.norm()),
            }
            rows.append(row)
            ratio = row[backend.name] / row["floor"]
            numbers = (row["floor"], row["cublas"], row[backend.name], ratio)
            texts = [f"{number:.1f}" for number in numbers]
            table.add_row(str(columns), str(outputs), str(tokens), *texts, f"{row['error']:.1e}")
        del packed, dense, exact
        if args.out:
            made = {"scheme": args.scheme, "dtype": args.dtype, "rows": rows, "machine": machine()}
            args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    Console().print(table)


if __name__ == "__main__":
    main()
