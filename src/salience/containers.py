"""Which file the tensors of a format go into: safetensors shards, or one GGUF file.

What writes a checkpoint asks here for its writer and then adds tensors to it one by one, under the
names of the source and the local names of the format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from salience.checkpoint import Checkpoint, GgufCheckpoint
from salience.conversion import ModelWeights
from salience.formats import Format
from salience.gguf.metadata import architecture
from salience.gguf.tokenizer import check_tokenizer
from salience.gguf.writer import GgufWriter
from salience.source import Source
from salience.writer import ShardWriter


class Writer(Protocol):
    """Takes a checkpoint's tensors and JSON files."""

    def add(self, name: str, tensor: Tensor) -> int:
        """Take one tensor; returns the bytes it is stored in."""
        ...

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file into the checkpoint."""
        ...

    def finish(self) -> None:
        """Put everything on the disk."""
        ...


def check_container(fmt: Format, source: Source) -> None:
    """Refuse a model that the container of a format has no place for, before any work.

    Raises:
        SalienceError: naming the architecture or the tokenizer.
    """
    if fmt.container == "gguf":
        architecture(source.config)
        if not isinstance(source.stored, GgufCheckpoint):
            check_tokenizer(source.path)


def make_writer(
    fmt: Format,
    folder: Path,
    source: Source,
    model: Any,
    weights: Checkpoint,
    config: Mapping[str, Any],
) -> Writer:
    """A writer for checkpoints of a format.

    Args:
        fmt: whose tensors will come.
        folder: of the checkpoint, which holds config.json and the tokenizer's files
            (`Source.save_assets`) already.
        source: the model's.
        model: its skeleton.
        weights: the source's tensors under the names of the skeleton.
        config: what is in that config.json.
    """
    if fmt.container == "safetensors":
        return ShardWriter(folder)
    aliases = {}
    if isinstance(weights, ModelWeights):
        names = list(model.state_dict())
        aliases = {stored: name for name in names for stored in weights.stored_names(name)}
    vocabulary_of = source.stored if isinstance(source.stored, GgufCheckpoint) else None
    return GgufWriter(
        folder, source.config, model, config, source.path.stem, aliases, vocabulary_of
    )
