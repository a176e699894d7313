"""What converting to or from GGUF needs beyond the codes: the model.

GGUF has names of its own, its llama has rows of q and k in another order, its norms are fp32, and
its header says what the model is. So here the model is made, on meta, and both sides are looked at
under the names that it has. Tensors that are quantized must be codes, scales and integer zeros;
those of other tools that are not are named and refused.

All comes back to the byte but Gemma's norms: llama.cpp multiplies by 1 + weight, and the fp32 sum
has no room for the last bit of weights below 2^-13.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.checkpoint import BLOCKS, Checkpoint, GgufCheckpoint, RenamedCheckpoint
from salience.containers import check_container
from salience.conversion import unplaced
from salience.errors import SalienceError
from salience.formats import Format, stored_config
from salience.source import Source, open_source
from salience.writer import FLOAT_DTYPES, holds

_FLOATS = ("F64", "F32", "F16", "BF16")
_ROPE = "rope_freqs.weight"  # made of the config, and made again of it


@dataclass(frozen=True, slots=True)
class Modelled:
    """A quantized checkpoint as its model sees it. Make one with `open_modelled`.

    Args:
        source: where it is.
        model: its skeleton.
        weights: its tensors under the names of that; blocks as "x.weight.blocks".
        config: what config.json says, or would.
        quantization: what that says of the quantization; None of a float model.
    """

    source: Source
    model: Any
    weights: Checkpoint
    config: dict[str, Any]
    quantization: dict[str, Any] | None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file, or a folder with one."""
        return isinstance(self.source.stored, GgufCheckpoint)

    def others(self, names: list[str], target: Format) -> list[str]:
        """Those of `names`, which are not quantized, that are to be in the other format.

        A GGUF file has a place for what the model has and nothing else: what the model would not
        look at is left out, as are a bias of zeros that some tools give each linear and a head that
        is the embeddings once more. `config` is told of one that is not.

        Raises:
            SalienceError: a tensor that has no place.
        """
        if target.container != "gguf":
            return names
        known = self.model.state_dict().keys()
        lost = unplaced(self.model, self.weights)
        placed = [name for name in names if name in known]
        for name in names:
            if name in lost and (not name.endswith(".bias") or self.weights.tensor(name).any()):
                raise SalienceError(
                    f"tensor {name} of {self.weights.path} has no place in a GGUF file: "
                    f"a {self.config.get('model_type')} has none of that name"
                )
        if self.config.get("tie_word_embeddings", self.source.config.tie_word_embeddings):
            head, rows = "lm_head.weight", "model.embed_tokens.weight"
            packed = any(name.startswith("lm_head.") for name in self.weights.names() - {head})
            twice = {head, rows} <= set(placed)
            if twice and torch.equal(self.weights.tensor(head), self.weights.tensor(rows)):
                placed.remove(head)
            elif packed or twice:
                self.config["tie_word_embeddings"] = False
        return placed

    def float_tensor(self, name: str) -> Tensor:
        """A tensor that is not quantized: as it is stored, of a GGUF file in its former dtype.

        That is the config's, if it holds the values, or else the narrowest that does.
        """
        tensor = self.weights.tensor(name)
        if not self.is_gguf:
            return tensor
        own = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        for dtype in (FLOAT_DTYPES.get(own, torch.float16), *FLOAT_DTYPES.values()):
            if holds(dtype, tensor):
                return tensor.to(dtype)
        return tensor


def open_modelled(path: Path, target: Format, trust_remote_code: bool) -> Modelled:
    """A checkpoint that is GGUF, or is to be.

    Raises:
        SalienceError: an architecture or tokenizer that GGUF has no words for, or quantized tensors
            of other tools that are no codes, scales and integer zeros.
    """
    source = open_source(str(path), trust_remote_code)
    check_container(target, source)
    model = source.skeleton()
    quantization = stored_config(source.config, source.stored)
    if not isinstance(source.stored, GgufCheckpoint):
        return Modelled(source, model, source.weights(model), source.config_values(), quantization)
    values = source.stored.config() if source.is_gguf else source.config_values()
    if values is None:  # of a file by another tool
        values = source.config_values() | {"architectures": [type(model).__name__]}
        values = {"dtype": "float16", **values}
    weights = source.weights(model, lookups=True)
    _check_exact(source.stored, weights, source.stored.config())
    if quantization is None and any(name.endswith(BLOCKS) for name in weights.names()):
        quantization = {"quant_method": "gguf"}
    return Modelled(source, model, weights, values, quantization)


def _check_exact(
    stored: GgufCheckpoint, weights: Checkpoint, own: Mapping[str, Any] | None
) -> None:
    """Refuse tensors that would be lost or rounded, the first by name."""
    renamed = weights.stored_names() if isinstance(weights, RenamedCheckpoint) else {}
    placed = set(renamed.values())
    for name in sorted(stored.names()):
        kind = stored.kind(name)
        what = f"tensor {name} of {stored.path}"
        if name == _ROPE and own is None:
            raise SalienceError(
                f"{what} stretches the positions, which no key of the file says how; "
                "convert the model's own checkpoint"
            )
        if name != _ROPE and name not in placed:
            raise SalienceError(f"{what} is none that Transformers has a name for")
        if kind not in _FLOATS and f"{name}{BLOCKS}" not in placed:
            raise SalienceError(
                f"{what} is {kind} and not codes, scales and whole zeros, which Q4_0, Q8_0 and "
                "salience's own Q4_1 are; make codes of the model by salience quantize"
            )
