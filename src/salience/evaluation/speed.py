"""How fast a loaded model generates on this machine, and what memory that takes.

Prompts and replies are timed apart, because they are bound by different things: a prompt by
multiplications, a reply by the bytes of the weights, which each step reads once for all sequences
together. Each is timed several times, with other prompts. Of so few times the median is shown with
the least and the most: on a machine that does other work too they lie far apart, and a mean would
hide it.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from salience.bench.measure import require_memory
from salience.bench.shapes import resident
from salience.errors import SalienceError
from salience.monitor import Memory, Sampler
from salience.placement import input_device
from salience.runtime import Engine
from salience.runtime.cache import padded
from salience.runtime.limits import context_limit
from salience.runtime.timing import random_prompts, time_decode, time_prefill, warm_up

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """The same thing measured several times."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """Tokens a second of a batch, all its sequences together.

    Args:
        batch: sequences at once.
        prefill_tokens_per_second: of prompts, until each has its first token.
        decode_tokens_per_second: new ones, while all run.
        peak: memory while both were measured.
    """

    batch: int
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    peak: Memory


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured.

    Args:
        device: where.
        prompt: tokens of a prompt.
        new: tokens of a reply.
        weight_bytes: of all parameters and packed tensors.
        cache_bytes_per_token: keys and values of a token.
        rows: for each batch.
    """

    device: str
    prompt: int
    new: int
    weight_bytes: float
    cache_bytes_per_token: float
    rows: tuple[SpeedRow, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_speed(
    model: Any,
    batches: Sequence[int] = (1, 4, 16),
    prompt: int = 128,
    new: int = 64,
    repeats: int = 3,
    sampler: Sampler | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Generate with a model in the engine, which merges some of its linears, in place.

    Args:
        model: on its devices.
        batches: sequences at once, each measured.
        prompt: tokens of a prompt; less where the model was made for less.
        new: tokens of a reply, likewise.
        repeats: how often.
        sampler: a running one, which gets marks; None for one of its own.
        progress: called with (phase, done, total).

    Raises:
        SalienceError: a batch or a length that is too small.
        DoesNotFitError: a batch whose cache does not fit.
    """
    limit = context_limit(model)
    if limit is not None:
        prompt, new = min(prompt, limit // 2), min(new, limit // 2)
    if min([prompt, repeats, *batches], default=0) < 1 or new < 2:
        raise SalienceError("a batch, a prompt and repeats are at least 1, new tokens at least 2")
    held = resident(model, model.config.dtype)
    random = torch.Generator().manual_seed(0)
    rows = []
    with Sampler() if sampler is None else nullcontext(sampler) as running:
        for number, batch in enumerate(batches):
            if progress is not None:
                progress(f"batch {batch}", number, len(batches))
            cache = batch * padded(prompt + new + 1) * held.token
            mend = "use a smaller --batch"
            require_memory(cache, input_device(model), f"the cache of batch {batch}", mend)
            make = partial(random_prompts, model, batch, prompt, random)
            rows.append(_row(model, make, batch, prompt, new, repeats, running))
    if progress is not None:
        progress("done", len(batches), len(batches))
    device = str(input_device(model))
    return Speed(device, prompt, new, held.weights, held.token, tuple(rows))


def _row(
    model: Any,
    prompts: Callable[[], list[list[int]]],
    batch: int,
    prompt: int,
    new: int,
    repeats: int,
    sampler: Sampler,
) -> SpeedRow:
    engine = Engine(model, max_context=prompt + new, max_batch=batch)
    warm_up(engine, prompts(), new)
    sampler.mark(filling := f"prefill, batch {batch}")
    prefill = [batch * prompt / time_prefill(engine, prompts()) for _ in range(repeats)]
    peak = sampler.peak_of(filling)
    sampler.mark(running := f"decode, batch {batch}")
    decode = [batch / time_decode(engine, prompts(), new).step_seconds for _ in range(repeats)]
    peak = peak.larger(sampler.peak_of(running))
    return SpeedRow(batch, Spread.of(prefill), Spread.of(decode), peak)
