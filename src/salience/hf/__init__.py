"""Transformers, with `QuantLinear` where it would ask for other packages.

    import salience.hf

    salience.hf.enable()
    model = AutoModelForCausalLM.from_pretrained("folder-awq")

Transformers reads AWQ and GPTQ checkpoints with gptqmodel and optimum, and stops without them.
`enable` puts readers of ours into its two tables, of configs and of quantizers, and `disable` takes
them out. While a model loads, each linear that owns packed tensors by the headers of the files
becomes a module of these very tensors; when they have arrived, a `QuantLinear`. No name in a list
of exceptions is looked at, so none can be misread. `save_pretrained` writes the tensors as they
were, or refuses: AutoAWQ's layouts other than gemm are only read.

A float checkpoint is rounded to nearest as it is read with

    from_pretrained("folder", quantization_config=salience.hf.SalienceConfig("nf4"))

a linear at a time, so that the model never exists as floats. It looks at no text: quick, and worse
than `salience.quantize`. What it saves is a checkpoint in a standard format.

A model lies where `from_pretrained` puts any other: on the CPU, unless `device_map="cuda"` or
"auto" says otherwise (Transformers' own readers of AWQ and GPTQ do the same; that of bitsandbytes
takes the GPU by itself). `model.to("cuda")` packs the weights anew for the GPU. Of a map with
"cpu" or "disk" beside a GPU, packed weights stay on the GPU that runs them and only float ones are
brought there each time: what is larger than the GPU is for `salience.load`, which loads on the GPU
if there is one.

The seams of Transformers used here are private. `benchmarks/hf_versions.py` runs the tests of this
file with each version that is supported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from salience.errors import SalienceError
from salience.hf.rounding import SalienceConfig
from salience.hf.stored import CONFIGS, StoredConfig, StoredQuantizer

__all__ = ["SalienceConfig", "disable", "enable"]


@dataclass(frozen=True)
class _Configs:
    """Stands where Transformers has the class `stock`, to make our config of a checkpoint's."""

    stock: Any
    ours: type[StoredConfig]

    def from_dict(self, stored: Mapping[str, Any], **options: Any) -> Any:
        return self.ours.from_dict(dict(stored), **options)


@dataclass(frozen=True)
class _Quantizers:
    """Stands where Transformers has the class `stock`, which still makes what is not stored yet:
    a float model that is quantized while it loads.
    """

    stock: Any

    def __call__(self, config: Any, **options: Any) -> HfQuantizer:
        make = StoredQuantizer if isinstance(config, StoredConfig) else self.stock
        return make(config, **options)


def enable(formats: Sequence[str] = ("awq", "gptq")) -> None:
    """Let `from_pretrained` read these formats with the kernels of this package.

    Args:
        formats: "awq", "gptq", "compressed-tensors", "bitsandbytes".

    Raises:
        SalienceError: another name.
    """
    for name in formats:
        if name not in CONFIGS:
            raise SalienceError(f"there is no format {name!r}; use {' or '.join(CONFIGS)}")
    for name in formats:
        keys, ours = CONFIGS[name]
        for key in keys:
            config, quantizer = AUTO_QUANTIZATION_CONFIG_MAPPING[key], AUTO_QUANTIZER_MAPPING[key]
            if not isinstance(config, _Configs):
                made: Any = _Configs(config, ours)
                AUTO_QUANTIZATION_CONFIG_MAPPING[key] = made
            if not isinstance(quantizer, _Quantizers):
                made = _Quantizers(quantizer)
                AUTO_QUANTIZER_MAPPING[key] = made


def disable() -> None:
    """Undo `enable`, of every format."""
    for key in (key for keys, _ in CONFIGS.values() for key in keys):
        config, quantizer = AUTO_QUANTIZATION_CONFIG_MAPPING[key], AUTO_QUANTIZER_MAPPING[key]
        if isinstance(config, _Configs):
            AUTO_QUANTIZATION_CONFIG_MAPPING[key] = config.stock
        if isinstance(quantizer, _Quantizers):
            AUTO_QUANTIZER_MAPPING[key] = quantizer.stock
