"""Rewrites of norms, gated activations and packed products in the graph of a step.

Each takes a graph, replaces what it recognizes by the dataflow, and says how many. What it does not
recognize stays as it was. `salience.runtime.attention` has those of rotations and attention.
"""

import operator
from collections.abc import Callable

import torch
from torch import fx

from salience.kernels import fused  # noqa: F401  (registers the ops)
from salience.runtime.graph import Known, Node, aten, is_op, meta

ops = torch.ops.salience

_CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def skip_conversions(node: Node) -> Node:
    """What a node was converted from."""
    while is_op(node, *_CONVERSIONS):
        node = node.args[0]
    return node


def replace(node: Node, target: Callable[..., object], args: tuple[object, ...]) -> Node:
    """Call `target` instead of what a node does."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(new)
    return new


def rms_norms(gm: fx.GraphModule) -> int:
    """w * x / sqrt(mean(x^2) + eps), rounded before or after the weight."""
    known = Known(gm)
    count = 0
    for node in list(gm.graph.nodes):
        found = _match_norm(node, known)
        if found is not None:
            x, weight, eps, cast_first = found
            replace(node, ops.rms_norm.default, (x, weight, eps, 0.0, cast_first))
            count += 1
    gm.graph.eliminate_dead_code()
    return count


def _match_norm(node: Node, known: Known) -> tuple[Node, Node, float, bool] | None:
    """x, weight, eps, and whether the quotient is rounded before it meets the weight."""
    out = meta(node)
    if out is None or out.dtype not in _FLOATS:
        return None
    # Gemma: the product with the weight in fp32, then rounded.
    product = node.args[0] if is_op(node, *_CONVERSIONS) else node
    if not is_op(product, aten.mul.Tensor):
        return None
    if product is not node and len(product.users) > 1:
        return None
    for weight, quotient in (product.args, product.args[::-1]):
        scale = meta(weight)
        if not known.is_constant(weight) or scale is None or scale.ndim != 1:
            continue
        cast_first = product is node
        inner = skip_conversions(quotient) if cast_first else quotient
        found = _match_quotient(inner)
        if found is None:
            continue
        x, eps = found
        given = meta(x)
        if given is None or given.dtype != out.dtype or given.shape != out.shape:
            continue
        if given.shape[-1] != len(scale) or given.stride(-1) != 1:
            continue
        return x, weight, eps, cast_first
    return None


def _match_quotient(node: Node) -> tuple[Node, float] | None:
    """x and eps of x * rsqrt(mean(x^2) + eps), computed in fp32."""
    if not is_op(node, aten.mul.Tensor):
        return None
    for wide, factor in (node.args, node.args[::-1]):
        root = is_op(factor, aten.pow.Tensor_Scalar) and factor.args[1] == -0.5
        if root or is_op(factor, aten.rsqrt.default):
            total = factor.args[0]
        else:
            continue
        if not is_op(total, aten.add.Tensor, aten.add.Scalar):
            continue
        mean, eps = total.args
        if not (is_op(mean, aten.mean.dim) and isinstance(eps, float)):
            continue
        if list(mean.args[1]) != [-1] or mean.args[2:3] != (True,):
            continue
        power = mean.args[0]
        square = (is_op(power, aten.pow.Tensor_Scalar) and power.args[1] == 2) or (
            is_op(power, aten.mul.Tensor) and power.args[0] is power.args[1]
        )
        value = meta(wide)
        if not square or power.args[0] is not wide or value is None:
            continue
        if value.dtype != torch.float32:
            continue
        x = skip_conversions(wide)
        if isinstance(x, fx.Node):
            return x, eps
    return None


def residual_norms(gm: fx.GraphModule) -> int:
    """A norm of a sum that is used again: both from one op."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_op(node, ops.rms_norm.default):
            continue
        total = node.args[0]
        if not is_op(total, aten.add.Tensor) or total.kwargs or len(total.users) < 2:
            continue
        a, b = (meta(each) for each in total.args)
        out = meta(total)
        if a is None or b is None or out is None:
            continue
        if not (a.shape == b.shape == out.shape and a.dtype == b.dtype == out.dtype):
            continue
        if a.stride(-1) != 1 or b.stride(-1) != 1:
            continue
        residual, x = total.args
        with gm.graph.inserting_before(total):
            both = gm.graph.call_function(ops.add_rms_norm.default, (x, residual, *node.args[1:]))
            normed = gm.graph.call_function(operator.getitem, (both, 0))
            added = gm.graph.call_function(operator.getitem, (both, 1))
        normed.meta["val"], added.meta["val"] = node.meta["val"], total.meta["val"]
        both.meta["val"] = (node.meta["val"], total.meta["val"])
        node.replace_all_uses_with(normed)
        total.replace_all_uses_with(added)
        gm.graph.erase_node(node)
        gm.graph.erase_node(total)
        count += 1
    return count


def gated_activations(gm: fx.GraphModule) -> int:
    """silu(gate) * up and gelu(gate) * up."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_op(node, aten.mul.Tensor):
            continue
        for active, up in (node.args, node.args[::-1]):
            if not is_op(active, aten.silu.default, aten.gelu.default) or len(active.users) > 1:
                continue
            gate = active.args[0]
            g, u, out = meta(gate), meta(up), meta(node)
            if g is None or u is None or out is None or g.dtype != u.dtype or g.dtype != out.dtype:
                continue
            if not g.shape == u.shape == out.shape or g.stride(-1) != 1 or u.stride(-1) != 1:
                continue
            if is_op(active, aten.silu.default):
                replace(node, ops.silu_mul.default, (gate, up))
            else:
                tanh = active.kwargs.get("approximate", "none") == "tanh"
                replace(node, ops.gelu_mul.default, (gate, up, tanh))
            count += 1
            break
    gm.graph.eliminate_dead_code()
    return count
