"""A checkpoint's tensors under the names of the model, and back.

Transformers 5 renames tensors while it loads them, stacks the experts of a layer into one
parameter, and splits fused projections. Its own rules are used here, one parameter at a time: what
is in memory is the parameter asked for. What is written goes back under the names it was stored
by, which every runtime knows.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from salience.checkpoint import Checkpoint
from salience.errors import SalienceError


@dataclass(slots=True)
class _Origin:
    """Where a parameter comes from: stored names, each with the pattern that took it.

    `converter` makes the parameter out of them, None when it is one tensor as it is stored.
    """

    converter: Any = None
    stored: list[tuple[str, str]] = field(default_factory=list)


class ModelWeights:
    """A checkpoint under the names of a model.

    The packed tensors of a quantized linear ("q_proj.qweight") are renamed as its weight would be.

    Args:
        inner: the tensors as stored.
        model: the Transformers model, its parameters may be on meta.
    """

    def __init__(self, inner: Checkpoint, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        self.path = inner.path
        self._inner = inner
        self._model = model
        self._like = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self._converters: list[Any] = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings: list[Any] = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._by_pattern = {p: t for t in self._converters for p in t.source_patterns}
        self._origins: dict[str, _Origin] = {}
        for stored in sorted(inner.names(), key=dot_natural_key):
            name, pattern = self._renamed(stored)
            if pattern is None:
                self._origins[name] = _Origin(None, [(stored, stored)])
                continue
            origin = self._origins.setdefault(name, _Origin(self._by_pattern[pattern]))
            origin.stored.append((stored, pattern))
        self._name_split_targets()
        self._name_tied()

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        """The model's name of a stored tensor, and the converter's pattern that takes it."""
        from transformers.core_model_loading import rename_source_key

        prefix = str(getattr(self._model, "base_model_prefix", ""))
        name, pattern = rename_source_key(
            stored, self._renamings, self._converters, prefix, self._like
        )
        if name in self._like:
            return name, pattern
        plain, _ = rename_source_key(stored, [], [], prefix, self._like)
        if plain in self._like:
            return plain, None
        owner, _, leaf = stored.rpartition(".")
        if leaf != "weight":
            name, pattern = rename_source_key(
                f"{owner}.weight", self._renamings, self._converters, prefix, self._like
            )
            if name in self._like and pattern is None:
                return f"{name.rpartition('.')[0]}.{leaf}", None
        return stored, None

    def _name_split_targets(self) -> None:
        """One stored tensor may hold several parameters: give each of them that origin."""
        for name, origin in list(self._origins.items()):
            targets = origin.converter.target_patterns if origin.converter is not None else []
            first = next((t for t in targets if t in name), "")
            for target in targets if first else []:
                self._origins.setdefault(name.replace(first, target), origin)

    def _name_tied(self) -> None:
        """A parameter that is stored by the name of another it is tied to."""
        names: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for tied in names.values():
            stored = next((name for name in tied if name in self._origins), None)
            if stored is not None:
                self._origins.setdefault(tied[0], self._origins[stored])

    def names(self) -> set[str]:
        return set(self._origins)

    def shape(self, name: str) -> tuple[int, ...]:
        origin = self._origin(name)
        if origin.converter is None:
            return self._inner.shape(origin.stored[0][0])
        return tuple(self._like[name].shape)

    def nbytes(self, name: str) -> int:
        origin = self._origin(name)
        total = sum(self._inner.nbytes(stored) for stored, _ in origin.stored)
        return total // (1 if origin.converter is None else self._shares(origin))

    def tensor(self, name: str) -> Tensor:
        origin = self._origin(name)
        if origin.converter is None:
            return self._inner.tensor(origin.stored[0][0])
        converter = deepcopy(origin.converter)
        first = next(other for other, found in self._origins.items() if found is origin)
        for stored, pattern in origin.stored:
            converter.add_tensor(first, stored, pattern, self._inner.tensor(stored))
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError) as error:
            raise SalienceError(f"tensor {name} of {self.path} cannot be made: {error}") from None
        tensor = made.get(name)
        if tensor is None:
            raise SalienceError(f"tensor {name} is missing from {self.path}")
        return tensor[0] if isinstance(tensor, list) else tensor

    def stored_names(self, name: str) -> list[str]:
        """The names of the tensors that hold `name` and nothing else; none if there are no such."""
        origin = self._origins.get(name, _Origin())
        shared = origin.converter is not None and self._shares(origin) > 1
        return [] if shared else [stored for stored, _ in origin.stored]

    def is_as_stored(self, name: str) -> bool:
        """Whether a tensor is one of the stored ones, with nothing made of it."""
        return name in self._origins and self._origins[name].converter is None

    def _shares(self, origin: _Origin) -> int:
        return sum(other is origin for other in self._origins.values())

    def _origin(self, name: str) -> _Origin:
        if name not in self._origins:
            raise SalienceError(f"tensor {name} is missing from {self.path}")
        return self._origins[name]


def unplaced(model: Any, weights: Checkpoint) -> set[str]:
    """The stored tensors that no parameter or buffer takes, but for those the model passes over."""
    passed = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = weights.names() - model.state_dict().keys()
    return {name for name in extra if not any(re.search(each, name) for each in passed)}


def check_places(model: Any, weights: Checkpoint) -> None:
    """Refuse a stored weight or bias that the model would silently do without.

    Args:
        model: the Transformers model, with no packed linear yet.
        weights: its tensors under its names.

    Raises:
        SalienceError: a module of the model has no place for one that is not all zeros.
    """
    leaves = {name for name, part in model.named_modules() if not [*part.children()]}
    for name in sorted(unplaced(model, weights)):
        owner, _, leaf = name.rpartition(".")
        # Some tools store a bias of zeros for every linear.
        if owner in leaves and leaf in ("weight", "bias") and weights.tensor(name).any():
            raise SalienceError(
                f"tensor {name} of {weights.path} has no place: the model's {owner} has no {leaf}; "
                "config.json does not fit the weights"
            )


def stored_tensors(model: Any, weights: Checkpoint, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter under the names, and in the layout, in which its source stores it.

    Args:
        model: the Transformers model.
        weights: its source, as `Source.weights` gives it.
        name: of the parameter or buffer in the model.
        tensor: its value, which may be on meta.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(weights, ModelWeights):
        return {name: tensor}
    names = weights.stored_names(name)
    if not names:
        return {name: tensor}  # what is stored holds more than it
    if weights.is_as_stored(name):
        return {names[0]: tensor}
    reverted: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return reverted if set(reverted) == set(names) else {name: tensor}


def stored_module(model: Any, weights: Checkpoint, name: str) -> str:
    """The name under which the source keeps a linear: what its packed tensors are written by."""
    like = torch.empty_like(model.get_submodule(name).get_parameter("weight"), device="meta")
    stored = list(stored_tensors(model, weights, f"{name}.weight", like))
    only = stored[0] if len(stored) == 1 else ""
    return only.removesuffix(".weight") if only.endswith(".weight") else name


def stored_owner(weights: Checkpoint, name: str) -> str:
    """What the source calls a module or parameter of the model: what its tensors' names begin with.

    Transformers calls Mixtral's router `mlp.gate`; its checkpoints, and other runtimes, call it
    `block_sparse_moe.gate`.
    """
    if not isinstance(weights, ModelWeights):
        return name
    paths = [
        stored.split(".")[:-1]
        for other in weights.names()
        if other == name or other.startswith(f"{name}.")
        for stored in weights.stored_names(other)
    ]
    alike = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in alike) or name
