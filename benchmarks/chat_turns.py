"""What a talk before it costs a new turn: time to its first token, first and second.

    python benchmarks/chat_turns.py --history 1024 -o chat_turns.json

The same text is said as the first turn of a talk, and as the second, after a long one and a reply
that was just drawn. Medians over `--rounds` talks, each with a seed of its own. Exits with 1 when
the second turn takes more than 1.3 times as long as the first.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from salience.chat.session import Session
from salience.loading import load_source
from salience.runtime import Engine, Result, Sampling
from salience.source import open_source

_LIMIT = 1.3
_REPLY = 128
_FIRST = "Write about the sea, the ships that cross it and those who live by it."
_NEW = "Now tell me in one sentence which of these things matters most to a sailor, and why so."
_UNRELATED = "1 2 3 4 5 6 7 8"


def last(engine: Engine, texts: dict[str, int], seed: int) -> Result:
    """The last reply of a talk.

    Args:
        texts: what is said, and how many tokens each reply has at most.
    """
    engine.generate([engine.tokenizer(_UNRELATED)["input_ids"]], Sampling(max_new_tokens=1))
    session = Session(engine)
    for text, count in texts.items():
        session.sampling = Sampling(max_new_tokens=count, temperature=1.0, seed=seed)
        session.ask(text)
    assert session.last is not None
    return session.last.result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--history", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    source = open_source(args.model)
    engine = Engine(load_source(source, args.device), source.tokenizer)
    words = len(source.tokenizer(_FIRST)["input_ids"])
    first = " ".join([_FIRST] * max(1, (args.history - _REPLY) // words))
    cases = {"first turn": {_NEW: 1}, "second turn": {first: _REPLY, _NEW: 1}}
    rows: list[dict[str, Any]] = []
    for name, texts in cases.items():
        last(engine, {_NEW: 1}, 0)  # warm
        results = [last(engine, texts, seed) for seed in range(args.rounds)]
        rows.append(
            {
                "name": name,
                "first_token_seconds": median(each.first_token_seconds for each in results),
                "prompt_tokens": median(each.prompt_tokens for each in results),
                "computed_tokens": median(e.prompt_tokens - e.cached_tokens for e in results),
            }
        )
    table = Table(title=f"{args.model}, {args.rounds} rounds")
    for column in ("", "first token ms", "prompt tokens", "computed", "times the first turn"):
        table.add_column(column, justify="right" if column else "left")
    base = rows[0]["first_token_seconds"]
    for row in rows:
        row["ratio"] = row["first_token_seconds"] / base
        milliseconds = f"{1e3 * row['first_token_seconds']:.1f}"
        counts = (f"{row['prompt_tokens']:.0f}", f"{row['computed_tokens']:.0f}")
        table.add_row(row["name"], milliseconds, *counts, f"{row['ratio']:.2f}")
    Console().print(table)
    if args.out:
        args.out.write_text(json.dumps({"model": args.model, "rows": rows}, indent=1) + "\n")
    return int(rows[1]["ratio"] > _LIMIT)


if __name__ == "__main__":
    sys.exit(main())
