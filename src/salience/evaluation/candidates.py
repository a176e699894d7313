"""What is compared: checkpoints, and recipes to be made on the fly.

    MODEL                a folder, a .gguf file, a Hub name, as everywhere
    MODEL@w4g64:awq      MODEL quantized: scheme and method
    MODEL@nf4            a scheme that has one method
    MODEL@awq, @awq      a method with each scheme of --scheme, of MODEL or of the reference

Methods are those of `quantize`, and its efforts by their names: `fast` is AWQ's, `balanced` is
AWQ's scales with GPTQ's codes, `best` is these codes learned, and the whole then tuned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salience.errors import SalienceError
from salience.methods import EFFORTS, METHODS
from salience.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model of a comparison.

    Args:
        name: in tables, unlike all others.
        model: what is loaded, or quantized.
        recipe: how it is quantized first; None for a checkpoint.
    """

    name: str
    model: str
    recipe: "MadeBy | None" = None


@dataclass(frozen=True, slots=True)
class MadeBy:
    """How a candidate is made: `quantize`'s options of these names."""

    scheme: str
    method: str
    effort: str

    @property
    def format(self) -> str:
        """One that holds all schemes of the kind."""
        codebook = Scheme.parse(self.scheme).codebook
        return "compressed-tensors" if codebook is None else "bitsandbytes"

    def __str__(self) -> str:
        if self.method == "nf4":
            return self.scheme
        return f"{self.effort if self.effort != 'fast' else self.method} {self.scheme}"


def parse_candidates(texts: Sequence[str], schemes: Sequence[str]) -> list[Candidate]:
    """The models of a comparison, the reference first.

    Args:
        texts: as they were given.
        schemes: of the methods that name none.

    Raises:
        SalienceError: fewer than two, one that is not understood, or one that is there twice.
    """
    found: list[Candidate] = []
    for text in texts:
        model, recipes = _parse(text, schemes)
        if not model and not found:
            raise SalienceError(
                f"{text} names no model, and the first MODEL is the reference; put it before"
            )
        origin = model or found[0].model
        if not found and len(recipes) > 1:
            raise SalienceError(f"{text} is several models; the first is the reference, one")
        for recipe in recipes:
            own = str(recipe) if recipe is not None else ""
            if found and recipe is not None and origin == found[0].model:
                name = own
            else:
                name = " ".join(part for part in (_short(origin), own) if part)
            found.append(Candidate(name, origin, recipe))
    if len(found) < 2:
        raise SalienceError("compare needs a reference and at least one other MODEL")
    seen: dict[tuple[str, MadeBy | None], str] = {}
    for each in found:
        if (each.model, each.recipe) in seen:
            raise SalienceError(f"{each.name} is there twice; leave one out")
        seen[each.model, each.recipe] = each.name
    return _distinct(found)


def _parse(text: str, schemes: Sequence[str]) -> tuple[str, list[MadeBy | None]]:
    model, at, recipe = text.rpartition("@")
    if not at or Path(text).exists():
        return text, [None]
    first, colon, method = recipe.partition(":")
    if colon:
        return model, [_made_by(text, Scheme.parse(first), method)]
    if first in _methods() and first != "nf4":
        if not schemes:
            raise SalienceError(
                f"{text} names no scheme; pass --scheme, or {text[: -len(first)]}w4g64:{first}"
            )
        return model, [_made_by(text, Scheme.parse(scheme), first) for scheme in schemes]
    scheme = Scheme.parse(first)
    return model, [_made_by(text, scheme, "awq" if scheme.codebook is None else "nf4")]


def _made_by(text: str, scheme: Scheme, method: str) -> MadeBy:
    if method not in _methods():
        raise SalienceError(f"{text}: there is no method {method!r}; use {' or '.join(_methods())}")
    if (scheme.codebook is None) == (method == "nf4"):
        raise SalienceError(f"{text}: method {method} makes no {scheme}")
    effort = method if method in EFFORTS else "fast"
    return MadeBy(str(scheme), "awq" if method in EFFORTS else method, effort)


def _methods() -> list[str]:
    return [*(method.name for method in METHODS), *EFFORTS]


def _short(model: str) -> str:
    return Path(model).name or model


def _distinct(found: list[Candidate]) -> list[Candidate]:
    """Candidates of one name, told apart by where they are."""
    names = [each.name for each in found]
    return [
        each
        if names.count(each.name) == 1
        else Candidate(f"{each.model} {each.recipe or ''}".strip(), each.model, each.recipe)
        for each in found
    ]
