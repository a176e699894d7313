"""What reading a quantized checkpoint and quantizing while reading have in common: saving."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from salience.checkpoint import SafetensorsCheckpoint
from salience.conversion import ModelWeights
from salience.errors import SalienceError
from salience.formats import FORMATS
from salience.linear import QuantEmbedding, QuantLinear
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.writer import write_json


class PackedQuantizer(HfQuantizer):
    """A model whose packed linears are saved by a format.

    `fmt` is a format, or one that is only read; `packed` has the names of these modules, `files`
    those of the checkpoint they came from, if it was quantized.
    """

    fmt: Any
    packed: dict[str, Scheme]
    files: list[Path]

    def is_serializable(self, *args: object) -> bool:
        return self.fmt in FORMATS

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def own_saving(self, model: Any) -> None:
        """Give a model the `save_pretrained` of packed ones.

        Transformers tells a quantizer of no folder, and of a refusal only to look at the log.
        """
        model.save_pretrained = MethodType(save_pretrained, model)

    def get_state_dict_and_metadata(self, model: Any, *args: object) -> tuple[Any, dict[str, str]]:
        """All tensors under the names of the format. Those that are still in the files they came
        from and mean the same are taken from there: some tools write what others would not.
        """
        state = model.state_dict()
        there = bool(self.files) and all(file.is_file() for file in self.files)
        weights = self._weights(model) if there else None
        for name, scheme in self.packed.items():
            module = model.get_submodule(name)
            if not isinstance(module, QuantLinear | QuantEmbedding):
                continue  # wrapped by an adapter, which is saved alone
            for local in module.state_dict():
                if local != "bias":
                    del state[f"{name}.{local}"]
            qt = module.qtensor()
            tensors = self._as_stored(weights, name, scheme, qt) or self._written(name, scheme, qt)
            state |= {f"{name}.{local}": tensor for local, tensor in tensors.items()}
        return state, {}

    def _as_stored(
        self, weights: ModelWeights | None, name: str, scheme: Scheme, qt: QTensor
    ) -> dict[str, Tensor]:
        names = {local: f"{name}.{local}" for local in self.fmt.tensors}
        if weights is None or f"{name}.{self.fmt.marker}" not in weights.names():
            return {}
        # Copies: the files may be what is written next.
        tensors = {k: weights.tensor(v).clone() for k, v in names.items() if v in weights.names()}
        try:
            same = _equal(self.fmt.read(tensors, scheme), qt)
        except (SalienceError, RuntimeError):
            return {}  # another file by now
        return tensors if same else {}

    def _written(self, name: str, scheme: Scheme, qt: QTensor) -> dict[str, Tensor]:
        """The tensors of a weight.

        Raises:
            SalienceError: they would mean something else to who reads them by the config.
        """
        tensors = self.fmt.write(qt)
        if not _equal(self.fmt.read(tensors, scheme), qt):
            raise SalienceError(
                f"linear {name} can only be saved as it was stored, and the files it came from "
                "are gone; put them back, or write the model with `salience convert`"
            )
        return tensors

    def _weights(self, model: Any) -> ModelWeights:
        return ModelWeights(SafetensorsCheckpoint(self.files[0].parent, self.files), model)


def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of the model's class, and the file beside `config.json` in which some
    readers of the format look for the same config.

    Raises:
        SalienceError: a layout that is only read.
    """
    quantizer = model.hf_quantizer
    adapter = getattr(model, "_hf_peft_config_loaded", False)  # which is saved alone
    if not adapter and quantizer.fmt not in FORMATS:
        raise SalienceError(
            f"the layout {quantizer.fmt.name} is read, not written; make an awq checkpoint of it: "
            f"`salience convert {quantizer.files[0].parent} --format awq -o FOLDER`"
        )
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if not adapter and quantizer.fmt.config_file and kwargs.get("is_main_process", True):
        stored = model.config.quantization_config.to_dict()
        write_json(Path(save_directory) / quantizer.fmt.config_file, stored)


def _equal(a: QTensor, b: QTensor) -> bool:
    """Whether two weights are the same, though one may have its scales in a wider dtype."""
    if a.scheme != b.scheme or a.q.shape != b.q.shape or (a.g_idx is None) != (b.g_idx is None):
        return False
    parts = [(a.q, b.q), (a.scales, b.scales), (a.zeros, b.zeros)]
    if a.g_idx is not None and b.g_idx is not None:
        parts.append((a.g_idx, b.g_idx))
    return all(bool((x.cpu() == y.cpu()).all()) for x, y in parts)


def no_weight() -> Tensor:
    """What some models look for, in their linears, to initialize: nothing, and that is done."""
    weight = torch.empty(0)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


@contextmanager
def of_linear(name: str, where: object) -> Iterator[None]:
    """Name the linear in what a format or a kernel says of it."""
    try:
        yield
    except (SalienceError, RuntimeError) as error:
        raise SalienceError(f"linear {name} of {where}: {error}") from None
