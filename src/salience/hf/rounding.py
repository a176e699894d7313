"""Float checkpoints, rounded to nearest while Transformers reads them."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from salience import grid
from salience.checkpoint import SafetensorsCheckpoint
from salience.conversion import ModelWeights, check_places, stored_owner
from salience.errors import SalienceError
from salience.formats import get_format
from salience.hf.base import PackedQuantizer, of_linear
from salience.hf.stored import CONFIGS
from salience.linear import QuantLinear
from salience.modules import bias_of, find_blocks, kept, linears, weight_of
from salience.scheme import Scheme


class _Method(str, Enum):
    SALIENCE = "salience"


@register_quantization_config(_Method.SALIENCE.value)
class SalienceConfig(QuantizationConfigMixin):
    """Round the linears of a float checkpoint to nearest while they are read.

    Head, embeddings, routers and experts stay float.

    Args:
        scheme: as on the command line: "nf4", "nf4-dq", "w4g128", "w8channel", "w4g64-sym", ...
        modules_to_not_convert: names of modules that stay float, with all that is below them.
        format: what `save_pretrained` writes; None is bitsandbytes for nf4, else
            compressed-tensors.

    Raises:
        SalienceError: a scheme that there is not, or that the format cannot hold.
    """

    def __init__(
        self,
        scheme: str = "w4g128",
        modules_to_not_convert: Sequence[str] | None = None,
        format: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = _Method.SALIENCE
        parsed = Scheme.parse(scheme)
        self.scheme = scheme
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.format = format or ("bitsandbytes" if parsed.codebook else "compressed-tensors")
        get_format(self.format).check({"any linear": parsed}, {"any linear": (64, 4096)})


@register_quantizer(_Method.SALIENCE.value)
class RoundingQuantizer(PackedQuantizer):
    """Rounds a float checkpoint to nearest while Transformers reads it."""

    gpu: torch.device | None = None  # one of the device map's, if it has any

    def validate_environment(self, *args: object, device_map: Any = None, **kwargs: object) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise SalienceError(
                "a model that is quantized while it loads cannot be offloaded to disk; quantize "
                "it with `salience quantize` first"
            )
        devices = [torch.device("cuda", p) if isinstance(p, int) else p for p in places]
        self.gpu = next((torch.device(d) for d in devices if str(d).startswith("cuda")), None)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: object
    ) -> None:
        config: Any = self.quantization_config
        self.files = []  # what is saved is not in them
        self.fmt = get_format(config.format)
        scheme = Scheme.parse(config.scheme)
        prefix, blocks = find_blocks(model)
        floats = config.modules_to_not_convert
        names = {
            f"{prefix}.{name}"
            for name in linears(blocks)
            if not any(f".{other}." in f".{prefix}.{name}." for other in floats)
        }
        self.packed = dict.fromkeys(sorted(names), scheme)
        shapes: dict[str, tuple[int, int]] = {}
        for name in sorted(names):
            rows, columns = weight_of(model.get_submodule(name)).shape
            shapes[name] = (rows, columns)
            with of_linear(name, model.config.name_or_path):
                scheme.groups(columns)
        self.fmt.check(self.packed, shapes)
        self._kept = [n for n in (*kept(model), *linears(model)) if n not in names]
        if checkpoint_files and str(checkpoint_files[0]).endswith(".safetensors"):
            files = [Path(file) for file in checkpoint_files]
            weights = ModelWeights(SafetensorsCheckpoint(files[0].parent, files), model)
            check_places(model, weights)
            self._kept += [stored_owner(weights, name) for name in self._kept]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: object) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and owner in self.packed

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        return self.packed[param_name.rpartition(".")[0]].bits_per_weight(param.shape[-1]) / 8

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: object) -> None:
        for name in self.packed:
            linear = model.get_submodule(name)
            if not isinstance(linear, QuantLinear):
                raise SalienceError(f"tensor {name}.weight is missing from the checkpoint")
        method = self.fmt.config(self.packed, list(dict.fromkeys(self._kept)))
        _, ours = CONFIGS[method["quant_method"]]
        model.config.quantization_config = ours(**method)
        self.own_saving(model)


class _Round(ConversionOps):
    """The step of loading that makes a QuantLinear of a linear whose weight has arrived."""

    def __init__(self, quantizer: RoundingQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        for full, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if weight.device.type == "cpu" and self._quantizer.gpu is not None:
                # It will run on a GPU: hooks bring it there, as it is packed.
                weight = weight.to(self._quantizer.gpu)
            name = full.rpartition(".")[0]
            linear = model.get_submodule(name)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            with of_linear(name, model.config.name_or_path):
                qt = grid.quantize(weight_of(linear), self._quantizer.packed[name])
            bias = bias_of(linear)
            packed = QuantLinear(qt, None if bias is None else bias.detach(), dtype=weight.dtype)
            model.set_submodule(name, packed)
            if missing_keys is not None:
                missing_keys.discard(full)
        return {}
