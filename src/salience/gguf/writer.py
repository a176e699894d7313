"""One `model.gguf`, written tensor by tensor as they come.

    magic, version, counts | metadata | name, shape, type, offset of each tensor | data

The table of tensors comes before the data, and which type a tensor gets is known only when it is
there. But the model says which tensors come and of what shapes, and a type or an offset takes the
same bytes whatever it is. So room is left for the table, data goes to the disk as it comes, and the
table is filled in last: memory stays flat and nothing is written twice.

Floats are fp16, bf16 or fp32, the first that holds them exactly; norms and biases are fp32
(llama.cpp computes with no other). The head and the embeddings are no exception: what the scheme
does not name stays exact, so that a checkpoint can be converted to GGUF and back. Who wants them
smaller names them, as llama.cpp's users mostly do: `--rule "lm_head|embed_tokens=w8g32-sym"` makes
them Q8_0, half the size.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from salience.checkpoint import CONFIG_KEY, GgufCheckpoint, read_json
from salience.errors import SalienceError
from salience.gguf.metadata import (
    Value,
    architecture,
    file_type,
    hyperparameters,
    rope_factors,
)
from salience.gguf.tokenizer import is_sentencepiece, vocabulary
from salience.writer import disk_errors, holds, sync, write_json

FILE_NAME = "model.gguf"
_BLOCKS = ".blocks"
_F32 = 0
_FLOAT_TYPES = {torch.float16: 1, torch.bfloat16: 30}
_BLOCK_TYPES = {18: 2, 20: 3, 34: 8}  # Q4_0, Q4_1, Q8_0
_BLOCK = 32
_ALIGNMENT = 32
_ROPE = "rope_freqs.weight"


class GgufWriter:
    """Write a checkpoint's tensors into `model.gguf` and its other files beside it.

    Args:
        folder: holds config.json and the tokenizer's files already.
        config: the model's Transformers config.
        model: the Transformers model, which may be on meta: its tensors are those of the file.
        values: the content of that config.json.
        name: of the model, for people.
        aliases: model's name of tensors that will come by another.
        vocabulary_of: a GGUF file whose tokenizer to take over; None to read the folder's.

    Raises:
        SalienceError: a model that llama.cpp does not run, or a tokenizer it has no words for.
        StorageError: the disk is full or not writable.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        model: Any,
        values: Mapping[str, Any],
        name: str,
        aliases: Mapping[str, str],
        vocabulary_of: GgufCheckpoint | None = None,
    ) -> None:
        self.folder = folder
        self._config = config
        self._arch = architecture(config)
        self._aliases = aliases
        tied = bool(values.get("tie_word_embeddings", config.tie_word_embeddings))
        self._names = _tensor_names(self._arch, model, tied)
        self._shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self._infos: dict[str, bytes] = {}
        self._expected = {gguf: len(self._shapes[hf]) for hf, gguf in self._names.items()}
        factors = rope_factors(config)
        if factors is not None:
            self._expected[_ROPE] = 1
        scheme = (values.get("quantization_config") or {}).get("scheme")
        metadata = hyperparameters(config, name) | {"general.file_type": file_type(scheme)}
        metadata |= {CONFIG_KEY: json.dumps(values, ensure_ascii=False)}
        with disk_errors(folder):
            self._file = _write_header(
                folder, self._arch, metadata, len(self._expected), config.vocab_size, vocabulary_of
            )
            self._table = self._file.tell()
            size = sum(8 + len(name) + 16 + 8 * ndim for name, ndim in self._expected.items())
            self._file.write(bytes(size))
            self._pad()
            self._data = self._file.tell()
        if factors is not None:
            self._write(_ROPE, factors, factors.shape, _F32)

    def add(self, name: str, tensor: Tensor) -> int:
        """Write one tensor, now: blocks as they are, anything else as floats. Returns its bytes.

        Raises:
            SalienceError: a name or a shape that the model does not have.
        """
        owner = name.removesuffix(_BLOCKS)
        owner = self._aliases.get(owner, owner)
        if owner not in self._names:
            raise SalienceError(f"tensor {name} has no place in a GGUF file of {self._arch}")
        stored, shape = self._names[owner], self._shapes[owner]
        tensor = self._arrange(stored, tensor.detach().cpu())
        if name.endswith(_BLOCKS):
            kind = _BLOCK_TYPES[tensor.shape[-1]]
        elif tuple(tensor.shape) != shape:
            raise SalienceError(f"tensor {name} is {list(tensor.shape)}, not {list(shape)}")
        elif tensor.ndim == 1:
            shift = self._arch == "gemma3" and stored.endswith("norm.weight")
            tensor, kind = tensor.float() + shift, _F32
        else:
            tensor, kind = _exact(tensor)
        self._write(stored, tensor, shape, kind)
        return tensor.nbytes

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file beside the GGUF file."""
        write_json(self.folder / name, value)

    def finish(self) -> None:
        """Fill in the table and put everything on the disk.

        Raises:
            SalienceError: a tensor of the model that did not come.
        """
        missing = self._expected.keys() - self._infos.keys()
        if missing:
            raise SalienceError(f"tensor {min(missing)} of {self.folder / FILE_NAME} did not come")
        with disk_errors(self.folder):
            self._file.seek(self._table)
            self._file.write(b"".join(self._infos.values()))
            self._file.close()
            for file in self.folder.rglob("*"):
                if file.is_file():
                    sync(file)
            sync(self.folder)

    def _arrange(self, stored: str, tensor: Tensor) -> Tensor:
        """llama.cpp rotates neighbours where Transformers rotates halves: rows of q and k move."""
        part = stored.split(".")[-2]
        if self._arch != "llama" or part not in ("attn_q", "attn_k"):
            return tensor
        config = self._config
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        return permute_rows(tensor, heads)

    def _write(self, name: str, tensor: Tensor, shape: tuple[int, ...], kind: int) -> None:
        if name in self._infos:
            raise SalienceError(f"tensor {name} of {self.folder / FILE_NAME} came twice")
        offset = self._file.tell() - self._data
        text = name.encode()
        self._infos[name] = struct.pack(
            f"<Q{len(text)}sI{len(shape)}QIQ",
            len(text), text, len(shape), *reversed(shape), kind, offset,
        )  # fmt: skip
        with disk_errors(self.folder):
            self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._pad()

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))


def _exact(tensor: Tensor) -> tuple[Tensor, int]:
    """Floats in the first type that holds them."""
    for dtype, kind in _FLOAT_TYPES.items():
        if holds(dtype, tensor):
            return tensor.to(dtype), kind
    return tensor.float(), _F32


def permute_rows(tensor: Tensor, heads: int) -> Tensor:
    """Rows (half, i) of each head [heads * d, ...] in the order (i, half)."""
    rows = tensor.unflatten(0, (heads, 2, -1))
    return rows.transpose(1, 2).flatten(0, 2)


def _tensor_names(arch: str, model: Any, tied: bool) -> dict[str, str]:
    """The file's name of each tensor of the model; a tied head is not there."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for name in model.state_dict():
        if tied and name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise SalienceError(f"tensor {name} has no place in a GGUF file of {arch}")
        found[name] = stored
    return found


def _write_header(
    folder: Path,
    arch: str,
    metadata: Mapping[str, Value],
    tensors: int,
    tokens: int,
    vocabulary_of: GgufCheckpoint | None,
) -> Any:
    """Begin the file; returns it, open, where the table of tensors is to come."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(folder / FILE_NAME, arch)
    for key, value in metadata.items():
        writer.add_key_value(key, value, _kind(value))
    if vocabulary_of is not None:
        for key, field in vocabulary_of.fields("tokenizer.").items():
            kind = gguf.GGUFValueType(field.kind)
            of = None if field.of is None else gguf.GGUFValueType(field.of)
            writer.add_key_value(key, field.value(), kind, of)
    else:
        for key, value in vocabulary(folder, tokens).items():
            writer.add_key_value(key, value, _kind(value))
        merges = not is_sentencepiece(read_json(folder / "tokenizer.json"))
        special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=tokens)
        special.add_to_gguf(writer, quiet=True)
    for i in range(tensors):  # only their number is written here
        f32 = gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(str(i), (), numpy.dtype("f4"), 0, f32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    return cast(list[Any], writer.fout)[0]


def _kind(value: Value) -> Any:
    """llama.cpp wants numbers unsigned."""
    import gguf

    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)
