"""Linears that read the same tensor, as one product.

    [q; k; v] = [Wq; Wk; Wv] x

A token is a matrix times a vector: each product costs a launch, and a narrow one does not fill a
GPU. Which linears belong together is found by running the model once and comparing, by identity,
the tensors they receive: q, k and v, gate and up, both down projections of MLA, and all of these at
once where attention and MLP read the same norm.

The model's code stays as it is. It still calls each member; the first call computes the product of
all, the others take their slices of it. What tells them that this is the same input is that it is
the same object, which the group holds until each member had its slice. So a member may be called
alone, or with something else: then the product is computed for it anew, which is right, and slow.
The trace of a step (`salience.runtime.trace`) has one product and its slices, and no bookkeeping.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from salience import kernels
from salience.groups import calls_of
from salience.linear import QuantLinear
from salience.placement import input_device
from salience.qtensor import QTensor

_TOKENS = 4


@torch.no_grad()
def merge_linears(model: Any, run: Callable[[], Any] | None = None) -> list[tuple[str, ...]]:
    """Merge, in place, the linears of a model that read the same tensor.

    Packed linears are merged when scheme, kernel and dtypes are the same and no column is out of
    order; float ones when they are plain `nn.Linear` of one dtype whose weight nobody shares. The
    others stay as they are. Memory grows by one group while it is made.

    Args:
        model: a Transformers causal language model, or with `run` any module.
        run: calls the model once, on anything; by default on a few tokens.

    Returns:
        The names of the members of each merged group, in the order they are called.
    """

    def few_tokens() -> Any:
        ids = torch.arange(1, _TOKENS + 1, device=input_device(model))[None]
        known = inspect.signature(model.forward).parameters
        return model(input_ids=ids, **({"use_cache": False} if "use_cache" in known else {}))

    merged = []
    for names in _groups(model, run or few_tokens):
        modules = [model.get_submodule(name) for name in names]
        product = _product(modules)
        if product is None:
            continue
        start = 0
        for index, (name, module) in enumerate(zip(names, modules, strict=True)):
            rows = slice(start, start + module.out_features)
            member = (
                MergedQuantLinear(product, index, rows, module)
                if isinstance(module, QuantLinear)
                else MergedLinear(product, index, rows, module)
            )
            model.set_submodule(name, member)
            start = rows.stop
        merged.append(names)
    return merged


def _groups(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, ...]]:
    """Linears that received the same object, each called once."""
    parameters = model.named_parameters(remove_duplicate=False)
    shared = Counter(id(parameter) for _, parameter in parameters)
    modules = model.named_modules(remove_duplicate=False)
    aliases = Counter(id(module) for _, module in modules)
    versions: dict[nn.Module, int] = {}  # of the inputs: one that was written to is another

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not args[0].is_inference():
            versions[module] = args[0]._version

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if _can_merge(m)]
    try:
        calls = calls_of(model, run)  # it holds all inputs, so no two share an id
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(call.name for call in calls)
    groups: dict[tuple[int, int], list[str]] = {}
    for call in calls:
        module = model.get_submodule(call.name)
        if not _can_merge(module) or times[call.name] > 1 or aliases[id(module)] > 1:
            continue
        if type(module) is nn.Linear and shared[id(module.weight)] > 1:
            continue
        groups.setdefault((id(call.x), versions.get(module, 0)), []).append(call.name)
    return [names for group in groups.values() for names in _alike(model, group)]


def _can_merge(module: nn.Module) -> bool:
    if hasattr(module, "_hf_hook"):  # its tensors come and go
        return False
    if type(module) is QuantLinear:
        return module.order is None and not module.scheme.double_quant
    return type(module) is nn.Linear


def _alike(model: nn.Module, names: list[str]) -> list[tuple[str, ...]]:
    """The members of a group that one product can hold."""
    kinds: dict[object, list[str]] = {}
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight
        key: tuple[object, ...] = (type(module), weight.dtype, weight.device, module.in_features)
        if isinstance(module, QuantLinear):
            key += (module.scheme, module.kernel)
        kinds.setdefault(key, []).append(name)
    return [tuple(each) for each in kinds.values() if len(each) > 1]


class _Product(nn.Module):
    """The product of all members and the input it was computed for."""

    def __init__(self, linear: Any, members: int) -> None:
        super().__init__()
        self.linear: Any = linear
        self.members = members
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.left: tuple[int, ...] = ()

    def take(self, index: int, x: Tensor, rows: slice) -> Tensor:
        """The slice [..., rows] of a member's output."""
        if self.x is not x or index not in self.left:
            self.x, self.y = x, self.linear(x)
            self.left = tuple(range(self.members))
        y = self.y
        assert y is not None
        self.left = tuple(i for i in self.left if i != index)
        if not self.left:
            self.x = self.y = None
        return y[..., rows]


