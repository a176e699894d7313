"""What a model is made of: its decoder's blocks, the linears that can be coded, what stays float.

Nothing here goes by a name, an architecture or a class of Transformers. Routed experts are stacked
parameters of three dimensions, or a list of equal modules with a router beside it; a router is
whatever has one output for each expert. Both stay float: a router decides, by comparing numbers
that are close to each other, which weights are used at all, and experts need a search of their own
(each sees only the tokens sent to it).
"""

import copy
from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from salience.errors import SalienceError

# Formats pack eight outputs into a word; a gate of fewer, or a sum of fewer inputs, saves nothing.
_NARROWEST = 8


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder's blocks: the largest list of modules with linears.

    A model of several parts (a vision tower, an encoder) says which is the decoder, by the
    `get_decoder` that every Transformers model has.

    Raises:
        SalienceError: the model has no list of blocks with linears.
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    for part in (decoder, model):
        inside = set(part.modules()) if isinstance(part, nn.Module) else set()
        best: tuple[int, str, nn.ModuleList] | None = None
        for name, module in model.named_modules():
            if module in inside and isinstance(module, nn.ModuleList) and linears(module):
                size = sum(p.numel() for p in module.parameters())
                if best is None or size > best[0]:
                    best = (size, name, module)
        if best is not None:
            return best[1], best[2]
    raise SalienceError(f"{type(model).__name__} has no list of blocks with linear layers")


def coded_blocks(prefix: str, names: Iterable[str]) -> list[int]:
    """Which blocks have something to code, in order: by the names of what is coded anywhere.

    Args:
        prefix: of the list of blocks, as `find_blocks` gives it.
        names: full names of linears.
    """
    inside = (name[len(prefix) + 1 :] for name in names if name.startswith(f"{prefix}."))
    return sorted({int(name.partition(".")[0]) for name in inside})


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """All linears below `module` that can be coded, by name: no expert, router or narrow gate."""
    floats = _floats(module)
    return {
        name: part
        for name, part in module.named_modules()
        if is_linear(part) and not _inside(name, floats)
    }


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input embeddings of a causal language model, by name, if looking up is all they do."""
    own = model.get_input_embeddings()  # type: ignore[operator]
    return {n: m for n, m in model.named_modules() if m is own and type(m) is nn.Embedding}


def codable(model: nn.Module) -> dict[str, nn.Module]:
    """What of a whole model can be coded: its linears and its input embeddings."""
    return {**linears(model), **embeddings(model)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b and nothing else: a Linear, or GPT-2's Conv1D.

    A Linear with a forward of its own is tried out: some routers compute something else.
    """
    if not isinstance(module, nn.Linear):
        return is_transposed(module)
    return type(module).forward is nn.Linear.forward or _acts_linear(module)


