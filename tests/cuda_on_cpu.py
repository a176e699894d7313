"""Kernels of CUDA C++ on a CPU, thread by thread: what they compute is tested where no GPU is.

`cuda_on_cpu.h` has the machine: fibers that change where threads wait, in a random order; copies
that land early or late; shared memory that begins as NaN and ends where the launch said. Here the
source becomes C++: each `asm` the call of a function, by the name of its instruction.
"""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

COMPILER = shutil.which("g++")
_HEADER = Path(__file__).with_name("cuda_on_cpu.h")

# Instructions whose names are long or depend on types, and asm of several: the function for it.
_NAMES = {
    r"ld\.global\S*\.v4\.u32": "ld_global_v4",
    r"ld\.global\S*\.v2\.u32": "ld_global_v2",
    r"ldmatrix\S*": "ldmatrix_x4",
    r"mma\S*bf16\S*": "mma_bf16",
    r"mma\S*": "mma_f16",
    r"barrier\.cluster\.(arrive|wait)\S*": r"barrier_cluster_\1",
    r"bar\.sync": "bar_sync",
    r"mbarrier\.init\S*": "mbarrier_init",
    r"mbarrier\.arrive\.expect_tx\S*": "mbarrier_arrive_expect_tx",
}
_TOGETHER = {"cvt.f32.f16": "two_halves", "st.async": "push", "mbarrier.try_wait": "mbarrier_wait"}


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at a place closes."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        if not quoted:
            depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"no end of {text[at : at + 60]!r}")


def _sections(text: str) -> list[str]:
    """What stands between the colons of an asm, outside of strings and parentheses."""
    found, start, i = [], 0, 0
    while i < len(text):
        if text[i] == '"':
            i = text.index('"', i + 1)
        elif text[i] == "(":
            i = _closing(text, i)
        elif text[i] == ":":
            found.append(text[start:i])
            start = i + 1
        i += 1
    return [*found, text[start:]]


def _operands(section: str) -> Iterator[str]:
    for match in re.finditer(r'"[^"]*"\s*\(', section):
        yield section[match.end() : _closing(section, match.end() - 1)]


def _statement(content: str) -> str:
    """An asm as C++."""
    template, *rest = _sections(content)
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", " ").strip()
    values = [f"({value})" for section in rest[:2] for value in _operands(section)]
    if text.startswith("{"):
        name = next((to for word, to in _TOGETHER.items() if word in text), None)
        if name is None:
            raise ValueError(f"no function for {text!r}")
        if name == "mbarrier_wait":
            values.append(re.search(r"\[%0\], (\d)", text)[1])  # type: ignore[index]
        return f"ptx::{name}({', '.join(values)});"
    calls = []
    for one in filter(None, map(str.strip, text.split(";"))):
        operation, _, arguments = one.partition(" ")
        pattern = next((p for p in _NAMES if re.fullmatch(p, operation)), r"\W+")
        name = re.sub(pattern, _NAMES.get(pattern, "_"), operation)
        given = re.findall(r"%\d+|\w[\w.]+|\d", arguments)
        if name.startswith("mma_"):
            given = given[:10]  # the sums come a second time
        calls.append(
            f"ptx::{name}({', '.join(values[int(g[1:])] if g[0] == '%' else g for g in given)});"
        )
    return " ".join(calls)


def as_cpp(source: str) -> str:
    """CUDA C++ as C++ for `cuda_on_cpu.h`.

    Raises:
        ValueError: it has an asm of several instructions that has no function there.
    """
    parts, end = [], 0
    for match in re.finditer(r"\basm\s*(volatile\s*)?\(", source):
        close = _closing(source, match.end() - 1)
        parts += [source[end : match.start()], _statement(source[match.end() : close])]
        end = close + 2  # and the semicolon
    text = "".join([*parts, source[end:]])
    memory = "gpu::current->block->memory.data()"
    text = re.sub(r"extern __shared__ [^;]*?char (\w+)\[\];", rf"char* const \1 = {memory};", text)
    return re.sub(
        r"__shared__ __align__\(8\) (\w+) (\w+);",
        rf"\1& \2 = *reinterpret_cast<\1*>({memory} + gpu::static_memory());",
        text,
    )


class Fault(Exception):
    """What a kernel must not do."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """As cuda_program.Kernel, on a CPU.

    Args:
        library: the compiled source.
        seed: of the order of threads.
        late: asynchronous copies land when they are waited for, not at once.
    """

    library: ctypes.CDLL
    seed: int
    late: bool

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: tuple[Any, ...],
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Run it to its end.

        Raises:
            Fault: memory that is not the kernel's, or threads that all wait.
        """
        grid = (grid[0] * cluster, *grid[1:])
        given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        sizes = [a.nbytes if isinstance(a, Tensor) else 0 for a in arguments]
        fault = self.library.run(
            (ctypes.c_int * 3)(*grid),
            *(cluster, threads, shared, self.seed, int(self.late)),
            (ctypes.c_ssize_t * len(given))(*given),
            (ctypes.c_size_t * len(given))(*sizes),
            len(given),
        )
        if fault:
            raise Fault(fault.decode())


@functools.cache
def compiled(
    folder: Path,
    source: str,
    name: str,
    macros: tuple[tuple[str, int], ...],
    change: tuple[str, str] = ("", ""),
) -> ctypes.CDLL:
    """A kernel of `salience/kernels/cuda`, compiled into a folder.

    Args:
        folder: for what is compiled.
        source: file name.
        name: of the kernel.
        macros: what is defined for it.
        change: a piece of the source, which must be there, and what to put in its place.
    """
    code = files("salience.kernels").joinpath("cuda", source).read_text(encoding="utf-8")
    if change[0] not in code:
        raise ValueError(f"{source} has no {change[0]!r}")
    code = code.replace(*change) if change[0] else code
    text = f"""
#include "{_HEADER}"
{as_cpp(code)}
extern "C" const char* run(const int* grid, int cluster, int threads, int shared, int seed,
                           int late, const std::intptr_t* given, const std::size_t* sizes,
                           int count) {{
    return gpu::run<{name}>(grid, cluster, threads, shared, seed, late, given, sizes, count);
}}
"""
    key = hashlib.sha256(f"{macros}{text}".encode()).hexdigest()[:16]
    path = folder / f"{name}-{key}"
    path.with_suffix(".cpp").write_text(text)
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w"]
    defined = [f"-D{macro}={value}" for macro, value in macros]
    made, source_file = path.with_suffix(".so"), path.with_suffix(".cpp")
    subprocess.run([COMPILER or "g++", *options, *defined, "-o", made, source_file], check=True)
    library = ctypes.CDLL(str(made))
    library.run.restype = ctypes.c_char_p
    return library
