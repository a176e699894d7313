"""Where the parts of a model lie, and where they run.

A device map gives each module, by the beginning of its name, a GPU, "cpu" or "disk". What lies on a
GPU runs there. What lies elsewhere runs on the main device, the first GPU of the map or else the
CPU: accelerate's hooks bring the tensors of a module before its forward and let go of them after
it. So the memory of a device bounds what lies there, and a forward costs one reading of the rest,
at the speed of the bus or of the disk.

Packed tensors are nothing but bytes in the order that one kernel reads, and the order differs
between a CPU and a GPU. A weight is therefore packed for the device it runs on and then put where
it lies; what comes back is ready to multiply.
"""

import logging
import math
import shutil
import tempfile
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from salience.errors import DoesNotFitError, SalienceError
from salience.machine import available_ram_bytes
from salience.modules import find_blocks
from salience.writer import disk_errors

AUTOMATIC = ("auto", "balanced", "sequential")
DeviceMap = str | Mapping[str, str | int | torch.device]
MaxMemory = str | int | Mapping[str | int, str | int]
_GPU_SHARE = 0.9  # the rest of a GPU is for activations and the cache
_ROOT = ""


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_device(device: str | torch.device) -> torch.device:
    """A device; "auto" is `default_device`.

    Raises:
        SalienceError: a device this machine lacks.
    """
    if device == "auto":
        return default_device()
    try:
        place = torch.device(device)
    except RuntimeError:
        raise SalienceError(f"device {device!r} is not understood; use cpu or cuda") from None
    if place.type not in ("cpu", "cuda") or (
        place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count()
    ):
        raise SalienceError(f"device {device} is not on this machine; use cpu")
    return place


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each tensor of a model lies and runs. Make one with `place`.

    Args:
        main: runs what lies on the CPU or the disk.
        devices: the beginning of names to a device; None is the disk.
    """

    main: torch.device
    devices: Mapping[str, torch.device | None]

    def lies(self, name: str) -> torch.device | None:
        """Where a tensor or module is kept; None is the disk. What no key says is on `main`."""
        while name and name not in self.devices:
            name = name.rpartition(".")[0]
        return self.devices.get(name, self.main)

    def runs(self, name: str) -> torch.device:
        """Where it is when it is computed with."""
        place = self.lies(name)
        return self.main if place is None or place.type == "cpu" else place

    @property
    def is_plain(self) -> bool:
        """Whether all of the model lies where it runs, on one device."""
        return set(self.devices.values()) == {self.main}


def main_device(device: str | torch.device, device_map: DeviceMap | None) -> torch.device:
    """The device that runs what lies on the CPU or the disk.

    Raises:
        SalienceError: a device this machine lacks, or a map that is none.
    """
    default = resolve_device(device)
    if device_map is None or device_map in AUTOMATIC:
        return default
    places = [_device(place) for place in _as_mapping(device_map).values()]
    gpus = [place for place in places if place is not None and place.type == "cuda"]
    if gpus:
        return gpus[0]
    return default if set(places) == {None} else torch.device("cpu")


def place(
    model: nn.Module,
    main: torch.device,
    device_map: DeviceMap | None,
    max_memory: MaxMemory | None,
    packed_bytes: Callable[[], Mapping[str, int]],
) -> Placement:
    """Give each part of a model its device.

    Args:
        model: on meta, no module packed yet.
        main: as `main_device` says.
        device_map: of the user; None is `main` for all.
        max_memory: bytes or texts such as "8GiB" for GPU numbers and "cpu", or one for `main`. By
            default what is free. Only an automatic map looks at it; given alone it asks for one.
        packed_bytes: says how many bytes each module will take that will be packed.

    Raises:
        SalienceError: a map that names an unknown module or device, or leaves a tensor out.
    """
    if max_memory is not None and device_map is None:
        device_map = "auto"
    if device_map is None:
        return Placement(main, {_ROOT: main})
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        limits = _limits(max_memory, main)
        if main.type == "cuda" and main.index is None:
            main = torch.device("cuda", torch.cuda.current_device())
        found = Placement(main, _inferred(model, device_map, limits, packed_bytes()))
        return Placement(main, dict(_disjoint(model, found)))
    if max_memory is not None:
        raise SalienceError(
            f"max_memory is for a device map of {', '.join(AUTOMATIC)}; a map of one's own says "
            "what lies where by itself"
        )
    devices = {name: _device(each) for name, each in _as_mapping(device_map).items()}
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in devices:
        if name not in modules and name not in parameters:
            raise SalienceError(f"device_map names {name!r}, which is no module of the model")
    result = Placement(main, devices)
    for name in model.state_dict():
        if not any(name == key or not key or name.startswith(f"{key}.") for key in devices):
            raise SalienceError(f"device_map gives {name} no device; add one for it, or for ''")
    return Placement(main, dict(_disjoint(model, result)))


def _disjoint(
    module: nn.Module, placement: Placement, name: str = _ROOT
) -> Iterator[tuple[str, torch.device | None]]:
    """A placement by modules none of which is in another, as hooks want it."""
    prefix = f"{name}." if name else ""
    if not any(key != name and key.startswith(prefix) for key in placement.devices):
        yield name, placement.lies(name)
        return
    for local, child in module.named_children():
        yield from _disjoint(child, placement, prefix + local)
    for local, _ in [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]:
        # No hook brings these: the modules below have their own.
        yield prefix + local, placement.runs(prefix + local)


class OffloadFolder(Mapping[str, Tensor]):
    """Tensors on the disk by name, a file of raw bytes for each; read, they are mapped files.

    Memory they take belongs to the page cache: it is not copied, and is free once they are.

    Args:
        parent: a folder of the user; None is for models that need no disk. The files go into a
            new folder below it, which is removed with the model that is handed to `own`.
    """

    def __init__(self, parent: str | Path | None) -> None:
        self._parent = parent
        self._folder: Path | None = None
        self._stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    @property
    def folder(self) -> Path:
        """Where the files are.

        Raises:
            SalienceError: no folder was given.
            StorageError: it cannot be made.
        """
        if self._folder is None:
            if self._parent is None:
                raise DoesNotFitError(
                    "the device map puts a part of the model on the disk; pass "
                    "offload_folder=FOLDER (--offload-folder FOLDER), or allow more memory"
                )
            with disk_errors(Path(self._parent)):
                Path(self._parent).mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="offload-", dir=self._parent))
        return self._folder

    def write(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a tensor; what stands for it in the model is one on meta.

        Raises:
            StorageError: the disk is full or not writable.
        """
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        with disk_errors(self.folder):
            data.numpy().tofile(self.folder / name)  # a full disk is no error in a mapped file
        self._stored[name] = (tuple(tensor.shape), tensor.dtype)
        return torch.empty_like(tensor, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._stored[name]
        size = math.prod(shape)
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(str(self.folder / name), False, size, dtype=dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def discard(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def own(self, model: nn.Module) -> None:
        """Remove the files when `model` is gone."""
        if self._folder is not None:
            weakref.finalize(model, shutil.rmtree, self._folder, ignore_errors=True)


def dispatch(model: Any, placement: Placement, offload: OffloadFolder) -> None:
    """Hang hooks on a filled model that bring each module's tensors to where it runs."""
    from accelerate import dispatch_model

    if placement.is_plain:
        model.to(placement.main)
        return
    for name, tensor in model.state_dict().items():
        if placement.lies(name) is None and name not in offload:
            offload.write(name, tensor)  # a buffer, made with the model
    for name, buffer in list(model.named_buffers()):
        if name in placement.devices:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(placement.runs(name)))
    offload.own(model)
    # What lies on the CPU and runs on a GPU stays in memory, here, and leaves the model.
    held = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if placement.lies(name) != placement.runs(name) and not tensor.is_meta
    }
    with _without_remark():
        dispatch_model(
            model,
            {name: _accelerate_name(each) for name, each in placement.devices.items()},
            main_device=cast(Any, _accelerate_name(placement.main)),
            state_dict=cast(Any, ChainMap(held, cast(Any, offload))),
            offload_index={},
            offload_buffers=True,
            skip_keys=getattr(model, "_skip_keys_device_placement", None),
            force_hooks=True,
        )


@contextmanager
def _without_remark() -> Iterator[None]:
    """Keep accelerate from telling the log that what was to be offloaded has been."""

    def is_other(record: logging.LogRecord) -> bool:
        return "on the meta device" not in record.getMessage()

    logger = logging.getLogger("accelerate.big_modeling")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs, also when its parameters are elsewhere till they are used."""
    hook = getattr(model, "_hf_hook", None)
    if hook is None:
        return torch.device(model.device)
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _as_mapping(device_map: DeviceMap) -> Mapping[str, str | int | torch.device]:
    if isinstance(device_map, Mapping):
        if not device_map:
            raise SalienceError('device_map is empty; {"": "cpu"} puts all on one device')
        return device_map
    return {_ROOT: device_map}


def _device(place: str | int | torch.device) -> torch.device | None:
    if place == "disk":
        return None
    if isinstance(place, str) and place.split(":")[0] not in ("cpu", "cuda"):
        raise SalienceError(
            f"device_map {place!r} is not understood; use {', '.join(AUTOMATIC)}, cpu, cuda:0, "
            "disk, or a dict of such by module"
        )
    found = resolve_device(f"cuda:{place}" if isinstance(place, int) else place)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


def _accelerate_name(place: torch.device | None) -> str | int:
    if place is None:
        return "disk"
    return "cpu" if place.type == "cpu" else place.index or 0


def _limits(max_memory: MaxMemory | None, main: torch.device) -> dict[str | int, str | int]:
    """Bytes of each device that an automatic map may use, as accelerate wants them."""
    own = _accelerate_name(main)
    if isinstance(max_memory, Mapping):
        return {_limit_name(key): _size(value) for key, value in max_memory.items()}
    limits: dict[str | int, str | int] = {"cpu": available_ram_bytes()}
    if max_memory is not None:
        return {**limits, own: _size(max_memory)}
    if main.type == "cuda":
        several = range(torch.cuda.device_count()) if main.index is None else [main.index]
        for i in several:
            limits[i] = int(_GPU_SHARE * torch.cuda.mem_get_info(i)[0])
    return limits


def _limit_name(key: str | int) -> str | int:
    if isinstance(key, int) or key in ("cpu", "disk"):
        found: str | int = key
    else:
        found = _accelerate_name(_device(key))
    if isinstance(found, int) and not 0 <= found < torch.cuda.device_count():
        raise SalienceError(f"max_memory names GPU {found}, which is not on this machine")
    return found


def _size(value: str | int) -> int:
    from accelerate.utils import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(value))
    except (ValueError, TypeError):
        raise SalienceError(f"max_memory {value!r} is not understood; write it like 8GiB") from None


class _Shell(nn.Module):
    """Stands for a packed module while a map is made: as many bytes, on meta."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.empty(nbytes, dtype=torch.uint8, device="meta"))


def _inferred(
    model: Any,
    kind: str,
    limits: dict[str | int, str | int],
    packed_bytes: Mapping[str, int],
) -> dict[str, torch.device | None]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    # A block's parts pass the hidden states on to each other: it stays in one place.
    whole = {type(block).__name__ for block in find_blocks(model)[1]}
    whole |= set(getattr(model, "_no_split_modules", None) or ())
    floats = {name: model.get_submodule(name) for name in packed_bytes}
    for name, nbytes in packed_bytes.items():
        model.set_submodule(name, _Shell(nbytes))
    try:
        if kind != "sequential":
            limits = get_balanced_memory(model, limits, sorted(whole))
        found = infer_auto_device_map(model, limits, sorted(whole), offload_buffers=True)
    finally:
        for name, module in floats.items():
            model.set_submodule(name, module)
    return {name: _device(each) for name, each in found.items()}
