"""What is wrong, how badly, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing about a checkpoint.

    Args:
        severity: "error" for what does not load or answers nonsense, "warning" for what may, "note"
            for what is as it is.
        where: names of the linears, tensors or files.
        problem: what is wrong, alike for all of them.
        mend: what to do.
    """

    severity: str
    where: tuple[str, ...]
    problem: str
    mend: str


def sorted_complaints(found: Iterable[Complaint]) -> list[Complaint]:
    """Those of one problem together, the worst first."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for each in found:
        key = (each.severity, each.problem, each.mend)
        places.setdefault(key, []).extend(each.where)
    merged = [
        Complaint(severity, tuple(dict.fromkeys(where)), problem, mend)
        for (severity, problem, mend), where in places.items()
    ]
    return sorted(merged, key=lambda each: SEVERITIES.index(each.severity))
