"""CUDA C++ compiled on the user's machine by NVRTC, a library that comes with torch: no compiler.

This file wraps `cuda-core`, NVIDIA's Python package for it. A source file of `cuda/` and its macros
make one kernel; what was compiled is kept on disk, since a kernel takes half a second.
"""

import ctypes
import functools
import hashlib
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from salience.machine import cache_folder


def available() -> bool:
    """Whether kernels can be compiled and run here: an NVIDIA GPU from sm80 on, and cuda-core."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@functools.cache
def capability(index: int) -> int:
    """90 for sm90."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


class Kernel:
    """One kernel of a source file, with its macros, for one GPU.

    Args:
        source: file name in `salience/kernels/cuda`.
        name: of the function.
        macros: what is defined for it.
        index: of the GPU.
    """

    def __init__(self, source: str, name: str, macros: dict[str, int], index: int) -> None:
        from cuda.core import Device, ObjectCode

        Device(index).set_current()
        code = files("salience.kernels").joinpath("cuda", source).read_text(encoding="utf-8")
        self._function = ObjectCode.from_cubin(_cubin(code, name, macros, index)).get_kernel(name)
        self._name, self._shared = name, 0

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: tuple[Tensor | int, ...],
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Put it on the current stream.

        Args:
            grid: blocks in x, y, z; of clusters, where there are any.
            threads: of a block.
            arguments: tensors go as pointers, numbers as int32.
            shared: bytes of dynamic shared memory of a block.
            cluster: blocks in x that share their memory.
            overlap: may start before the kernel before it ends (it waits for it itself).
        """
        from cuda.core import LaunchConfig, Stream, launch

        if shared > 48 * 1024 and shared > self._shared:
            self._allow(shared)
        config = LaunchConfig(
            grid=grid,
            block=threads,
            shmem_size=shared,
            programmatic_stream_serialization=overlap,
            **({"cluster": cluster} if cluster > 1 else {}),
        )
        values: list[Any] = [
            a.data_ptr() if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments
        ]
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
def kernel(source: str, name: str, macros: tuple[tuple[str, int], ...], index: int) -> Kernel:
    """The kernel, compiled once a process."""
    return Kernel(source, name, dict(macros), index)


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
