"""The result of a search as a file: scales and grids, without the model.

A search takes minutes and its result a few bits a weight, so it is worth keeping: the same scales
and grids make the checkpoint in another format, or on another machine, without the search. The
file is safetensors:

    <block>|<source>|<first sink>|scales     fp32 [in]           a scale that was folded in
    <linear>|grid_scales, |grid_zeros        fp16, uint8 [out, groups]
    <block>|<source>|<first sink>|exponents  fp64 [2]            what the scale was made of
    <block>|digest                           sha256 of the block's weights, as bytes; of the
                                             linears in no block under |digest

and its metadata says which model, method, schemes and text it is of. The digest is compared before
a block is touched, so a search is never applied to another model (nor to another fine-tune of the
same one). What a file has and the model has no place for is refused, never left out in silence.

llm-awq's own files (`.pt`: a dict of "scale" and "clip") are read too. They say neither which
weights nor which bits they are for; what can be checked is that the names and shapes fit.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salience.blocks.block import SolvedBlock
from salience.blocks.search import FoundScale, Search
from salience.errors import SalienceError

_SEPARATOR = "|"
_KIND = "salience-search"


def search_tensors(block: str, digest: str, solved: SolvedBlock) -> dict[str, Tensor]:
    """What was found for one block, by the names of the file."""
    prefix = f"{block}." if block else ""
    tensors = {}
    tensors[f"{block}|digest"] = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
    for choice in solved.scales:
        key = _SEPARATOR.join((block, choice.fold.prev, choice.fold.sinks[0], "scales"))
        tensors[key] = choice.scales
        exponents = torch.tensor([choice.alpha, choice.beta], dtype=torch.float64)
        tensors[key.replace("|scales", "|exponents")] = exponents
    for name, coded in solved.linears.items():
        tensors[f"{prefix}{name}|grid_scales"] = coded.grid.scales
        tensors[f"{prefix}{name}|grid_zeros"] = coded.grid.zeros.to(torch.uint8)
    return tensors


def search_metadata(info: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a search file that says `info` of itself."""
    # One entry: safetensors writes several in an order of chance.
    return {_KIND: json.dumps(info)}


def open_search(path: Path) -> Search:
    """Read a search file, salience's or llm-awq's.

    Raises:
        SalienceError: no such file, or not a search.
    """
    if not path.is_file():
        raise SalienceError(f"search file {path} does not exist")
    return _open_llm_awq(path) if path.suffix == ".pt" else _open_own(path)


def _open_own(path: Path) -> Search:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SalienceError(f"{path} is damaged or no search file ({error})") from None
    if _KIND not in metadata:
        raise SalienceError(f"{path} is no search file; make one with --save-search")
    try:
        search = Search(path, _checked_info(json.loads(metadata[_KIND])))
        for name in tensors:
            _take(search, name, tensors)
        for name in search.info["schemes"].keys() ^ search.grids.keys():
            raise ValueError(f"{name} has a scheme or a grid, but not both")
    except (ValueError, RecursionError) as error:
        raise SalienceError(f"{path} is damaged: {error}; search anew") from None
    return search


def _checked_info(info: object) -> dict[str, Any]:
    if not isinstance(info, dict) or not isinstance(info.get("schemes"), dict):
        raise ValueError("its metadata does not say which schemes")
    texts = [info.get(key) for key in ("method", "effort", "scheme", "model")]
    if not all(isinstance(text, str) for text in [*texts, *info["schemes"].values()]):
        raise ValueError("its metadata does not say which method, effort, scheme and model")
    return info


def _take(search: Search, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put one tensor of an own file where it belongs."""
    *parts, leaf = name.split(_SEPARATOR)
    if leaf == "digest" and len(parts) == 1:
        digest = _typed(tensors, name, torch.uint8, 1)
        search.digests[parts[0]] = bytes(digest.tolist()).hex()
    elif leaf == "scales" and len(parts) == 3:
        block, prev, sink = parts
        exponents = _typed(tensors, name.replace("|scales", "|exponents"), torch.float64, 1)
        if len(exponents) != 2:
            raise ValueError(f"there are {len(exponents)} exponents to {name}")
        scales = _positive(_typed(tensors, name, torch.float32, 1), name)
        search.scales[block, prev, (sink,)] = FoundScale(scales, *exponents.tolist())
    elif leaf == "grid_scales" and len(parts) == 1:
        scales = _positive(_typed(tensors, name, torch.float16, 2), name)
        zeros = _typed(tensors, f"{parts[0]}|grid_zeros", torch.uint8, 2)
        search.grids[parts[0]] = (scales, zeros)
    elif name.replace("|exponents", "|scales") not in tensors and leaf == "exponents":
        raise ValueError(f"{name} goes with no scale")
    elif leaf not in ("exponents", "grid_zeros"):
        raise ValueError(f"{name!r} means nothing")


def _typed(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, axes: int) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.ndim != axes:
        raise ValueError(f"{name} is {tensor.dtype} with {tensor.ndim} axes")
    return tensor


def _positive(tensor: Tensor, name: str) -> Tensor:
    if not (torch.isfinite(tensor) & (tensor > 0)).all():
        raise ValueError(f"{name} has values that are no scales")
    return tensor


def _open_llm_awq(path: Path) -> Search:
    search = Search(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SalienceError(
            f"{path} is damaged, or holds more than tensors, names and lists and could run code; "
            "it is not loaded"
        ) from None
    except Exception as error:  # of any kind for a damaged file, AssertionError among them
        raise SalienceError(f"{path} is damaged ({type(error).__name__}); fetch it again") from None
    try:
        scales, clips = content["scale"], content["clip"]
        most = path.stat().st_size
        for prev, sinks, scale in scales:
            block, names = _split([prev, *sinks])
            flat = _positive(_stored(scale, most).float().flatten(), f"the scale of {prev}")
            search.scales[block, names[0], tuple(names[1:])] = FoundScale(flat)
        for name, clip in clips:
            if not isinstance(name, str):
                raise ValueError("a clip has a name that is no text")
            values = _stored(clip, most).float().flatten(1)
            if not (values >= 0).all():
                raise ValueError(f"the clip of {name} has values that are no magnitudes")
            search.clips[name] = values
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SalienceError(f"{path} is no search result of llm-awq: {error}") from None
    return search


def _stored(tensor: Tensor, most: int) -> Tensor:
    """A tensor that has no more values than its file has bytes: a view may repeat one for ever."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() > most:
        raise ValueError(f"a tensor {list(tensor.shape)} holds more than the file")
    return tensor


def _split(names: list[str]) -> tuple[str, list[str]]:
    """The block that modules are in, and their names in it."""
    # Lists may hold themselves in a pickle, and are too long for a message.
    if not all(isinstance(name, str) for name in names):
        raise ValueError("it has a name that is no text")
    parts = names[0].split(".")
    for end in range(2, len(parts)):
        block = ".".join(parts[:end])
        if parts[end - 1].isdigit() and all(name.startswith(f"{block}.") for name in names):
            return block, [name[len(block) + 1 :] for name in names]
    raise ValueError(f"{' and '.join(names)} are in no common block")
