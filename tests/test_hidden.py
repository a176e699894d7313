"""Hidden states in memory and on the disk are the same, and are gone on from."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from salience.blocks import hidden as module
from salience.blocks.hidden import HiddenStates
from salience.blocks.journal import Journal
from salience.errors import StorageError

SHAPE, BATCH = (6, 5, 4), 2
PARTS = SHAPE[0] // BATCH


class KilledError(Exception):
    """Leaves a journal as it is."""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with pytest.raises(KilledError), Journal(tmp_path / "out", {}) as made:
        yield made
        raise KilledError


@pytest.fixture
def make(journal: Journal) -> Callable[[bool], HiddenStates]:
    return lambda on_disk: HiddenStates(journal, SHAPE, BATCH, torch.device("cpu"), on_disk)


def part(index: int, number: int) -> Tensor:
    """What enters block `index`."""
    generator = torch.Generator().manual_seed(100 * index + number)
    return torch.randn(BATCH, *SHAPE[1:], generator=generator)


def fill(hidden: HiddenStates) -> None:
    for number in range(PARTS):
        hidden.first(number, part(0, number))


def step(hidden: HiddenStates) -> None:
    """One block, as the engine does it: each part is read, then written."""
    index = hidden.index
    for number in range(PARTS):
        assert torch.equal(hidden.get(number), part(index, number))
        hidden.put(number, part(index + 1, number))
    hidden.advance()


def content(hidden: HiddenStates) -> Tensor:
    assert hidden.parts == PARTS
    return torch.cat([hidden.get(number) for number in range(PARTS)])


@pytest.mark.parametrize("on_disk", [True, False])
def test_values_and_order(make: Callable[[bool], HiddenStates], on_disk: bool) -> None:
    hidden = make(on_disk)
    fill(hidden)
    for index in range(4):
        assert hidden.index == index
        expected = torch.cat([part(index, number) for number in range(PARTS)])
        assert torch.equal(content(hidden), expected)
        assert content(hidden).dtype == torch.float32
        step(hidden)
    assert torch.equal(hidden.get(PARTS - 1), part(4, PARTS - 1))  # in any order
    assert torch.equal(hidden.get(0), part(4, 0))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("then", [True, False])
def test_going_on(
    make: Callable[[bool], HiddenStates],
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
    then: bool,
) -> None:
    """In either place, from either place."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    before = make(first)
    fill(before)
    step(before)
    step(before)
    journal.forget_hidden(2)
    assert len(list(journal.folder.glob("hidden-*"))) == 1
    assert journal.latest_hidden(5) == 2
    after = make(then)
    after.load(2)
    assert after.index == 2 and torch.equal(content(after), content(before))
    step(after)
    step(after)
    assert torch.equal(content(after), torch.cat([part(4, number) for number in range(PARTS)]))


@pytest.mark.parametrize("then", [True, False])
def test_a_block_that_was_not_finished(
    make: Callable[[bool], HiddenStates], journal: Journal, then: bool
) -> None:
    """A kill after some parts of its output: its input is whole, and the parts are done anew."""
    before = make(True)
    fill(before)
    step(before)
    before.put(0, torch.zeros(BATCH, *SHAPE[1:]))
    assert journal.latest_hidden(9) == 1
    after = make(then)
    after.load(1)
    step(after)
    step(after)


def test_copies_of_what_is_in_memory(
    make: Callable[[bool], HiddenStates], journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then, not for each block."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    hidden = make(False)
    fill(hidden)
    for index in range(1, 7):
        now += 25  # of 60 seconds
        step(hidden)
        assert journal.latest_hidden(9) == (None, None, None, 3, 3, 3, 6)[index]


def test_half_precision_is_widened(make: Callable[[bool], HiddenStates]) -> None:
    for on_disk in (True, False):
        hidden = make(on_disk)
        for number in range(PARTS):
            hidden.first(number, part(0, number).bfloat16())
        assert torch.equal(hidden.get(1), part(0, 1).bfloat16().float())


def test_disk_errors(make: Callable[[bool], HiddenStates], journal: Journal) -> None:
    journal.hidden_file(0).with_name("hidden-00000.bin.growing").mkdir()
    with pytest.raises(StorageError, match=r"writing .*hidden-00000\.bin failed"):
        make(True).first(0, part(0, 0))
    with pytest.raises(StorageError, match=r"hidden-00003\.bin"):
        make(False).load(3)
