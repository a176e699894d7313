"""Load a checkpoint, quantized or not, as a Transformers model that is ready to run.

The model is made on the meta device. The modules that own packed tensors in the shard headers,
whatever a config says of them, become `QuantLinear` or `QuantEmbedding`, and each tensor is read
once and put in its place. At no time is there more in memory than what stays and what one module is
made of: a tensor as it is stored is a view of its file, unmapped when the next one is read.

Where the places are, and what happens to a model larger than the memory, is in
`salience.placement`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience import kernels
from salience.checkpoint import Checkpoint, GgufCheckpoint, read_json
from salience.conversion import ModelWeights, check_places, unplaced
from salience.errors import SalienceError
from salience.formats import detect_format, stored_config
from salience.formats.base import Reader
from salience.linear import QuantEmbedding, QuantLinear, packed_bytes
from salience.machine import release_memory
from salience.modules import bias_of, codable, weight_of
from salience.placement import (
    DeviceMap,
    MaxMemory,
    OffloadFolder,
    Placement,
    dispatch,
    main_device,
    place,
    resolve_device,
)
from salience.qtensor import QTensor
from salience.source import Source, open_source

__all__ = ["load", "load_source", "read_tensor", "resolve_device", "set_tensor"]

_TRIM_NUMBERS = 2**22  # read between two returns of freed memory to the system


def load(
    model: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    keep: Sequence[str] = (),
) -> Any:
    """A Transformers causal language model in eval mode.

    Args:
        model: a folder, a `.gguf` file, a Hub name, or `smollm2-135m`.
        device: where it runs; "auto" is the GPU if there is one.
        dtype: of activations and float weights; fp32 on CPUs and the checkpoint's own elsewhere.
        kernel: name of a kernel for the quantized linears, "auto" for the fastest that fits.
        trust_remote_code: let the model's own Python code run.
        device_map: where its parts lie: "auto" or "balanced" (all GPUs alike), "sequential" (one
            after the other), one device ("cpu", "cuda:0", "disk"), or a dict of such by module.
            What does not lie on a GPU runs on the first GPU of the map, or else the CPU.
        max_memory: for an automatic map: {0: "8GiB", "cpu": "30GiB"}, or one size for `device`.
        offload_folder: where parts on the disk are kept as long as the model lives.
        keep: patterns (regular expressions, searched for in the name) of quantized modules to hold
            as float ones, with the same weights.

    Raises:
        SalienceError: not found, incomplete or malformed; the message names the tensor.
        DoesNotFitError: a part must go to the disk and there is no `offload_folder`.
        StorageError: the disk of `offload_folder` is full or not writable.
    """
    return load_source(
        open_source(str(model), trust_remote_code),
        device,
        dtype,
        kernel,
        device_map,
        max_memory,
        offload_folder,
        keep,
    )


def load_source(
    source: Source,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    keep: Sequence[str] = (),
) -> Any:
    """`load`, from an opened source."""
    main = main_device(device, device_map)
    if kernel != "auto":
        kernels.backend(kernel)  # a wrong name is wrong for a float model too
    if dtype is None:
        dtype = torch.float32 if main.type == "cpu" else _config_dtype(source)
    model = source.skeleton(dtype)
    weights = source.weights(model)
    config = stored_config(source.config, source.stored)
    if config is None and isinstance(source.stored, GgufCheckpoint):
        config = {"quant_method": "gguf"}  # by another tool; blocks of exact codes stay as they are
    coded = _coded(model, weights, config) if config else {}
    floats = _kept(coded, keep, weights.path)
    loader = _Loader(model, weights, coded, floats, dtype, kernel)
    loader.check_extra()
    loader.placement = place(model, main, device_map, max_memory, lambda: loader.packed_bytes(main))
    loader.offload = OffloadFolder(offload_folder)
    try:
        loader.fill()
        dispatch(model, loader.placement, loader.offload)
    except BaseException:
        loader.offload.discard()
        raise
    model.generation_config = _generation_config(source)
    model.config.dtype = dtype
    return model


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace the parameter `name` of a model."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def unload(model: nn.Module, names: Iterable[str]) -> None:
    """Let go of the memory of the parameters `names` of a model; their shapes stay."""
    for name in names:
        set_tensor(model, name, torch.empty_like(model.get_parameter(name), device="meta"))


def check_finite(stored: Checkpoint, name: str, value: Tensor) -> None:
    """Refuse a tensor of a model, read from `stored`, with NaN or Inf in it."""
    # Least and largest, which are NaN when any is: no mask as large as the tensor.
    ends = value.aminmax() if value.is_floating_point() and value.numel() else ()
    if not all(torch.isfinite(end) for end in ends):
        raise SalienceError(
            f"tensor {name} of {stored.path} has values that are not finite; "
            "the file is damaged or the model diverged"
        )


def read_tensor(stored: Checkpoint, name: str, like: Tensor) -> Tensor:
    """A stored tensor, which must have the shape of the model's."""
    tensor = stored.tensor(name)
    if tensor.shape != like.shape:
        raise SalienceError(
            f"tensor {name} of {stored.path} is {list(tensor.shape)}, "
            f"the model wants {list(like.shape)}"
        )
    return tensor


