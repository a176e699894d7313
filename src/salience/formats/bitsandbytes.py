"""bitsandbytes NF4: what QLoRA's tools, Transformers and vLLM call `bitsandbytes` in 4 bits.

Of a linear with N outputs and K inputs, in blocks of 64 along each row:

    weight                   uint8 [N K / 2, 1]    codes by rows, two a byte, the first one high
    weight.absmax            fp32 [N K / 64]       scales; uint8 codes of them when nested
    weight.quant_map         fp32 [16]             the table
    weight.nested_absmax     fp32 [N K / 64 / 256] scales of the scales, when nested
    weight.nested_quant_map  fp32 [256]            their table
    weight.quant_state.bitsandbytes__nf4           shape and so on: the bytes of a JSON object

bitsandbytes cuts blocks from the flattened weight; where 64 does not divide K they would cross
rows, and such weights are refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.codebook import table
from salience.errors import SalienceError
from salience.packing import pack, unpack
from salience.qtensor import NestedScales, QTensor
from salience.scheme import NESTED_BLOCK, Scheme

_TABLE = "nf4"
_STATE = f"weight.quant_state.bitsandbytes__{_TABLE}"
_PLAIN = frozenset({"weight", "weight.absmax", "weight.quant_map", _STATE})
_NESTED = frozenset({"weight.nested_absmax", "weight.nested_quant_map"})


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """NF4 in blocks of 64, with double quantization or without, one for all linears."""

    name: str = "bitsandbytes"
    tensors: frozenset[str] = _PLAIN | _NESTED
    marker: str = "weight.absmax"
    heads: bool = False
    act_order: bool = False
    config_file: str | None = None

    def detect(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "bitsandbytes"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if not config.get("load_in_4bit") or kind != _TABLE:
            found = f"4-bit {kind}" if config.get("load_in_4bit") else "not 4 bits"
            raise SalienceError(f"quantization_config is {found}; of bitsandbytes only nf4 is read")
        nested = bool(config.get("bnb_4bit_use_double_quant", False))
        return Scheme.parse(f"{_TABLE}-dq" if nested else _TABLE)

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if scheme.codebook != _TABLE:
                raise SalienceError(
                    f"--format bitsandbytes holds nf4, not {scheme} as {name} wants; use --method "
                    "nf4 --scheme nf4, or another format"
                )
        if len(set(schemes.values())) > 1:
            raise SalienceError(
                "--format bitsandbytes stores one scheme for all linears, not nf4 and nf4-dq"
            )

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        state: dict[str, object] = {
            "quant_type": _TABLE,
            "blocksize": qt.scheme.group_columns(qt.in_features),
            "dtype": "float16",
            "shape": list(qt.q.shape),
        }
        tensors = {
            "weight": _swap(pack(qt.q.flatten(), 4).view(torch.uint8))[:, None],
            "weight.absmax": qt.scales.flatten(),
            "weight.quant_map": table(_TABLE),
        }
        if qt.nested is not None:
            tensors["weight.absmax"] = qt.nested.q.flatten()
            tensors["weight.nested_absmax"] = qt.nested.scales
            tensors["weight.nested_quant_map"] = qt.nested.table
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": qt.nested.offset,
            }
        return tensors | {_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        missing = _PLAIN.union(_NESTED if scheme.double_quant else ()) - tensors.keys()
        if missing:
            raise SalienceError(f"tensor {min(missing)} is missing")
        device = tensors["weight"].device
        if not torch.equal(tensors["weight.quant_map"].float(), table(_TABLE, device)):
            raise SalienceError(f"weight.quant_map is not the table of {_TABLE}")
        state = _state(tensors[_STATE], scheme)
        rows, columns = shape = state["shape"]
        groups = (rows, scheme.groups(columns))
        stored = tensors["weight"].flatten().view(torch.uint8)  # of whatever bnb_4bit_quant_storage
        absmax = tensors["weight.absmax"]
        for name, count, want in (
            ("weight", stored.numel(), rows * columns // 2),
            ("weight.absmax", absmax.numel(), groups[0] * groups[1]),
        ):
            if count != want:
                raise SalienceError(f"{name} of a {rows} x {columns} weight holds {count} values")
        if (absmax.dtype == torch.uint8) != scheme.double_quant:
            raise SalienceError(f"weight.absmax is {absmax.dtype}, which does not fit {scheme}")
        nested = None
        scales = absmax.view(groups)
        if scheme.double_quant:
            inner, values = tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"]
            if inner.numel() != -(-absmax.numel() // NESTED_BLOCK) or values.numel() != 256:
                raise SalienceError("weight.nested_absmax or nested_quant_map has a wrong size")
            nested = NestedScales(scales, inner, float(state["nested_offset"]), values)
            scales = nested.dequantize()
        codes = unpack(_swap(stored).view(torch.int32), 4).view(shape)
        zeros = torch.zeros_like(scales, dtype=torch.uint8)
        return QTensor(codes, scales, zeros, scheme, nested=nested)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": "float16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": _TABLE,
            "bnb_4bit_use_double_quant": next(iter(schemes.values())).double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(kept) or None,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }


def _swap(data: Tensor) -> Tensor:
    """Exchange the two codes of each byte: our packing has the first one low."""
    return (data << 4) | (data >> 4)


def _state(data: Tensor, scheme: Scheme) -> dict[str, Any]:
    """The JSON object among the tensors, with what is needed of it checked."""
    try:
        state = json.loads(bytes(data.tolist()))
    except ValueError as error:
        raise SalienceError(f"{_STATE} is not readable as JSON ({error})") from None
    known: dict[str, object] = {
        "quant_type": _TABLE,
        "blocksize": scheme.group_columns(0),
        **({"nested_blocksize": NESTED_BLOCK} if scheme.double_quant else {}),
    }
    for key, value in known.items():
        if not isinstance(state, dict) or state.get(key) != value:
            raise SalienceError(f"{_STATE} is not of {key} {value}: other ones are not read")
    shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
    whole = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or len(shape) != 2 or not isinstance(offset, float):
        raise SalienceError(f"{_STATE} has no shape of two numbers, or no nested_offset")
    return dict(state)
