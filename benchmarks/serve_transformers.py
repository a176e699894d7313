"""Our engine against Transformers' continuous batching: which of the two is to be served?

    python benchmarks/serve_transformers.py MODEL [--requests 16 --tokens 32 -o FILE]

Both run the same dense weights on the same prompts, greedily, with room for `--slots` replies at
once, each in a process of its own. Told are tokens a second in all, when first tokens came, the
most memory, and how many replies are the same.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import time
from pathlib import Path
from typing import Any

from serve_load import WORDS

from salience.machine import describe, peak_rss_bytes


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


def ours(name: str, requests: int, tokens: int, slots: int) -> dict[str, Any]:
    """`salience.runtime.Engine`."""
    from salience.runtime import Engine, Sampling

    model, tokenizer = load(name)
    engine = Engine(model, tokenizer, max_context=512, max_batch=slots)
    sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
    engine.prepare(sampling)
    asked = prompts(tokenizer, requests)
    start = time.perf_counter()
    results = engine.generate(asked, sampling)
    seconds = time.perf_counter() - start
    firsts = [result.first_token_seconds for result in results]
    return _result(seconds, firsts, [result.tokens for result in results])


def theirs(name: str, requests: int, tokens: int, slots: int) -> dict[str, Any]:
    """Transformers' `generate_batch`, which runs its ContinuousBatchingManager."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer = load(name)
    asked = prompts(tokenizer, requests)
    generation = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    longest = max(map(len, asked)) + tokens
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


def _result(seconds: float, firsts: list[float], replies: list[list[int]]) -> dict[str, Any]:
    return {
        "tokens_per_second": sum(map(len, replies)) / seconds,
        "seconds": seconds,
        "first_token_median": statistics.median(firsts) if firsts else None,
        "first_token_worst": max(firsts, default=None),
        "peak_rss_bytes": peak_rss_bytes(),
        "replies": replies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    arguments = (options.model, options.requests, options.tokens, options.slots)
    found = {}
    for function in (ours, theirs):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[function.__name__] = pool.apply(function, arguments)
    pairs = [found[name].pop("replies") for name in ("ours", "theirs")]
    same = sum(a == b for a, b in zip(*pairs, strict=True))
    result = {"arguments": arguments, **found, "same_replies": same, **describe()}
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
