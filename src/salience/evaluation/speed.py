"""How fast a loaded model generates on this machine, and what memory that takes.

Prompts and replies are timed apart, because they are bound by different things: a prompt by
multiplications, a reply by the bytes of the weights, which each step reads once for all sequences
together. Each is timed several times, with other prompts. Of so few times the median is shown with
the least and the most: on a machine that does other work too they lie far apart, and a mean would
hide it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from salience.bench.measure import require_memory
from salience.bench.shapes import resident
from salience.errors import SalienceError
from salience.monitor import Memory, Sampler
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
        prefill: tokens of prompts a second, until each has its first token.
        decode: new tokens a second, while all run.
        peak: memory while both were measured.
    """

    batch: int
    prefill: Spread
    decode: Spread
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
    sampler: Sampler,
    batches: Sequence[int] = (1, 4, 16),
    prompt: int = 128,
    new: int = 64,
    repeats: int = 3,
    progress: Progress | None = None,
) -> Speed:
    """Generate with a model in the engine, which merges some of its linears, in place.

    Args:
        model: on its devices.
        sampler: running; it gets a mark for each batch.
        batches: sequences at once, each measured.
        prompt: tokens of a prompt; less where the model was made for less.
        new: tokens of a reply, likewise.
        repeats: how often.
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
    for number, batch in enumerate(batches):
        if progress is not None:
            progress(f"batch {batch}", number, len(batches))
        engine = Engine(model, max_context=prompt + new, max_batch=batch)
        cache = batch * padded(prompt + new + 1) * held.token
        require_memory(cache, engine.device, f"the cache of batch {batch}", "use a smaller --batch")
        warm_up(engine, random_prompts(model, batch, prompt, random), new)
        sampler.mark(name := f"prefill, batch {batch}")
        prefill = [
            batch * prompt / time_prefill(engine, random_prompts(model, batch, prompt, random))
            for _ in range(repeats)
        ]
        first = sampler.peak_of(name)
        sampler.mark(name := f"decode, batch {batch}")
        decode = []
        for _ in range(repeats):
            prompts = random_prompts(model, batch, prompt, random)
            decode.append(batch / time_decode(engine, prompts, new).step_seconds)
        peak = first.larger(sampler.peak_of(name))
        rows.append(SpeedRow(batch, Spread.of(prefill), Spread.of(decode), peak))
        del engine
    if progress is not None:
        progress("done", len(batches), len(batches))
    device = str(model.device)
    return Speed(device, prompt, new, held.weights, held.token, tuple(rows))
