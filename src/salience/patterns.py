"""Regular expressions that a checkpoint brings, matched only where that cannot take long.

Python's `re` tries one way to match after the other, and `(a+)+$` has 2**n of them on n letters.
The ways are counted before any is tried: each `*`, `+` or `{}` has at most one for each letter of
the name and one more, `?` has two, alternatives have one each, and what stands side by side
multiplies. Patterns of the tools ("re:.*self_attn.*proj$") have thousands; those that repeat a
group have no bound and are refused.
"""

import re
from collections.abc import Mapping
from functools import lru_cache

from salience.errors import SalienceError

_LONGEST = 10_000
_MOST_STEPS = 2 * 10**7  # of all patterns on one name: less than half a second
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?::|<?[=!]|P<\w+>))?|.", re.DOTALL)


def matching(targets: Mapping[str, str], name: str) -> list[str]:
    """Those of `targets` whose pattern matches the beginning of `name`.

    Args:
        targets: what stands in the config -> the regular expression in it.
        name: of a module.

    Raises:
        SalienceError: no regular expression, or one that could take long.
    """
    found = []
    steps = 0
    for target, pattern in targets.items():
        try:
            if len(pattern) <= _LONGEST:
                steps += _ways(pattern, len(name)) * len(pattern)
            if len(pattern) > _LONGEST or steps > _MOST_STEPS:
                raise SalienceError(
                    f"quantization_config has {target!r}, which may take too long to match; "
                    "repeat no groups in it, or name the modules in full"
                )
            if re.match(pattern, name) is not None:
                found.append(target)
        except (re.error, OverflowError, RecursionError) as error:
            raise SalienceError(
                f"quantization_config has {target!r}, which is no regular expression: {error}"
            ) from None
    return found


@lru_cache(4096)  # a checkpoint asks the same of each of its linears
def _ways(pattern: str, length: int) -> int:
    """At most how many ways there are to match a text of `length` letters."""
    outer: list[tuple[int, int]] = []  # what `done` and `ways` were before each open group
    done, ways = 0, 1  # of the alternatives before this one; of this one so far
    last, before = 1, ""  # ways of the last atom; the last token
    for token in _TOKEN.findall(pattern):
        quantifies = token in "*+?{"
        if quantifies and before in ("*", "+", "?"):
            pass  # lazy or possessive
        elif token == "?" and before == "(":
            return _MOST_STEPS + 1  # a flag or a condition: what follows may mean anything
        elif quantifies and token != "?" and last > 1:
            return _MOST_STEPS + 1
        elif quantifies:
            ways *= 2 if token == "?" else length + 1
        elif token.startswith("("):
            outer.append((done, ways))
            done, ways = 0, 1
        elif token == "|":
            done, ways = done + ways, 1
        elif token == ")" and outer:
            last = done + ways
            done, ways = outer.pop()
            ways *= last
        if not quantifies and token != ")":
            last = 1
        before = token
    return done + ways
