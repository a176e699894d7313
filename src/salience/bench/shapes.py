"""Models of published sizes with random weights, for what depends on no weight: time and memory.

A shape is the config of a model. `build` makes it in place: the skeleton lies on the meta device,
and each linear of the blocks becomes a `QuantLinear` straight away, so that no float copy of the
model ever exists. One weight of each size is packed, and the others are copies of it: other memory,
the same numbers. `write_checkpoint` puts a float model of a shape on the disk, shard by shard, for
what reads files.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from salience.bench.measure import weight_bytes
from salience.bench.weights import random_weight
from salience.checkpoint import read_json
from salience.errors import SalienceError
from salience.linear import QuantEmbedding, QuantLinear, packed_bytes
from salience.loading import set_tensor
from salience.machine import free_disk_bytes, release_memory
from salience.modules import bias_of, codable, find_blocks, kept, linears, weight_of
from salience.recipe import Recipe
from salience.scheme import Scheme, fitting_group_sizes
from salience.source import config_of, skeleton


def _shape(
    kind: str,
    vocabulary: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        **more,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# As their config.json on the Hub has it.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape(
        "llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, **_rope(1e5),
        max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "tinyllama-1.1b": _shape(
        "llama", 32000, 2048, 5632, 22, 32, 4, **_rope(1e4),
        max_position_embeddings=2048, rms_norm_eps=1e-5,
    ),
    "llama-2-7b": _shape(
        "llama", 32000, 4096, 11008, 32, 32, 32, **_rope(1e4),
        max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "llama-2-13b": _shape(
        "llama", 32000, 5120, 13824, 40, 40, 40, **_rope(1e4),
        max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "llama-3-8b": _shape(
        "llama", 128256, 4096, 14336, 32, 32, 8, **_rope(5e5),
        max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "llama-3-70b": _shape(
        "llama", 128256, 8192, 28672, 80, 64, 8, **_rope(5e5),
        max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "mistral-7b": _shape(
        "mistral", 32768, 4096, 14336, 32, 32, 8, **_rope(1e6), sliding_window=None,
        max_position_embeddings=32768, rms_norm_eps=1e-5, head_dim=128,
    ),
    "qwen2.5-0.5b": _shape(
        "qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True, **_rope(1e6),
        max_position_embeddings=32768, rms_norm_eps=1e-6,
    ),
    "qwen2.5-7b": _shape(
        "qwen2", 152064, 3584, 18944, 28, 28, 4, **_rope(1e6),
        max_position_embeddings=32768, rms_norm_eps=1e-6,
    ),
    "qwen2.5-32b": _shape(
        "qwen2", 152064, 5120, 27648, 64, 40, 8, **_rope(1e6),
        max_position_embeddings=32768, rms_norm_eps=1e-6,
    ),
    "qwen3-8b": _shape(
        "qwen3", 151936, 4096, 12288, 36, 32, 8, **_rope(1e6),
        max_position_embeddings=40960, rms_norm_eps=1e-6, head_dim=128,
    ),
}  # fmt: skip


_PACKING_BYTES = 10  # for each code of a weight, while it is packed
_SHARD_BYTES = 2**29


def shape_config(name: str, layers: int | None = None) -> Any:
    """The Transformers config of a shape.

    Args:
        name: a key of `SHAPES`, or the path of a config.json.
        layers: how many blocks, None for as many as the model has.

    Raises:
        SalienceError: an unknown shape or architecture.
    """
    if name in SHAPES:
        values = dict(SHAPES[name])
    elif name.endswith(".json"):
        values = read_json(Path(name))
    else:
        known = ", ".join(SHAPES)
        raise SalienceError(f"there is no shape {name!r}; use {known}, or a config.json")
    config = config_of(values, name)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1] * layers
    return config


def needed_bytes(
    model: Any, scheme: Scheme | None, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """What a skeleton will take on a device: its weights, and while they are made beside them.

    Args:
        model: on meta.
        scheme: of the linears in its blocks; None leaves them float.
        dtype: of everything float.
        device: where it is to be.

    Raises:
        SalienceError: a scheme that does not fit.
    """
    schemes = _schemes(model, scheme)
    known: dict[tuple[int, int], int] = {}
    weights = 0.0
    for name, each in schemes.items():
        rows, columns = weight_of(model.get_submodule(name)).shape
        if (rows, columns) not in known:
            known[rows, columns] = packed_bytes(each, (rows, columns), device)
        weights += known[rows, columns]
    packed = {f"{name}.weight" for name in schemes}
    for names, parameter in _parameters(model):
        if names[0] not in packed:
            weights += parameter.numel() * dtype.itemsize
    largest = max((rows * columns for rows, columns in known), default=0)
    return weights, _PACKING_BYTES * largest


@dataclass(frozen=True, slots=True)
class Resident:
    """What a model that is filled takes, in bytes.

    Args:
        weights: all parameters and packed tensors.
        read: what a decoding step must read of them: codes, scales and zeros as they are, and all
            else but tables in which it looks up rows.
        token: keys and values of one token, in all layers.
    """

    weights: float
    read: float
    token: float


def resident(model: Any, dtype: torch.dtype) -> Resident:
    """What a model holds, from the modules it has; its cache is of `dtype`."""
    held = read = 0.0
    head = model.get_output_embeddings()
    tied = getattr(head, "weight", None)
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            held += sum(buffer.nbytes for buffer in module.buffers())
        if isinstance(module, QuantLinear):
            read += weight_bytes(module.scheme, module.in_features, module.out_features)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                held += parameter.nbytes
                if not isinstance(module, nn.Embedding) or parameter is tied:
                    read += parameter.nbytes
    return Resident(held, read, cache_bytes(model.config, dtype))


def cache_bytes(config: Any, dtype: torch.dtype) -> float:
    """Bytes of keys and values of a token in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2.0 * text.num_hidden_layers * heads * size * dtype.itemsize


