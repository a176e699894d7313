"""CUDA C++ compiled on the user's machine by NVRTC, a library that comes with torch: no compiler.

This file wraps `cuda-core`, NVIDIA's Python package for it. A source file of `cuda/` and its macros
make one kernel; what was compiled is kept on disk, since a kernel takes half a second.
"""

import ctypes
import functools
import hashlib
import re
import threading
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salience.kernels._fragments import BLOCK
from salience.machine import cache_folder

if TYPE_CHECKING:
    from cuda.core import TensorMapDescriptor

_thread = threading.local()  # which threads have a GPU's context

SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # macro SCALE of all kernels


def takes_groups(size: int, columns: int) -> bool:
    """Whether groups of `size` columns fall on the columns that the kernels unpack at once."""
    return size in (32, 64) or size % BLOCK == 0 or size == columns


def available() -> bool:
    """Whether kernels can be compiled and run here: an NVIDIA GPU from sm80 on, and cuda-core."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return False
    import_module("cuda.core")  # now: two threads that compile must not be the first to import it
    return torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def capability(index: int) -> int:
    """90 for sm90."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def text(source: str) -> str:
    """A file of `salience/kernels/cuda`, with those that it includes."""
    code = files("salience.kernels").joinpath("cuda", source).read_text(encoding="utf-8")
    return re.sub(r'#include "(\S+)"', lambda found: text(found[1]), code)


class Kernel:
    """One kernel of a source file, with its macros, for one GPU.

    Args:
        source: file name in `salience/kernels/cuda`.
        name: of the function.
        macros: what is defined for it.
        index: of the GPU.
        before: text to put before the source, where macros do not suffice.
    """

    def __init__(
        self, source: str, name: str, macros: dict[str, int], index: int, before: str = ""
    ) -> None:
        from cuda.core import Device, ObjectCode

        Device(index).set_current()
        code = before + text(source)
        self._function = ObjectCode.from_cubin(_cubin(code, name, macros, index)).get_kernel(name)
        self._name, self._shared = name, 0

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: "tuple[Tensor | TensorMapDescriptor | int | float, ...]",
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Put it on the current stream.

        Args:
            grid: blocks in x, y, z; of clusters, where there are any.
            threads: of a block.
            arguments: tensors go as pointers, numbers as int32 or fp32, tensor maps as they are.
            shared: bytes of dynamic shared memory of a block.
            cluster: blocks in x that share their memory.
            overlap: may start before the kernel before it ends (it waits for it itself).
        """
        from cuda.core import Device, LaunchConfig, Stream, launch

        if not getattr(_thread, "ready", False):
            # torch binds a thread to a GPU at its first call of the runtime, which may come later
            Device(torch.cuda.current_device()).set_current()
            _thread.ready = True
        if shared > 48 * 1024 and shared > self._shared:
            self._allow(shared)
        config = LaunchConfig(
            grid=grid,
            block=threads,
            shmem_size=shared,
            programmatic_stream_serialization=overlap,
            **({"cluster": cluster} if cluster > 1 else {}),
        )
        values = [_value(argument) for argument in arguments]
        stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        launch(stream, config, self._function, *values)

    def _allow(self, shared: int) -> None:
        from cuda.bindings import driver

        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = driver.CUkernel(int(self._function.handle))
        status, device = driver.cuCtxGetDevice()
        if not int(status):
            (status,) = driver.cuKernelSetAttribute(limit, shared, handle, device)
        if int(status):
            raise RuntimeError(f"{self._name}: {shared} bytes of shared memory: {status}")
        self._shared = shared


@functools.cache
def kernel(
    source: str, name: str, macros: tuple[tuple[str, int], ...], index: int, before: str = ""
) -> Kernel:
    """The kernel, compiled once a process."""
    return Kernel(source, name, dict(macros), index, before)


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int(argument) if isinstance(argument, int) else argument


def tensor_map(x: Tensor, box: int) -> "TensorMapDescriptor":
    """How the copy engine of sm90 finds a matrix: in tiles of `box` rows by 64 columns, swizzled in
    128 bytes; what lies beyond its edges reads as 0. It is a value, and holds no memory.

    Args:
        x: contiguous [rows, columns] of two bytes each, columns a multiple of 8, 16-byte aligned.
        box: at most 256.
    """
    rows, columns = x.shape
    return _tensor_map(x.data_ptr(), rows, columns, box, x.device.index)


# All that a map says is in its key, so memory that is used again, in another shape, finds another.
@functools.lru_cache(maxsize=1024)
def _tensor_map(
    address: int, rows: int, columns: int, box: int, index: int
) -> "TensorMapDescriptor":
    from cuda.core import Device, TensorMapDescriptorOptions
    from cuda.core.utils import StridedMemoryView

    Device(index).set_current()
    options = TensorMapDescriptorOptions(box_dim=(box, 64))
    options.swizzle = type(options.swizzle).SWIZZLE_128B  # enums that cuda.core does not export
    options.l2_promotion = type(options.l2_promotion).L2_256B
    view = StridedMemoryView.from_any_interface(_Memory(address, (rows, columns)), stream_ptr=-1)
    return view.as_tensor_map(options=options)


class _Memory:
    """Memory of a GPU as NumPy's typing describes it, of two bytes each: fp16 and bf16 alike."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, True),
            "shape": shape,
            "typestr": "<f2",
            "version": 3,
        }


def _cubin(code: str, name: str, macros: dict[str, int], index: int) -> bytes:
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    sm = capability(index)
    arch = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"  # the a: wgmma and its like
    macros = {**macros, "SM": sm}
    key = f"{nvrtc.nvrtcVersion()}{arch}{sorted(macros.items())}{code}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    kept = cache_folder("cubin") / f"{name}-{digest}.bin"
    try:
        return kept.read_bytes()
    except OSError:
        pass
    options = ProgramOptions(
        arch=arch, std="c++17", define_macro=[(k, str(v)) for k, v in macros.items()]
    )
    made = bytes(Program(code, "c++", options).compile("cubin").code)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{digest[:4]}.part")
        part.write_bytes(made)
        part.replace(kept)
    except OSError:
        pass  # a cache that can't be written costs half a second, no more
    return made
