"""Which linear gets which scheme: a default for the blocks, and a table of exceptions.

    scheme   w4g128                      every linear of the decoder's blocks
    rules    "down_proj$" -> w8g128      the first pattern found in a name wins; rules also reach
             "^lm_head$"  -> w8g128      linears outside the blocks and embeddings, which are
                                         otherwise left float
    skip     "layers\\.0\\."              stays float, whatever else is said
    only     "mlp"                       what it does not match stays float

Patterns are regular expressions, searched for anywhere in the full module name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from salience.errors import SalienceError
from salience.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Recipe:
    """How each module is coded.

    Args:
        scheme: of linears inside the blocks.
        rules: (pattern, scheme) pairs, the first match first.
        skip: patterns of modules that stay float.
        only: patterns, one of which a module must match unless there are none.

    Raises:
        SalienceError: a pattern that is no regular expression.
    """

    scheme: Scheme = field(default_factory=Scheme)
    rules: tuple[tuple[str, Scheme], ...] = ()
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*(p for p, _ in self.rules), *self.skip, *self.only):
            try:
                re.compile(pattern)
            except (re.error, OverflowError) as error:
                raise SalienceError(
                    f"pattern {pattern!r} is no regular expression: {error}"
                ) from None

    def scheme_of(self, name: str, inside: bool) -> Scheme | None:
        """The scheme of module `name`, None to keep it float.

        Args:
            name: full module path.
            inside: whether it is in the decoder's blocks, where the default holds.
        """
        if any(re.search(pattern, name) for pattern in self.skip):
            return None
        if self.only and not any(re.search(pattern, name) for pattern in self.only):
            return None
        for pattern, scheme in self.rules:
            if re.search(pattern, name):
                return scheme
        return self.scheme if inside else None

    def resolve(
        self, names: Sequence[str], prefix: str, floats: Mapping[str, str] | None = None
    ) -> dict[str, Scheme]:
        """The scheme of each module to quantize.

        Args:
            names: full names of all modules that could be.
            prefix: name of the list of blocks.
            floats: full names of modules that stay float in any case, with the reason.

        Raises:
            SalienceError: a pattern that matches none of them, or nothing left to quantize.
        """
        for pattern in (*(p for p, _ in self.rules), *self.skip, *self.only):
            if any(re.search(pattern, name) for name in names):
                continue
            for name, reason in (floats or {}).items():
                if pattern not in self.skip and re.search(pattern, name):
                    raise SalienceError(
                        f"pattern {pattern!r} asks for {name}, which cannot be quantized yet "
                        f"({reason}); leave it out, and it stays float"
                    )
            raise SalienceError(f"pattern {pattern!r} matches no linear of the model")
        found = {}
        for name in names:
            scheme = self.scheme_of(name, name.startswith(f"{prefix}."))
            if scheme is not None:
                found[name] = scheme
        if not found:
            raise SalienceError("the patterns leave no linear to quantize")
        return found

    def describe(self) -> dict[str, object]:
        """As plain JSON values, for reports and journals."""
        return {
            "scheme": str(self.scheme),
            "rules": [[pattern, str(scheme)] for pattern, scheme in self.rules],
            "skip": list(self.skip),
            "only": list(self.only),
        }
