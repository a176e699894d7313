"""What the stored numbers say: one linear and one tensor at a time, so that any size is read.

A code is saturated where it is the lowest or the highest of its grid. Rounding to the range of a
group puts two of its weights there, clipping some more; a scale that was lost, or taken from
another tensor, puts most of them there. How many are normal depends on bits and group size, so it
is found by rounding random weights of the same scheme.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salience.checkpoint import Checkpoint
from salience.codebook import table
from salience.conversion import check_places, unplaced
from salience.doctor.complaint import Complaint
from salience.errors import SalienceError
from salience.formats.base import Reader
from salience.grid import quantize
from salience.modules import codable, embeddings, find_blocks, kept, weight_of
from salience.qtensor import QTensor
from salience.scheme import Scheme

FLOAT16_MAX = 65504.0
_FLOAT16_TINY = 2.0**-14  # the least with all its bits
_MANY_TINY = 0.01
_SOME_CODES = 2**22  # that are counted at a time
_MUCH_ALIKE = 0.999
_AGAIN = "download it again, or quantize it anew"
_ALL_ZEROS = ("is all zeros", f"{_AGAIN}, if the float model has other values there")
_INVERSE = ("inv_freq", "masked_bias", "rotary_emb.inv_freq")  # buffers that old files hold


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized linear as it is stored.

    Args:
        name: of the linear.
        shape: [out, in] of the model's.
        scheme: by the config.
        tensors: local names to full ones.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    tensors: Mapping[str, str]


def packed_linears(
    model: nn.Module, stored: Checkpoint, fmt: Reader, config: Mapping[str, Any]
) -> dict[str, Packed]:
    """The linears and embeddings that own packed tensors, by what is stored.

    Raises:
        SalienceError: a scheme that the format cannot have.
    """
    found = {}
    own = fmt.tensors - {"weight"}
    for name, module in codable(model).items():
        tensors = {
            local: full for local in fmt.tensors if (full := f"{name}.{local}") in stored.names()
        }
        if own & tensors.keys():
            rows, columns = weight_of(module).shape
            found[name] = Packed(name, (rows, columns), fmt.scheme(config, name), tensors)
    return found


def name_complaints(
    model: Any, stored: Checkpoint, packed: Mapping[str, Packed], fmt: Reader | None
) -> Iterator[Complaint]:
    """Tensors that are missing, and those that no module has a place for."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    missing = tuple(
        alike[0]
        for alike in names.values()
        if not any(n in stored.names() or n.rpartition(".")[0] in packed for n in alike)
    )
    if missing:
        mend = "download the checkpoint again, or make config.json fit the weights"
        yield Complaint("error", missing, "is missing", mend)
    used = {full for each in packed.values() for full in each.tensors.values()}
    extra = sorted(unplaced(model, stored) - used)
    endings = tuple(f".{local}" for local in (fmt.tensors - {"weight"} if fmt else ()))
    orphans = tuple(name for name in extra if endings and name.endswith(endings))
    if orphans:
        problem = "is packed and belongs to no linear that may be"
        yield Complaint("error", orphans, problem, "keep that module float and quantize anew")
    try:
        check_places(model, stored)
    except SalienceError as error:
        mend = "make config.json fit the weights"
        yield Complaint("error", (str(stored.path),), str(error), mend)
    rest = tuple(n for n in extra if n not in orphans and not n.endswith(_INVERSE))
    if rest:
        problem = "is in the files and not in the model"
        yield Complaint(
            "note", rest, problem, "nothing, if these are parts that salience leaves out"
        )


def packed_complaints(stored: Checkpoint, fmt: Reader, each: Packed) -> Iterator[Complaint]:
    """What is wrong with the numbers of a quantized linear."""
    tensors = {local: stored.tensor(full) for local, full in each.tensors.items()}
    try:
        qt = fmt.read(tensors, each.scheme)
    except (SalienceError, RuntimeError) as error:
        yield Complaint("error", (each.name,), f"cannot be read: {error}", _AGAIN)
        return
    if (qt.out_features, qt.in_features) != each.shape:
        problem = f"holds {[qt.out_features, qt.in_features]}, the model wants {list(each.shape)}"
        yield Complaint("error", (each.name,), problem, "make config.json fit the weights")
        return
    yield from weight_complaints(each.name, qt)


