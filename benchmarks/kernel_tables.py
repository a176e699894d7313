"""The tables of kernels that come with the package: every variant of backend `gpu`, measured.

    python benchmarks/kernel_tables.py -o OUT --bits 4 --tokens 1 4 16

As `salience bench kernels --save` does it, but kernels are compiled side by side, and cuBLAS and
the floor are beside them. Each time is the median of replays of a CUDA graph over so many copies of
the weight that the L2 cache holds none, or over eight calls where arithmetic is the floor; the
fastest and cuBLAS are timed by turns. The error of the fastest, against fp64 on fresh random input,
is in the result; the status is 1 if one is wrong. OUT gets the table and `kernels.json`; the floor
is the bytes of codes, scales, zeros, activations at 2.96 TB/s, or the operations at 790 TFLOP/s.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from salience.kernels import choice, cuda_program, gpu
from salience.kernels.choice import Entry, Shape, Timed, Variant
from salience.machine import describe
from salience.scheme import Scheme

SHAPES = (
    *((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096), (8192, 8192)),
    *((8192, 57344), (28672, 8192)),
)
TOLERANCE = 6e-4
FAST = ("mma", "wgmma", "dequantize")  # Triton's own is for GPUs that have neither


def candidates(shape: Shape, tokens: int) -> Iterator[tuple[Variant, dict[str, int]]]:
    """What is worth measuring."""
    for variant in gpu.VARIANTS:
        if variant.name not in FAST or not variant.supports(shape, tokens, torch.device("cuda")):
            continue
        if (variant.name, tokens < 64) == ("dequantize", True):
            continue
        if (variant.name, tokens > 32) == ("mma", True):
            continue
        for options in variant.options(shape, tokens):
            yield variant, options


def compile_all(shapes: list[Shape], tokens: list[int]) -> None:
    """Compile what will be measured, in threads; nothing is launched."""
    first = shapes[0]
    packed = choice._random_weights(Shape(first.bits, 128, 4096, 1024, first.dtype), _gpu())[0]
    jobs = {
        (variant.name, count, tuple(options.items())): (variant, count, options)
        for shape in shapes
        for count in tokens
        for variant, options in candidates(shape, count)
        if variant.name != "dequantize"
    }

    def build(job: tuple[Variant, int, dict[str, int]]) -> None:
        variant, count, options = job
        torch.cuda.set_device(0)
        x = torch.zeros(count, 4096, dtype=first.dtype, device="cuda")
        variant.multiply(x, packed, first.bits, 128, 1024, **options)

    with (
        mock.patch.object(cuda_program.Kernel, "launch", lambda *_, **__: None),
        ThreadPoolExecutor() as pool,
    ):
        list(pool.map(build, jobs.values()))


def measure(shape: Shape, tokens: list[int]) -> tuple[Entry, list[dict[str, Any]]]:
    """The fastest of each variant, for each number of tokens, beside cuBLAS."""
    copies = choice._random_weights(shape, _gpu())
    count = max(2, int(160e6 / (2 * shape.rows * shape.columns)))
    size = (shape.rows, shape.columns)
    dense = [torch.randn(size, device="cuda", dtype=shape.dtype) for _ in range(count)]
    scheme = Scheme(shape.bits, shape.group_size)
    exact = gpu.Gpu().unpack(copies[0], scheme, shape.columns, shape.rows)
    weight = exact.dequantize(torch.float32)[:256].double()
    del exact
    choice.warm_up(_gpu())
    buckets, rows = {}, []
    for many in sorted(tokens):
        x = torch.randn(many, shape.columns, device="cuda", dtype=shape.dtype)
        if many > 256:  # the cache helps nobody
            copies, dense = copies[:2] * 4, dense[:2] * 4
        found: dict[str, Timed] = {}
        for variant, options in candidates(shape, many):
            calls = [
                partial(variant.multiply, x, packed, shape.bits, shape.group_size, shape.rows)
                for packed in copies
            ]
            took = choice.microseconds([partial(call, **options) for call in calls])
            if variant.name not in found or took < found[variant.name].microseconds:
                found[variant.name] = Timed(variant.name, options, took)
        first, *others = sorted(found.values(), key=lambda one: one.microseconds)
        [variant] = [one for one in gpu.VARIANTS if one.name == first.variant]
        ours = [
            partial(variant.multiply, x, packed, shape.bits, shape.group_size, shape.rows)
            for packed in copies
        ]
        ours = [partial(call, **first.options) for call in ours]
        theirs = [partial(torch.nn.functional.linear, x, w) for w in dense]
        took, cublas = (
            statistics.median(times) for times in zip(*by_turns(ours, theirs), strict=True)
        )
        best = sorted(
            [replace(first, microseconds=took), *others], key=lambda one: one.microseconds
        )
        y = ours[0]()
        want = x[:16].double() @ weight.T
        buckets[many] = best
        rows.append(
            {
                "bits": shape.bits,
                "in": shape.columns,
                "out": shape.rows,
                "tokens": many,
                "floor": floor(shape, many),
                "cublas": cublas,
                "times": {one.variant: one.microseconds for one in best},
                "options": {one.variant: one.options for one in best},
                "error": float((y[:16, :256].double() - want).norm() / want.norm()),
            }
        )
    return Entry(shape, buckets), rows


def by_turns(*calls: list[Callable[[], torch.Tensor]]) -> list[list[float]]:
    """Microseconds of each, three times in turn: the GPU's clock is then the same for all."""
    return [[choice.microseconds(one) for one in calls] for _ in range(3)]


def floor(shape: Shape, tokens: int) -> float:
    """Microseconds below which no kernel can be."""
    size = shape.rows * shape.columns
    stored = size * shape.bits / 8 + size / shape.group_size * 3
    moved = (stored + 2 * tokens * (shape.rows + shape.columns)) / 2.96e6
    return max(moved, 2 * tokens * size / 790e6)


def _gpu() -> torch.device:
    return torch.device("cuda", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=1e9, help="Begin no shape after these.")
    parser.add_argument("--keep", action="store_true", help="Also in this user's cache.")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    begin, console, name = time.monotonic(), Console(width=200), torch.cuda.get_device_name()
    shapes = [Shape(args.bits, 128, *pair, torch.float16) for pair in SHAPES]
    compile_all(shapes, args.tokens)
    console.print(f"compiled in {time.monotonic() - begin:.0f} s")
    entries, rows, wrong = [], [], False
    args.out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        if time.monotonic() - begin > args.seconds:
            break
        entry, found = measure(shape, args.tokens)
        entries.append(entry)
        rows += found
        wrong |= any(not row["error"] < TOLERANCE for row in found)
        line = "; ".join(
            f"{row['tokens']}: {min(row['times'].values()):.1f} {next(iter(row['times']))}"
            f" cuBLAS {row['cublas']:.1f} floor {row['floor']:.1f}"
            for row in found
        )
        console.print(f"w{shape.bits} {shape.columns}x{shape.rows} {line}", soft_wrap=True)
        choice.save(name, entries, args.out)
        if args.keep:
            choice.save(name, entries)
        made = {"rows": rows, "wrong": wrong, "machine": describe()}
        (args.out / "kernels.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
