"""What is in a checkpoint: its format, the scheme of each linear, what stayed float, its size."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from salience.errors import SalienceError
from salience.formats import detect_format, stored_config
from salience.modules import embeddings
from salience.modules import kept as stay_float
from salience.scheme import Scheme
from salience.serving import Finding, Served, findings, kv_heads, skip_list
from salience.source import Source
from salience.structure import codable, linears, weight_of


@dataclass(frozen=True, slots=True)
class Module:
    """One linear; `scheme` is "float" or a name such as "w4g64"."""

    name: str
    in_features: int
    out_features: int
    scheme: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` prints.

    Args:
        format: name of the format, "gguf" or "dense".
        scheme: of the quantized linears; None when there are none or several.
        bits_per_weight: stored bits a weight of the `modules`, scales and zeros included.
        bytes: of all tensors on disk.
        modules: the quantized linears; for a dense checkpoint or a GGUF file, all.
        kept: linears that stayed float beside quantized ones.
        serving: what vLLM and SGLang would mind.
    """

    format: str
    scheme: str | None
    bits_per_weight: float
    bytes: int
    modules: list[Module]
    kept: list[str]
    serving: list[Finding] = field(default_factory=list)


def inspect(source: Source, tensor_parallel: int = 1) -> Inspection:
    """Look at the config and the tensor headers; of the weights only an order of columns is read.

    Args:
        source: the checkpoint.
        tensor_parallel: GPUs that would serve it.

    Raises:
        SalienceError: a checkpoint that cannot be read.
    """
    result, profile = _look(source)
    return replace(result, serving=findings(profile, tensor_parallel)) if profile else result


def served(source: Source) -> Served | None:
    """A checkpoint as runtimes see it; None of a dense one, or of another tool's GGUF file.

    Raises:
        SalienceError: a checkpoint that cannot be read.
    """
    return _look(source)[1]


def _look(source: Source) -> tuple[Inspection, Served | None]:
    model = source.skeleton()
    stored = source.stored
    total = sum(stored.nbytes(name) for name in stored.names())
    config = stored_config(source.config, source.stored)
    if config is None:
        return _dense(source, model, total), None
    fmt = detect_format(config)
    stored = source.weights(model)
    modules, kept, bits, count = [], [], 0, 0
    schemes, orders = {}, {}
    for name, linear in codable(model).items():
        rows, columns = weight_of(linear).shape
        parts = [f"{name}.{part}" for part in fmt.tensors if f"{name}.{part}" in stored.names()]
        if f"{name}.{fmt.marker}" not in parts:
            kept += [] if isinstance(linear, nn.Embedding) else [name]
            continue
        schemes[name] = fmt.scheme(config, name)
        modules.append(Module(name, columns, rows, str(schemes[name])))
        for part in parts:
            if part.endswith("g_idx"):
                if stored.shape(part) != (columns,):
                    raise SalienceError(
                        f"tensor {part} of {stored.path} is {list(stored.shape(part))}, "
                        f"its linear has {columns} columns"
                    )
                orders[name] = stored.tensor(part)
        bits += 8 * sum(stored.nbytes(part) for part in parts)
        count += rows * columns
    kinds = {module.scheme for module in modules}
    only = kinds.pop() if len(kinds) == 1 else None
    moved = {name: order for name, order in orders.items() if not _in_order(order, schemes[name])}
    profile = Served(
        format=fmt.name,
        schemes=schemes,
        shapes={module.name: (module.out_features, module.in_features) for module in modules},
        kept=[*kept, *(name for name in stay_float(model) if name not in {*kept, *schemes})],
        skips=skip_list(config),
        dtype=str(getattr(source.config, "dtype", "float16")).removeprefix("torch."),
        kv_heads=kv_heads(source.config),
        act_order=bool(moved),
        g_idx=moved,
        embeddings=[name for name in embeddings(model) if name in schemes],
    )
    return Inspection(fmt.name, only, bits / max(count, 1), total, modules, kept), profile


def _in_order(g_idx: Tensor, scheme: Scheme) -> bool:
    """Whether groups lie beside each other, or are not named at all (-1)."""
    plain = torch.arange(len(g_idx)) // scheme.group_columns(len(g_idx))
    return bool((g_idx == -1).any()) or torch.equal(g_idx.long(), plain)


def _dense(source: Source, model: nn.Module, total: int) -> Inspection:
    weights = source.weights(model)
    modules, bits, count = [], 0, 0
    for name, linear in linears(model).items():
        if f"{name}.weight" not in weights.names():
            continue  # tied to the embeddings
        rows, columns = weight_of(linear).shape
        modules.append(Module(name, columns, rows, "float"))
        bits += 8 * weights.nbytes(f"{name}.weight")
        count += rows * columns
    kind = "gguf" if source.is_gguf else "dense"
    return Inspection(kind, None, bits / max(count, 1), total, modules, [])
