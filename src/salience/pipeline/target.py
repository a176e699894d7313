"""Bits chosen by what they do to the model: `--target-bits`.

    options      the scheme of each linear with 2, 3, 4 and 8 bits, those of them that the format
                 can hold, and a runtime serves where `--tensor-parallel` asks for one
    cost         of each width of each group of linears, measured    (`.sensitivity`)
    choice       the least sum of costs within the budget, exactly   (`.allocation`)

The budget counts what the report's bits a weight count, scales and zeros included, over what is
quantized in the blocks. A linear with a `--rule` of its own keeps that, and counts; what is
float, and the head and the embeddings, do not count. The choice is kept in the journal, so that an
interrupted job goes on with it, and is the same each time.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.checkpoint import read_json
from salience.errors import SalienceError, StorageError
from salience.formats import FORMATS, Format
from salience.modules import shapes_of
from salience.pipeline.allocation import Option, allocate
from salience.pipeline.sensitivity import Sensitivity, measure
from salience.planning.bytes import stored_bits
from salience.recipe import Recipe
from salience.scheme import Scheme
from salience.serving import findings, rejection
from salience.writer import write_json

WIDTHS = (2, 3, 4, 8)
_FILE = "allocation.json"


@dataclass(frozen=True, slots=True)
class Choice:
    """The scheme chosen for each linear, and why.

    Args:
        target_bits: the most stored bits a weight, on the average.
        bits_per_weight: what came of it, over the linears of the blocks.
        schemes: of each linear that was free.
        groups: what was measured.
    """

    target_bits: float
    bits_per_weight: float
    schemes: dict[str, Scheme]
    groups: list[Sensitivity]

    def describe(self) -> dict[str, Any]:
        """As plain JSON values: for each group its linears, its bits, and the cost of each width.

        `expected_kl` is the sum of the costs chosen, in nats a token; `expected_kl_of` that of one
        width for all.
        """
        bits = [self.schemes[group.names[0]].bits for group in self.groups]
        counts = {b: sum(s.bits == b for s in self.schemes.values()) for b in sorted(set(bits))}
        shared = set.intersection(*(set(group.costs) for group in self.groups))
        return {
            "target_bits": self.target_bits,
            "bits_per_weight": self.bits_per_weight,
            "linears_of_bits": {str(b): count for b, count in counts.items()},
            "expected_kl": sum(g.costs[b] for g, b in zip(self.groups, bits, strict=True)),
            "expected_kl_of": {
                str(b): sum(g.costs[b] for g in self.groups) for b in sorted(shared)
            },
            "groups": [
                {
                    "linears": list(group.names),
                    "bits": b,
                    "costs": {str(width): cost for width, cost in group.costs.items()},
                }
                for group, b in zip(self.groups, bits, strict=True)
            ],
        }


def set_target(job: Job, recipe: Recipe, target: float, tensor_parallel: int | None) -> None:
    """Put a target, and the schemes to choose from, into a job.

    Args:
        tensor_parallel: GPUs that will serve it, where widths that no runtime serves on that many
            are to be left out.

    Raises:
        SalienceError: a method or a format without a choice, or a target out of reach.
    """
    if not math.isfinite(target) or target <= 0:
        raise SalienceError(f"--target-bits is {target}; name bits a weight, such as 3.25")
    if job.search is not None:
        raise SalienceError(
            "--target-bits chooses bits that --from-search has settled; leave one of them away"
        )
    if not job.method.reads_text:
        raise SalienceError(
            f"--target-bits measures on the calibration text, and --method {job.method.name} reads "
            "none; use --method awq or gptq"
        )
    shapes = shapes_of(job.skeleton, (n for n in job.schemes if n not in job.outside))
    free = {
        name: job.schemes[name]
        for name in shapes
        if not any(re.search(pattern, name) for pattern, _ in recipe.rules)
    }
    options = _options(job.fmt, free, shapes)
    if tensor_parallel is not None:
        options = _served(job, options, tensor_parallel)
    options = {name: schemes for name, schemes in options.items() if schemes}
    if all(len(schemes) < 2 for schemes in options.values()):
        one = " and ".join(sorted({str(s) for each in options.values() for s in each})) or "rules"
        others = [
            f.name for f in FORMATS if any(len(s) > 1 for s in _options(f, free, shapes).values())
        ]
        mend = f"use --format {' or '.join(dict.fromkeys(others))}" if others else "leave it away"
        raise SalienceError(
            f"--target-bits needs several widths to choose from, and --format {job.fmt.name} holds "
            f"only {one} here; {mend}"
        )
    job.target_bits, job.options = target, options
    weights = sum(rows * columns for rows, columns in shapes.values())
    for pick, word in ((min, "below"), (max, "above")):
        chosen = {name: pick(s, key=lambda s: s.bits) for name, s in options.items()}
        mean = _stored(job, chosen) / weights
        if (target - mean) * (1 if pick is min else -1) < 0 and not math.isclose(target, mean):
            kinds = " and ".join(sorted({str(scheme) for scheme in chosen.values()}))
            raise SalienceError(
                f"--target-bits {target} is {word} the {mean:.4g} bits a weight of all linears at "
                f"{kinds}; use that or {'more' if pick is min else 'less'}"
            )


def choose(job: Job, journal: Journal, tokens: Any, on_disk: bool) -> Choice:
    """The choice for a job with a target: that of its journal, or a new one, which it then has.

    Args:
        tokens: calibration token ids [samples, seqlen].
        on_disk: keep the hidden states on the disk.

    Raises:
        SalienceError: what `measure` refuses.
        StorageError: the journal's is damaged.
    """
    path = journal.folder / _FILE
    if not path.exists():
        found = measure(job, journal, tokens, on_disk)
        values = [[list(g.names), {str(b): c for b, c in g.costs.items()}] for g in found]
        write_json(path, {"groups": values})
    try:
        stored = read_json(path)["groups"]
        groups = [
            Sensitivity(tuple(n), {int(b): c for b, c in costs.items()}) for n, costs in stored
        ]
    except (SalienceError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{path} is damaged ({error}); delete {journal.folder} to start over"
        ) from None
    return solve_target(job, groups)


def solve_target(job: Job, groups: Sequence[Sensitivity]) -> Choice:
    """The choice of the least expected loss within the job's target."""
    target = job.target_bits or 0.0
    fixed = {n: s for n, s in job.schemes.items() if n not in job.options and n not in job.outside}
    shapes = shapes_of(job.skeleton, (*fixed, *job.options))
    weights = sum(rows * columns for rows, columns in shapes.values())
    taken = stored_bits(fixed, {name: shapes[name] for name in fixed}, job.fmt)
    offers: list[list[dict[str, Scheme]]] = []
    options: list[list[Option]] = []
    for group in groups:
        made = [
            {name: _of_bits(job.options[name], bits) for name in group.names}
            for bits in group.costs
        ]
        offers.append(made)
        options.append(
            [
                Option(stored_bits(each, {n: shapes[n] for n in each}, job.fmt), cost)
                for each, cost in zip(made, group.costs.values(), strict=True)
            ]
        )
    # The number as it was typed, not the nearest binary one.
    budget = math.floor(Fraction(str(target)) * weights) - taken
    picked = allocate(options, budget)
    schemes: dict[str, Scheme] = {}
    size = taken
    for made, own, option in zip(offers, options, picked, strict=True):
        schemes |= made[option]
        size += own[option].size
    return Choice(target, size / weights, schemes, list(groups))


