"""GPTQ: what AutoGPTQ and GPTQModel write; vLLM, SGLang, Transformers and ExLlama read.

Of a linear with N outputs, K inputs and G groups, codes of b = 2, 3, 4 or 8 bits:

    qweight  int32 [K b / 32, N]   codes, packed along K
    qzeros   int32 [G, N b / 32]   zeros, packed along N
    scales   fp16  [G, N]          bf16 and fp32 are read too
    g_idx    int32 [K]             group of each column

Both packings are the dense stream of `salience.packing`. The columns lie in their own order; with
act-order ("desc_act") only g_idx says which group each is in, else it is k // group_size.

There are two versions. The first ("gptq") stores zeros less one, so that 0 has no place: each
writer makes something else of it and each reader takes it for something else. The second
("gptq_v2") stores zeros as they are, but older readers do not know it. Symmetric weights, whose
zeros are all 2**(b-1), are written as version 1, which everything reads; all others as version 2.

One scheme is the checkpoint's. Linears of other bits or groups are named in `dynamic`, a table of
regular expressions and what they override, which GPTQModel made and vLLM and SGLang read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.formats._tensors import group_index, in_order, need
from salience.packing import pack, unpack
from salience.patterns import matching
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.serving import with_fused

_BITS = (2, 3, 4, 8)
_V1, _V2 = "gptq", "gptq_v2"


@dataclass(frozen=True, slots=True)
class Gptq:
    """Uniform codes in groups or whole rows, in column order or in activation order.

    Args:
        version: of the checkpoints it reads; which one it writes follows from the scheme.
    """

    version: int = 1
    name: str = "gptq"
    tensors: frozenset[str] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    marker: str = "qweight"
    heads: bool = False
    container: str = "safetensors"
    act_order: bool = True
    config_file: str | None = "quantize_config.json"

    def detect(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "gptq" and (
            (_layout(config) == _V2) == (self.version == 2)
        )

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        layout, words = _layout(config), config.get("pack_dtype", "int32")
        if layout not in (_V1, _V2) or config.get("is_marlin_format"):
            found = "marlin" if config.get("is_marlin_format") else layout
            raise SalienceError(
                f"checkpoint_format {found!r} is another layout under the same names and is not "
                f"supported; only {_V1} and {_V2} are"
            )
        if words != "int32":
            raise SalienceError(f"pack_dtype {words!r} is not supported; only int32 is")
        own = {**config, **_override(config, name)}
        # What older files leave out is symmetric: upstream's default.
        bits, group_size, sym = own.get("bits"), own.get("group_size"), own.get("sym", True)
        # In Python 4.0 is 4, and a bool is an int.
        known = bits in _BITS and isinstance(sym, bool)
        if not known or type(bits) is not int or type(group_size) is not int:
            raise SalienceError(
                f"quantization_config has bits {bits!r}, group_size {group_size!r} and sym "
                f"{sym!r}; a gptq checkpoint has bits 2, 3, 4 or 8 and a group size"
            )
        return Scheme(bits, group_size, sym)

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if scheme.codebook is not None or scheme.bits not in _BITS:
                other = "bitsandbytes" if scheme.codebook else "compressed-tensors"
                raise SalienceError(
                    f"--format gptq holds codes of 2, 3, 4 or 8 bits, not {scheme} as {name} "
                    f"wants; use --format {other}"
                )
        if len({scheme.sym for scheme in schemes.values()}) > 1:
            raise SalienceError(
                "--format gptq stores symmetric linears or asymmetric ones, not "
                f"{' and '.join(sorted({str(s) for s in schemes.values()}))}; "
                "use --format compressed-tensors"
            )
        for name, shape in shapes.items():
            bits = schemes[name].bits
            for what, count in zip(("outputs", "inputs"), shape, strict=True):
                if count * bits % 32:
                    multiple = 32 if bits == 3 else 32 // bits
                    raise SalienceError(
                        f"--format gptq packs {bits}-bit codes of {multiple} {what} at a time and "
                        f"{name} has {count}; leave it float with --skip, or use --format "
                        "compressed-tensors"
                    )

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        """The stored tensors.

        Raises:
            SalienceError: zeros that are not in the middle in a scheme that says they are.
        """
        bits, zeros, g_idx = qt.scheme.bits, qt.zeros, qt.g_idx
        if qt.scheme.sym:
            # Less one, and never less than 0: no field borrows from the next.
            if (zeros != 2 ** (bits - 1)).any():
                raise SalienceError(
                    f"a weight of {qt.scheme} has a zero other than {2 ** (bits - 1)}, which "
                    "version 1 of GPTQ's format cannot be trusted with; make it asymmetric"
                )
            zeros = zeros - 1
        if g_idx is None:
            g_idx = in_order(qt.in_features, qt.scheme, qt.q.device)
        return {
            "qweight": pack(qt.q, bits).T.contiguous(),
            "qzeros": pack(zeros.T, bits),
            "scales": qt.scales.T.contiguous().to(torch.float16),
            "g_idx": g_idx.to(torch.int32),
        }

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        need(tensors, self.tensors)
        qweight, qzeros, scales, g_idx = (
            tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx")
        )
        bits = scheme.bits
        for name, packed, along in (("qweight", qweight, 0), ("qzeros", qzeros, 1)):
            if packed.dtype != torch.int32 or packed.ndim != 2:
                raise SalienceError(
                    f"{name} must be an int32 matrix, not {packed.dtype} {list(packed.shape)}"
                )
            if packed.shape[along] * 32 % bits:
                raise SalienceError(
                    f"{name} {list(packed.shape)} does not hold a whole number of {bits}-bit codes"
                )
        if scales.ndim != 2:
            raise SalienceError(f"scales must be a matrix, not {list(scales.shape)}")
        codes = unpack(qweight.T, bits)
        zeros = self._zeros(qzeros, scheme).T.contiguous()
        order = group_index("g_idx", g_idx, codes.shape[1], scheme)
        return QTensor(codes, scales.T.contiguous(), zeros, scheme, order)

    def _zeros(self, qzeros: Tensor, scheme: Scheme) -> Tensor:
        """The zeros meant, uint8 [groups, out]."""
        bits = scheme.bits
        stored, middle = unpack(qzeros, bits), 2 ** (bits - 1)
        if scheme.sym:
            # Files under the label of the other version exist (vllm#38966: a "gptq" that stores 8).
            # vLLM's Marlin takes 2**(b-1) for the zero of any symmetric weight and never looks.
            if not (stored == middle - 1).all() and not (stored == middle).all():
                raise SalienceError(
                    f"qzeros of a symmetric {bits}-bit weight must all be {middle - 1} ({_V1}) or "
                    f"{middle} ({_V2}), and some are not; is it asymmetric (sym: false)?"
                )
            return torch.full_like(stored, middle)
        if self.version == 2:
            return stored
        if 8 % bits:
            return (stored + 1) & scheme.levels
        # GPTQModel subtracts from whole words, and where a zero was 0 it borrowed from the next.
        # Added to the whole word again, all are right. (AutoGPTQ's own writer spoils such words.)
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return unpack(qzeros + ones, bits)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        of_scheme: dict[Scheme, list[str]] = {}
        for name, each in schemes.items():
            of_scheme.setdefault(each, []).append(name)
        scheme = max(of_scheme, key=lambda each: len(of_scheme[each]))
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": _V1 if scheme.sym else _V2,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            # With one group a row there is no order of groups, and vLLM says so too.
            "desc_act": act_order and scheme.group_size != -1,
            "sym": scheme.sym,
            "lm_head": False,
            "pack_dtype": "int32",
        }
        # What differs from the rest. vLLM and SGLang look for the name of a fused linear, the rest
        # for those of its parts.
        others = {
            f"+:^{re.escape(name)}$": {"bits": each.bits, "group_size": each.group_size}
            for each, names in of_scheme.items()
            if each != scheme
            for name in with_fused(names)
        }
        # Readers keep the head float by themselves. Of other names, GPTQModel and SGLang want to be
        # told; vLLM sees in the headers which are float.
        skipped: dict[str, Any] = {
            f"-:^{re.escape(name)}$": {} for name in kept if name != "lm_head"
        }
        table = others | skipped
        return config | ({"dynamic": table} if table else {})


def _layout(config: Mapping[str, Any]) -> str:
    """ "gptq" or "gptq_v2", of a good config; AutoGPTQ's early ones do not say."""
    return str(config.get("checkpoint_format") or config.get("format") or _V1).lower()


def _override(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What `dynamic` says of one linear: GPTQModel's table of exceptions, the first match wins.

    A key is a regular expression, with "-:" before it for linears that stay float.
    """
    table = config.get("dynamic") or {}
    if not isinstance(table, Mapping):
        raise SalienceError("quantization_config has a dynamic that is no table")
    found = matching({key: key.removeprefix("-:").removeprefix("+:") for key in table}, name)
    if not found:
        return {}
    key = found[0]
    if key.startswith("-:"):
        raise SalienceError(f"quantization_config keeps it float ({key!r}), yet it is packed")
    values = table[key]
    if not isinstance(values, Mapping):
        raise SalienceError(f"{key!r} of quantization_config's dynamic is no table")
    return values
