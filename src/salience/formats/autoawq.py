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
from salience.formats._awq import BITS, config_scheme, variant
from salience.formats._tensors import matrix, need
from salience.packing import interleave_awq, pack, unpack_awq
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.serving import with_fused


@dataclass(frozen=True, slots=True)
class AutoAwq:
    """AutoAWQ's gemm layout, 4 bits."""

    name: str = "awq"
    tensors: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})
    marker: str = "qweight"
    heads: bool = False
    act_order: bool = False
    config_file: str | None = None
    container: str = "safetensors"

    def detect(self, config: Mapping[str, Any]) -> bool:
        return variant(config) == "gemm"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        return config_scheme(config)

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if scheme.bits != BITS or scheme.codebook is not None:
                better = Scheme(BITS, scheme.group_size, scheme.sym)
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
        """The stored tensors.

        Raises:
            SalienceError: groups in activation order.
        """
        if qt.g_idx is not None:
            raise SalienceError("--format awq holds no groups in activation order")
        return {
            "qweight": pack(interleave_awq(qt.q.T), BITS),
            "qzeros": pack(interleave_awq(qt.zeros.T), BITS),
            "scales": qt.scales.T.contiguous().to(torch.float16),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        need(tensors, self.tensors)
        qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        matrix("qweight", qweight, torch.int32)
        matrix("qzeros", qzeros, torch.int32)
        if scales.ndim != 2:
            raise SalienceError(f"scales must be a matrix, not {list(scales.shape)}")
        codes, zeros = unpack_awq(qweight), unpack_awq(qzeros)
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
        skipped = [name for name in with_fused(kept) if name != "lm_head"]
        return {
            "quant_method": "awq",
            "zero_point": True,
            "group_size": next(iter(schemes.values())).group_size,
            "bits": BITS,
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