def _acts_linear(module: nn.Linear) -> bool:
    """Whether the forward of a Linear's subclass is a Linear's, on a small weight."""
    probe = copy.copy(module)
    random = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*size, generator=random) for size in ((3, 5), (3,), (2, 5)))
    has_bias = module.bias is not None
    probe._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": nn.Parameter(bias, requires_grad=False) if has_bias else None,
    }
    try:
        out = probe.forward(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False  # it wants more than a tensor, or other shapes
    expected = F.linear(x, weight, bias if has_bias else None)
    return isinstance(out, Tensor) and out.shape == expected.shape and torch.allclose(out, expected)


def is_transposed(module: nn.Module) -> bool:
    """A linear that stores its weight as [in, out], as Transformers' Conv1D does."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]: a view, so that writing to it writes to the linear."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if is_transposed(linear) else weight


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear."""
    rows, columns = weight_of(linear).shape
    return rows, columns


def shapes_of(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of some linears by their names."""
    return {name: shape_of(model.get_submodule(name)) for name in names}


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [out] of a linear."""
    bias = getattr(linear, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def kept(model: nn.Module) -> dict[str, str]:
    """What stays float beside norms and embeddings: full name of a module or parameter -> reason.

    Reasons are "expert", "router", "convolution", "stacked weights" (of three dimensions, with no
    router beside them), "narrow" (fewer than 8 inputs or outputs), "own forward" (a Linear that
    computes something else) and "outside the blocks".
    """
    prefix, blocks = find_blocks(model)
    result = {f"{prefix}.{name}": reason for name, reason in _floats(blocks).items()}
    for name, module in model.named_modules():
        inside = name == prefix or name.startswith(f"{prefix}.")
        if not inside and (isinstance(module, nn.Linear) or is_linear(module)):
            result[name] = "outside the blocks"
    return result


def has_experts(module: nn.Module) -> bool:
    """Whether there are routed experts below `module`."""
    return "expert" in _floats(module).values()


def expert_lists(module: nn.Module) -> dict[str, list[str]]:
    """Lists of equal modules, one for each expert: name of the list -> names of its items.

    Args:
        module: a block, a list of blocks, or a model, whose outermost lists hold blocks.
    """
    lists = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList | nn.ModuleDict)
    }
    is_model = any(isinstance(part, nn.Embedding) for part in module.modules())
    return {
        name: [f"{name}.{key}" for key, _ in part.named_children()]
        for name, part in lists.items()
        if (not is_model or any(name.startswith(f"{other}.") for other in lists))
        and _are_equal(part)
        and _routers(module, name, len(part))
    }


def _floats(module: nn.Module) -> dict[str, str]:
    """What stays float below `module`, by the shortest name that says it, with the reason."""
    result: dict[str, str] = {}
    for name, items in expert_lists(module).items():
        result[name] = "expert"
        result |= dict.fromkeys(_routers(module, name, len(items)), "router")
    for name, part in module.named_modules():
        if isinstance(part, _ConvNd):
            result[name] = "convolution"
            continue
        for local, parameter in part.named_parameters(recurse=False):
            if parameter.ndim < 3:
                continue
            routers = _routers(module, name, parameter.shape[0])
            # A module of stacked weights goes by its own name, unless there is more in it.
            alone = not any(is_linear(child) for child in part.modules())
            owner = name if alone and name else _join(name, local)
            if routers:
                result[owner] = "expert"
            result.setdefault(owner, "stacked weights")
            result |= dict.fromkeys(routers, "router")
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and not is_linear(part):
            result.setdefault(name, "own forward")
        elif is_linear(part) and min(weight_of(part).shape) < _NARROWEST:
            result.setdefault(name, "narrow")
    return {
        name: reason
        for name, reason in result.items()
        if not _inside(name.rpartition(".")[0], result)
    }


def _routers(root: nn.Module, experts: str, count: int) -> list[str]:
    """What chooses among `count` experts: the nearest modules with an output for each of them.

    A shared expert may have as many outputs, and some routers have a few more ("no expert"). So of
    the candidates those that are no plain linears win, then those with the very number of outputs,
    then those that lie highest.
    """
    parent = experts
    while parent:
        parent = parent.rpartition(".")[0]
        scope = root.get_submodule(parent)
        if isinstance(scope, nn.ModuleList):
            return []  # this is the list of blocks
        found: dict[str, tuple[bool, bool, int]] = {}
        for local, part in scope.named_modules():
            outputs = _outputs(part)
            if outputs is None or not count <= outputs <= 2 * count:
                continue
            if not _inside(name := _join(parent, local), (experts,)):
                found[name] = (is_linear(part), outputs != count, local.count("."))
        if found:
            best = [name for name, rank in found.items() if rank == min(found.values())]
            if parent != experts.rpartition(".")[0]:
                return best
            # Beside the experts: all of the router, were it of several layers.
            depth = parent.count(".") + 2 if parent else 1
            return list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in best))
    return []


def _outputs(module: nn.Module) -> int | None:
    if is_linear(module):
        return weight_of(module).shape[0]
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    return weight.shape[0]


def _are_equal(modules: nn.ModuleList | nn.ModuleDict) -> bool:
    """Whether these are at least two modules with linears and the same parameters."""
    kinds = {
        (type(part), *((name, p.shape) for name, p in part.named_parameters()))
        for part in modules.children()
    }
    first = next(modules.children(), None)
    several = len(list(modules.children())) > 1 and len(kinds) == 1
    return several and first is not None and any(is_linear(part) for part in first.modules())


def _inside(name: str, names: Container[str]) -> bool:
    """Whether a module is one of those named, or below one."""
    while name:
        if name in names:
            return True
        name = name.rpartition(".")[0]
    return False


def _join(name: str, local: str) -> str:
    return f"{name}.{local}" if name and local else name or local
