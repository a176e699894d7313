"""What vLLM and SGLang would say of a checkpoint, before it is made.

A runtime cuts a linear of N outputs and K inputs over `tensor_parallel` GPUs, by its outputs or by
its inputs, and gives each part to a kernel that wants whole tiles of it:

    outputs cut (q, k, v, gate, up)    N / TP,  K         with N multiples of 64,
    inputs cut  (o, down)              N,       K / TP    K of 128 and of the group size

Which linears are cut which way, and which are fused into one (q, k and v; gate and up), runtimes
decide by name, in a table for each architecture. So it is done by name here too, unlike everywhere
else in salience: what counts is not what the model computes, but what the runtime takes it for. The
parts of a fused linear share one kernel, so they need one scheme, and all or none of them are
quantized.

A finding is a warning where the runtime still answers (by a slower kernel, or only in some of its
versions), a refusal where it does not load the model, or answers wrongly.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.scheme import Scheme
from salience.tiles import KERNELS, RUNTIMES, Part, Remark, cut_remarks

_TITLES = {"vllm": "vLLM", "sglang": "SGLang"}

# What vLLM's packed_modules_mapping and SGLang's say, of all architectures together.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
_INNER = frozenset(("down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2"))  # read an MLP's width
_INPUTS_CUT = _INNER | frozenset(("o_proj", "out_proj", "dense", "c_proj", "wo"))
_FORMATS = frozenset((*KERNELS, "bitsandbytes"))
_NOT_READ = frozenset(("awq-gemv", "awq-gemv-fast", "llm-awq"))
_NOT_CUT = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj"))
_HEADS = frozenset(("k_proj", "v_proj"))


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that one runtime would mind.

    Args:
        runtime: "vllm" or "sglang".
        linear: full name; of linears that are fused, the fused one's.
        problem: what is wrong.
        severity: "warn", or "refuse" for what the runtime cannot serve.
        mend: what to do.
    """

    runtime: str
    linear: str
    problem: str
    severity: str
    mend: str


@dataclass(frozen=True, slots=True)
class Served:
    """A checkpoint as runtimes see it: no weights, only what its headers and config say.

    Args:
        format: name of its format.
        schemes: of each quantized linear, by its full name.
        shapes: (out, in) of the same.
        kept: full names of linears, routers and experts that stay float.
        skips: the config's list of modules to keep float, None where the format has none.
        dtype: of scales and activations, "float16" or "bfloat16".
        kv_heads: heads of keys and values; more GPUs than that have copies.
        act_order: whether groups are in activation order.
        g_idx: the group of each column, of linears where that is known already.
        embeddings: those of `schemes` that are embeddings.
    """

    format: str
    schemes: Mapping[str, Scheme]
    shapes: Mapping[str, tuple[int, int]]
    kept: Sequence[str] = ()
    skips: Sequence[str] | None = None
    dtype: str = "float16"
    kv_heads: int | None = None
    act_order: bool = False
    g_idx: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Sequence[str] = ()


def findings(
    served: Served,
    tensor_parallel: int = 1,
    kernels: Mapping[str, Callable[[Part, int], Iterator[Remark]]] = KERNELS,
) -> list[Finding]:
    """What vLLM and SGLang would mind; nothing of formats that are made for other runtimes.

    Args:
        served: the checkpoint.
        tensor_parallel: on how many GPUs each linear is cut.
        kernels: what kernels mind, by format: of all versions, or of the one that will serve it.
    """
    found: list[Finding] = []

    def note(name: str, remarks: Iterable[Remark]) -> None:
        for runtimes, severity, problem, mend in remarks:
            found.extend(Finding(each, name, problem, severity, mend) for each in runtimes)

    if served.format in _NOT_READ:
        problem, mend = f"{served.format} is not read there", "salience convert it to awq"
        note(next(iter(served.schemes)), [(RUNTIMES, "refuse", problem, mend)])
    if served.format not in _FORMATS:
        return found
    kernel = kernels.get(served.format)
    for name in served.embeddings:
        note(name, [(RUNTIMES, "refuse", "coded embeddings are not read", "leave them float")])
    for name, parts in _units(served).items():
        remarks = list(_fused(served, parts))
        note(name, remarks)
        if remarks or kernel is None:
            continue
        part = _part(served, name, parts, tensor_parallel)
        note(name, cut_remarks(part, tensor_parallel))
        if part.whole and not part.columns % part.group:
            note(name, kernel(part, tensor_parallel))
    if served.format == "bitsandbytes" and tensor_parallel > 1:
        problem = "quantized beforehand it was long not served on several GPUs (vllm#8434)"
        mend = "use pipeline parallelism, or --format awq"
        note(next(iter(served.schemes)), [(RUNTIMES, "warn", problem, mend)])
    if served.format == "awq":
        for name, remark in _skipped(served):
            note(name, [remark])
    return found