def _of_bits(schemes: Sequence[Scheme], bits: int) -> Scheme:
    return next(scheme for scheme in schemes if scheme.bits == bits)


def _options(
    fmt: Format, free: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Scheme, ...]]:
    """The schemes of a format for each linear."""
    found = {}
    for name, scheme in free.items():
        widths = sorted({*WIDTHS, scheme.bits}) if scheme.codebook is None else [scheme.bits]
        made = [replace(scheme, bits=bits) for bits in widths]
        found[name] = tuple(each for each in made if _holds(fmt, name, each, shapes[name]))
    return found


def _holds(fmt: Format, name: str, scheme: Scheme, shape: tuple[int, int]) -> bool:
    try:
        fmt.check({name: scheme}, {name: shape})
    except SalienceError:
        return False
    return fmt.name != "dense"


def _served(
    job: Job, options: dict[str, tuple[Scheme, ...]], gpus: int
) -> dict[str, tuple[Scheme, ...]]:
    """Without the widths that neither vLLM nor SGLang would serve."""
    refused = set()
    before = job.schemes
    for bits in {scheme.bits for schemes in options.values() for scheme in schemes}:
        job.schemes = {
            name: next((s for s in options.get(name, ()) if s.bits == bits), scheme)
            for name, scheme in before.items()
        }
        if rejection(findings(job.served, gpus)) is not None:
            refused.add(bits)
    job.schemes = before
    return {n: tuple(s for s in each if s.bits not in refused) for n, each in options.items()}


def _stored(job: Job, chosen: Mapping[str, Scheme]) -> int:
    """Bits of the linears in the blocks, with some of their schemes replaced."""
    schemes = {n: chosen.get(n, s) for n, s in job.schemes.items() if n not in job.outside}
    return stored_bits(schemes, shapes_of(job.skeleton, schemes), job.fmt)