def build(model: Any, scheme: Scheme | None, dtype: torch.dtype, device: torch.device) -> Any:
    """Fill a skeleton with random weights on a device, block by block.

    Args:
        model: of `salience.source.skeleton`, in `dtype`; it is filled in place.
        scheme: of the linears in the blocks; None leaves them float.
        dtype: of everything float.
        device: where it is made and stays.

    Returns:
        The same model, ready to run.

    Raises:
        SalienceError: a scheme that does not fit.
    """
    made: dict[object, QuantLinear] = {}
    for name, each in _schemes(model, scheme).items():
        linear = model.get_submodule(name)
        rows, columns = weight_of(linear).shape
        has_bias = bias_of(linear) is not None
        key = (rows, columns, has_bias)
        if key in made:
            packed = copy.deepcopy(made[key])
        else:
            bias = torch.zeros(rows, dtype=dtype, device=device) if has_bias else None
            packed = QuantLinear(random_weight(columns, rows, each, device), bias, dtype=dtype)
            made[key] = packed
        model.set_submodule(name, packed)
    for names, parameter in _parameters(model):
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        _fill(value, names[0])
        shared = nn.Parameter(value, requires_grad=False)
        for name in names:
            set_tensor(model, name, shared)
    model.to(device)
    model.config.dtype = dtype
    release_memory()
    return model


def write_checkpoint(config: Any, folder: Path, device: torch.device) -> int:
    """Write a random bf16 checkpoint of a shape, with a small tokenizer.

    Args:
        config: of `shape_config`.
        folder: an empty folder.
        device: where the numbers are made.

    Returns:
        Bytes of the weights.

    Raises:
        SalienceError: a disk without the space.
    """
    dtype = torch.bfloat16
    model = skeleton(config, dtype, "the shape")
    total = sum(p.numel() * dtype.itemsize for _, p in _parameters(model))
    if total > free_disk_bytes(folder):
        raise SalienceError(
            f"the disk of {folder} has not the {total / 2**30:.1f} GiB of this checkpoint; "
            "set TMPDIR to a folder on a larger one"
        )
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(_shards(model)):
        tensors = {}
        for name, parameter in shard.items():
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            tensors[name] = _fill(value, name, loud=True).cpu()
        file = f"model-{i:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        del tensors
        release_memory()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _write_tokenizer(folder)
    return total


def _shards(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    shard: dict[str, nn.Parameter] = {}
    for names, parameter in _parameters(model):
        shard[names[0]] = parameter
        if sum(p.numel() for p in shard.values()) * 2 >= _SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _fill(value: Tensor, name: str, loud: bool = False) -> Tensor:
    """Random numbers for a float parameter: of norms about 1, of all else small."""
    if value.ndim > 1 or not name.endswith("weight"):
        return value.normal_(0, 0.02)
    value.normal_(1, 0.1)
    if loud and len(value) >= 64:
        # A few channels are loud, as in every trained model.
        value[torch.randperm(len(value), device=value.device)[: len(value) // 64]] *= 8
    return value


def _parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """The parameters of a model, each once, with all its names."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def _schemes(model: Any, scheme: Scheme | None) -> dict[str, Scheme]:
    """The linears of the blocks, each with the scheme, which must fit all of them."""
    if scheme is None:
        return {}
    prefix, blocks = find_blocks(model)
    columns = {weight_of(linear).shape[1] for linear in linears(blocks).values()}
    for count in columns:
        if count % scheme.group_columns(count):
            fit = [f"w{scheme.bits}g{size}" for size in fitting_group_sizes(columns)]
            raise SalienceError(
                f"group size {scheme.group_size} does not divide the {count} inputs of a linear; "
                f"schemes that fit: {', '.join(fit) or f'w{scheme.bits}channel'}"
            )
    return Recipe(scheme).resolve(list(codable(model)), prefix, kept(model))


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 512 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
