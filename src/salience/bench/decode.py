"""Tokens a second of a model in the engine, beside what the memory allows: `salience bench decode`.

A step of decoding reads every weight once, however many sequences it makes a token for, and the
cached keys and values of each. That time is the floor:

    seconds a step >= (weights + batch * length * bytes of a cached token) / bandwidth

How the times are taken is in `salience.runtime.timing`.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import psutil
import torch

from salience.bench.measure import Rates, measure_rates, require_memory
from salience.bench.shapes import (
    Resident,
    build,
    cache_bytes,
    needed_bytes,
    resident,
    shape_config,
)
from salience.errors import SalienceError
from salience.linear import QuantLinear
from salience.loading import load_source
from salience.machine import describe, release_memory
from salience.recipe import Recipe
from salience.runtime import Engine
from salience.runtime.cache import padded
from salience.runtime.timing import random_prompts, time_decode, time_prefill, warm_up
from salience.source import Source, skeleton

Progress = Callable[[str, int, int], None]

_ALL = ".*"
_WARM_UP = 4  # tokens of Transformers' own generation


@dataclass(frozen=True, slots=True)
class Task:
    """What is generated: for each batch, prompts of `prompt` tokens and replies of `new`.

    Args:
        context: tokens there is room for; None for those of a prompt and its reply.
    """

    batches: Sequence[int] = (1, 4, 16, 64)
    prompt: int = 128
    new: int = 256
    context: int | None = None

    def __post_init__(self) -> None:
        if min(*self.batches, self.prompt) < 1 or self.new < 2:
            raise SalienceError("a batch and a prompt are at least 1, and new tokens at least 2")
        if self.context is not None and self.context < self.prompt + self.new:
            raise SalienceError(
                f"--context {self.context} has no room for {self.prompt} + {self.new} tokens"
            )

    @property
    def length(self) -> int:
        """Tokens of a sequence that there is room for."""
        return self.context or self.prompt + self.new


@dataclass(frozen=True, slots=True)
class Row:
    """What a batch took.

    Args:
        prefill_seconds: until each prompt has its first token, and nothing else is done.
        step_seconds: of one token for each sequence, while all run.
        seconds: of the whole, from the prompts to the last token.
        floor_seconds: below which no step can be.
        share: of the bandwidth that a step used: floor_seconds / step_seconds.
        peak_bytes: most memory of tensors on a GPU while it ran; on a CPU what is resident.
        predicted_bytes: weights and cache.
        interleaved: whether some replies were done before the last prompt was in, so that the step
            is a mean over steps that did other work too.
    """

    batch: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    step_seconds: float
    tokens_per_second: float
    seconds: float
    floor_seconds: float
    share: float
    peak_bytes: int
    predicted_bytes: float
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to hold and run the model: "w4g128", "dense" or "transformers"."""

    name: str
    dtype: str
    load_seconds: float
    load_peak_bytes: int
    resident: Resident
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Decoding:
    """What was measured of a model."""

    model: str
    device: str
    prompt: int
    new: int
    rates: Rates
    variants: list[Variant]

    def ratio(self, variant: Variant, row: Row) -> float | None:
        """Tokens a second over those of another variant, in the same batch."""
        theirs = next((each for each in variant.rows if each.batch == row.batch), None)
        return None if theirs is None else row.tokens_per_second / theirs.tokens_per_second

    def as_json(self) -> dict[str, Any]:
        """With device, versions and date; times in seconds."""
        first, *others = self.variants
        over = {
            other.name: {row.batch: self.ratio(other, row) for row in first.rows}
            for other in others
        }
        return {**asdict(self), "over": over, "machine": describe()}


class Subject(Protocol):
    """A model that can be had in low bits and float."""

    name: str

    def check(self, task: Task, dtype: torch.dtype | None, device: torch.device) -> None:
        """Refuse what memory does not hold, before it is made."""
        ...

    def load(self, dense: bool, dtype: torch.dtype | None, device: torch.device) -> Any:
        """The model on its device."""
        ...


class Shape:
    """A model of random weights.

    Args:
        name: of the shape.
        recipe: the schemes of its linears.
        layers: how many blocks, None for all.
        dense: whether the float model is wanted too.

    Raises:
        SalienceError: an unknown shape.
    """

    def __init__(self, name: str, recipe: Recipe, layers: int | None, dense: bool) -> None:
        self.name, self.recipe, self.dense = name, recipe, dense
        self.config = shape_config(name, layers)

    def check(self, task: Task, dtype: torch.dtype | None, device: torch.device) -> None:
        kind = _dtype(dtype, device)
        model = skeleton(self.config, kind, self.name)
        cache = max(task.batches) * padded(task.length + 1) * cache_bytes(self.config, kind)
        for recipe in (self.recipe, *([None] if self.dense else [])):
            weights, beside = needed_bytes(model, recipe, kind, device)
            what = f"{self.name} in {recipe.scheme if recipe else _name(kind)}"
            mend = "use a smaller --batch, fewer --layers or another --shape"
            require_memory(weights + max(beside, cache), device, what, mend)

    def load(self, dense: bool, dtype: torch.dtype | None, device: torch.device) -> Any:
        kind = _dtype(dtype, device)
        model = skeleton(self.config, kind, self.name)
        return build(model, None if dense else self.recipe, kind, device)


