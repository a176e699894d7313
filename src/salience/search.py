"""The result of a search as a file: scales and grids, without the model.

A search takes minutes and its result a few bits a weight, so it is worth keeping: the same scales
and grids make the checkpoint in another format, or on another machine, without the search. The
file is safetensors:

    <block>|<source>|<first sink>|scales     fp32 [in]           a scale that was folded in
    <linear>|grid_scales, |grid_zeros        fp16, uint8 [out, groups]
    <block>|digest                           sha256 of the block's weights, as bytes

and its metadata says which model, method, schemes and text it is of. The digest is compared before
a block is touched, so a search is never applied to another model (nor to another fine-tune of the
same one).

llm-awq's own files (`.pt`: a dict of "scale" and "clip") are read too. They say neither which
weights nor which bits they are for; what can be checked is that the names and shapes fit.
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salience import grid
from salience.block import SolvedBlock
from salience.errors import SalienceError
from salience.grid import Grid
from salience.methods import FoldScale, Method, Problem
from salience.scheme import Scheme
from salience.structure import Fold

_SEPARATOR = "|"
_KIND = "salience-search"
# What torch.load and the walk over its result raise for a file that is damaged or something else.
_TORCH_LOAD_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def search_tensors(block: str, digest: str, solved: SolvedBlock) -> dict[str, Tensor]:
    """What was found for one block, by the names of the file."""
    prefix = f"{block}." if block else ""
    tensors = {}
    if digest:
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


@dataclass(slots=True)
class Search:
    """Scales and grids by module name, in place of a search.

    Args:
        path: the file.
        info: what it says of itself: method, effort, schemes, model.
        digests: of each block's weights; empty where the file knows none.
        scales: by (block, source, first sink): the scale and its exponents.
        grids: stored grid of each linear.
        clips: largest magnitude of each group, fp32 [out, groups], of each linear (llm-awq).
    """

    path: Path
    info: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    scales: dict[tuple[str, str, str], tuple[Tensor, float, float]] = field(default_factory=dict)
    grids: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)

    def check(self, block: str, digest: str) -> None:
        """Refuse weights that the search was not made on.

        Raises:
            SalienceError: naming the block.
        """
        if self.digests and self.digests.get(block) != digest:
            raise SalienceError(
                f"{self.path} was searched on other weights: {block} differs; use the model "
                f"{self.info.get('model', 'it was made for')}, or search anew"
            )

    def schemes_for(
        self, default: Mapping[str, Scheme], given: Mapping[str, Scheme] | None
    ) -> Mapping[str, Scheme]:
        """The scheme of each linear that the search was made for.

        Args:
            default: for a file that does not say.
            given: what the user asked for, if anything.

        Raises:
            SalienceError: the user asked for something else.
        """
        if "schemes" not in self.info:
            return default
        own = {name: Scheme.parse(text) for name, text in self.info["schemes"].items()}
        for name in own.keys() | (given or own).keys():
            wanted = (given or own).get(name)
            if wanted != own.get(name):
                raise SalienceError(
                    f"{self.path} was searched with {own.get(name, 'float')} for {name}, not "
                    f"{wanted or 'float'}; leave --scheme and the patterns away, or search anew"
                )
        return own

    def method(self, base: Method) -> Method:
        """`base` with these scales and grids for its own."""
        return replace(
            base,
            scales=self._scales,
            grids=self._grids,
            reads_text=base.reads_moments_to_code,
            trusted=not base.reads_moments_to_code,
        )

    def _scales(self, problems: Sequence[Problem], fold: Fold) -> list[FoldScale | None]:
        weight = problems[0].weight
        found: list[FoldScale | None] = []
        for names in problems[0].names:
            block = _block_of(names[0], fold)
            key = (block, fold.prev, fold.sinks[0])
            if key not in self.scales:
                found.append(None)
                continue
            scales, alpha, beta = self.scales[key]
            if scales.shape != weight.shape[-1:]:
                raise SalienceError(
                    f"{self.path}: the scale of {names[0]} has {len(scales)} channels, the model "
                    f"{weight.shape[-1]}; it is of another model"
                )
            found.append(FoldScale(fold, scales.to(weight.device), alpha, beta))
        return found

    def _grids(self, problem: Problem) -> Grid:
        blocks = []
        for i, names in enumerate(problem.names):
            parts = problem.weight[i].split(problem.rows)
            blocks.append(
                [self._grid(n, w, problem.scheme) for n, w in zip(names, parts, strict=True)]
            )
        scales = torch.stack([torch.cat([g.scales for g in parts]) for parts in blocks])
        zeros = torch.stack([torch.cat([g.zeros for g in parts]) for parts in blocks])
        return Grid(scales, zeros, problem.scheme.levels)

    def _grid(self, name: str, weight: Tensor, scheme: Scheme) -> Grid:
        shape = (weight.shape[0], scheme.groups(weight.shape[1]))
        if name in self.grids:
            scales, zeros = (t.to(weight.device) for t in self.grids[name])
            if scales.shape != shape or zeros.shape != shape:
                raise SalienceError(
                    f"{self.path}: the grid of {name} is {list(scales.shape)}, {scheme} wants "
                    f"{list(shape)}; it is of another model or scheme"
                )
            return Grid(scales, zeros.float(), scheme.levels)
        lo, hi = grid.value_range(weight, scheme)
        if name in self.clips:
            most = self.clips[name].to(weight.device)
            if most.shape != shape:
                raise SalienceError(
                    f"{self.path}: the clip of {name} is {list(most.shape)}, {scheme} wants "
                    f"{list(shape)}; use the group size it was searched with"
                )
            lo, hi = torch.maximum(lo, -most), torch.minimum(hi, most)
        elif self.info:
            raise SalienceError(f"{self.path} has no grid for {name}; it is of another model")
        return grid.make_grid(lo, hi, scheme)


def open_search(path: Path) -> Search:
    """Read a search file, salience's or llm-awq's.

    Raises:
        SalienceError: no such file, or not a search.
    """
    if not path.is_file():
        raise SalienceError(f"search file {path} does not exist")
    return _open_llm_awq(path) if path.suffix == ".pt" else _open_own(path)


def _open_own(path: Path) -> Search:
    search = Search(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise SalienceError(f"{path} is no search file; make one with --save-search")
            search.info = json.loads(metadata["info"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise SalienceError(f"{path} is damaged or no search file ({error})") from None
    for name, tensor in tensors.items():
        *parts, leaf = name.split(_SEPARATOR)
        if leaf == "digest":
            search.digests[parts[0]] = bytes(tensor.tolist()).hex()
        elif leaf == "scales" and len(parts) == 3:
            block, prev, sink = parts
            alpha, beta = tensors[name.replace("|scales", "|exponents")].tolist()
            search.scales[block, prev, sink] = (tensor, alpha, beta)
        elif leaf == "grid_scales":
            search.grids[parts[0]] = (tensor, tensors[f"{parts[0]}|grid_zeros"])
    return search


def _open_llm_awq(path: Path) -> Search:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        scales, clips = content["scale"], content["clip"]
        search = Search(path)
        for prev, sinks, scale in scales:
            block, source = _split(str(prev), [str(sink) for sink in sinks])
            first = str(sinks[0])[len(block) + 1 :]
            search.scales[block, source, first] = (scale.float().flatten(), 0.0, 0.0)
        for name, most in clips:
            search.clips[str(name)] = most.float().flatten(1)
    except _TORCH_LOAD_ERRORS as error:
        raise SalienceError(f"{path} is no search result of llm-awq: {error}") from None
    return search


def _split(prev: str, sinks: list[str]) -> tuple[str, str]:
    """The block that a source and its sinks are in, and the source's name in it."""
    parts = prev.split(".")
    for end in range(len(parts) - 1, 0, -1):
        block = ".".join(parts[:end])
        if parts[end - 1].isdigit() and all(sink.startswith(f"{block}.") for sink in sinks):
            return block, ".".join(parts[end:])
    raise ValueError(f"{prev} and {sinks[0]} are in no common block")


def _block_of(name: str, fold: Fold) -> str:
    """The block of a linear that is a sink of `fold`, from its full name."""
    local = next(sink for sink in fold.sinks if name.endswith(f".{sink}"))
    return name[: -len(local) - 1]


def search_metadata(info: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a search file that says `info` of itself."""
    return {"kind": _KIND, "info": json.dumps(info)}
