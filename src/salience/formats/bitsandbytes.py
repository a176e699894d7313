"""bitsandbytes NF4 and FP4: what QLoRA's tools, Transformers and vLLM call 4-bit `bitsandbytes`.

Of a linear with N outputs and K inputs, in blocks of B (64, if not said otherwise) along each row:

    weight                   uint8 [N K / 2, 1]    codes by rows, two a byte, the first one high
    weight.absmax            fp32 [N K / B]        scales; uint8 codes of them when nested
    weight.quant_map         fp32 [16]             the table
    weight.nested_absmax     fp32 [N K / B / 256]  scales of the scales, when nested
    weight.nested_quant_map  fp32 [256]            their table
    weight.quant_state.bitsandbytes__nf4           shape and so on: the bytes of a JSON object

FP4's state ends in __fp4. Its codes are the bits of a float, sign first, so that its table is not
ascending as ours (`salience.codebook`): codes are renamed on their way in and out. Of the two zeros
its portable kernels take code 0 for values up to 0 and code 8 above; so does the order here.

bitsandbytes cuts blocks from the flattened weight; where B does not divide K they would cross rows,
and such weights are refused. B is in the state of each weight and nowhere else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from salience.codebook import table
from salience.errors import SalienceError
from salience.formats._bnb import loads_in, quantization_config
from salience.formats._tensors import need
from salience.packing import pack, unpack
from salience.qtensor import NestedScales, QTensor
from salience.scheme import NESTED_BLOCK, Scheme

_BLOCK = 64
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Place in our table of each stored code.
_PLACES = {
    "nf4": tuple(range(16)),
    "fp4": (7, 9, 14, 15, 12, 13, 10, 11, 8, 6, 1, 0, 3, 2, 5, 4),
}
_STATES = {kind: f"weight.quant_state.bitsandbytes__{kind}" for kind in _PLACES}
_PLAIN = frozenset({"weight", "weight.absmax", "weight.quant_map"})
_NESTED = frozenset({"weight.nested_absmax", "weight.nested_quant_map"})


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """NF4 or FP4, with double quantization or without, one for all linears."""

    name: str = "bitsandbytes"
    tensors: frozenset[str] = _PLAIN | _NESTED | frozenset(_STATES.values())
    marker: str = "weight.absmax"
    heads: bool = False
    act_order: bool = False
    config_file: str | None = None
    container: str = "safetensors"

    def detect(self, config: Mapping[str, Any]) -> bool:
        return loads_in(config, 4)

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if not isinstance(kind, str) or kind not in _PLACES:
            raise SalienceError(
                f"quantization_config is of bnb_4bit_quant_type {kind!r}; nf4 and fp4 are read"
            )
        nested = bool(config.get("bnb_4bit_use_double_quant", False))
        return Scheme.parse(f"{kind}-dq" if nested else kind)

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if scheme.codebook not in _PLACES:
                raise SalienceError(
                    f"--format bitsandbytes holds nf4 and fp4, not {scheme} as {name} wants; use "
                    "--method nf4 --scheme nf4, or another format"
                )
            if scheme.group_size not in _BLOCK_SIZES:
                raise SalienceError(
                    f"--format bitsandbytes has no blocks of {scheme.group_size}, as {name} wants; "
                    f"use one of {', '.join(map(str, _BLOCK_SIZES))}"
                )
        # The state of each weight has its block size; kind and nesting are said once.
        kinds = {replace(scheme, group_size=_BLOCK) for scheme in schemes.values()}
        if len(kinds) > 1:
            raise SalienceError(
                "--format bitsandbytes stores one scheme for all linears, not "
                f"{' and '.join(sorted(map(str, kinds)))}"
            )

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        kind = str(qt.scheme.codebook)
        state: dict[str, object] = {
            "quant_type": kind,
            "blocksize": qt.scheme.group_columns(qt.in_features),
            "dtype": "float16",
            "shape": list(qt.q.shape),
        }
        codes = _codes(kind, qt.q.device)[qt.q.flatten().int()]
        tensors = {
            "weight": _swap(pack(codes, 4).view(torch.uint8))[:, None],
            "weight.absmax": qt.scales.flatten(),
            "weight.quant_map": _stored_table(kind, qt.q.device),
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
        data = list(json.dumps(state).encode())
        return tensors | {_STATES[kind]: torch.tensor(data, dtype=torch.uint8)}

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        kind = str(scheme.codebook)
        need(tensors, _PLAIN.union({_STATES[kind]}, _NESTED if scheme.double_quant else ()))
        device = tensors["weight"].device
        if not torch.equal(tensors["weight.quant_map"].float(), _stored_table(kind, device)):
            raise SalienceError(f"weight.quant_map is not the table of {kind}")
        state = _state(tensors[_STATES[kind]], scheme)
        scheme = replace(scheme, group_size=state["blocksize"])
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
            blocks = -(-absmax.numel() // NESTED_BLOCK)
            if (tuple(inner.shape), tuple(values.shape)) != ((blocks,), (256,)):
                raise SalienceError("weight.nested_absmax or nested_quant_map has a wrong size")
            nested = NestedScales(scales, inner, float(state["nested_offset"]), values)
            scales = nested.dequantize()
        codes = unpack(_swap(stored).view(torch.int32), 4).view(shape)
        places = torch.tensor(_PLACES[kind], dtype=torch.uint8, device=device)
        codes = places[codes.int()]
        zeros = torch.zeros_like(scales, dtype=torch.uint8)
        return QTensor(codes, scales, zeros, scheme, nested=nested)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        first = next(iter(schemes.values()))
        return quantization_config(4, kept, str(first.codebook), first.double_quant)


def _codes(kind: str, device: torch.device) -> Tensor:
    """The stored code of each place in our table, uint8 [16]."""
    return torch.tensor(_PLACES[kind], device=device).argsort().to(torch.uint8)


def _stored_table(kind: str, device: torch.device) -> Tensor:
    """The table in the order of the stored codes, fp32 [16]."""
    return table(kind, device)[list(_PLACES[kind])]


def _swap(data: Tensor) -> Tensor:
    """Exchange the two codes of each byte: our packing has the first one low."""
    return (data << 4) | (data >> 4)


def _state(data: Tensor, scheme: Scheme) -> dict[str, Any]:
    """The JSON object among the tensors, with what is needed of it checked."""
    name = _STATES[str(scheme.codebook)]
    if data.dtype != torch.uint8 or data.ndim != 1:
        raise SalienceError(f"{name} must be bytes, not {data.dtype} {list(data.shape)}")
    try:
        state = json.loads(bytes(data.tolist()))
    except (ValueError, RecursionError) as error:
        raise SalienceError(f"{name} is not readable as JSON ({error})") from None
    known: dict[str, object] = {"quant_type": scheme.codebook}
    if scheme.double_quant:
        known["nested_blocksize"] = NESTED_BLOCK
    for key, value in known.items():
        if not isinstance(state, dict) or state.get(key) != value:
            raise SalienceError(f"{name} is not of {key} {value}: other ones are not read")
    if type(state.get("blocksize")) is not int or state["blocksize"] not in _BLOCK_SIZES:
        raise SalienceError(
            f"{name} is of blocksize {state.get('blocksize')!r}, which there is not"
        )
    shape, offset = state.get("shape"), state.get("nested_offset")
    offset = offset if scheme.double_quant else 0.0
    whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not whole or len(shape) != 2 or not isinstance(offset, float):
        raise SalienceError(f"{name} has no shape of two numbers, or no nested_offset")
    return dict(state)
