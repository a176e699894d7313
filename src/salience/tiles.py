"""What kernels of vLLM and SGLang take: the shape of one GPU's part of a linear, and its scheme.

The fast one, Marlin, works in tiles of 64 outputs by 128 inputs, on 4 or 8 bits in groups of 32, 64
or 128 or whole rows; zeros only with 4 bits. What does not fit it goes to another kernel where a
runtime has one for the format (AutoAWQ's; ExLlama's for GPTQ and, in vLLM, for symmetric
compressed-tensors, in float16 only), and else is refused when the model is loaded. The newest
builds of vLLM pad to whole tiles; what is said here holds for those before them too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from salience.scheme import Scheme, fitting_group_sizes

RUNTIMES = ("vllm", "sglang")
_TILE_ROWS, _TILE_COLUMNS = 64, 128
TILE_GROUPS = frozenset((-1, 32, 64, 128))
_GEMM_GROUP = 32  # AutoAWQ's own kernel takes multiples of it
_PACKED_ROWS = 8  # of AutoAWQ, in a word

_SLOWER = "expect a slower kernel"
_FLOAT = "keep it float by --skip"
_IN_ORDER = "quantize with groups in column order"
_FLOAT16 = "serve with --dtype float16"


@dataclass(frozen=True, slots=True)
class Part:
    """What one GPU has of a linear, or of several fused into one.

    Args:
        scheme: of its weights.
        rows: outputs; not whole where the number of GPUs does not divide them.
        columns: inputs, likewise.
        inputs_cut: whether it is the inputs that GPUs share out.
        inner: whether the inputs are an MLP's inner channels.
        dtype: of scales and activations, "float16" or "bfloat16".
        act_order: whether groups are in activation order.
    """

    scheme: Scheme
    rows: float
    columns: float
    inputs_cut: bool
    inner: bool
    dtype: str
    act_order: bool

    @property
    def whole(self) -> bool:
        return self.rows == int(self.rows) and self.columns == int(self.columns)

    @property
    def group(self) -> float:
        return self.columns if self.scheme.group_size == -1 else self.scheme.group_size

    @property
    def tiles(self) -> bool:
        """Whether the fast kernel of both runtimes, Marlin, takes its shape and groups."""
        grouped = self.scheme.group_size in TILE_GROUPS and not self.columns % self.group
        return grouped and not self.rows % _TILE_ROWS and not self.columns % _TILE_COLUMNS


# Runtimes, severity, problem, mend.
Remark = tuple[tuple[str, ...], str, str, str]


def cut_remarks(part: Part, gpus: int) -> Iterator[Remark]:
    """What no kernel can do without: whole rows, columns and groups for each GPU."""
    if not part.whole:
        total, what = (part.rows, "outputs") if part.rows % 1 else (part.columns, "inputs")
        problem = f"its {total * gpus:.0f} {what} cannot be cut for {gpus} GPUs"
        yield RUNTIMES, "refuse", problem, "use a number of GPUs that divides them"
    elif part.columns % part.group:
        size = int(part.group)
        each = f"{part.columns:.0f} inputs" + (f" on each of {gpus} GPUs" if gpus > 1 else "")
        fit = [g for g in fitting_group_sizes({int(part.columns)}) if g in TILE_GROUPS]
        mends = [f"a group size of {fit[0]}"] if fit else []
        mends += [f"--pad-intermediate {size * gpus}"] if part.inner else []
        mend = f"use {' or '.join(mends or ['fewer GPUs'])}"
        yield RUNTIMES, "refuse", f"its {each} are no multiple of group size {size}", mend


def _untiled(part: Part) -> str:
    """Why Marlin does not take it."""
    if part.scheme.group_size not in TILE_GROUPS:
        return f"group size {part.scheme.group_size}, where fast kernels know 32, 64 and 128"
    if part.rows % _TILE_ROWS:
        return f"{part.rows:.0f} outputs, no multiple of {_TILE_ROWS}"
    return f"{part.columns:.0f} inputs, no multiple of {_TILE_COLUMNS}"


def _other(part: Part, otherwise: str) -> str:
    """The mend: of the group size where it is at fault."""
    known = part.scheme.group_size in TILE_GROUPS
    return otherwise if known else "use groups of 32, 64 or 128"


def _awq(part: Part, _gpus: int) -> Iterator[Remark]:
    if part.scheme.group_size == -1:
        problem = "group size -1 is taken as it stands there"
        yield ("sglang",), "refuse", problem, "use w4g128, or --format compressed-tensors"
    if part.rows % _PACKED_ROWS:
        problem = f"{part.rows:.0f} outputs, no multiple of {_PACKED_ROWS}"
        yield RUNTIMES, "refuse", problem, _FLOAT
    elif part.tiles and part.dtype == "bfloat16":
        yield RUNTIMES, "warn", "its scales are rounded to bfloat16", _FLOAT16
    elif not part.tiles and part.dtype == "bfloat16":
        yield RUNTIMES, "refuse", f"{_untiled(part)}; what is left has no bfloat16", _FLOAT16
    elif not part.tiles:
        # AutoAWQ's own kernel, which vLLM has, wants the outputs of whole groups; SGLang's copes.
        taken = not (part.rows % _TILE_ROWS or part.group % _GEMM_GROUP or part.rows % part.group)
        mend = _other(part, _FLOAT if part.rows % _TILE_ROWS else "use w4g64 or w4g32")
        if taken:
            yield RUNTIMES, "warn", _untiled(part), _SLOWER
        else:
            yield ("vllm",), "refuse", _untiled(part), mend
            if part.scheme.group_size != -1:
                yield ("sglang",), "warn", _untiled(part), _SLOWER


def _gptq(part: Part, gpus: int) -> Iterator[Remark]:
    scheme = part.scheme
    if scheme.bits not in (2, 3, 4, 8):
        yield RUNTIMES, "refuse", f"{scheme.bits} bits, where GPTQ has 2, 3, 4 and 8", "use 4"
        return
    if not scheme.sym:
        problem = "asymmetric GPTQ needs a build that knows gptq_v2 (vllm#26092)"
        yield RUNTIMES, "warn", problem, f"use {scheme}-sym, or --format awq"
    yield from _ordered(part, gpus)
    if scheme.sym and scheme.bits in (4, 8) and part.tiles:
        return
    if part.dtype == "bfloat16":
        yield RUNTIMES, "refuse", "the kernel for it has no bfloat16", _FLOAT16
    elif scheme.sym and scheme.bits in (4, 8):
        yield RUNTIMES, "warn", _untiled(part), _SLOWER
    elif scheme.sym:
        yield RUNTIMES, "warn", f"{scheme.bits} bits, which fast kernels do not have", "use 4 or 8"


def _ordered(part: Part, gpus: int) -> Iterator[Remark]:
    """Groups in activation order of which no GPU has a whole one."""
    if part.act_order and part.inputs_cut and gpus > 1:
        severity = "warn" if part.scheme.sym else "refuse"
        problem = f"groups in activation order, cut for {gpus} GPUs (vllm#7374, #14211)"
        yield RUNTIMES, severity, problem, _IN_ORDER


def _compressed_tensors(part: Part, gpus: int) -> Iterator[Remark]:
    scheme = part.scheme
    bits = f"{scheme.bits} bits"
    if part.act_order:
        problem = "groups in activation order, which new builds drop (vllm#48148)"
        yield RUNTIMES, "warn", problem, _IN_ORDER
    yield from _ordered(part, gpus)
    if scheme.sym and scheme.bits not in (4, 8):
        yield ("vllm",), "warn", f"{bits}, which only builds with Humming kernels have", "use 4"
        yield ("sglang",), "refuse", f"{bits}, where 4 and 8 are read", "use 4"
    elif not scheme.sym and scheme.bits != 4:
        mend = f"use {scheme}-sym" if scheme.bits == 8 else "use 4"
        yield RUNTIMES, "refuse", f"{bits} asymmetric, where only 4 are read", mend
    elif not part.tiles:
        # vLLM has another kernel, without zeros and for float16; SGLang has this one only.
        taken = scheme.sym and scheme.group_size != -1 and part.dtype != "bfloat16"
        if taken:
            yield ("vllm",), "warn", _untiled(part), _SLOWER
        mend = _other(part, "use --format awq" if scheme.bits == 4 else _FLOAT)
        yield ("sglang",) if taken else RUNTIMES, "refuse", _untiled(part), mend


# By format: what the kernels mind of a part that has whole rows, columns and groups.
KERNELS: dict[str, Callable[[Part, int], Iterator[Remark]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}