def skip_list(config: Mapping[str, Any]) -> list[str] | None:
    """The modules that a `quantization_config` keeps float by part of their name; None if it has
    no such list.

    Raises:
        SalienceError: it is something else.
    """
    if "modules_to_not_convert" not in config:
        return None
    found = config["modules_to_not_convert"] or []
    if not isinstance(found, list):
        raise SalienceError(f"modules_to_not_convert must be a list of names, not {found!r}")
    return [str(entry) for entry in found]


def kv_heads(model_config: Any) -> int | None:
    """How many heads of keys and values a Transformers config speaks of."""
    count = getattr(model_config.get_text_config(), "num_key_value_heads", None)
    return count if isinstance(count, int) else None


def with_fused(names: Iterable[str]) -> list[str]:
    """Names to keep float, with those of the fused linears whose parts are all among them.

    vLLM looks for the parts of a fused linear in a skip list, SGLang for its own name.
    """
    listed = list(dict.fromkeys(names))
    for name in listed.copy():
        owner, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            full = [f"{owner}.{part}" for part in parts]
            if leaf == parts[0] and set(full) <= set(listed):
                listed.append(f"{owner}.{fused}")
    return list(dict.fromkeys(listed))


def rejection(found: Sequence[Finding]) -> str | None:
    """Why neither runtime would serve it, in one line; None if at least one would."""
    of = {
        name: {
            (f.linear, f.problem): f for f in found if f.runtime == name and f.severity == "refuse"
        }
        for name in RUNTIMES
    }
    if not all(of.values()):
        return None
    mine, others = (of[name] for name in RUNTIMES)
    both = [each for what, each in mine.items() if what in others]
    one = (both or list(mine.values()))[0]
    who = " and ".join(_TITLES[name] for name in (RUNTIMES if both else RUNTIMES[:1]))
    return f"{who} would refuse {one.linear}: {one.problem}; {one.mend}"


