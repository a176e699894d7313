"""What is refused before anything runs: by the config and the headers alone."""

from collections.abc import Mapping

from torch import nn

from salience.checkpoint import Checkpoint
from salience.errors import SalienceError
from salience.formats import Format, stored_config
from salience.methods import Method
from salience.modules import shapes_of
from salience.scheme import Scheme, fitting_group_sizes
from salience.source import Source
from salience.structure import find_blocks


def check_source(source: Source, model: nn.Module, weights: Checkpoint) -> None:
    """Refuse a source that is quantized already or lacks a tensor of `model`.

    Raises:
        SalienceError: naming the tensor.
    """
    if stored_config(source.config, source.stored):
        raise SalienceError(f"{source.name} is quantized already; start from the float model")
    missing = {name for name, _ in model.named_parameters()} - weights.names()
    if missing:
        raise SalienceError(f"tensor {min(missing)} is missing from {weights.path}")


def check_schemes(model: nn.Module, schemes: Mapping[str, Scheme], fmt: Format) -> None:
    """Refuse schemes that do not fit the linears or the format.

    Raises:
        SalienceError: naming a linear and the group sizes that would fit.
    """
    prefix, _ = find_blocks(model)
    outside = [name for name in schemes if not name.startswith(f"{prefix}.")]
    if outside and not fmt.heads:
        raise SalienceError(
            f"readers of --format {fmt.name} take {outside[0]} for float; use "
            "--format compressed-tensors, or leave it out of --rule"
        )
    shapes = shapes_of(model, schemes)
    fmt.check(schemes, shapes)
    for name, (_, columns) in shapes.items():
        scheme = schemes[name]
        if columns % scheme.group_columns(columns):
            fit = fitting_group_sizes({columns for _, columns in shapes.values()})
            better = ", ".join(f"w{scheme.bits}g{size}" for size in fit) or "none of the usual ones"
            raise SalienceError(
                f"group size {scheme.group_size} does not divide the {columns} inputs of "
                f"{name}; schemes that fit this model: {better}"
            )


def check_act_order(method: Method, fmt: Format) -> None:
    """Refuse groups in activation order where the format cannot say which column is in which.

    Raises:
        SalienceError: naming a format that can.
    """
    if method.act_order and not fmt.act_order:
        raise SalienceError(
            f"--format {fmt.name} has no place for the groups of --act-order; use --format gptq"
        )
