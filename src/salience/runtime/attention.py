"""Rewrites of rotations, cache writes and attention in the graph of a step.

How a model writes them differs from one to the next: halves, pairs, parts of a head, tables of a
column for each pair or for each channel, masks of bools or of large numbers, built in a dozen ways.
What they compute hardly differs. So they are not compared with patterns but evaluated: the part of
the graph between two nodes is a function, which is tried out on random inputs and compared with the
candidates.

    mask       a function of the positions p alone: is key t seen exactly when p - window < t <= p?
    rotation   a function of the positions and one tensor x: is it x cos + swapped(x) sin, for two
               of the tables that it reads?
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from salience.kernels.fused import plain
from salience.runtime.graph import (
    Known,
    Node,
    aten,
    evaluate,
    is_op,
    is_view,
    meta,
    root,
    value_of,
    writes,
)

ops = torch.ops.salience

_MASK_SAMPLES = 64
_REACH = 24  # nodes of a rotation
_ROTATION_ERROR = 2e-2  # bf16, of numbers of size 1; a wrong one is off by 1


@dataclass(frozen=True, slots=True)
class Rotation:
    """x rotated: where x comes from and by what."""

    x: Node
    cos: Node
    sin: Node
    rotary_dim: int
    interleaved: bool

    @property
    def kind(self) -> tuple[Node, Node, int, bool]:
        return (self.cos, self.sin, self.rotary_dim, self.interleaved)


def decode_attentions(gm: fx.GraphModule) -> int:
    """Attention of one query a row to the cache up to its position."""
    known = Known(gm)
    windows: dict[Node, int | None] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if not is_op(node, aten.scaled_dot_product_attention.default):
            continue
        arguments = _arguments(node)
        q, k, v, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
        out, queries = meta(node), meta(q)
        if mask is None or arguments["dropout_p"] or arguments["is_causal"]:
            continue
        if out is None or queries is None:
            continue
        k, v = _unrepeated(k), _unrepeated(v)
        keys, values = meta(k), meta(v)
        if keys is None or values is None or not known.is_positional(mask):
            continue
        # [batch, heads, 1, D], or the heads that share keys as queries of one head.
        if queries.shape[0] != keys.shape[0] or queries.dtype != keys.dtype:
            continue
        if queries.shape[2] != 1 and queries.shape[1] != keys.shape[1]:
            continue
        if queries.shape[1] * queries.shape[2] % keys.shape[1]:
            continue
        if not (_in_cache(k, known) and _in_cache(v, known)):
            continue
        if mask not in windows:
            windows[mask] = _window(known, mask, keys.shape[0], keys.shape[2])
        window = windows[mask]
        if window is None:
            continue
        scale = arguments["scale"] or queries.shape[-1] ** -0.5
        with gm.graph.inserting_before(node):
            flat = gm.graph.call_function(
                aten.reshape.default, (q, [queries.shape[0], -1, queries.shape[-1]])
            )
            flat.meta["val"] = queries.reshape(queries.shape[0], -1, queries.shape[-1])
            y = gm.graph.call_function(
                ops.decode_attention.default, (flat, k, v, known.positions, scale, window)
            )
            y.meta["val"] = out.reshape(out.shape[0], -1)
            view = gm.graph.call_function(aten.view.default, (y, list(out.shape)))
        view.meta["val"] = torch.empty(out.shape, dtype=out.dtype, device="meta")
        node.replace_all_uses_with(view)
        gm.graph.erase_node(node)
        count += 1
    gm.graph.eliminate_dead_code()
    return count


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of a node by name."""
    schema = node.target._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _unrepeated(node: Any) -> Any:
    """The cache that a node repeats the heads of."""
    if not is_op(node, aten.reshape.default):
        return node
    expanded = node.args[0]
    if not is_op(expanded, aten.expand.default):
        return node
    inner = expanded.args[0]
    if not is_op(inner, aten.unsqueeze.default) or inner.args[1] != 2:
        return node
    whole, one = meta(expanded), inner.args[0]
    if whole is None or meta(node).shape != whole.flatten(1, 2).shape:
        return node
    return one


def _in_cache(node: Node, known: Known) -> bool:
    """Whether a node is a view of a tensor that the step writes to: [batch, heads, length, D]."""
    origin, value = root(node), meta(node)
    return (
        origin.op == "get_attr"
        and value is not None
        and value.ndim == 4
        and value.stride(-1) == 1
        and "state" in known.of[origin]
    )


