"""On a CPU: what the fused ops consist of, in place of the ops.

An op of ours is a call into Python, which takes ten microseconds to get there; PyTorch's own take
one or two. So for a step of one row each is written out as the fewest calls that compute it.

    norm       the layer norm of (x, -x), whose mean is 0 and whose variance is mean(x^2)
    rotation   x cos + roll(x, D / 2) sin, the first half of sin being negated; queries and keys
               that are slices of one product are turned together
    attention  to the keys up to the position: its number is read once a step
    linear     of bf16: the weight is copied into the order that oneDNN reads it in, as PyTorch's
               own op does at each call; a step of SmolLM2-135M spent a third of its time there.
               The copies take up to 512 MiB, in the order of the graph

What has no such form (several rows, partial rotations, softcaps) stays one op. Sums are rounded at
other places than in the ops, by the last bit of the dtype.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from salience.runtime.graph import Known, Node, aten, constant, is_op, meta, value_of

ops = torch.ops.salience

_REORDERED_BYTES = 2**29
# Ops on the last axis alone, and where their arguments name it.
_LAST_AXIS: dict[Any, int | None] = {
    aten.add.Tensor: None,
    aten.mul.Tensor: None,
    aten.neg.default: None,
    aten.silu.default: None,
    aten.gelu.default: None,
    aten.layer_norm.default: None,
    aten.cat.default: 1,
    aten.slice.Tensor: 1,
}


class _Lowering:
    """One pass over a graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.known = Known(gm)
        self.made: dict[object, Any] = {}  # what several nodes use: signed sines, the end of keys
        self.room = _REORDERED_BYTES if _reorders() else 0

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, which knows its shape where that is easy to say: views can then be joined."""
        node = self.gm.graph.call_function(target, args, kwargs)
        if target in _LAST_AXIS or target is aten.reshape.default:
            given = [meta(each) for each in node.all_input_nodes]
            if all(isinstance(each, FakeTensor) for each in given):
                found = dict(zip(node.all_input_nodes, given, strict=True))
                node.meta["val"] = target(*fx.map_arg(args, found.__getitem__), **kwargs)
        return node

    def rms_norm(self, node: Node) -> Node | None:
        x, weight, eps, offset, _ = _arguments(node)
        return self._norm(x, weight, eps, offset)

    def add_rms_norm(self, node: Node) -> bool:
        x, residual, weight, eps, offset, _ = _arguments(node)
        if not self.known.is_constant(weight):
            return False
        total = self.call(aten.add.Tensor, residual, x)
        total.meta["val"] = node.meta["val"][1]
        normed = self._norm(total, weight, eps, offset)
        assert normed is not None
        normed.meta["val"] = node.meta["val"][0]
        for user in list(node.users):
            user.replace_all_uses_with(normed if user.args[1] == 0 else total)
            self.gm.graph.erase_node(user)
        return True

    def _norm(self, x: Node, weight: Node, eps: float, offset: float) -> Node | None:
        if not self.known.is_constant(weight):
            return None
        dtype, width = x.meta["val"].dtype, x.meta["val"].shape[-1]
        key = ("weight", weight, offset, dtype)
        if key not in self.made:
            value = value_of(weight).detach()
            value = ((value + offset) if offset else value).to(dtype)
            self.made[key] = constant(self.gm, torch.cat([value, value]), "doubled")
        both = self.call(aten.cat.default, [x, self.call(aten.neg.default, x)], -1)
        normed = self.call(aten.layer_norm.default, both, [2 * width], self.made[key], None, eps)
        normed.meta["val"] = both.meta["val"]
        return self.call(aten.slice.Tensor, normed, -1, 0, width)

    def silu_mul(self, node: Node) -> Node:
        gate, up = node.args
        return self.call(aten.mul.Tensor, self.call(aten.silu.default, gate), up)

    def gelu_mul(self, node: Node) -> Node:
        gate, up, tanh = node.args
        kind = "tanh" if tanh else "none"
        return self.call(aten.mul.Tensor, self.call(aten.gelu.default, gate, approximate=kind), up)

    def rope_update(self, node: Node) -> Node | None:
        q, k, v, cos, sin, k_cache, v_cache, positions, rotary_dim, interleaved, *norms = (
            _arguments(node)
        )
        width = meta(k_cache).shape[-1]
        whole = meta(cos).shape[-1] == rotary_dim == width
        if len(positions.meta["val"]) != 1 or interleaved or not whole or norms[0] is not None:
            return None
        q_heads = q.meta["val"].numel() // width
        k_heads = k.meta["val"].numel() // width
        factors = self._tables(cos, sin, q.meta["val"].dtype, node)
        joint = self._joint(q, k, q_heads + k_heads, width)
        if joint is None:
            q_turned = self._turned(self.call(aten.reshape.default, q, [1, q_heads, width]),
                                    width, factors)  # fmt: skip
            k_turned = self._turned(self.call(aten.reshape.default, k, [1, k_heads, width]),
                                    width, factors)  # fmt: skip
        else:
            turned = self._turned(joint, width, factors)
            q_turned = self.call(aten.slice.Tensor, turned, 1, 0, q_heads)
            k_turned = self.call(aten.slice.Tensor, turned, 1, q_heads, q_heads + k_heads)
        for cache, value in ((k_cache, k_turned), (v_cache, v)):
            one = self.call(aten.reshape.default, value, [1, k_heads, 1, meta(cache).shape[-1]])
            self.call(aten.index_copy_.default, cache, 2, positions, one)
        return q_turned

    def _tables(self, cos: Node, sin: Node, dtype: torch.dtype, node: Node) -> tuple[Node, Node]:
        """cos, and sin with its first half negated, [1, 1, D], once a step."""
        source = (_unshaped(cos), _unshaped(sin))
        if source not in self.made:
            width = cos.meta["val"].shape[-1]
            sign = torch.ones(width, dtype=dtype)
            sign[: width // 2] = -1
            signs = constant(self.gm, sign, "signs")
            tables = []
            # After the later of the two, to be there for all layers.
            after = next(n for n in reversed(self.gm.graph.nodes) if n in source)
            with self.gm.graph.inserting_after(after):
                for table in reversed(source):
                    shaped = self.call(aten.reshape.default, table, [1, 1, width])
                    tables.append(shaped)
            with self.gm.graph.inserting_after(tables[0]):
                signed = self.call(aten.mul.Tensor, tables[0], signs)
            cast = [tables[1], signed]
            if cos.meta["val"].dtype != dtype:
                with self.gm.graph.inserting_after(signed):
                    cast = [self.call(aten.to.dtype, each, dtype) for each in cast]
            self.made[source] = (cast[0], cast[1])
        return self.made[source]

    def _joint(self, q: Node, k: Node, heads: int, width: int) -> Node | None:
        """q and k as one tensor, where they are neighbouring slices of one product."""
        parts = [_unshaped(each) for each in (q, k)]
        if not all(is_op(each, aten.slice.Tensor) for each in parts):
            return None
        (product, *first), (other, *second) = (part.args for part in parts)
        given = meta(product)
        if product is not other or given is None or len(first) != 3 or len(second) != 3:
            return None
        last = given.ndim - 1
        if first[0] not in (-1, last) or second[0] not in (-1, last) or first[2] != second[1]:
            return None
        both = self.call(aten.slice.Tensor, product, last, first[1], second[2])
        return self.call(aten.reshape.default, both, [1, heads, width])

    def _turned(self, x: Node, width: int, factors: tuple[Node, Node]) -> Node:
        swapped = self.call(aten.roll.default, x, [width // 2], [2])
        return self.call(aten.addcmul.default, self.call(aten.mul.Tensor, x, factors[0]),
                         swapped, factors[1])  # fmt: skip

    def decode_attention(self, node: Node) -> Node | None:
        q, k, v, positions, scale, window, softcap, sinks = _arguments(node)
        if len(positions.meta["val"]) != 1 or softcap or sinks is not None:
            return None
        start, end = self._span(positions, window)
        kv_heads, width, deep = meta(k).shape[1], meta(k).shape[-1], meta(v).shape[-1]
        queries = self.call(aten.reshape.default, q, [1, kv_heads, -1, width])
        k, v = (self.call(aten.slice.Tensor, cache, 2, start, end) for cache in (k, v))
        y = self.call(aten.scaled_dot_product_attention.default, queries, k, v, scale=scale)
        got = node.meta["val"]
        y.meta["val"] = got.reshape(1, kv_heads, -1, deep)
        return self.call(aten.reshape.default, y, [1, got.shape[-1]])

    def _span(self, positions: Node, window: int) -> tuple[Any, Any]:
        """The first key that is seen and the one after the last, read once a step."""
        if "end" not in self.made:
            with self.gm.graph.inserting_after(positions):
                position = self.call(aten.item.default, positions)
            with self.gm.graph.inserting_after(position):
                self.made["end"] = self.call(operator.add, position, 1)
        if window and window not in self.made:
            with self.gm.graph.inserting_after(self.made["end"]):
                begin = self.call(operator.sub, self.made["end"], window)
            with self.gm.graph.inserting_after(begin):
                self.made[window] = self.call(max, begin, 0)
        return self.made[window] if window else 0, self.made["end"]

    def qmm(self, node: Node) -> Node | None:
        x, packed, kernel, _, _, out_features = node.args
        given = meta(x)
        if kernel != "cpu_int4" or given is None or given.dtype != torch.bfloat16:
            return None
        if given.shape[:-1].numel() != 1:
            return None
        codes, scales = packed[:2]
        group_size = given.shape[-1] // meta(scales).shape[0]
        target = aten._weight_int4pack_mm_for_cpu.default
        return self._product(x, out_features, target, codes, group_size, scales)

    def linear(self, node: Node) -> Node | None:
        x, weight, bias = _arguments(node)
        given = meta(x)
        if given is None or given.dtype != torch.bfloat16 or given.shape[:-1].numel() != 1:
            return None
        if not self.known.is_constant(weight) or weight.op != "get_attr":
            return None
        value = value_of(weight).detach()
        if value.dtype != torch.bfloat16 or value.nbytes > self.room:
            return None
        self.room -= value.nbytes
        reordered = torch.ops.mkldnn._reorder_linear_weight(value, 1)
        weight = constant(self.gm, reordered, "reordered")
        target = torch.ops.mkldnn._linear_pointwise.default
        return self._product(x, value.shape[0], target, weight, bias, "none", [], "")

    def _product(self, x: Node, out_features: int, target: Any, *args: Any) -> Node:
        """An op that takes one row, [1, n], of an x [..., n] that has no more."""
        given = meta(x)
        rows = self.call(aten.reshape.default, x, [1, given.shape[-1]])
        y = self.call(target, rows, *args)
        y.meta["val"] = given.new_empty(1, out_features)
        return self.call(aten.view.default, y, [*given.shape[:-1], out_features])


def _reorders() -> bool:
    """Whether oneDNN is there and multiplies bf16 on this processor."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def lower(gm: fx.GraphModule) -> int:
    """Write out the fused ops of a step on a CPU, in place: how many."""
    if any(isinstance(v := n.meta.get("val"), Tensor) and v.device.type != "cpu"
           for n in gm.graph.nodes):  # fmt: skip
        return 0
    lowering = _Lowering(gm)
    methods = {
        ops.rms_norm.default: lowering.rms_norm,
        ops.add_rms_norm.default: lowering.add_rms_norm,
        ops.silu_mul.default: lowering.silu_mul,
        ops.gelu_mul.default: lowering.gelu_mul,
        ops.rope_update.default: lowering.rope_update,
        ops.decode_attention.default: lowering.decode_attention,
        ops.qmm.default: lowering.qmm,
        aten.linear.default: lowering.linear,
    }
    count = 0
    for node in list(gm.graph.nodes):
        method = methods.get(node.target) if node.op == "call_function" else None
        if method is None:
            continue
        with gm.graph.inserting_before(node):
            new = method(node)
        if not new:
            continue
        if isinstance(new, fx.Node):
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        count += 1
    for node in list(gm.graph.nodes):
        count += _flatten(node)
    gm.graph.eliminate_dead_code()
    return count