class Stored:
    """A checkpoint."""

    def __init__(self, source: Source) -> None:
        self.name, self.source = source.name, source

    def check(self, task: Task, dtype: torch.dtype | None, device: torch.device) -> None:
        pass

    def load(self, dense: bool, dtype: torch.dtype | None, device: torch.device) -> Any:
        return load_source(self.source, device, dtype, keep=[_ALL] if dense else ())


def bench_decode(
    subject: Subject,
    task: Task,
    dtype: torch.dtype | None,
    device: torch.device,
    dense: bool = False,
    transformers: bool = False,
    progress: Progress | None = None,
) -> Decoding:
    """Generate with a model, and with its float form in the same run if asked to.

    Args:
        subject: the model.
        task: batches and lengths.
        dtype: of activations and what is float; None for what suits the device.
        device: where.
        dense: also the float model, in the same engine.
        transformers: also the float model, by Transformers' own `generate`, in half precision.
        progress: called with (what, done, total).

    Raises:
        SalienceError: a model that cannot be loaded, or that is float already.
        DoesNotFitError: more than the memory holds.
    """
    subject.check(task, dtype, device)
    rates = measure_rates(device, _dtype(dtype, device))
    runs: list[tuple[str, torch.dtype | None]] = [("", dtype)]
    runs += [("dense", dtype)] if dense else []
    half = torch.bfloat16 if device.type == "cpu" else dtype
    runs += [("transformers", half)] if transformers else []
    variants = []
    for i, (name, kind) in enumerate(runs):
        if progress:
            progress(f"load {name}".strip(), i, len(runs))
        made = _Variant(subject, name, kind, device, task, rates)
        if len(runs) > 1 and not name and made.name == "dense":
            raise SalienceError(f"{subject.name} is float already; leave out --dense")
        for batch in task.batches:
            if progress:
                progress(f"{made.name}, batch {batch}", i, len(runs))
            made.run(batch)
        variants.append(made.result())
        del made
        gc.collect()
        release_memory()
    return Decoding(subject.name, str(device), task.prompt, task.new, rates, variants)


class _Variant:
    """A model that is loaded, and the rows found of it."""

    def __init__(
        self,
        subject: Subject,
        name: str,
        dtype: torch.dtype | None,
        device: torch.device,
        task: Task,
        rates: Rates,
    ) -> None:
        _reset_peak(device)
        start = time.perf_counter()
        self.model = subject.load(bool(name), dtype, device)
        _wait(device)
        self.load_seconds = time.perf_counter() - start
        self.load_peak = _peak(device)
        schemes = {str(m.scheme) for m in self.model.modules() if isinstance(m, QuantLinear)}
        self.name = name or " ".join(sorted(schemes)) or "dense"
        self.by_transformers = name == "transformers"
        self.dtype = self.model.config.dtype
        self.resident = resident(self.model, self.dtype)
        self.device, self.task, self.rates = device, task, rates
        self.random = torch.Generator().manual_seed(0)
        self.rows: list[Row] = []

    def run(self, batch: int) -> None:
        """Measure a batch."""
        task = self.task
        cache = batch * padded(task.length + 1) * self.resident.token
        mend = "use a smaller --batch or --context"
        require_memory(cache, self.device, f"the cache of batch {batch}", mend)
        _reset_peak(self.device)
        measured = self._by_transformers if self.by_transformers else self._by_engine
        prefill, step, seconds, interleaved = measured(batch)
        length = task.prompt + task.new / 2
        floor = self.rates.floor(self.resident.read + batch * length * self.resident.token)
        row = Row(
            batch=batch,
            prefill_seconds=prefill,
            prefill_tokens_per_second=batch * task.prompt / prefill,
            step_seconds=step,
            tokens_per_second=batch / step,
            seconds=seconds,
            floor_seconds=floor,
            share=floor / step,
            peak_bytes=_peak(self.device),
            predicted_bytes=self.resident.weights + cache,
            interleaved=interleaved,
        )
        self.rows.append(row)

    def result(self) -> Variant:
        """All that was found."""
        sizes = (self.load_seconds, self.load_peak, self.resident)
        return Variant(self.name, _name(self.dtype), *sizes, self.rows)

    def _by_engine(self, batch: int) -> tuple[float, float, float, bool]:
        task = self.task
        engine = Engine(self.model, max_context=task.length, max_batch=batch)
        warm_up(engine, self._prompts(batch), task.new)
        prefill = time_prefill(engine, self._prompts(batch))
        found = time_decode(engine, self._prompts(batch), task.new)
        return prefill, found.step_seconds, found.seconds, found.interleaved

    def _by_transformers(self, batch: int) -> tuple[float, float, float, bool]:
        self.model.generation_config.eos_token_id = None  # or replies end early
        took = {}
        for new in (min(self.task.new, _WARM_UP), 1, self.task.new):
            ids = torch.tensor(self._prompts(batch), device=self.device)
            start = time.perf_counter()
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            _wait(self.device)
            took[new] = time.perf_counter() - start
        whole = took[self.task.new]
        return took[1], max(whole - took[1], 1e-9) / (self.task.new - 1), whole, False

    def _prompts(self, batch: int) -> list[list[int]]:
        return random_prompts(self.model, batch, self.task.prompt, self.random)


def _dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    return dtype or (torch.float32 if device.type == "cpu" else torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