def _window(known: Known, mask: Node, batch: int, length: int) -> int | None:
    """How many keys up to its own a position sees; 0 for all of them, None for another mask."""
    device = known.positions.meta["val"].device
    random = torch.Generator().manual_seed(0)
    sample = torch.cat(
        [
            torch.tensor([length - 1, 0, length // 2, 1]),
            torch.randint(length, (_MASK_SAMPLES * batch,), generator=random),
        ]
    )
    window: int | None = None
    for start in range(0, _MASK_SAMPLES, batch):
        positions = sample[start : start + batch].to(device)
        if len(positions) < batch:
            break
        seen = known.at(mask, positions)
        if seen.dtype != torch.bool:
            if not ((seen == 0) | (seen <= torch.finfo(torch.float16).min)).all():
                return None
            seen = seen == 0
        if seen.shape[-1] != length or seen.shape[1:3] != (1, 1):
            return None
        seen = seen[:, 0, 0].expand(batch, length)
        if window is None:
            window = int(seen[0].sum())
        key, last = torch.arange(length, device=device), positions[:, None]
        if not torch.equal(seen, (key <= last) & (key > last - window)):
            return None
    return 0 if window == length else window


def rotations(gm: fx.GraphModule) -> int:
    """Rotation of queries and keys, and the write of keys and values into the cache."""
    known = Known(gm)
    count = 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if not is_op(node, ops.decode_attention.default):
            continue
        q, k, v, positions = node.args[:4]
        k_write, v_write = _write_to(k, node, known), _write_to(v, node, known)
        if k_write is None or v_write is None:
            continue
        values = v_write.args[2]
        batch, heads, _, width = meta(v).shape
        if meta(values).numel() != batch * heads * width:
            continue
        keys = _rotation(k_write.args[2], known, meta(k).shape[-1])
        if keys is None:
            continue
        queries = _rotation(q, known, meta(k).shape[-1], keys)
        if queries is None or meta(queries.x).dtype != meta(k).dtype:
            continue
        # The cache is written where the later write was: nothing may read it before.
        last = max((k_write, v_write, queries.x, keys.x), key=order.__getitem__)
        first = min((k_write, v_write), key=order.__getitem__)
        if _read_between(gm, first, last, (k, v)):
            continue
        kc, vc = k_write.args[0], v_write.args[0]
        with gm.graph.inserting_after(last):
            shaped = gm.graph.call_function(aten.reshape.default, (values, [batch, heads, width]))
        shaped.meta["val"] = meta(values).reshape(batch, heads, width)
        with gm.graph.inserting_after(shaped):
            turned = gm.graph.call_function(
                ops.rope_update.default,
                (queries.x, keys.x, shaped, keys.cos, keys.sin, kc, vc, positions,
                 keys.rotary_dim, keys.interleaved),
            )  # fmt: skip
        turned.meta["val"] = meta(q)
        node.update_arg(0, turned)
        for write in (k_write, v_write):
            write.replace_all_uses_with(write.args[0])
            gm.graph.erase_node(write)
        order = {each: i for i, each in enumerate(gm.graph.nodes)}
        count += 1
    gm.graph.eliminate_dead_code()
    return count


def _write_to(cache: Node, reader: Node, known: Known) -> Node | None:
    """The one node before `reader` that writes to the memory of `cache`: row b at positions[b]."""
    origin = root(cache)
    memory = value_of(origin).untyped_storage()._cdata
    found = []
    for node in known.gm.graph.nodes:
        if node is reader:
            break
        for written in writes(node):
            start = root(written)
            if start.op == "get_attr" and value_of(start).untyped_storage()._cdata == memory:
                found.append(node)
    if len(found) != 1 or not is_op(found[0], aten.index_put_.default):
        return None
    write = found[0]
    target, indices, value = write.args[:3]
    whole, batch = meta(target), meta(cache).shape[0]
    if whole is None or len(write.args) > 3 or len(indices) != 3 or indices[1] is not None:
        return None
    # The cache that is read begins where the one that is written does.
    read = value_of_view(cache)
    if read is None or whole.shape[0] != batch:
        return None
    written_to = value_of_view(target)
    if written_to is None or written_to.data_ptr() != read.data_ptr():
        return None
    if written_to.stride() != read.stride() or written_to.ndim != 4:
        return None
    rows, places = indices[0], indices[2]
    if not (known.is_constant(rows) and known.is_positional(places)):
        return None
    some = torch.arange(batch, device=whole.device).flip(0) + 1
    if not torch.equal(evaluate(rows, {}), torch.arange(batch, device=whole.device)):
        return None
    if not torch.equal(known.at(places, some), some):
        return None
    data = meta(value)
    return write if data is not None and data.dtype == whole.dtype else None


def value_of_view(node: Node) -> Tensor | None:
    """The tensor of a node that is a view of a get_attr, itself, or what a write to it returns."""
    path = []
    while node.op != "get_attr":
        if is_view(node):
            path.append(node)
        elif node.args[0] not in writes(node):
            return None
        node = node.args[0]
    value = value_of(node)
    for view in reversed(path):
        value = view.target(value, *view.args[1:], **view.kwargs)
    return value


def _read_between(gm: fx.GraphModule, first: Node, last: Node, caches: tuple[Node, ...]) -> bool:
    """Whether anything but views and the two writes uses the caches from `first` to `last`."""
    memory = {value_of(root(cache)).untyped_storage()._cdata for cache in caches}
    inside = False
    for node in gm.graph.nodes:
        inside = inside or node is first
        if inside and node.op == "call_function" and not is_view(node):
            for used in node.all_input_nodes:
                origin = root(used)
                if origin.op != "get_attr" or is_op(node, aten.index_put_.default):
                    continue
                if value_of(origin).untyped_storage()._cdata in memory:
                    return True
        if node is last:
            return False
    return False


def _rotation(
    node: Node, known: Known, width: int, like: Rotation | None = None
) -> Rotation | None:
    """The rotation that makes a node [..., width], by the nearest tensor that it is one of."""
    for x, tables in _sources(node, known):
        given, got = meta(x), meta(node)
        if given is None or got is None or given.numel() != got.numel() or given.ndim < 2:
            continue
        if len(known.positions.meta["val"]) != given.shape[0]:
            continue
        if given.dtype != got.dtype or given.stride(-1) != 1:
            continue
        if like is None:
            pairs = [(c, s) for c in tables for s in tables if c is not s]
            kinds = [
                (c, s, turned, interleaved)
                for c, s in pairs
                for turned in {meta(c).shape[-1], 2 * meta(c).shape[-1]}
                for interleaved in (False, True)
                if turned <= width and meta(c).shape == meta(s).shape
            ]
        else:
            kinds = [like.kind]
        if not kinds:
            continue
        found = _try(node, x, known, width, kinds)
        if found is not None:
            return found
    return None


def _sources(node: Node, known: Known) -> Iterator[tuple[Node, list[Node]]]:
    """The nodes that a node is a function of, one alone beside the positions, nearest first; each
    with the positional nodes that come in between.
    """
    order = {each: i for i, each in enumerate(known.gm.graph.nodes)}
    frontier = {node}
    tables: list[Node] = []
    for _ in range(_REACH):
        last = max(frontier, key=order.__getitem__)
        frontier.discard(last)
        if last.op != "call_function" or writes(last):
            return
        for used in last.all_input_nodes:
            if not known.is_positional(used):
                frontier.add(used)
            elif used not in tables and known.of[used]:
                tables.append(used)
        if len(frontier) == 1:
            yield next(iter(frontier)), tables
        if not frontier:
            return


def _try(
    node: Node,
    x: Node,
    known: Known,
    width: int,
    kinds: list[tuple[Node, Node, int, bool]],
) -> Rotation | None:
    given = x.meta["val"]
    batch = given.shape[0]
    random = torch.Generator().manual_seed(0)
    value = torch.randn(given.shape, generator=random).to(given.device, given.dtype)
    positions = torch.randint(1, 1000, (batch,), generator=random).to(given.device)
    memo: dict[Node, Any] = {x: value, known.positions: positions}
    try:
        got = evaluate(node, memo)
    except (ValueError, RuntimeError, IndexError):
        return None
    if not isinstance(got, Tensor):
        return None
    got = got.reshape(batch, -1, width).float()
    for cos, sin, rotary_dim, interleaved in kinds:
        c, s = (known.at(table, positions) for table in (cos, sin))
        if c.numel() not in (c.shape[-1], batch * c.shape[-1]) or not c.is_floating_point():
            continue
        c, s = plain.tables(c, batch), plain.tables(s, batch)
        heads = plain.heads(value, width)
        expected = plain.rotated(heads, c, s, rotary_dim, interleaved).float()
        if expected.shape == got.shape and float((expected - got).abs().max()) < _ROTATION_ERROR * (
            1 + float(got.abs().max())
        ):
            return Rotation(x, cos, sin, rotary_dim, interleaved)
    return None
