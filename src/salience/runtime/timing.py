"""How long an engine takes for prompts and for tokens.

The time of a step is taken where all sequences run at once: after the last prompt is in, before the
first reply is done. Prompts are random tokens, other ones for each run, so that none is found in
the cache.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from salience.runtime.engine import Engine
from salience.runtime.sampling import Sampling

_CPU_WARM_UP = 4  # tokens; on a GPU all of them, since graphs of several lengths are captured


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one generation.

    Args:
        step_seconds: of one token for each sequence, while all run.
        seconds: of the whole, from the prompts to the last token.
        interleaved: whether some replies were done before the last prompt was in, so that the step
            is a mean over steps that did other work too.
    """

    step_seconds: float
    seconds: float
    interleaved: bool


# What a step brought: seconds since the start, tokens, how many replies have begun and ended.
Stamp = tuple[float, int, int, int]


def random_prompts(
    model: Any, batch: int, length: int, generator: torch.Generator
) -> list[list[int]]:
    """So many prompts of `length` tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts: list[list[int]] = torch.randint(
        vocabulary, (batch, length), generator=generator
    ).tolist()
    return prompts


def warm_up(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Do once what is made on the first use, before replies of `new` tokens are timed."""
    on_gpu = engine.device.type == "cuda"
    _generate(engine, prompts, new if on_gpu else min(new, _CPU_WARM_UP))


def time_prefill(engine: Engine, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds until each prompt has its first token, and nothing else is done."""
    return _generate(engine, prompts, 1)[-1][0]


def time_decode(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> Timing:
    """Generate replies of `new` tokens, at least 2."""
    return steady(_generate(engine, prompts, new), len(prompts), new)


def steady(stamps: Sequence[Stamp], batch: int, new: int) -> Timing:
    """What the stamps of a generation say."""
    seconds = stamps[-1][0]
    last = next(i for i, stamp in enumerate(stamps) if stamp[3])
    first = next(i for i, stamp in enumerate(stamps) if stamp[2] == batch)
    interleaved = first >= last
    if interleaved:
        first, last = next(i for i, stamp in enumerate(stamps) if stamp[2]), len(stamps) - 1
    tokens = sum(stamp[1] for stamp in stamps[first + 1 : last + 1])
    took = stamps[last][0] - stamps[first][0]
    if not tokens:  # two tokens that were read at once
        return Timing(seconds / new, seconds, True)
    return Timing(took * batch / tokens, seconds, interleaved)


def _generate(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> list[Stamp]:
    """Generate, and take down when the tokens came."""
    sampling = Sampling(max_new_tokens=new, ignore_eos=True)
    stamps = []
    start = time.perf_counter()
    requests = [engine.submit(prompt, sampling) for prompt in prompts]
    ended = 0
    while ended < len(requests):
        events = engine.step()
        now = time.perf_counter() - start
        begun = sum(bool(request.tokens) for request in requests)
        ended = sum(request.finished for request in requests)
        stamps.append((now, sum(len(event.tokens) for event in events), begun, ended))
    return stamps