def _flatten(node: Node) -> bool:
    """Compute [1, 1, n] as [1, n], which products of one row take and give: views then meet."""
    got, given = meta(node), [meta(each) for each in node.all_input_nodes]
    if node.target not in _LAST_AXIS or any(each is None for each in [got, *given]):
        return False
    axis = _LAST_AXIS[node.target]
    if axis is not None and (len(node.args) <= axis or node.args[axis] not in (-1, 2)):
        return False
    if any(each.shape[:-1] != (1, 1) for each in [got, *given] if each.ndim > 1):
        return False
    graph, flat = node.graph, {}
    with graph.inserting_before(node):
        for each in node.all_input_nodes:
            flat[each] = each
            if meta(each).ndim > 1:
                shape = [1, meta(each).shape[-1]]
                flat[each] = graph.call_function(aten.reshape.default, (each, shape))
                flat[each].meta["val"] = meta(each).reshape(shape)
        args = list(fx.map_arg(node.args, flat.__getitem__))
        if axis is not None:
            args[axis] = 1
        new = graph.call_function(node.target, tuple(args), node.kwargs)
        view = graph.call_function(aten.reshape.default, (new, list(got.shape)))
    new.meta["val"], view.meta["val"] = got.reshape(1, got.shape[-1]), got
    node.replace_all_uses_with(view)
    graph.erase_node(node)
    return True


def _arguments(node: Node) -> list[Any]:
    """All arguments of a node, in order."""
    schema = node.target._schema.arguments
    given = [*node.args, *(node.kwargs.get(a.name, a.default_value)
                           for a in schema[len(node.args) :])]  # fmt: skip
    return given


def _unshaped(node: Node) -> Node:
    """What a node is a reshape of."""
    while is_op(node, aten.reshape.default, aten.view.default, aten.unsqueeze.default):
        node = node.args[0]
    return node
