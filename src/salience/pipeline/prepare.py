"""From the options of a quantization to a job: what `quantize` does and `plan` counts.

Everything that can be refused without the text and without weights is refused here, so that a plan
is made of exactly the jobs that can be run. `--pad-intermediate` alone has a proof that wants
weights; a plan goes without it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from salience.blocks.job import Job
from salience.blocks.search import Search
from salience.containers import check_container
from salience.errors import SalienceError
from salience.formats import Dense, get_format
from salience.loading import resolve_device
from salience.methods import check_method, default_format, default_scheme, get_method
from salience.pipeline.padding import pad
from salience.pipeline.target import set_target
from salience.planning.checks import check_act_order, check_schemes, check_source
from salience.recipe import Recipe
from salience.scheme import Scheme
from salience.serving import Finding, findings, rejection
from salience.source import Source, open_source
from salience.structure import codable, find_blocks, kept
from salience.writer import float_dtype


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job and what is to be said of it.

    Args:
        job: what is made of what.
        recipe: the schemes as they were asked for.
        serving: what vLLM and SGLang would mind.
        padding: the MLPs' width before and after, where they are widened.
    """

    job: Job
    recipe: Recipe
    serving: list[Finding]
    padding: tuple[int, int] | None


def prepare(
    model: str | Source,
    *,
    method: str | None = None,
    effort: str | None = None,
    act_order: bool = False,
    scheme: Scheme | str | None = None,
    rules: Sequence[tuple[str, Scheme | str]] = (),
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    format: str | None = None,
    dtype: str = "float16",
    device: str = "auto",
    tensor_parallel: int | None = None,
    pad_intermediate: int | None = None,
    target_bits: float | None = None,
    trust_remote_code: bool = False,
    search: Search | None = None,
    prove: bool = True,
) -> Prepared:
    """What the options of `quantize`, which has them all, come to for a model.

    Args:
        model: as of `quantize`, or opened already; the options up to `trust_remote_code` are
            those of `quantize` too.
        search: scales and grids found before.
        prove: run padded blocks with their weights.

    Raises:
        SalienceError: options that do not go together, with the model or with each other.
    """
    method, effort = method or "awq", effort or "fast"
    chosen = base = get_method(method, effort, act_order)
    fmt = get_format(format or default_format(method))
    stored, place = float_dtype(dtype), resolve_device(device)
    source = open_source(model, trust_remote_code) if isinstance(model, str) else model
    padding = None
    if pad_intermediate is not None:
        source, padding = pad(source, pad_intermediate, place, prove)
    skeleton = source.skeleton()
    prefix, blocks = find_blocks(skeleton)
    recipe = Recipe(
        _scheme(default_scheme(method) if scheme is None else scheme),
        tuple((pattern, _scheme(each)) for pattern, each in rules),
        tuple(skip),
        tuple(only),
    )
    schemes: Mapping[str, Scheme] = recipe.resolve(list(codable(skeleton)), prefix, kept(skeleton))
    if search is not None:
        search.check_names(codable(skeleton), [f"{prefix}.{i}" for i in range(len(blocks))])
        # The search knows; what is said beside it can only agree.
        given = None if scheme is None and not (rules or skip or only) else schemes
        schemes = search.schemes_for(schemes, given)
        chosen = search.method(chosen)
    job = Job(
        source=source,
        skeleton=skeleton,
        weights=source.weights(skeleton),
        prefix=prefix,
        blocks=blocks,
        method=chosen,
        schemes=schemes,
        fmt=fmt,
        device=place,
        dtype=stored,
        search=search,
    )
    check_source(source, skeleton, job.weights)
    check_container(fmt, source)
    for each in schemes.values():
        check_method(base, each)
    check_schemes(skeleton, schemes, fmt)
    check_act_order(chosen, fmt)
    if isinstance(fmt, Dense) and not chosen.folds:
        raise SalienceError(
            f"--format dense holds weights with scales folded in and --method {method} finds none; "
            "use --method awq, or the model as it is"
        )
    if isinstance(fmt, Dense) and chosen.learns is not None:
        raise SalienceError(
            "--format dense rounds nothing, so there is nothing to learn; use --effort fast"
        )
    if target_bits is not None:
        set_target(job, recipe, target_bits, tensor_parallel)
        return Prepared(job, recipe, [], padding)  # what is served is not chosen yet
    return Prepared(job, recipe, _findings(job, tensor_parallel), padding)


def _findings(job: Job, tensor_parallel: int | None) -> list[Finding]:
    """What vLLM and SGLang would mind.

    Raises:
        SalienceError: neither would serve it on the GPUs asked for.
    """
    if tensor_parallel is not None and tensor_parallel < 1:
        raise SalienceError(f"--tensor-parallel is {tensor_parallel}; use 1 or more")
    found = findings(job.served, tensor_parallel or 1)
    refusal = rejection(found) if tensor_parallel is not None else None
    if refusal is not None:
        raise SalienceError(f"{refusal} (without --tensor-parallel it is a warning)")
    return found


def _scheme(scheme: Scheme | str) -> Scheme:
    return Scheme.parse(scheme) if isinstance(scheme, str) else scheme
