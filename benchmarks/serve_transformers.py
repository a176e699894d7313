"""Our engine against Transformers' continuous batching: which of the two is to be served?

    python benchmarks/serve_transformers.py MODEL [--requests 8 --tokens 32 --rounds 3 -o FILE]

Both run the same dense weights on the same prompts, greedily, with room for `--slots` replies at
once, in turns, in one process. Told are tokens a second in all and when first tokens came, each the
median of the rounds, the ratio of each round, and how many replies are the same. The first round is
not counted: there both make what they keep.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_load import WORDS

from salience.machine import describe

Run = Callable[[], dict[str, Any]]


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Of 20 to 60 words."""
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(20, 60))) for _ in range(count)]
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def load(name: str) -> tuple[Any, Any]:
    from salience.loading import load_source
    from salience.source import open_source

    source = open_source(name)
    return load_source(source, "auto"), source.tokenizer


def ours(model: Any, tokenizer: Any, asked: Sequence[Any], tokens: int, slots: int) -> Run:
    """`salience.runtime.Engine`, which has no prompt of the round before in its cache."""
    from salience.runtime import Engine, Sampling

    engine = Engine(model, tokenizer, max_context=512, max_batch=slots)
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
    engine.prepare(sampling)

    def run() -> dict[str, Any]:
        engine.reset()
        start = time.perf_counter()
        results = engine.generate(asked, sampling)
        seconds = time.perf_counter() - start
        firsts = [result.first_token_seconds for result in results]
        return _result(seconds, firsts, [result.tokens for result in results])

    return run


def theirs(model: Any, asked: Sequence[Any], tokens: int, slots: int) -> Run:
    """Transformers' `generate_batch`, which runs its ContinuousBatchingManager."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    longest = max(map(len, asked)) + tokens

    def run() -> dict[str, Any]:
        config = ContinuousBatchingConfig(
            page_size=32,
            num_blocks=slots * -(-longest // 32) + 1,
            max_batch_tokens=512,
            max_requests_per_batch=slots,
        )
        start = time.perf_counter()
        outputs = model.generate_batch(
            asked,
            generation_config=generation,
            continuous_batching_config=config,
            record_timestamps=True,
            warmup=False,
        )
        seconds = time.perf_counter() - start
        by_prompt = {tuple(output.prompt_ids): output for output in outputs.values()}
        found = [by_prompt[tuple(each)] for each in asked]
        firsts = [output.timestamps[0] - start for output in found if output.timestamps]
        return _result(seconds, firsts, [list(output.generated_tokens) for output in found])

    return run


def _result(seconds: float, firsts: list[float], replies: list[list[int]]) -> dict[str, Any]:
    return {
        "tokens_per_second": sum(map(len, replies)) / seconds,
        "seconds": seconds,
        "first_token_median": statistics.median(firsts) if firsts else None,
        "first_token_worst": max(firsts, default=None),
        "replies": replies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    asked = prompts(tokenizer, options.requests)
    other = copy.deepcopy(model)  # ours merges linears
    runs = {
        "ours": ours(model, tokenizer, asked, options.tokens, options.slots),
        "theirs": theirs(other, asked, options.tokens, options.slots),
    }
    rounds = [{name: run() for name, run in runs.items()} for _ in range(1 + options.rounds)][1:]
    pairs = [rounds[0][name]["replies"] for name in runs]
    found = {
        name: {
            key: statistics.median(each[name][key] for each in rounds)
            for key in ("tokens_per_second", "first_token_median", "first_token_worst")
        }
        for name in runs
    }
    result = {
        "model": options.model,
        "requests": options.requests,
        "tokens": options.tokens,
        "slots": options.slots,
        **found,
        "ratios": [
            each["ours"]["tokens_per_second"] / each["theirs"]["tokens_per_second"]
            for each in rounds
        ],
        "same_replies": sum(a == b for a, b in zip(*pairs, strict=True)),
        **describe(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
