"""The ATen graph of a step: what is known of its values, how it is run.

`salience.runtime.record` makes it. Tensors of the model and of its cache are attributes of the
graph, by reference: a write to the cache is a node like any other, and stays one.

What a node depends on is one of four things: nothing but constants, the positions alone, the ids,
or the state that the step writes to. Nodes of the first two kinds can be evaluated at will. So the
rewrites find out what a mask or a rotation means without knowing how a model writes it.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Step = Callable[..., Tensor]
Node = Any  # an fx.Node: what its arguments are, no type says

_FOLD_BYTES = 2**20  # of what is computed ahead; views of weights are free
_SAME_OR_COPY = {  # ops that return their argument when there is nothing to do
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.contiguous.default,
    aten.reshape.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
}

_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.contiguous.default,
}


def value_of(node: Node) -> Tensor:
    """The tensor of a get_attr node."""
    return getattr(node.graph.owning_module, str(node.target))


def constant(gm: fx.GraphModule, value: Tensor, name: str) -> Node:
    """A new node for a tensor, before all that computes."""
    count = 0
    while hasattr(gm, f"{name}_{count}"):
        count += 1
    gm.register_buffer(f"{name}_{count}", value.detach(), persistent=False)
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with gm.graph.inserting_before(first):
        node = gm.graph.get_attr(f"{name}_{count}")
    node.meta["val"] = value
    return node


def meta(node: object) -> Any:
    """Shape, strides and dtype of what a node returns, when it is one tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def is_op(node: object, *targets: object) -> bool:
    """Whether a node calls one of these ops."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def writes(node: Node) -> list[Node]:
    """The arguments that a node writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found: list[Node] = []
    for argument, value in [
        *zip(schema.arguments, node.args, strict=False),
        *((a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs),
    ]:
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [v for v in (value if isinstance(value, list) else [value])
                      if isinstance(v, fx.Node)]  # fmt: skip
    return found


def is_view(node: Node) -> bool:
    """Whether a node returns a view of its first argument."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.is_mutable or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    returns = schema.returns
    return alias is not None and len(returns) == 1 and returns[0].alias_info is not None


def root(node: Node) -> Node:
    """What a node is a view of, or writes to and returns."""
    while node.args and isinstance(node.args[0], fx.Node):
        if (
            not is_view(node)
            and not is_op(node, *_SAME_OR_COPY)
            and node.args[0] not in writes(node)
        ):
            break
        node = node.args[0]
    return node


def state_of(gm: fx.GraphModule) -> list[Tensor]:
    """The tensors of the graph that it writes to, and those that share their memory."""
    written = {root(w) for node in gm.graph.nodes for w in writes(node)}
    memory = {_memory(value_of(n)) for n in written if n.op == "get_attr"}
    return [
        value_of(n) for n in gm.graph.nodes if n.op == "get_attr" and _memory(value_of(n)) in memory
    ]


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


class Known:
    """What the nodes of a graph depend on, and the values of those that can be evaluated."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.positions = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
        state = {_memory(value) for value in state_of(gm)}
        self.state = state
        changed = {root(w) for node in gm.graph.nodes for w in writes(node)}
        self.of: dict[Node, frozenset[str]] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                depends = frozenset({"positions" if node is self.positions else "inputs"})
            elif node.op == "get_attr":
                depends = frozenset({"state"} if _memory(value_of(node)) in state else ())
            else:
                depends = frozenset().union(*(self.of[n] for n in node.all_input_nodes))
                if writes(node) or not _is_pure(node):
                    depends |= {"state"}
            if node in changed:
                depends |= {"state"}
            self.of[node] = depends

    def is_constant(self, node: object) -> bool:
        return isinstance(node, fx.Node) and not self.of.get(node, {"new"})

    def is_positional(self, node: object) -> bool:
        """Whether a node is a function of the positions, or a constant."""
        return isinstance(node, fx.Node) and self.of.get(node, {"new"}) <= {"positions"}

    def at(self, node: Node, positions: Tensor) -> Any:
        """The value of a positional node."""
        return evaluate(node, {self.positions: positions})


def _is_pure(node: Node) -> bool:
    if node.op != "call_function":
        return node.op == "output"
    if node.target is operator.getitem:
        return True
    tags = getattr(node.target, "tags", None)
    return tags is not None and torch.Tag.nondeterministic_seeded not in tags


def evaluate(node: Node, known: Mapping[Node, Any]) -> Any:
    """The value of a node, given those of some that it depends on.

    Raises:
        ValueError: it depends on an input that is not given, or on something that writes.
    """
    values = dict(known)
    pending = [node]
    while pending:
        last = pending[-1]
        if last in values:
            pending.pop()
        elif last.op == "get_attr":
            values[pending.pop()] = value_of(last)
        elif last.op != "call_function" or writes(last):
            raise ValueError(f"{last} cannot be evaluated")
        elif missing := [n for n in last.all_input_nodes if n not in values]:
            pending += missing
        else:
            args = fx.map_arg(last.args, values.__getitem__)
            kwargs = fx.map_arg(last.kwargs, values.__getitem__)
            values[pending.pop()] = last.target(*args, **kwargs)
    return values[node]


def clean(gm: fx.GraphModule) -> int:
    """Drop what changes nothing: conversions to the same dtype, views of the same shape, factors
    of 1, dropout that is off.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if not (node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node)):
            continue
        given, got = meta(node.args[0]), meta(node)
        if given is None or got is None or writes(node):
            continue
        same = given.shape == got.shape and given.stride() == got.stride()
        same = same and (given.dtype, given.device) == (got.dtype, got.device)
        nothing = is_view(node) or is_op(node, *_SAME_OR_COPY)
        if is_op(node, aten.mul.Tensor, aten.div.Tensor):
            nothing = isinstance(node.args[1], int | float) and node.args[1] == 1
        elif is_op(node, aten.dropout.default):
            nothing = node.args[1] == 0 or not node.args[2]
        if same and nothing:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            count += 1
    return count


def join_views(gm: fx.GraphModule) -> int:
    """One reshape for a chain of views that keeps the order of the numbers."""
    written = {root(w) for node in gm.graph.nodes for w in writes(node)}
    count = 0
    for node in reversed(list(gm.graph.nodes)):
        chain = _chain(node)
        if len(chain) < 2 or any(is_op(user, *_RESHAPES) for user in node.users):
            continue
        source, got = chain[-1].args[0], meta(node)
        given = meta(source)
        if given is None or got is None or given.numel() != got.numel() or root(node) in written:
            continue
        numbers = torch.arange(given.numel()).view(given.shape)
        if not torch.equal(evaluate(node, {source: numbers}).flatten(), numbers.flatten()):
            continue
        if given.shape == got.shape:
            joined = source
        else:
            with gm.graph.inserting_before(node):
                joined = gm.graph.call_function(aten.reshape.default, (source, list(got.shape)))
            joined.meta["val"] = given.reshape(got.shape)
        node.replace_all_uses_with(joined)
        count += 1
    gm.graph.eliminate_dead_code()
    return count


def _chain(node: Node) -> list[Node]:
    """A node and those before it that only reshape, the last first."""
    chain = []
    while is_op(node, *_RESHAPES):
        chain.append(node)
        node = node.args[0]
    return chain


def fold(gm: fx.GraphModule) -> int:
    """Compute ahead what depends on no input: views of any tensor, and small results."""
    known = Known(gm)
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not node.users or writes(node):
            continue
        inputs = node.all_input_nodes
        if any(n.op != "get_attr" for n in inputs):
            continue
        view = is_view(node) and len(inputs) == 1
        got = meta(node)
        if got is None or not (view or known.is_constant(node)):
            continue
        if not view and got.nbytes > _FOLD_BYTES:
            continue
        value = evaluate(node, {})
        if not isinstance(value, Tensor):
            continue
        folded = constant(gm, value, "folded")
        known.of[folded] = known.of[node]
        node.replace_all_uses_with(folded)
        gm.graph.erase_node(node)
        count += 1
    gm.graph.eliminate_dead_code()
    return count


def runner(gm: fx.GraphModule) -> Step:
    """The graph as one Python function of plain calls, its tensors and ops bound to names."""
    graph = gm.graph
    scope: dict[str, Any] = {"inf": float("inf"), "nan": float("nan"), "device": torch.device}
    scope["torch"] = torch
    ops: dict[object, str] = {}
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    names = {node: f"v{i}" for i, node in enumerate(graph.nodes)}
    inputs, lines = [], []
    for node in graph.nodes:
        if node.op == "placeholder":
            inputs.append(names[node])
        elif node.op == "get_attr":
            names[node] = f"t{len(scope)}"
            scope[names[node]] = value_of(node)
        elif node.op == "output":
            lines.append(f"return {_written(node.args[0], names)}")
        else:
            called = ops.setdefault(node.target, f"f{len(ops)}")
            scope[called] = getattr(node.target, "_op", node.target)
            given = [_written(a, names) for a in node.args]
            given += [f"{k}={_written(a, names)}" for k, a in node.kwargs.items()]
            lines.append(f"{names[node]} = {called}({', '.join(given)})")
            done = [names[n] for n in node.all_input_nodes if last[n] is node]
            done = [name for name in done if name.startswith("v")]
            if done:
                lines.append(f"del {', '.join(done)}")
    source = f"def run({', '.join(inputs)}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<step>", "exec"), scope)
    return scope["run"]


def _written(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        inner = ", ".join(_written(each, names) for each in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, torch.device):
        return f"device({str(value)!r})"
    return repr(value)