def _product(modules: list[Any]) -> _Product | None:
    """The merged linear; None if no kernel takes it. The members' own tensors are let go of."""
    biases = [module.bias for module in modules]
    bias = None
    if any(each is not None for each in biases):
        dtype = next(each.dtype for each in biases if each is not None)
        bias = torch.cat(
            [
                torch.zeros(module.out_features, dtype=dtype, device=module.weight.device)
                if each is None
                else each.detach()
                for module, each in zip(modules, biases, strict=True)
            ]
        )
    if isinstance(modules[0], QuantLinear):
        linear = _merged_packed(modules, bias)
        return None if linear is None else _Product(linear, len(modules))
    first = modules[0]
    rows = sum(module.out_features for module in modules)
    dense = _Dense(first.in_features, rows, bias=bias is not None, device="meta")
    weight = torch.cat([module.weight.detach() for module in modules])
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return _Product(dense, len(modules))


class _Dense(nn.Linear):
    """The weight of all members, which each of them saves its part of."""

    def _save_to_state_dict(self, *_: Any) -> None:
        pass


def _merged_packed(modules: list[QuantLinear], bias: Tensor | None) -> QuantLinear | None:
    first = modules[0]
    rows = sum(module.out_features for module in modules)
    device = first.weight.device
    backend = kernels.backend(first.kernel)
    if not backend.supports(first.scheme, device, first.in_features, rows):
        return None
    parts = [module.qtensor() for module in modules]
    if len({part.scales.dtype for part in parts}) > 1:
        return None
    qt = QTensor(
        torch.cat([part.q for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        first.scheme,
    )
    del parts
    return QuantLinear(qt, bias, first.kernel, first.weight.dtype)


class MergedQuantLinear(QuantLinear):
    """A member of a product: a QuantLinear whose packed weight is some rows of a shared one."""

    product: _Product

    def __init__(self, product: _Product, index: int, rows: slice, of: QuantLinear) -> None:
        nn.Module.__init__(self)
        self._dtype = of._dtype
        self.in_features, self.out_features = of.in_features, of.out_features
        self.scheme, self.kernel = of.scheme, of.kernel
        self.index, self.rows = index, rows
        self._packed_names: list[str] = []
        self.register_buffer("order", None)
        self.register_buffer("bias", of.bias)
        _share(self, product, index)

    def forward(self, x: Tensor) -> Tensor:
        return self.product.take(self.index, x, self.rows)

    @property
    def weight(self) -> Tensor:
        whole = self.product.linear.weight
        return type(whole)((self.out_features, self.in_features), self._dtype, whole.device)

    def qtensor(self) -> QTensor:
        """The member's own rows, unpacked."""
        qt = self.product.linear.qtensor()
        rows = self.rows
        return QTensor(qt.q[rows], qt.scales[rows], qt.zeros[rows], qt.scheme)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        nn.Module._apply(self, fn, recurse)
        self.kernel = self.product.linear.kernel
        return self


class MergedLinear(nn.Module):
    """A member of a product: a Linear whose weight is some rows of a shared one."""

    product: _Product

    def __init__(self, product: _Product, index: int, rows: slice, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        self.index, self.rows = index, rows
        self._has_bias = of.bias is not None
        _share(self, product, index)

    def forward(self, x: Tensor) -> Tensor:
        return self.product.take(self.index, x, self.rows)

    @property
    def weight(self) -> Tensor:
        """A view [out, in] of the shared weight."""
        return nn.Parameter(self.product.linear.weight[self.rows], requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        """A view [out] of the shared bias."""
        if not self._has_bias:
            return None
        return nn.Parameter(self.product.linear.bias[self.rows], requires_grad=False)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.weight.detach()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.detach()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rows={self.rows}"


def _share(member: nn.Module, product: _Product, index: int) -> None:
    """The first member owns the product, so that it is moved and counted once."""
    if index == 0:
        member.product = product
    else:
        member.__dict__["product"] = product
