"""Tokens a second on a CPU: Transformers and our engine, the step as it is and optimized.

    python benchmarks/decode_cpu.py -o benchmarks/results/decode_cpu.json

Greedy generation of the same prompt, batch 1, in one process, the four by turns and the best of
several rounds each, so that what else the machine does hits all alike: compare ratios.

    dense      Transformers' generate, the float model in bf16
    packed     Transformers' generate, our w4g64 model in bf16
    plain      our engine, linears merged
    optimized  our engine, linears merged and the step traced and rewritten

Exits with 1 when `optimized` is not twice as fast as `dense`. The time is that of tokens after the
first. `agree` says how many of the tokens are those of `packed`, up to the first other one.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import salience
from salience.machine import describe
from salience.runtime import Engine, Sampling
from salience.runtime.merge import merge_linears
from salience.source import open_source

Generate = Callable[[int], list[int]]


def transformers(model: Any, prompt: list[int]) -> Generate:
    """Greedy tokens by Transformers."""

    def generate(count: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return list(out[0, len(prompt) :].tolist())

    return generate


def engine(model: Any, prompt: list[int], fast: bool) -> Generate:
    """Greedy tokens by our engine."""
    made = Engine(model, max_context=1024, fast=fast)

    def generate(count: int) -> list[int]:
        result = made.generate([prompt], Sampling(max_new_tokens=count, ignore_eos=True))[0]
        return list(result.tokens)

    return generate


def speed(generate: Generate, count: int) -> float:
    """Tokens a second after the first."""
    took = []
    for tokens in (1, count + 1):
        start = time.perf_counter()
        generate(tokens)
        took.append(time.perf_counter() - start)
    return count / (took[1] - took[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a float model")
    parser.add_argument("--scheme", default="w4g64")
    parser.add_argument("--packed", type=Path, help="its quantized folder; made when left out")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        folder = args.packed or Path(work) / "packed"
        if args.packed is None:
            salience.quantize(args.model, folder, method="rtn", scheme=args.scheme)
        dense, packed, merged = (
            salience.load(path, device="cpu", dtype=torch.bfloat16)
            for path in (args.model, folder, folder)
        )
    merge_linears(merged)
    tokenizer = open_source(args.model).tokenizer
    prompt = tokenizer("The history of the city begins with a river, and").input_ids
    ways = {
        "dense": transformers(dense, prompt),
        "packed": transformers(packed, prompt),
        "plain": engine(merged, prompt, False),
        "optimized": engine(merged, prompt, True),
    }
    tokens = {name: generate(32) for name, generate in ways.items()}  # also warms up
    best = dict.fromkeys(ways, 0.0)
    for _ in range(args.rounds):
        for name, generate in ways.items():
            best[name] = max(best[name], speed(generate, args.tokens))
    agree = {}
    for name, own in tokens.items():
        same = [a == b for a, b in zip(own, tokens["packed"], strict=True)]
        agree[name] = same.index(False) if False in same else len(same)
    ratio = best["optimized"] / best["dense"]
    for name, value in best.items():
        print(f"{name:10} {value:7.1f} tokens/s, first {agree[name]} tokens as packed")
    print(f"optimized is {ratio:.2f} times dense")
    if args.output:
        result = {
            "machine": describe(),
            "threads": torch.get_num_threads(),
            "model": args.model,
            "scheme": args.scheme,
            "tokens_per_second": best,
            "agree": agree,
            "optimized_over_dense": ratio,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(ratio < 2)


if __name__ == "__main__":
    main()