def weight_complaints(name: str, qt: QTensor) -> Iterator[Complaint]:
    """What is wrong with a quantized weight."""
    where = (name,)
    scales = qt.scales.float()
    if not torch.isfinite(scales).all():
        yield Complaint("error", where, "has scales that are not finite", _AGAIN)
        return
    if _dead_groups(qt, scales):
        problem = "has scales of 0 where its codes differ: what they stood for is lost"
        yield Complaint("error", where, problem, _AGAIN)
    if qt.scales.dtype == torch.float16:
        tiny = (scales != 0) & (scales.abs() < _FLOAT16_TINY)
        if tiny.float().mean() > _MANY_TINY:
            problem = "has scales below fp16's normal range, which are coarse"
            yield Complaint(
                "warning", where, problem, "quantize it anew, from weights that are larger"
            )
    largest = 1.0 if qt.scheme.codebook else float(qt.scheme.levels)
    if scales.abs().max() * largest > FLOAT16_MAX:
        problem = "has weights beyond fp16's range"
        yield Complaint("warning", where, problem, "serve it in bf16 or fp32")
    counts, zero = _count(qt)
    share = counts / counts.sum()
    if zero:
        yield Complaint("warning", where, *_ALL_ZEROS)
    elif share.max() > _MUCH_ALIKE:
        problem = f"has the same code everywhere ({share.argmax()})"
        yield Complaint("error", where, problem, _AGAIN)
    elif (saturated := float(share[0] + share[-1])) > (most := saturation_limit(qt.scheme)):
        problem = f"has many saturated codes, where up to {100 * most:.0f} % are normal"
        mend = "compare it with the float model (salience eval), and quantize it anew"
        yield Complaint("warning", (f"{name} ({100 * saturated:.0f} %)",), problem, mend)


def _count(qt: QTensor) -> tuple[Tensor, bool]:
    """How often each code comes, and whether all of them stand for 0; some rows at a time."""
    counts = torch.zeros(qt.scheme.levels + 1, dtype=torch.int64)
    zero = True
    place = qt.g_idx
    if place is None:
        place = torch.arange(qt.in_features) // qt.scheme.group_columns(qt.in_features)
    values = None if qt.scheme.codebook is None else table(qt.scheme.codebook, qt.q.device)
    step = max(1, _SOME_CODES // qt.in_features)
    for start in range(0, qt.out_features, step):
        codes = qt.q[start : start + step]
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        if zero and values is None:
            zero = torch.equal(codes, qt.zeros[start : start + step][:, place.long()])
    if values is not None:
        zero = not values[counts.nonzero()[:, 0]].any()
    return counts, zero


def _dead_groups(qt: QTensor, scales: Tensor) -> bool:
    """Whether groups with a scale of 0 have codes that differ."""
    zero = scales == 0
    if not zero.any() or qt.g_idx is not None:
        return bool(zero.any())
    codes = qt.q.unflatten(1, (scales.shape[1], -1))
    return bool((zero & (codes.amax(-1) != codes.amin(-1))).any())


@functools.cache
def saturation_limit(scheme: Scheme) -> float:
    """The largest share of codes at either end that is normal for a scheme, 1 for none to say."""
    if scheme.bits < 3:
        return 1.0
    size = scheme.group_size if scheme.group_size > 0 else 1024
    like = Scheme(scheme.bits, size, scheme.sym, scheme.codebook)
    generator = torch.Generator().manual_seed(0)
    codes = quantize(torch.randn(64, size, generator=generator), like).q
    normal = ((codes == 0) | (codes == scheme.levels)).float().mean().item()
    return min(1.0, max(3 * normal, normal + 0.25))


def float_complaints(stored: Checkpoint, name: str, like: Tensor) -> Iterator[Complaint]:
    """What is wrong with a tensor that is not packed.

    Args:
        stored: the tensors under the names of the model.
        name: of one.
        like: the model's, without values.
    """
    tensor = stored.tensor(name)
    if tensor.shape != like.shape:
        problem = f"is {list(tensor.shape)}, the model wants {list(like.shape)}"
        yield Complaint("error", (name,), problem, "make config.json fit the weights")
        return
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = (float(end) for end in tensor.aminmax())
    most = max(-low, high)
    if not most < float("inf"):  # NaN, too
        yield Complaint("error", (name,), "has values that are not finite", _AGAIN)
    elif most > FLOAT16_MAX:
        mend = "serve it with --dtype bfloat16"
        yield Complaint("warning", (name,), "has values beyond fp16's range", mend)
    elif most == 0 and tensor.ndim > 1 and "bias" not in name:
        yield Complaint("warning", (name,), *_ALL_ZEROS)


def kept_complaints(model: Any, packed: Mapping[str, Packed]) -> Iterator[Complaint]:
    """Modules that are quantized and are better not, and float ones among quantized ones."""
    prefix, _ = find_blocks(model)
    reasons, lookups, head = kept(model), embeddings(model), model.get_output_embeddings()
    towers = tuple(
        name
        for name in packed
        if not name.startswith(f"{prefix}.")
        and name not in lookups
        and model.get_submodule(name) is not head
    )
    if towers:
        problem = "is quantized and lies outside of the decoder"
        mend = "check its quality apart: calibration was text"
        yield Complaint("warning", towers, problem, mend)
    floats = tuple(
        name
        for name in codable(model)
        if name.startswith(f"{prefix}.") and name not in packed and name not in reasons
    )
    if packed and floats:
        problem = "is float among quantized linears"
        yield Complaint("note", floats, problem, "nothing, if --skip or --only said so")
