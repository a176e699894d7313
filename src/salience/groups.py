"""Which modules of a block are called with what: linears that read the same tensor are a group.

q, k and v, or gate and up, receive the very same tensor and so must share the scale of their
inputs. It is the memory that is compared, not the values: a view of all tokens in one row, as a
mixture of experts makes it, is the same tensor, an equal copy is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from salience.errors import SalienceError
from salience.modules import linears

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module, its first tensor and what it returned."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str
    out: Any

    @property
    def x(self) -> Tensor:
        return self.args[self.key] if isinstance(self.key, int) else self.kwargs[self.key]

    def again(self, module: nn.Module, x: Tensor) -> Any:
        """What the module returns for another first tensor."""
        if isinstance(self.key, int):
            args = (*self.args[: self.key], x, *self.args[self.key + 1 :])
            return module(*args, **self.kwargs)
        return module(*self.args, **{**self.kwargs, self.key: x})


def sink_groups(block: nn.Module, run: Run) -> list[tuple[str, ...]]:
    """Linears of `block` that received the same tensor, in the order they were called.

    Raises:
        SalienceError: a linear that was not called, so nothing is known of its input.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    found = linears(block)
    for call in calls_of(block, run):
        if call.name in found:
            x = call.x
            # A view of all tokens in one row is the same tensor.
            layout = () if x.is_contiguous() else (tuple(x.shape), x.stride())
            key = (x.data_ptr(), x.numel(), x.shape[-1], *layout)
            groups.setdefault(key, []).append(call.name)
    missing = set(found) - {name for group in groups.values() for name in group}
    if missing:
        raise SalienceError(f"linear {min(missing)} was not reached by the calibration text")
    # A linear that is called twice is in the group of its first call.
    seen: set[str] = set()
    result = []
    for group in groups.values():
        names = tuple(name for name in dict.fromkeys(group) if name not in seen)
        seen.update(names)
        if names:
            result.append(names)
    return result


def calls_of(block: nn.Module, run: Run) -> list[Call]:
    """The calls of all modules below the block that get a tensor, in the order they returned."""
    calls: list[Call] = []
    handles = []
    for name, module in block.named_modules():
        # Of modules that hold others, only those with parameters of their own compute something.
        inner = next(module.children(), None) is not None
        if not name or (inner and next(module.parameters(recurse=False), None) is None):
            continue

        def hook(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            out: Any,
            name: str = name,
        ) -> None:
            keys: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            for key, value in keys:
                if isinstance(value, Tensor):
                    calls.append(Call(name, args, kwargs, key, out))
                    return

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls
