"""The ATen graph of one call of a step, written down while it runs.

PyTorch takes composite ops apart on their way to the device: a linear becomes a transpose and a
product, attention a dozen ops. What is recorded here is what was called before that, at the
dispatch key `PreDispatch`, so a linear, an attention and an activation are one node each. It is
what `make_fx(pre_dispatch=True)` records, at a tenth of its time: the step runs on real tensors,
and nothing is kept of a result but its shape, strides, dtype and device.

Tensors that the step did not make itself, of the model and of its cache, are attributes of the
graph, by reference: a write to the cache is a node like any other.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

# Their results have as many elements as the values of their input say.
_BY_VALUE = (aten.nonzero.default, aten.nonzero_numpy.default, aten.masked_select.default,
             aten.where.default)  # fmt: skip


def capture(step: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of one call of a step. Autograd must be off.

    Raises:
        RuntimeError: control flow that depends on values.
    """
    recorder = _Recorder(inputs)
    with enable_python_dispatcher(), recorder:
        out = step(*inputs)
    return recorder.finish(out)


class _Recorder(SchemaCheckMode):  # the plainest of the modes that may stand at `PreDispatch`
    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        # Weak: a step makes more than fits into memory at once.
        self.nodes: Any = WeakTensorKeyDictionary()
        self.varying: set[fx.Node] = set()  # whose values another call may change
        self.fakes = FakeTensorMode()
        self.kinds: dict[object, Tensor] = {}
        for i, tensor in enumerate(inputs):
            node = self.graph.placeholder(f"input_{i}")
            self.last_input = self.nodes[tensor] = node
            node.meta["val"] = self.kind(tensor)
            self.varying.add(node)

    def __enter__(self) -> "_Recorder":
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten.lift_fresh.default:  # of a constant, which a write must not change
            func = aten.lift_fresh_copy.default
        node_args = map_aggregate(args, self.noted)
        node_kwargs = map_aggregate(kwargs, self.noted)
        out = func(*args, **kwargs)
        varies = any(n in self.varying for n in _nodes((node_args, node_kwargs)))
        if not isinstance(out, Tensor | tuple | list | None):
            if varies:
                raise RuntimeError(f"control flow depends on values, by {func}")
            return out
        if varies and func in _BY_VALUE and (func is not aten.where.default or len(args) == 1):
            raise RuntimeError(f"shapes depend on values, by {func}")
        node = self.graph.call_function(func, node_args, node_kwargs)
        if varies:
            self.varying.add(node)
        self.note(node, out)
        return out

    def noted(self, value: Any) -> Any:
        """The node of a tensor; what is no tensor as it is."""
        if not isinstance(value, Tensor):
            return value
        node = self.nodes.get(value)
        if node is None:
            name = f"tensor_{len(self.tensors)}"
            self.tensors[name] = value
            node = self.graph.create_node("get_attr", name)
            node.meta["val"] = value
            self.last_input.append(node)
            self.last_input = self.nodes[value] = node
        return node

    def note(self, node: fx.Node, out: Any) -> None:
        """Remember that a node made a tensor, or some of them."""
        if isinstance(out, Tensor):
            self.nodes[out] = node
            node.meta["val"] = self.kind(out)
        if not isinstance(out, tuple | list):
            return
        parts = []
        for i, each in enumerate(out):
            part = self.graph.call_function(operator.getitem, (node, i))
            if node in self.varying:
                self.varying.add(part)
            self.note(part, each)
            parts.append(part.meta.get("val"))
        node.meta["val"] = tuple(parts)

    def kind(self, value: Tensor) -> Tensor:
        """A tensor like this one that holds no values, one for all that are alike."""
        key = (value.shape, value.stride(), value.dtype, value.device)
        if key not in self.kinds:
            with self.fakes:
                self.kinds[key] = torch.empty_strided(
                    key[0], key[1], dtype=value.dtype, device=value.device
                )
        return self.kinds[key]

    def finish(self, out: Tensor) -> fx.GraphModule:
        """The graph, which returns `out`."""
        self.graph.output(self.nodes[out])
        root = torch.nn.Module()
        for name, tensor in self.tensors.items():
            root.register_buffer(name, tensor, persistent=False)
        return fx.GraphModule(root, self.graph)


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _nodes(each)
    elif isinstance(value, dict):
        yield from _nodes(tuple(value.values()))
