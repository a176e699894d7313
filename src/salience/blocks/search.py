"""The result of a search, in place of a method's own: scales and grids that were found before."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from salience import grid
from salience.errors import SalienceError
from salience.grid import Grid
from salience.methods import FoldScale, Method, Problem
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.structure import Fold


class FoundScale(NamedTuple):
    """A scale, fp32 [in], and its exponents, 0 where they are not known."""

    scales: Tensor
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(slots=True)
class Search:
    """Scales and grids by module name, in place of a search.

    Args:
        path: the file.
        info: what it says of itself: method, effort, schemes, model.
        digests: of each block's weights; empty where the file knows none.
        scales: by block, source and sinks (of which salience's own files name the first).
        grids: stored grid of each linear.
        clips: largest magnitude of each group, fp32 [out, groups], of each linear (llm-awq).
    """

    path: Path
    info: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    scales: dict[tuple[str, str, tuple[str, ...]], FoundScale] = field(default_factory=dict)
    grids: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)

    def check_names(self, linears: Iterable[str], blocks: Iterable[str]) -> None:
        """Refuse a file with something for linears or blocks that the model does not have.

        Raises:
            SalienceError: naming one.
        """
        found = {*self.info.get("schemes", ()), *self.grids, *self.clips}
        unknown = found - set(linears)
        unknown |= {block for block, _, _ in self.scales} - set(blocks)
        if unknown:
            raise SalienceError(
                f"{self.path} is for {min(unknown)}, which the model does not have; use the "
                "model it was searched on"
            )

    def check_weights(self, block: str, digest: str) -> None:
        """Refuse weights that the search was not made on; `block` is "" for what is in none.

        Raises:
            SalienceError: naming the block.
        """
        # llm-awq's files say nothing of themselves.
        if self.info and self.digests.get(block) != digest:
            raise SalienceError(
                f"{self.path} was searched on other weights: {block or 'what is in no block'} "
                f"differs; use the model {self.info['model']}, or search anew"
            )

    def check_folds(self, block: str, folds: Sequence[Fold]) -> None:
        """Refuse scales that a block does not allow.

        Raises:
            SalienceError: naming the source and the sinks.
        """
        for owner, prev, sinks in self.scales:
            allowed = any(fold.prev == prev and set(sinks) <= set(fold.sinks) for fold in folds)
            if owner == block and not allowed:
                raise SalienceError(
                    f"{self.path} scales what goes from {block}.{prev} into {', '.join(sinks)}, "
                    "and the model does not allow that; search anew"
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
            # llm-awq clamps, then rounds: half a step from rounding at once to the narrower grid.
            codes=partial(self._clamped_codes, base) if self.clips else base.codes,
            reads_text=base.reads_moments_to_code,
            trusted=not base.reads_moments_to_code,
        )

    def _scales(self, problems: Sequence[Problem], fold: Fold) -> list[FoldScale | None]:
        weight = problems[0].weight
        found: list[FoldScale | None] = []
        for names in problems[0].names:
            block = _block_of(names[0], fold)
            own = next(
                (
                    scale
                    for (owner, prev, sinks), scale in self.scales.items()
                    if (owner, prev) == (block, fold.prev) and set(sinks) <= set(fold.sinks)
                ),
                None,
            )
            if own is None:
                found.append(None)
                continue
            if own.scales.shape != weight.shape[-1:]:
                raise SalienceError(
                    f"{self.path}: the scale of {names[0]} has {len(own.scales)} channels, the "
                    f"model {weight.shape[-1]}; it is of another model"
                )
            found.append(FoldScale(fold, own.scales.to(weight.device), own.alpha, own.beta))
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

    def _clamped_codes(self, base: Method, problem: Problem, grids: Grid) -> list[QTensor]:
        rows = [
            torch.cat(
                [self._clamped(n, w, problem.scheme) for n, w in zip(names, parts, strict=True)]
            )
            for names, parts in zip(
                problem.names,
                (weight.split(problem.rows) for weight in problem.weight),
                strict=True,
            )
        ]
        return base.codes(replace(problem, weight=torch.stack(rows)), grids)

    def _clamped(self, name: str, weight: Tensor, scheme: Scheme) -> Tensor:
        if name not in self.clips:
            return weight
        most = self.clips[name].to(weight.device)[..., None]
        return grid.grouped(weight, scheme).clamp(-most, most).flatten(1)

    def _grid(self, name: str, weight: Tensor, scheme: Scheme) -> Grid:
        shape = (weight.shape[0], scheme.groups(weight.shape[1]))
        if name in self.grids:
            scales, zeros = (t.to(weight.device) for t in self.grids[name])
            if scales.shape != shape or zeros.shape != shape:
                raise SalienceError(
                    f"{self.path}: the grid of {name} is {list(scales.shape)}, {scheme} wants "
                    f"{list(shape)}; it is of another model or scheme"
                )
            if zeros.max() > scheme.levels:
                raise SalienceError(f"{self.path}: a zero of {name} is beyond {scheme}'s codes")
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


def _block_of(name: str, fold: Fold) -> str:
    """The block of a linear that is a sink of `fold`, from its full name."""
    local = next(sink for sink in fold.sinks if name.endswith(f".{sink}"))
    return name[: -len(local) - 1]
