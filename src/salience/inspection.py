"""What is in a checkpoint: its format, the scheme of each linear, what stayed float, its size."""

from dataclasses import dataclass

from torch import nn

from salience.formats import detect_format, stored_config
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
    """

    format: str
    scheme: str | None
    bits_per_weight: float
    bytes: int
    modules: list[Module]
    kept: list[str]


def inspect(source: Source) -> Inspection:
    """Look at the config and the tensor headers; no weights are read.

    Raises:
        SalienceError: a checkpoint that cannot be read.
    """
    model = source.skeleton()
    stored = source.stored
    total = sum(stored.nbytes(name) for name in stored.names())
    config = stored_config(source.config, source.stored)
    if config is None:
        return _dense(source, model, total)
    fmt = detect_format(config)
    stored = source.weights(model)
    modules, kept, bits, count = [], [], 0, 0
    for name, linear in codable(model).items():
        rows, columns = weight_of(linear).shape
        parts = [f"{name}.{part}" for part in fmt.tensors if f"{name}.{part}" in stored.names()]
        if f"{name}.{fmt.marker}" not in parts:
            kept += [] if isinstance(linear, nn.Embedding) else [name]
            continue
        scheme = str(fmt.scheme(config, name))
        modules.append(Module(name, columns, rows, scheme))
        bits += 8 * sum(stored.nbytes(part) for part in parts)
        count += rows * columns
    schemes = {module.scheme for module in modules}
    only = schemes.pop() if len(schemes) == 1 else None
    return Inspection(fmt.name, only, bits / max(count, 1), total, modules, kept)


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
