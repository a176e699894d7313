"""compressed-tensors "pack-quantized": what llm-compressor writes; vLLM, SGLang, Transformers read.

Of a linear with N outputs, K inputs and G groups, codes of b bits:

    weight_packed      int32 [N, ceil(K b / 32)]   codes, packed along K
    weight_scale       fp16  [N, G]
    weight_zero_point  int32 [ceil(N b / 32), G]   zeros, packed along N; absent when symmetric
    weight_shape       int64 [2]                   N, K
    weight_g_idx       int32 [K]                   group of each column; only in older checkpoints

The format speaks of signed codes and stores them plus 2**(b-1): what lies on the disk are the
unsigned codes and zeros of a QTensor as they are. Packing is the dense stream of `salience.packing`
for every width, since compressed-tensors 0.18. Before, a word held 32 // b whole codes, so that ten
3-bit codes took a word; the number of words tells which it is.

Each linear may have a scheme of its own: `config_groups` names the modules of each.

Groups in activation order ("actorder": "group") have their place in the tensors, and vLLM reads
them; the library itself dropped them with 0.19, whose loaders refuse the config, and Transformers
with it. The version written, 0.18.0, is the last that reads them and the first whose packing this
is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.formats._tensors import group_index, need
from salience.packing import pack, unpack, words
from salience.patterns import matching
from salience.qtensor import QTensor
from salience.scheme import Scheme

_FORMAT = "pack-quantized"
_VERSION = "0.18.0"
_CLASSES = ("Linear", "Module")  # of a linear, by which a target may name it
_MIN_BITS = 2


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Uniform codes of 2 to 8 bits, symmetric or not, in groups or whole rows, mixed at will."""

    name: str = "compressed-tensors"
    tensors: frozenset[str] = frozenset(
        {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
    )
    marker: str = "weight_packed"
    heads: bool = True
    act_order: bool = True
    config_file: str | None = None
    container: str = "safetensors"

    def detect(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "compressed-tensors"

    def scheme(self, config: Mapping[str, Any], name: str) -> Scheme:
        for key in ("transform_config", "sparsity_config"):
            extra = config.get(key) or {"format": "dense"}
            if not isinstance(extra, Mapping) or extra.get("format") != "dense":
                raise SalienceError(f"quantization_config has a {key}, which is not supported")
        if _matches(config.get("ignore") or [], name):
            raise SalienceError("quantization_config ignores it, yet its weight is quantized")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping):
            raise SalienceError("quantization_config has no config_groups")
        found = _group_of(name, groups)
        form = found.get("format") or config.get("format")
        if form != _FORMAT:
            raise SalienceError(f"format {form!r} is not supported; only {_FORMAT} is")
        if found.get("input_activations") or found.get("output_activations"):
            raise SalienceError("quantized activations are not supported, only weights are")
        return _scheme(found.get("weights"))

    def check(self, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> None:
        for name, scheme in schemes.items():
            if scheme.codebook is not None:
                raise SalienceError(
                    f"--format compressed-tensors holds uniform codes, not {scheme} as {name} "
                    "wants; use --format bitsandbytes"
                )
            if scheme.bits < _MIN_BITS:
                raise SalienceError(
                    f"--format compressed-tensors holds codes of 2 to 8 bits, not {scheme} as "
                    f"{name} wants"
                )

    def write(self, qt: QTensor) -> dict[str, Tensor]:
        tensors = {
            "weight_packed": pack(qt.q, qt.scheme.bits),
            "weight_scale": qt.scales.to(torch.float16).contiguous(),
            "weight_shape": torch.tensor(qt.q.shape),
        }
        if not qt.scheme.sym:
            tensors["weight_zero_point"] = pack(qt.zeros.T, qt.scheme.bits).T.contiguous()
        if qt.g_idx is not None and qt.scheme.group_size != -1:
            tensors["weight_g_idx"] = qt.g_idx.to(torch.int32)
        return tensors

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QTensor:
        names = {"weight_packed", "weight_scale", "weight_shape"}
        need(tensors, names.union(() if scheme.sym else {"weight_zero_point"}))
        packed, scales, shape = (
            tensors[k] for k in ("weight_packed", "weight_scale", "weight_shape")
        )
        if tuple(shape.shape) != (2,) or shape.is_floating_point() or scales.ndim != 2:
            raise SalienceError(
                "weight_shape must be two numbers (integers) and weight_scale a matrix"
            )
        rows, columns = (int(n) for n in shape)
        # Few zeros may take as many words either way; the codes of a row tell.
        dense = packed.shape[-1:] == (words(columns, scheme.bits),)
        codes = _unpack("weight_packed", packed, scheme.bits, (rows, columns), dense)
        if scheme.sym:
            zeros = torch.full_like(scales, 2 ** (scheme.bits - 1), dtype=torch.uint8)
        else:
            stored, size = tensors["weight_zero_point"], (scales.shape[1], rows)
            if stored.ndim != 2:
                raise SalienceError(f"weight_zero_point must be a matrix, not {list(stored.shape)}")
            zeros = _unpack("weight_zero_point", stored.T, scheme.bits, size, dense).T.contiguous()
        order = tensors.get("weight_g_idx")
        if order is not None and torch.equal(order, order.new_full((columns,), -1)):
            order = None  # there was room for it, and nothing was assigned
        if order is not None:
            order = group_index("weight_g_idx", order, columns, scheme)
        return QTensor(codes, scales, zeros, scheme, order)

    def config(
        self,
        schemes: Mapping[str, Scheme],
        kept: Sequence[str],
        outside: Sequence[str] = (),
        act_order: bool = False,
    ) -> dict[str, Any]:
        of_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            of_scheme.setdefault(scheme, []).append(name)
        if len(of_scheme) == 1:
            # Embeddings, and vLLM's head, are no "Linear", so they are named too.
            of_scheme = {scheme: ["Linear", *outside] for scheme in of_scheme}
        # With several, no group targets "Linear": vLLM fuses q, k, v into one module, looks for its
        # class before the names of its parts, and would read them all by that group.
        largest_first = sorted(of_scheme.items(), key=lambda item: -len(item[1]))
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "version": _VERSION,
            "ignore": list(kept),
            "config_groups": {
                f"group_{i}": {
                    "targets": targets,
                    "weights": _weights(scheme, act_order),
                    "input_activations": None,
                    "output_activations": None,
                }
                for i, (scheme, targets) in enumerate(largest_first)
            },
        }


def _weights(scheme: Scheme, act_order: bool) -> dict[str, Any]:
    """Only the keys that every version knows: older ones refuse those they do not."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "group_size": None if scheme.group_size == -1 else scheme.group_size,
        "dynamic": False,
    }
    # Of whole rows there is nothing to order, and a config that says so is refused.
    return weights | {"actorder": "group"} if act_order and scheme.group_size != -1 else weights


def _scheme(weights: object) -> Scheme:
    """The scheme that `_weights` describes."""
    if not isinstance(weights, Mapping):
        raise SalienceError("quantization_config has a group without weights")
    bits, group_size = weights.get("num_bits"), weights.get("group_size")
    strategy = weights.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        kind = f"dynamic {weights.get('type')}" if weights.get("dynamic") else weights.get("type")
        raise SalienceError(f"weights of type {kind} are not supported, only int is")
    if strategy not in ("group", "channel"):
        raise SalienceError(f"strategy {strategy!r} is not supported; group and channel are")
    size = -1 if strategy == "channel" else group_size
    # In Python a bool is an int.
    if type(bits) is not int or not _MIN_BITS <= bits <= 8 or type(size) is not int:
        raise SalienceError(
            f"num_bits {bits!r} with group_size {group_size!r} is not supported; "
            "2 to 8 bits and a group size are"
        )
    return Scheme(bits, size, sym=bool(weights.get("symmetric", True)))


def _matches(targets: object, name: str) -> list[str]:
    """Those of a list of targets, or of ignored entries, that mean the linear `name`."""
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise SalienceError("targets and ignore of quantization_config must be lists of names")
    plain = [target for target in targets if target == name or target in _CLASSES]
    patterns = {each: each.removeprefix("re:") for each in targets if each.startswith("re:")}
    return plain + matching(patterns, name)


def _group_of(name: str, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of a linear: by its name, else by a pattern, else by its class."""
    found: dict[str, Mapping[str, Any]] = {}
    for key, group in groups.items():
        if not isinstance(group, Mapping):
            raise SalienceError(f"{key} of quantization_config is a preset; save the model again")
        found |= dict.fromkeys(_matches(group.get("targets") or [], name), group)
    if not found:
        raise SalienceError("no group of quantization_config targets it, yet it is quantized")
    return found[
        min(found, key=lambda target: (target != name, not target.startswith("re:"), target))
    ]


def _unpack(name: str, packed: Tensor, bits: int, shape: tuple[int, int], dense: bool) -> Tensor:
    """Codes of `shape`, packed along its last dimension in the dense or the older way."""
    rows, n = shape
    want = (rows, words(n, bits) if dense else -(-n // (32 // bits)))
    if packed.dtype != torch.int32 or tuple(packed.shape) != want:
        raise SalienceError(
            f"{name} of {rows} x {n} codes of {bits} bits must be int32 {list(want)}, "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    if dense:
        return unpack(packed, bits, n)
    shifts = torch.arange(0, 32 - bits + 1, bits, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :n]
