"""Quantized checkpoints in models of Transformers."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig as StockBitsAndBytesConfig
from transformers.core_model_loading import WeightRenaming
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from salience.checkpoint import SafetensorsCheckpoint
from salience.conversion import ModelWeights, check_places
from salience.errors import SalienceError
from salience.formats import FORMATS, detect_format
from salience.hf.base import PackedQuantizer, no_weight, of_linear
from salience.linear import QuantEmbedding, QuantLinear
from salience.modules import bias_of, codable, weight_of


class StoredConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, kept as it is: what is saved has the same keys."""

    def __init__(self, **stored: Any) -> None:
        # A checkpoint may call a key as a method is called.
        vars(self).update({k: v for k, v in stored.items() if not hasattr(type(self), k)})
        # The first ones of bitsandbytes named no method.
        self.quant_method = QuantizationMethod(stored.get("quant_method", "bitsandbytes"))
        self._stored = copy.deepcopy(stored)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self._stored)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


# Transformers compares the names of classes when a config is passed to `from_pretrained` too.
class AwqConfig(StoredConfig):
    """Of an AWQ checkpoint."""


class GPTQConfig(StoredConfig):
    """Of a GPTQ checkpoint."""


class CompressedTensorsConfig(StoredConfig):
    """Of a compressed-tensors checkpoint."""


class BitsAndBytesConfig(StoredConfig, StockBitsAndBytesConfig):
    """Of a bitsandbytes checkpoint. Transformers wants an instance of its own class."""

    def __init__(self, **stored: Any) -> None:
        super().__init__(**stored)
        self._load_in_8bit = bool(stored.get("load_in_8bit"))
        self._load_in_4bit = not self._load_in_8bit


# Transformers' names of a method, and our config of it.
CONFIGS: dict[str, tuple[tuple[str, ...], type[StoredConfig]]] = {
    "awq": (("awq",), AwqConfig),
    "gptq": (("gptq",), GPTQConfig),
    "compressed-tensors": (("compressed-tensors",), CompressedTensorsConfig),
    "bitsandbytes": (("bitsandbytes_4bit", "bitsandbytes_8bit"), BitsAndBytesConfig),
}


class _Stored(nn.Module):
    """What a linear is while its tensors arrive: buffers of their names, shapes and dtypes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        for local, tensor in tensors.items():
            self.register_buffer(_buffer(local), tensor)
        if "weight" not in tensors:
            self.weight = no_weight()
        if "bias" not in tensors:
            self.bias = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Transformers marks what it has read; what it has not read, it makes up.
        if getattr(value, "_is_hf_initialized", False):
            self.loaded.add(name)
        super().__setattr__(name, value)


def _buffer(local: str) -> str:
    """The name of a buffer, which has no dots in it."""
    return local.replace(".", "_")


class StoredQuantizer(PackedQuantizer):
    """Reads a quantized checkpoint into a model of Transformers."""

    requires_calibration = True  # that is: of checkpoints only

    def get_weight_conversions(self) -> list[Any]:
        names = sorted({n for fmt in FORMATS for n in fmt.tensors if "." in n})
        return [WeightRenaming(re.escape(f".{n}") + "$", f".{_buffer(n)}") for n in names]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: object
    ) -> None:
        """Swap in modules that hold what the files hold.

        Raises:
            SalienceError: a config that is not read, or tensors that no module of the model takes.
        """
        if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
            raise SalienceError("a quantized checkpoint is read from .safetensors files only")
        config = self.quantization_config.to_dict()
        self._dtype = model.dtype
        self.files = [Path(file) for file in checkpoint_files]
        self.fmt = detect_format(config)
        files = SafetensorsCheckpoint(self.files[0].parent, self.files)
        weights = ModelWeights(files, model)
        check_places(model, weights)
        own = self.fmt.tensors - {"weight"}  # a float linear has one of that name too
        used: set[str] = set()
        self.packed, self._shapes = {}, {}
        for name, linear in codable(model).items():
            if not any(f"{name}.{local}" in weights.names() for local in own):
                continue
            with of_linear(name, weights.path):
                self.packed[name] = self.fmt.scheme(config, name)
            self._shapes[name] = tuple(weight_of(linear).shape)
            locals_ = [*self.fmt.tensors, *(["bias"] if bias_of(linear) is not None else [])]
            names = {local: f"{name}.{local}" for local in locals_}
            tensors = {
                local: torch.empty(
                    weights.shape(full),
                    dtype=files.dtype(*weights.stored_names(full)),
                    device="meta",
                )
                for local, full in names.items()
                if full in weights.names()
            }
            if "bias" in names and "bias" not in tensors:
                raise SalienceError(f"tensor {name}.bias is missing from {weights.path}")
            model.set_submodule(name, _Stored(tensors))
            used.update(names.values())
        endings = tuple(f".{local}" for local in own)
        orphans = {name for name in weights.names() - used if name.endswith(endings)}
        if orphans:
            raise SalienceError(
                f"tensor {min(orphans)} of {weights.path} belongs to no linear of "
                f"{type(model).__name__}: Transformers keeps experts as one float parameter a "
                "layer, and would leave it random"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: object) -> None:
        """Pack what was read for its device.

        Raises:
            SalienceError: tensors that were not read, or are no such weight.
        """
        for parameter in model.parameters():
            # Version 5.10 leaves what it renames, of a quantized checkpoint, in the stored dtype.
            if parameter.dtype in (torch.float16, torch.bfloat16) and not parameter.is_meta:
                parameter.data = parameter.data.to(self._dtype)
        folder = self.files[0].parent
        for name, scheme in self.packed.items():
            stored = model.get_submodule(name)
            missing = {n for n, _ in stored.named_buffers()} - stored.loaded
            if any(buffer.is_meta for buffer in stored.buffers()):
                raise SalienceError(
                    f"{name} is offloaded with its buffers, which is what packed weights "
                    "are; load it without offload_buffers"
                )
            if missing:
                raise SalienceError(f"Transformers did not read {name}.{min(missing)} of {folder}")
            buffers = dict(stored.named_buffers())
            tensors = {k: buffers[_buffer(k)] for k in self.fmt.tensors if _buffer(k) in buffers}
            with of_linear(name, folder):
                qt = self.fmt.read(tensors, scheme)
                if not torch.isfinite(qt.scales).all():
                    raise SalienceError("its scales are not finite")
            if tuple(qt.q.shape) != self._shapes[name]:
                raise SalienceError(
                    f"linear {name} of {folder} holds {list(qt.q.shape)}, "
                    f"the model wants {list(self._shapes[name])}"
                )
            if stored is model.get_input_embeddings():
                model.set_submodule(name, QuantEmbedding(qt, model.dtype))
            else:
                model.set_submodule(name, QuantLinear(qt, buffers.get("bias")))
        self.own_saving(model)
