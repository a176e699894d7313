"""A model in two parts: what makes hidden states, and what makes logits of them.

Logits are as wide as the vocabulary, a hundred times wider than hidden states: those of one text do
not fit in memory, and hardly those of one chunk. So hidden states are made of a whole chunk, and
logits of a few rows of it at a time; hidden states of a reference model can be kept on the disk.

Between the last hidden states and the logits there is more than a matrix: Gemma caps, Cohere and
Granite scale, others have one more layer. None of it is named here. The second part is the model
itself, by a copy of the modules on the way to the decoder, in whose place a stub returns hidden
states. Whether it gives the same logits is tried on a few tokens; a model where it does not is run
whole.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from salience.placement import input_device

_PROBE_TOKENS = 16
_EQUAL = 1e-5  # of the largest logit: products of other sizes add in another order


@dataclass(frozen=True, slots=True)
class Parts:
    """Makes hidden states of chunks, and logits of their rows. Made by `take_apart`.

    Args:
        first: the model; None where only the second part is left.
        decoder: its module whose outputs are the hidden states.
        second: the model with a stub for the decoder; None for a model that is run whole, whose
            logits take the place of hidden states.
        device: where tokens and hidden states enter.
        width: of the logits.
    """

    first: Any
    decoder: str
    second: Any
    device: torch.device
    width: int

    @torch.no_grad()
    def hidden(self, chunk: Tensor) -> Tensor:
        """What the decoder returns for tokens [n]: [n, hidden], as it is computed."""
        ids = chunk[None].to(self.device)
        if self.second is None:
            return self.first(input_ids=ids, use_cache=False).logits[0]
        return _stopped(self.first, self.decoder, ids).last_hidden_state[0]

    @torch.no_grad()
    def logits(self, chunk: Tensor, hidden: Tensor) -> Tensor:
        """Logits of a few rows, fp32 [rows, vocabulary].

        Args:
            chunk: their tokens, [rows].
            hidden: of `hidden`, [rows, hidden].
        """
        if self.second is None:
            return hidden.float()
        self.second.get_submodule(self.decoder).forward.hidden = hidden[None].to(self.device)
        ids = chunk[None].to(self.device)
        return self.second(input_ids=ids, use_cache=False).logits[0].float()

    def to(self, device: torch.device) -> "Parts":
        """The same parts elsewhere; the modules are moved, not copied."""
        for module in (self.first, self.second):
            if isinstance(module, nn.Module):
                module.to(device)
        return replace(self, device=device)

    def without_first(self) -> "Parts":
        """The second part alone: what the decoder takes is free when the model is."""
        return self if self.second is None else replace(self, first=None)


@torch.no_grad()
def take_apart(model: Any, tokens: Tensor) -> Parts:
    """Find the decoder of a model, and try the two parts on some tokens.

    Args:
        model: a Transformers causal language model, on its devices.
        tokens: some tokens it may meet, [n].
    """
    device = input_device(model)
    ids = tokens[None, :_PROBE_TOKENS].to(device)
    name, output, logits = _probe(model, ids)
    whole = Parts(model, "", None, device, logits.shape[-1])
    if output is None:
        return whole
    stub = _stub(model.get_submodule(name), type(output))
    parts = replace(whole, decoder=name, second=_replaced(model, name, stub))
    half = ids.shape[1] // 2
    try:
        found = parts.logits(ids[0, half:], output.last_hidden_state[0, half:])
    except AttributeError:  # it asks the decoder for a module
        return whole
    expected = logits[0, half:].float()
    if found.shape != expected.shape:
        return whole
    return parts if (found - expected).abs().max() <= _EQUAL * expected.abs().max() else whole


class _Stub:
    """What a decoder's stub does when it is called: it returns what was put here."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.hidden: Tensor | None = None

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.kind(last_hidden_state=self.hidden)


def _stub(decoder: nn.Module, kind: type) -> nn.Module:
    """A decoder without its modules; numbers that belong to it, models may ask it for."""
    stub = copy.copy(decoder)
    stub._modules, stub._parameters, stub._buffers = {}, {}, {}
    vars(stub).pop("_hf_hook", None)
    stub.forward = _Stub(kind)
    return stub


def _probe(model: Any, ids: Tensor) -> tuple[str, Any, Tensor]:
    """The outermost module that returns last hidden states, what it returns, and the logits."""
    if not isinstance(model, nn.Module):
        return "", None, model(input_ids=ids, use_cache=False).logits
    outputs: dict[str, Any] = {}

    def listen(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda _, __, output: outputs.update({name: output}))

    handles = [listen(name, module) for name, module in model.named_modules() if name]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    for name, _ in model.named_modules():  # from the outside in
        hidden = getattr(outputs.get(name), "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.shape[:2] == ids.shape:
            return name, outputs[name], logits
    return "", None, logits


class _StopForwardError(Exception):
    """Unwinds the model's forward when the decoder is done."""


def _stopped(model: Any, decoder: str, ids: Tensor) -> Any:
    """What the decoder returns, when the model is called with tokens."""
    outputs = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)
        raise _StopForwardError

    handle = model.get_submodule(decoder).register_forward_hook(stop)
    try:
        model(input_ids=ids, use_cache=False)
    except _StopForwardError:
        pass
    finally:
        handle.remove()
    return outputs[0]


def _replaced(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """A model with another module at `name`; all but those on the way to it are shared."""
    child, _, rest = name.partition(".")
    light = copy.copy(model)
    if hasattr(light, "_hf_hook"):
        vars(light).pop("forward", None)  # a hook's, which calls the old model
    light._modules = dict(model._modules)
    light._modules[child] = _replaced(getattr(model, child), rest, new) if rest else new
    return light
