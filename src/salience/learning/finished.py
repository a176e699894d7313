"""Blocks that are done, as whoever loads the checkpoint will read them."""

from dataclasses import dataclass

from torch import Tensor

from salience.blocks.job import Job
from salience.checkpoint import Checkpoint
from salience.conversion import ModelWeights
from salience.formats import Reader, detect_format
from salience.qtensor import QTensor


@dataclass(frozen=True, slots=True, eq=False)
class FinishedBlock:
    """What is stored of a block, on the device.

    Args:
        linears: by local name.
        floats: all other parameters by local name, as they are stored.
    """

    linears: dict[str, QTensor]
    floats: dict[str, Tensor]


class Finished:
    """The quantized tensors of a model.

    Args:
        job: how the model was made.
        stored: the tensors, under the names they are stored by.
    """

    def __init__(self, job: Job, stored: Checkpoint) -> None:
        self._job = job
        packed = isinstance(job.weights, ModelWeights)
        self._stored: Checkpoint = ModelWeights(stored, job.skeleton) if packed else stored
        # The one that wrote them may be another: asymmetric GPTQ is read by its second version.
        config = job.fmt.config(job.schemes, job.float_names, job.outside, job.method.act_order)
        self.reader: Reader = detect_format(config)

    def block(self, index: int) -> FinishedBlock:
        """A block.

        Raises:
            StorageError: a damaged file.
        """
        job, name = self._job, self._job.block_name(index)
        linears, floats = {}, {}
        for local, _ in job.blocks[index].named_parameters():
            owner = local.removesuffix(".weight")
            if f"{name}.{owner}" in job.schemes and owner != local:
                linears[owner] = self.linear(f"{name}.{owner}")
            else:
                # A copy: what is read is a view of the file.
                floats[local] = self._stored.tensor(f"{name}.{local}").to(job.device, copy=True)
        return FinishedBlock(linears, floats)

    def linear(self, name: str) -> QTensor:
        """A quantized linear or embedding by its full name."""
        tensors = {
            local: self._stored.tensor(full).to(self._job.device)
            for local in self.reader.tensors
            if (full := f"{name}.{local}") in self._stored.names()
        }
        return self.reader.read(tensors, self._job.schemes[name])