@dataclass(frozen=True, slots=True)
class _Coded:
    """The packed tensors of a module: local name to the one it is read by."""

    fmt: Reader
    config: Mapping[str, Any]
    owner: str  # the module they are stored for, another one when two are tied
    shape: tuple[int, ...]  # [out, in]
    tensors: Mapping[str, str]


def _coded(model: nn.Module, stored: Checkpoint, config: Mapping[str, Any]) -> dict[str, _Coded]:
    """The modules that own packed tensors, by what is stored and not by what a config lists."""
    fmt = detect_format(config)
    own = fmt.tensors - {"weight"}  # a float linear has one of that name too
    modules = codable(model)
    coded: dict[str, _Coded] = {}
    for name, module in modules.items():
        found = {
            local: full for local in fmt.tensors if (full := f"{name}.{local}") in stored.names()
        }
        if own & found.keys():
            coded[name] = _Coded(fmt, config, name, tuple(weight_of(module).shape), found)
    for names in _tied(model):
        # A head that is stored neither packed nor float has the codes of the embeddings.
        owners = [name.removesuffix(".weight") for name in names]
        donor = next((coded[owner] for owner in owners if owner in coded), None)
        floats = [o for o in owners if o not in coded and f"{o}.weight" in stored.names()]
        if donor is not None and not floats:
            coded |= {owner: donor for owner in owners if owner not in coded and owner in modules}
    return coded


def _kept(coded: Mapping[str, _Coded], keep: Sequence[str], path: Path) -> set[str]:
    """The packed modules that `keep` wants as float ones."""
    found: set[str] = set()
    for pattern in keep:
        try:
            matched = {name for name in coded if re.search(pattern, name)}
        except (re.error, OverflowError) as error:
            raise SalienceError(f"keep {pattern!r} is no regular expression: {error}") from None
        if not matched:
            raise SalienceError(f"keep {pattern!r} matches no quantized linear of {path}")
        found |= matched
    return found


