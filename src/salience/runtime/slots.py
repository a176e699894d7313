"""Which slot a prompt goes to, and how much of it is there already.

A slot keeps its tokens after its reply. A prompt goes where most of it is in the cache, so the next
turn of a talk is prefilled from its new text on. Where that slot is taken, or holds a much longer
text that another turn may want, the part that both share is copied.

A step is computed for the first 1, 4, 16 or all slots, so replies are made in the first slots that
are free, and what such a slot holds moves to one that was not used for longer: copying what is in
the cache takes a small part of the time of computing it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from salience.runtime.graphs import bucket
from salience.runtime.request import Request

_WORTH_A_COPY = 16  # tokens


@dataclass(slots=True)
class Slot:
    """One place of the cache."""

    index: int
    request: Request | None = None
    tokens: list[int] = field(default_factory=list)  # in the cache, when there is no request
    used: int = 0  # when it was last given out

    @property
    def held(self) -> list[int]:
        """The tokens whose keys and values are known to be in the cache."""
        if self.request is None:
            return self.tokens
        prompt = self.request.prompt[: self.request.filled]
        return [*prompt, *self.request.tokens[:-1]]

    @property
    def filling(self) -> bool:
        """Whether a step is to compute a part of a prompt."""
        request = self.request
        return request is not None and request.filled < len(request.prompt) and request.ready

    @property
    def missing(self) -> int:
        """How many tokens of the prompt are not in the cache."""
        return 0 if self.request is None else len(self.request.prompt) - self.request.filled

    @property
    def running(self) -> bool:
        """Whether a step is to make a token."""
        request = self.request
        return request is not None and 0 < request.launched < request.room and request.ready

    @property
    def position(self) -> int:
        """Where the next token is written."""
        if self.request is None:
            return len(self.tokens)
        return self.request.filled + max(self.request.launched - 1, 0)

    def release(self, keep: bool) -> None:
        """Let go of the request; its tokens stay in the cache, or do not."""
        self.tokens, self.request = (self.held if keep else []), None


@dataclass(frozen=True, slots=True)
class Placed:
    """A slot for a prompt: so many tokens of it are in the cache of `source`.

    What the slot holds now moves to `spare` before, unless that is None. Where that is the source,
    the two change places.
    """

    slot: Slot
    source: Slot
    cached: int
    spare: Slot | None = None


def place(slots: Sequence[Slot], prompt: Sequence[int]) -> Placed | None:
    """The slot for a prompt; None when all are taken."""
    free = [slot for slot in slots if slot.request is None]
    if not free:
        return None
    rows = {slot.index: bucket(slot.index + 1, len(slots)) for slot in free}
    fewest = min(rows.values())
    first = [slot for slot in free if rows[slot.index] == fewest]
    # The last token is computed in any case, for its logits.
    shared = {slot.index: _shared(slot.held, prompt[:-1]) for slot in slots}
    best = max(slots, key=lambda slot: (shared[slot.index], rows.get(slot.index) == fewest))
    cached = shared[best.index]
    if best in first and 2 * cached >= len(best.tokens) > 0:
        return Placed(best, best, cached)
    target = min(first, key=lambda slot: (slot.used, slot.index))
    own = shared[target.index]
    if cached - own < _WORTH_A_COPY:
        best, cached = target, own
    spare = None
    if len(target.tokens) >= max(_WORTH_A_COPY, 2 * own + 1):
        older = [slot for slot in free if slot not in first and slot.used < target.used]
        if best in older and 2 * cached >= len(best.tokens):
            spare = best  # most of which moves on
        else:
            older = [slot for slot in older if slot is not best]
            spare = min(older, key=lambda slot: (slot.used, slot.index), default=None)
    return Placed(target, best, cached, spare)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest beginning that both have."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
