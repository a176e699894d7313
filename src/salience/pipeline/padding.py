"""A wider model that computes the same: zeros between the MLP's projections.

Where `intermediate_size` is odd (Qwen2-72B: 29568 = 231 groups of 128), no runtime can cut the rows
of `down_proj` over several GPUs at the ends of groups. With zeros it can be cut:

    gate, up   rows of zeros (and of their bias)     their outputs are 0, whatever comes in
    down       columns of zeros                      which add nothing

Nothing is known by name. Two skeletons are made, with the config's width and with the wider one;
what of them differs in shape is what has to be padded. A fused projection, whose rows are gate and
then up, is padded in each half. Then the proof: a block of each kind, with its real weights, must
compute the same with and without zeros.

Tensors are padded as they are read, so that nothing else in salience needs to know.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from salience.blocks.blockwise import record_inputs, run_block
from salience.blocks.job import Job
from salience.blocks.outside import embeddings_loaded
from salience.checkpoint import Checkpoint
from salience.conversion import ModelWeights
from salience.errors import SalienceError
from salience.folds import PROOF_TOLERANCE, relative_error
from salience.formats import get_format
from salience.methods import get_method
from salience.modules import find_blocks, linears
from salience.pipeline.engine import PROBE_SHAPE
from salience.planning.checks import check_source
from salience.source import Source

_KEY = "intermediate_size"


@dataclass(frozen=True)
class PaddedSource(Source):
    """A source with a larger `intermediate_size`. Make one with `pad`.

    Args:
        widths: as stored, and padded.
        shapes: of the model's tensors that are padded, by their names in the model.
    """

    widths: tuple[int, int] = (0, 0)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def config_values(self) -> dict[str, Any]:
        values = super().config_values()
        inner = self.config.get_text_config()
        keys = [key for key, value in vars(self.config).items() if value is inner]
        owner = values.setdefault(keys[0], {}) if keys else values
        owner[_KEY] = self.widths[1]
        return values

    def weights(self, model: nn.Module, lookups: bool = False) -> Checkpoint:
        if self.is_gguf:
            return PaddedCheckpoint(super().weights(model, lookups), self.shapes, self.widths)
        plain = ModelWeights(self.stored, model)
        stored = {plain.stored_names(name)[0]: shape for name, shape in self.shapes.items()}
        return ModelWeights(PaddedCheckpoint(self.stored, stored, self.widths), model)


class PaddedCheckpoint:
    """Another checkpoint with zeros in some tensors.

    Args:
        inner: the tensors as stored.
        shapes: of those to pad.
        widths: as stored, and padded.
    """

    def __init__(
        self, inner: Checkpoint, shapes: Mapping[str, tuple[int, ...]], widths: tuple[int, int]
    ) -> None:
        self.path = inner.path
        self._inner, self._shapes, self._widths = inner, shapes, widths

    def names(self) -> set[str]:
        return self._inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name, self._inner.shape(name))

    def nbytes(self, name: str) -> int:
        stored = self._inner.nbytes(name)
        before, after = self._widths
        return stored * after // before if name in self._shapes else stored

    def tensor(self, name: str) -> Tensor:
        tensor = self._inner.tensor(name)
        if name not in self._shapes:
            return tensor
        before, after = self._widths
        for axis, (size, wanted) in enumerate(zip(tensor.shape, self._shapes[name], strict=True)):
            if size != wanted:
                parts = tensor.unflatten(axis, (size // before, before))
                zeros = parts.new_zeros(
                    [*parts.shape[: axis + 1], after - before, *parts.shape[axis + 2 :]]
                )
                tensor = torch.cat((parts, zeros), axis + 1).flatten(axis, axis + 1)
        return tensor


def pad(
    source: Source, multiple: int, device: torch.device, prove: bool = True
) -> tuple[Source, tuple[int, int] | None]:
    """A source whose `intermediate_size` is a multiple, proved to compute the same.

    Args:
        source: a float model.
        multiple: what shall divide it.
        device: where blocks run.
        prove: without it no weights are read, and nothing is proved.

    Returns:
        The padded source and its width before and after; the source itself and None where nothing
        has to be done.

    Raises:
        SalienceError: a model without that width, or where zeros change the result.
    """
    option = f"--pad-intermediate {multiple}"
    if multiple < 1:
        raise SalienceError(f"{option} is no width; use a multiple of the group size")
    width = getattr(source.config.get_text_config(), _KEY, None)
    if not isinstance(width, int) or width < 1:
        raise SalienceError(f"{option}: the config of {source.name} has no {_KEY}; leave it out")
    wider = -(-width // multiple) * multiple
    if wider == width:
        return source, None
    model = source.skeleton()
    check_source(source, model, source.weights(model))
    padded = _padded(source, (width, wider), option)
    if prove:
        _prove(source, padded, device, option)
    return padded, padded.widths


def _padded(source: Source, widths: tuple[int, int], option: str) -> PaddedSource:
    """The padded source, by what differs between skeletons of the two widths."""
    config = deepcopy(source.config)
    setattr(config.get_text_config(), _KEY, widths[1])
    own = {each.name: getattr(source, each.name) for each in fields(Source)}
    padded = PaddedSource(**{**own, "config": config}, widths=widths)
    model, wide = source.skeleton(), padded.skeleton()
    prefix, blocks = find_blocks(model)
    known = {f"{prefix}.{name}" for name in linears(blocks)}
    weights = source.weights(model)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    after = {name: tuple(p.shape) for name, p in wide.named_parameters()}
    if before.keys() != after.keys():
        raise SalienceError(f"{option}: with another {_KEY} {source.name} has other tensors")
    shapes = {name: after[name] for name in before if before[name] != after[name]}
    for name, wanted in shapes.items():
        sizes = [(a, b) for a, b in zip(before[name], wanted, strict=True) if a != b]
        scaled = all(a % widths[0] == 0 and a // widths[0] * widths[1] == b for a, b in sizes)
        if name.rpartition(".")[0] not in known or len(sizes) != 1 or not scaled:
            raise SalienceError(f"{option}: {name} has that width, too, and is no linear to pad")
        if isinstance(weights, ModelWeights) and not weights.is_as_stored(name):
            raise SalienceError(f"{option}: {name} is not stored as one tensor; leave it out")
    if not shapes:
        raise SalienceError(f"{option}: no linear of {source.name} has the width {widths[0]}")
    return PaddedSource(**{**own, "config": config}, widths=widths, shapes=shapes)


@torch.no_grad()
def _prove(source: Source, padded: Source, device: torch.device, option: str) -> None:
    """Run a block of each kind with its real weights, without zeros and with them.

    Raises:
        SalienceError: the outputs differ.
    """
    plain, wide = _job(source, device), _job(padded, device)
    hidden: list[Tensor] = []
    with embeddings_loaded(plain):
        vocabulary = plain.skeleton.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocabulary, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
        arguments = record_inputs(
            plain.skeleton,
            plain.blocks,
            tokens,
            len(tokens),
            device,
            lambda _, part: hidden.append(part),
        )
    seen = set()
    for index, block in enumerate(plain.blocks):
        kind = (type(block), *((name, p.shape) for name, p in block.named_parameters()))
        if kind in seen:
            continue
        seen.add(kind)
        with plain.loaded(index) as narrow:
            expected = run_block(narrow, hidden[0], arguments.of(index, 0))
        with wide.loaded(index) as other:
            found = run_block(other, hidden[0], arguments.of(index, 0))
        if not relative_error(found, expected) <= PROOF_TOLERANCE:
            name = plain.block_name(index)
            raise SalienceError(f"{option}: zeros change what {name} computes; leave it out")


def _job(source: Source, device: torch.device) -> Job:
    """Enough of a job to load blocks."""
    skeleton = source.skeleton()
    prefix, blocks = find_blocks(skeleton)
    return Job(
        source=source,
        skeleton=skeleton,
        weights=source.weights(skeleton),
        prefix=prefix,
        blocks=blocks,
        method=get_method("rtn", "fast"),
        schemes={},
        fmt=get_format("awq"),
        device=device,
    )