def _tied(model: nn.Module) -> list[list[str]]:
    """The parameters of a model, each with all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


@dataclass(slots=True)
class _Loader:
    """Fills a skeleton, a module or a tensor at a time."""

    model: Any
    weights: Checkpoint
    coded: Mapping[str, _Coded]
    floats: set[str]
    dtype: torch.dtype
    kernel: str
    placement: Placement = field(init=False)
    offload: OffloadFolder = field(init=False)
    _unreturned: int = 0

    def check_extra(self) -> None:
        """Refuse stored tensors that the model would silently do without."""
        used = {full for part in self.coded.values() for full in part.tensors.values()}
        extra = unplaced(self.model, self.weights) - used
        locals_ = {local for part in self.coded.values() for local in part.fmt.tensors}
        endings = tuple(f".{local}" for local in locals_ - {"weight"})
        orphans = [name for name in sorted(extra) if name.endswith(endings)]
        if orphans:
            raise SalienceError(f"tensor {orphans[0]} of {self.weights.path} belongs to no linear")
        check_places(self.model, self.weights)

    def packed_bytes(self, main: torch.device) -> dict[str, int]:
        """What each module that stays packed will take."""
        sizes: dict[str, int] = {}
        known: dict[object, int] = {}
        for name, part in self.coded.items():
            if name not in self.floats:
                scheme = part.fmt.scheme(part.config, part.owner)
                embeds = isinstance(self.model.get_submodule(name), nn.Embedding)
                key = (scheme, part.shape, embeds)
                if key not in known:
                    kernel = None if embeds else self.kernel
                    known[key] = packed_bytes(scheme, part.shape, main, kernel)
                sizes[name] = known[key]
        return sizes

    def fill(self) -> None:
        buffers = [name for name, _ in self.model.named_buffers() if name in self.weights.names()]
        tied = _tied(self.model)
        for name in self.coded:
            if name not in self.floats:
                self._fill_packed(name)
        for names in tied:
            self._fill_floats(names)
        for name in buffers:
            buffer = self.model.get_buffer(name)
            buffer.copy_(read_tensor(self.weights, name, buffer))
        release_memory()

    def _fill_packed(self, name: str) -> None:
        """Swap in a packed module."""
        linear, runs = self.model.get_submodule(name), self.placement.runs(name)
        qt = self._qtensor(name, runs)
        module: nn.Module
        if isinstance(linear, nn.Embedding):
            module = QuantEmbedding(qt, self.dtype)
        else:
            bias = None
            if (like := bias_of(linear)) is not None:
                stored = self._weight(f"{name}.bias", like)
                bias = self._own(stored, runs, stored.dtype)
            module = QuantLinear(qt, bias, self.kernel, self.dtype)
        del qt
        place = self.placement.lies(name)
        for local, buffer in list(module.named_buffers()):
            # Bytes alone: `module.to` would pack them for the device that they only lie on.
            full = f"{name}.{local}"
            moved = self.offload.write(full, buffer) if place is None else buffer.to(place)
            setattr(module, local, moved)
        self.model.set_submodule(name, module)
        self._trim(math.prod(self.coded[name].shape))

    def _fill_floats(self, names: list[str]) -> None:
        """Read a parameter, and give it to all modules that share it.

        Two that are tied by the config and stored with different values stay two, as Transformers
        has it; so do two of which one is packed.
        """
        left = [name for name in names if not self._is_packed(name)]
        sources: dict[object, str] = {}  # what holds a value, and the first name that has it
        for name in left:
            if self._is_kept(name):
                sources.setdefault(self.coded[_owner(name)].owner, name)
            elif name in self.weights.names():
                sources.setdefault(self._stored_as(name), name)
        first = next(iter([*sources.values(), *left]), "")
        chosen = dict.fromkeys(left, first)
        if len(sources) > 1 and not self._are_equal(list(sources.values())):
            chosen |= {name: name for name in sources.values()}
        for source in dict.fromkeys(chosen.values()):
            value = self._float(source)
            self._put([name for name in left if chosen[name] == source], value)
            del value
        if len(names) > 1 and (left != names or len(set(chosen.values())) > 1):
            _untie(self.model, names)

    def _is_packed(self, name: str) -> bool:
        return _owner(name) in self.coded and _owner(name) not in self.floats

    def _is_kept(self, name: str) -> bool:
        return _owner(name) in self.floats and name.endswith(".weight")

    def _stored_as(self, name: str) -> object:
        stored = self.weights.stored_names(name) if isinstance(self.weights, ModelWeights) else []
        return tuple(stored) or name

    def _are_equal(self, names: list[str]) -> bool:
        first = self._float(names[0])
        return all(torch.equal(first, self._float(name)) for name in names[1:])

    def _float(self, name: str) -> Tensor:
        """The value of a float parameter: as it is stored, or what packed tensors stand for."""
        like = self.model.get_parameter(name)
        if not self._is_kept(name):
            return self._weight(name, like)
        runs = self.placement.runs(name)
        value = torch.empty(like.shape, dtype=self.dtype, device=runs)
        set_tensor(self.model, name, value)  # so that a transposed one is written to as such
        qt = self._qtensor(_owner(name), runs)
        weight_of(self.model.get_submodule(_owner(name))).copy_(qt.dequantize(self.dtype))
        set_tensor(self.model, name, torch.empty_like(value, device="meta"))
        return value

    def _weight(self, name: str, like: Tensor) -> Tensor:
        """A float weight or bias as it is stored, all of it finite."""
        value = read_tensor(self.weights, name, like)
        check_finite(self.weights, name, value)
        return value

    def _put(self, names: list[str], value: Tensor) -> None:
        parameters: dict[torch.device | None, nn.Parameter] = {}
        for name in names:
            place = self.placement.lies(name)
            if place is None:
                parameter = self.offload.write(name, value.to(self.dtype))
                parameters.setdefault(None, nn.Parameter(parameter, requires_grad=False))
            elif place not in parameters:
                held = self._own(value, place, self.dtype)
                parameters[place] = nn.Parameter(held, requires_grad=False)
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, parameters[place])
        self._trim(value.numel())

    def _own(self, tensor: Tensor, place: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor elsewhere; a copy of it if it is there already, as it may be a view of a file.

        A file that someone replaces must not change the model, and one cut short not end it.
        """
        moved = tensor.to(place, dtype)
        return moved.clone() if moved is tensor else moved

    def _qtensor(self, name: str, place: torch.device) -> QTensor:
        part = self.coded[name]
        tensors = {local: self.weights.tensor(full) for local, full in part.tensors.items()}
        what = f"linear {part.owner} of {self.weights.path}"
        try:
            scheme = part.fmt.scheme(part.config, part.owner)
            qt = part.fmt.read({k: each.to(place) for k, each in tensors.items()}, scheme)
        except (SalienceError, RuntimeError) as error:
            raise SalienceError(f"{what}: {error}") from None
        if not torch.isfinite(qt.scales).all():
            raise SalienceError(f"{what} has scales that are not finite")
        if (qt.out_features, qt.in_features) != part.shape:
            raise SalienceError(
                f"{what} holds {[qt.out_features, qt.in_features]}, "
                f"the model wants {list(part.shape)}"
            )
        return qt

    def _trim(self, numbers: int) -> None:
        """Unpacking a weight takes many times its packed bytes, and glibc would keep them."""
        self._unreturned += numbers
        if self._unreturned >= _TRIM_NUMBERS:
            release_memory()
            self._unreturned = 0


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _untie(model: Any, names: list[str]) -> None:
    """Keep Transformers from tying parameters that are not the same."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for target, origin in list(tied.items()):
        if target in names or origin in names:
            del tied[target]
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _config_dtype(source: Source) -> torch.dtype:
    dtype = getattr(source.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float16


def _generation_config(source: Source) -> Any:
    from transformers import GenerationConfig

    if not source.is_gguf and (source.path / "generation_config.json").is_file():
        read_json(source.path / "generation_config.json")  # for an error that names the file
        return GenerationConfig.from_pretrained(source.path)
    return GenerationConfig.from_model_config(source.config)
