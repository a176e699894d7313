"""Load a checkpoint, quantized or not, as a Transformers model that is ready to run.

The model is made on the meta device; the linears that own packed tensors in the shard headers
become `QuantLinear`, and then each tensor is read once and put in its place. What is in memory at
the end is the packed weights, never a float copy of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience import kernels
from salience.checkpoint import Checkpoint, GgufCheckpoint, read_json
from salience.errors import SalienceError
from salience.formats import detect_format, stored_config
from salience.formats.base import Format
from salience.linear import QuantEmbedding, QuantLinear
from salience.modules import bias_of, codable, weight_of
from salience.source import Source, open_source


def load(
    model: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """A Transformers causal language model in eval mode.

    Args:
        model: a folder, a `.gguf` file, a Hub name, or `smollm2-135m`.
        device: where it runs; "auto" is the GPU if there is one.
        dtype: of activations and float weights; fp32 on CPUs and the checkpoint's own elsewhere.
        kernel: name of a kernel for the quantized linears, "auto" for the fastest that fits.
        trust_remote_code: let the model's own Python code run.

    Raises:
        SalienceError: not found, incomplete or malformed; the message names the tensor.
    """
    return load_source(open_source(str(model), trust_remote_code), device, dtype, kernel)


def load_source(
    source: Source,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
) -> Any:
    """`load`, from an opened source."""
    place = resolve_device(device)
    if kernel != "auto":
        kernels.backend(kernel)  # a wrong name is wrong for a float model too
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else _config_dtype(source)
    model = source.skeleton(dtype)
    weights = source.weights(model)
    config = stored_config(source.config)
    if config is None and isinstance(source.stored, GgufCheckpoint):
        config = {"quant_method": "gguf"}  # by another tool; blocks of exact codes stay as they are
    packed = _fill_quantized(model, weights, config, place, kernel) if config else set()
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for name, parameter in list(model.named_parameters()):
        value = read_tensor(weights, name, parameter).to(place, dtype)
        for other in tied[id(parameter)]:
            set_tensor(model, other, value)
    for name, buffer in model.named_buffers():
        if name in weights.names() and name not in packed:
            buffer.copy_(read_tensor(weights, name, buffer))
    model.tie_weights()
    model.to(place)
    model.generation_config = _generation_config(source)
    model.config.dtype = dtype
    return model


def resolve_device(device: str | torch.device) -> torch.device:
    """A device; "auto" is the GPU if there is one.

    Raises:
        SalienceError: a device this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise SalienceError(f"device {device!r} is not understood; use cpu or cuda") from None
    if place.type not in ("cpu", "cuda") or (
        place.type == "cuda" and not torch.cuda.is_available()
    ):
        raise SalienceError(f"device {device} is not on this machine; use cpu")
    return place


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter `name` of a model."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def read_tensor(stored: Checkpoint, name: str, like: Tensor) -> Tensor:
    """A stored tensor, which must have the shape of the model's."""
    tensor = stored.tensor(name)
    if tensor.shape != like.shape:
        raise SalienceError(
            f"tensor {name} of {stored.path} is {list(tensor.shape)}, "
            f"the model wants {list(like.shape)}"
        )
    return tensor


def _fill_quantized(
    model: nn.Module,
    stored: Checkpoint,
    config: Mapping[str, Any],
    device: torch.device,
    kernel: str,
) -> set[str]:
    """Swap in packed modules for those that own packed tensors; returns the tensors' names."""
    fmt = detect_format(config)
    own = fmt.tensors - {"weight"}  # a float linear has one of that name too
    used: set[str] = set()
    for name, linear in codable(model).items():
        if not any(f"{name}.{local}" in stored.names() for local in own):
            continue
        tensors = {local: f"{name}.{local}" for local in fmt.tensors}
        local = {
            key: stored.tensor(full).to(device)
            for key, full in tensors.items()
            if full in stored.names()
        }
        qt = _read(fmt, config, name, local, weight_of(linear).shape, stored)
        bias = None
        if (like := bias_of(linear)) is not None:
            bias = read_tensor(stored, f"{name}.bias", like).to(device)
        if isinstance(linear, nn.Embedding):
            model.set_submodule(name, QuantEmbedding(qt, linear.weight.dtype))
        else:
            model.set_submodule(name, QuantLinear(qt, bias, kernel))
        used.update(tensors.values(), [f"{name}.bias"])
    endings = tuple(f".{local}" for local in own)
    orphans = {name for name in stored.names() - used if name.endswith(endings)}
    if orphans:
        raise SalienceError(f"tensor {min(orphans)} of {stored.path} belongs to no linear")
    return used


def _read(
    fmt: Format,
    config: Mapping[str, Any],
    name: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    stored: Checkpoint,
) -> Any:
    try:
        qt = fmt.read(tensors, fmt.scheme(config, name))
    except (SalienceError, RuntimeError) as error:
        raise SalienceError(f"linear {name} of {stored.path}: {error}") from None
    if (qt.out_features, qt.in_features) != shape:
        raise SalienceError(
            f"linear {name} of {stored.path} holds {[qt.out_features, qt.in_features]}, "
            f"the model wants {list(shape)}"
        )
    return qt


def _config_dtype(source: Source) -> torch.dtype:
    dtype = getattr(source.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


def _generation_config(source: Source) -> Any:
    from transformers import GenerationConfig

    if not source.is_gguf and (source.path / "generation_config.json").is_file():
        read_json(source.path / "generation_config.json")  # for an error that names the file
        return GenerationConfig.from_pretrained(source.path)
    return GenerationConfig.from_model_config(source.config)
