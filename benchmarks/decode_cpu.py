"""Tokens a second on a CPU: Transformers and our engine, the step as it is and optimized.

    python benchmarks/decode_cpu.py -o benchmarks/results/decode_cpu.json

Greedy generation of the same prompt, batch 1, in one process, all by turns in several rounds, so
that what else the machine does hits all alike: the ratios are the medians of those of each round,
the rates the best of all.

    dense      Transformers' generate, the float model in bf16
    packed     Transformers' generate, our w4g64 model in bf16
    plain      our engine, linears merged
    optimized  our engine, linears merged and the step traced and rewritten
    float      the same of the float model in bf16
    llama.cpp  on the GGUF file that the model came in, as its makers coded it, with --llama; a
               process of its own each round, the better of two. Where to get it:
               interop_llama_cpp.py

Exits with 1 when `optimized` is not twice as fast as `dense`. The time is that of tokens after the
first. `agree` says how many of the tokens are those of `packed`, up to the first other one.
"""

import argparse
import json
import statistics
import subprocess
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

PROMPT = "The history of the city begins with a river, and"

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


def llama_cpp(folder: Path, file: Path, count: int, rounds: int) -> dict[str, Any]:
    """Tokens a second after the first by llama.cpp, the best of some rounds, and its release."""
    numbers = (count, rounds, torch.get_num_threads())
    script = Path(__file__).with_name("decode_llama_cpp.mjs").resolve()
    command = ["node", str(script), str(file), PROMPT, *map(str, numbers)]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


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
    parser.add_argument("--llama", type=Path, help="where npm put node-llama-cpp")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        folder = args.packed or Path(work) / "packed"
        if args.packed is None:
            salience.quantize(args.model, folder, method="rtn", scheme=args.scheme)
        dense, packed, merged, merged_dense = (
            salience.load(path, device="cpu", dtype=torch.bfloat16)
            for path in (args.model, folder, folder, args.model)
        )
    merge_linears(merged)
    merge_linears(merged_dense)
    source = open_source(args.model)
    prompt = source.tokenizer(PROMPT).input_ids
    ways = {
        "dense": transformers(dense, prompt),
        "packed": transformers(packed, prompt),
        "plain": engine(merged, prompt, False),
        "optimized": engine(merged, prompt, True),
        "float": engine(merged_dense, prompt, True),
    }
    tokens = {name: generate(32) for name, generate in ways.items()}  # also warms up
    rounds, peers = [], {}
    for _ in range(args.rounds):
        found = {name: speed(generate, args.tokens) for name, generate in ways.items()}
        if args.llama:
            theirs = llama_cpp(args.llama, Path(source.path), args.tokens, 2)
            found["llama.cpp"] = theirs["tokens_per_second"]
            peers["llama.cpp"] = theirs["llama_cpp"]
        rounds.append(found)
    best = {name: max(each[name] for each in rounds) for name in rounds[0]}
    agree = {}
    for name, own in tokens.items():
        equal = [a == b for a, b in zip(own, tokens["packed"], strict=True)]
        agree[name] = equal.index(False) if False in equal else len(equal)
    ratios = {
        name: statistics.median(each["optimized"] / each[name] for each in rounds) for name in best
    }
    for name, value in best.items():
        same = f", first {agree[name]} tokens as packed" if name in agree else ""
        print(f"{name:10} {value:7.1f} tokens/s{same}")
    print("optimized is", ", ".join(f"{ratio:.2f} {name}" for name, ratio in ratios.items()))
    if args.output:
        result = {
            "machine": describe(),
            "threads": torch.get_num_threads(),
            "model": args.model,
            "scheme": args.scheme,
            "peers": peers,
            "tokens_per_second": best,
            "agree": agree,
            "optimized_over": ratios,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(ratios["dense"] < 2)


if __name__ == "__main__":
    main()
