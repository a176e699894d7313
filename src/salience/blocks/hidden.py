"""The hidden states of all calibration sequences on their way from block to block.

They are the one thing in memory that grows with the calibration text: samples x seqlen x hidden
floats. Where that is too much they stay on the disk, in the journal's folder, and are read and
written a micro-batch at a time (by plain reads, so that the memory they take is the operating
system's to give and take). Where they fit they stay on the device, and a copy is put on the disk
now and then: what a kill costs is the forward passes since.
"""

import math
import time

import numpy
import torch
from torch import Tensor

from salience.blocks.journal import Journal
from salience.errors import StorageError
from salience.writer import disk_errors, sync

SAVE_SECONDS = 60.0


class HiddenStates:
    """fp32 [samples, seqlen, ..., hidden], in micro-batches; they enter block `index`.

    A few models have several streams of them, hence the dots.

    Args:
        journal: where they are kept on the disk.
        shape: of all.
        batch: sequences in a micro-batch; it divides the samples.
        device: where micro-batches are wanted.
        on_disk: do not hold them in memory.
        kind: what their files are called; several live side by side.
    """

    def __init__(
        self,
        journal: Journal,
        shape: tuple[int, ...],
        batch: int,
        device: torch.device,
        on_disk: bool,
        kind: str = "hidden",
    ) -> None:
        self.index = 0
        self._kind = kind
        self._journal, self._shape, self._batch, self._device = journal, shape, batch, device
        self._tensor = None if on_disk else torch.empty(shape, device=device)
        self._saved_at = time.monotonic()

    @property
    def parts(self) -> int:
        """How many micro-batches there are."""
        return self._shape[0] // self._batch

    def resume(self, before: int) -> bool:
        """Go on from the latest that are on the disk and enter a block up to `before`, if any."""
        index = self._journal.latest_hidden(before, self._kind)
        if index is not None:
            self.load(index)
        return index is not None

    def forget(self, done: int) -> None:
        """Delete what going on after `done` blocks would not read."""
        self._journal.forget_hidden(done, self._kind)

    def load(self, index: int) -> None:
        """Go on from hidden states that are on the disk."""
        self.index = index
        if self._tensor is not None:
            for part in range(self.parts):
                self._tensor[part * self._batch : (part + 1) * self._batch] = self._read(part)

    def first(self, part: int, hidden: Tensor) -> None:
        """Keep micro-batch `part` of what enters the first block; parts come in order."""
        self._keep(0, part, hidden)

    def get(self, part: int) -> Tensor:
        """Micro-batch `part`, [batch, seqlen, ..., hidden] on the device."""
        if self._tensor is not None:
            return self._tensor[part * self._batch : (part + 1) * self._batch]
        return self._read(part).to(self._device)

    def put(self, part: int, hidden: Tensor) -> None:
        """Micro-batch `part` of the block's output; parts come in order."""
        self._keep(self.index + 1, part, hidden)

    def advance(self) -> None:
        """All parts of the block's output were put: they now enter the next block."""
        self.index += 1
        if self._tensor is not None and time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._journal.save_hidden(self.index, self._tensor, self._kind)
            self._saved_at = time.monotonic()

    def _read(self, part: int) -> Tensor:
        shape = (self._batch, *self._shape[1:])
        count = math.prod(shape)
        file = self._journal.hidden_file(self.index, self._kind)
        with disk_errors(file):
            values = numpy.fromfile(file, numpy.float32, count, offset=4 * part * count)
        if len(values) != count:
            raise StorageError(f"{file} is too short; delete {file.parent} to start over")
        return torch.from_numpy(values).view(shape)

    def _keep(self, index: int, part: int, hidden: Tensor) -> None:
        if self._tensor is not None:
            self._tensor[part * self._batch : (part + 1) * self._batch] = hidden
            return
        file = self._journal.hidden_file(index, self._kind)
        growing = file.with_name(f"{file.name}.growing")
        with disk_errors(file):
            with growing.open("ab" if part else "wb") as stream:
                stream.write(hidden.float().cpu().contiguous().numpy().data)
            if part == self.parts - 1:
                sync(growing)
                growing.rename(file)