def summary(found: Sequence[Finding]) -> list[str]:
    """One line for what is alike: all runtimes and linears of one problem together."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for each in found:
        groups.setdefault((each.problem, each.severity, each.mend), []).append(each)
    lines = []
    for (problem, severity, mend), alike in groups.items():
        runtimes = [_TITLES[name] for name in RUNTIMES if any(f.runtime == name for f in alike)]
        names = list(dict.fromkeys(f.linear for f in alike))
        kinds = list(dict.fromkeys(re.sub(r"\.\d+\b", ".*", name) for name in names))
        some = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
        where = names[0] if len(names) == 1 else f"{len(names)} linears ({some})"
        verb = "would refuse" if severity == "refuse" else "would take"
        lines.append(f"{' and '.join(runtimes)} {verb} {where}: {problem}; {mend}")
    return lines


def _units(served: Served) -> dict[str, list[str]]:
    """Quantized linears by the name of what runtimes make of them, and its parts, float ones too.

    A part that the model does not have (v where it is k) is left out.
    """
    there = {*served.schemes, *served.kept}
    units: dict[str, list[str]] = {}
    for name in served.schemes:
        if name in served.embeddings or "." not in name:
            continue  # the head: its table of tokens is padded by runtimes
        owner, _, leaf = (unit := _fused_name(served, name)).rpartition(".")
        parts = [f"{owner}.{part}" for part in FUSED[leaf]] if unit != name else [name]
        units[unit] = [part for part in parts if part in there]
    return units


def _part(served: Served, name: str, parts: list[str], gpus: int) -> Part:
    leaf = name.rpartition(".")[2]
    inputs_cut = leaf in _INPUTS_CUT
    rows = 0.0
    for part in parts:
        count = served.shapes[part][0]
        heads = served.kv_heads
        copied = part.rpartition(".")[2] in _HEADS and heads is not None and gpus > heads
        cut = 1 if inputs_cut or leaf in _NOT_CUT else heads if copied and heads else gpus
        rows += count / cut
    columns = served.shapes[parts[0]][1] / (gpus if inputs_cut else 1)
    scheme = served.schemes[parts[0]]
    inner = leaf in _INNER
    return Part(scheme, rows, columns, inputs_cut, inner, served.dtype, served.act_order)


def _fused(served: Served, parts: list[str]) -> Iterator[Remark]:
    """All parts of a fused linear have one scheme, or none of them has."""
    leaves = [part.rpartition(".")[2] for part in parts]
    together = f"{', '.join(leaves[:-1])} and {leaves[-1]} are one linear there"
    floats = [leaf for part, leaf in zip(parts, leaves, strict=True) if part not in served.schemes]
    kinds = {str(served.schemes[part]) for part in parts if part in served.schemes}
    if floats:
        problem = f"{together}, and of it {' and '.join(floats)} would be float"
        yield RUNTIMES, "refuse", problem, "quantize or --skip all of them"
    elif len(kinds) > 1:
        problem = f"{together}, and have {' and '.join(sorted(kinds))}"
        yield RUNTIMES, "refuse", problem, "give them one scheme, by a --rule that matches all"
    known = [served.g_idx[part] for part in parts if part in served.g_idx]
    if known and (len(known) < len(parts) or any(not torch.equal(known[0], i) for i in known)):
        problem = f"{together}, and their columns are in different orders"
        yield RUNTIMES, "refuse", problem, "quantize without groups in activation order"


def _skipped(served: Served) -> Iterator[tuple[str, Remark]]:
    """What a skip list means to each runtime, where that is not what it says.

    Both look for an entry anywhere in a name: vLLM in the names of the parts of a fused linear,
    SGLang in the name of the whole. Of an empty list vLLM makes one from the headers.
    """
    if served.skips is None:
        return
    mend = "list the full names of modules, and of fused ones"
    for runtime in RUNTIMES:
        for name in [*served.schemes, *served.kept]:
            seen = _fused_name(served, name) if runtime == "sglang" else name
            entry = next((entry for entry in served.skips if entry in seen), None)
            in_block = any(step.isdigit() for step in name.split("."))
            inferred = runtime == "vllm" and not served.skips
            if name in served.schemes and entry is not None:
                problem = f"it is quantized, yet {entry!r} of the skip list is part of its name"
                yield name, ((runtime,), "refuse", problem, mend)
            elif name not in served.schemes and entry is None and in_block and not inferred:
                problem = "it is float, yet nothing in the skip list says so"
                yield name, ((runtime,), "refuse", problem, mend)
    for name in served.kept:
        if name.endswith(".experts"):
            problem = "float experts in a quantized model, which some builds take for quantized"
            mend = "try it first (vllm#32935, sglang#20439)"
            yield name, (RUNTIMES, "warn", problem, mend)


def _fused_name(served: Served, name: str) -> str:
    """The name of what a runtime makes of a linear."""
    owner, _, leaf = name.rpartition(".")
    there = {*served.schemes, *served.kept}
    for fused, parts in FUSED.items():
        if leaf in parts and sum(f"{owner}.{part}" in there for part in parts) > 1:
            return f"{owner}.{fused}"
    return name
