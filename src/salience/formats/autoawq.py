"""AutoAWQ "gemm": what vLLM, SGLang and Transformers call `awq`.

Of a linear with N outputs, K inputs and G groups, transposed and packed along N:

    qweight  int32 [K, N/8]    codes
    qzeros   int32 [G, N/8]    zeros, the same packing
    scales   fp16  [G, N]

Eight columns share a word, interleaved: nibble i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i], so the
codes 0..7 make the word 0x75316420. The zero stored is the zero meant (GPTQ v1 stores one less).
Symmetric weights store zeros of 8: there is no shorter form that every reader takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.packing import deinterleave_awq, interleave_awq, pack, unpack
from salience.qtensor import QTensor
from salience.scheme import Scheme

_BITS = 4


@dataclass(frozen=True, slots=True)
class AutoAwq:
    """AutoAWQ's gemm layout, 4 bits."""

    name: str = "awq"
    tensors: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})
    marker: str = "qweight"
    heads: bool = False
    act_order: bool = False
    config_file: str | None = None

    def detect(self, config: Mapping[str, Any]) -> bool:
        version = str(config.get("version", config.get("format", "gemm"))).lower()
        return config.get("quant_method") == "awq" and version == "gemm"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        bits = config.get("bits", config.get("w_bit"))
        group_size = config.get("group_size", config.get("q_group_size"))
        if bits != _BITS or not isinstance(group_size, int):
            raise SalienceError(
                f"quantization_config has bits {bits!r} and group_size {group_size!r}; "
                "an awq checkpoint has bits 4 and a group size"
            )
        return Scheme(_BITS, group_size)

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if scheme.bits != _BITS or scheme.codebook is not None:
                better = Scheme(_BITS, scheme.group_size, scheme.sym)
                other = "bitsandbytes" if scheme.codebook else "compressed-tensors"
                raise SalienceError(
                    f"--format awq holds 4-bit codes, not {scheme} as {name} wants; "
                    f"use --scheme {better}, or --format {other}"
                )
        _one_group_size(schemes, shapes)
        for name, (rows, _) in shapes.items():
            if rows % 8:
                raise SalienceError(
                    f"--format awq packs 8 outputs a word and {name} has {rows}; "
                    "such a linear cannot be stored in it"
                )

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        return {
            "qweight": pack(interleave_awq(qt.q.T), _BITS),
            "qzeros": pack(interleave_awq(qt.zeros.T), _BITS),
            "scales": qt.scales.T.contiguous().to(torch.float16),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        missing = self.tensors - tensors.keys()
        if missing:
            raise SalienceError(f"tensor {min(missing)} is missing")
        qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        for name, words in (("qweight", qweight), ("qzeros", qzeros)):
            if words.dtype != torch.int32 or words.ndim != 2:
                raise SalienceError(
                    f"{name} must be an int32 matrix, not {words.dtype} {list(words.shape)}"
                )
        if scales.ndim != 2:
            raise SalienceError(f"scales must be a matrix, not {list(scales.shape)}")
        codes = deinterleave_awq(unpack(qweight, _BITS)).T.contiguous()
        zeros = deinterleave_awq(unpack(qzeros, _BITS)).T.contiguous()
        return QTensor(codes, scales.T.contiguous(), zeros, scheme)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        # Readers keep the head float by themselves and differ in how they match other names; full
        # paths mean the same to all of them.
        skipped = [name for name in kept if name != "lm_head"]
        return {
            "quant_method": "awq",
            "zero_point": True,
            "group_size": next(iter(schemes.values())).group_size,
            "bits": _BITS,
            "version": "gemm",
            "modules_to_not_convert": skipped or None,
        }


def _one_group_size(schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
    sizes = {(scheme.group_size, scheme.sym) for scheme in schemes.values()}
    if len(sizes) > 1:
        raise SalienceError(
            "--format awq stores one scheme for all linears, not "
            f"{' and '.join(sorted({str(s) for s in schemes.values()}))}; "
            "use --format compressed-tensors"
        )
    whole_rows = any(size == -1 for size, _ in sizes)
    if whole_rows and len({columns for _, columns in shapes.values()}) > 1:
        raise SalienceError(
            "--format awq stores one group size for all linears, so w4channel does not fit "
            "linears of different widths; use a group size"
        )
