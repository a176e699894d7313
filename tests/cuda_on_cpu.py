"""Kernels of CUDA C++ on a CPU, thread by thread: what they compute is tested where no GPU is.

`cuda_on_cpu.h` has the machine: fibers that change where threads wait, in a random order; copies
and products that happen early or late; shared memory that begins as NaN and ends where the launch
said. Here the source becomes C++: each `asm` the call of a function, by the name of its
instruction.
"""

import ctypes
import functools
import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from salience.kernels import cuda_program

COMPILER = shutil.which("g++")
_HEADER = Path(__file__).with_name("cuda_on_cpu.h")

# The functions of instructions whose names are long or speak of types.
_NAMES = {
    r"ld\.global\.nc\S*\.v4\.u32": "load4",
    r"ld\.global\.nc\S*\.v2\.u32": "load2",
    r"ld\.global\.nc\.u16": "load_short",
    r"ld\.global\.L1\S*\.v4\.u32": "load4_from",
    r"ld\.global\.L1\S*\.v2\.u32": "load2_from",
    r"ld\.global\.L1\S*\.u32": "load1_from",
    r"ld\.relaxed\S*": "load_relaxed",
    r"ld\.shared\S*\.v4\.f32": "load_shared4",
    r"ldmatrix\S*": "ldmatrix_x4",
    r"mma\S*HALF\S*": "mma_half",
    r"mma\S*bf16\S*": "mma_bf16",
    r"mma\S*": "mma_f16",
    r"wgmma\.mma\S*": "wgmma",
    r"wgmma\.(fence|commit_group|wait_group)\S*": r"wgmma_\1",
    r"setmaxnreg\S*": "setmaxnreg",
    r"mapa\S*": "mapa",
    r"cp\.async\.cg\S*": "cp_async",
    r"cp\.async\.bulk\.prefetch\S*": "prefetch",
    r"cp\.async\.bulk\.tensor\S*": "copy_tile",
    r"st\.async\S*v4\.f32": "send4",
    r"st\.async\S*v2\.f32": "send2",
    r"barrier\.cluster\.(arrive|wait)\S*": r"barrier_cluster_\1",
    r"fence\.mbarrier_init\S*": "fence_mbarrier_init",
    r"mbarrier\.init\S*": "mbarrier_init",
    r"mbarrier\.arrive\.expect_tx\S*": "mbarrier_arrive_expect_tx",
    r"mbarrier\.arrive\S*": "mbarrier_arrive",
}
# Those of an asm of several instructions, by what is in it.
_TOGETHER = {
    "cvt.f32.f16": "two_halves",
    "st.async": "send4_to",
    "mbarrier.try_wait": "mbarrier_wait",
    "cache_hint.v4.u32": "load4_if",
    "cache_hint.v2.u32": "load2_if",
    "nc.v2.u32": "load_pair_if",
    "nc.u32": "load_word_if",
    "nc.u16": "load_short_if",
}


class Fault(Exception):
    """What a kernel must not do."""


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
    """An asm as C++; a macro between its strings is a part of the name."""
    template, *rest = _sections(content)
    words = re.findall(r'"((?:[^"\\]|\\.)*)"|(\w+)', template)
    text = "".join(string or macro for string, macro in words).replace("\\n", " ").strip()
    values = [f"({value})" for section in rest[:2] for value in _operands(section)]

    def given(token: str) -> str:
        return values[int(token[1:])] if token[0] == "%" else token

    if text.startswith("{"):
        name = next((to for part, to in _TOGETHER.items() if part in text), None)
        if name is None:
            raise ValueError(f"no function for {text!r}")
        if name == "mbarrier_wait":
            [waited] = re.findall(r"\[%0\], (%?\d)", text)
            values = [values[0], given(waited)]
        return f"ptx::{name}({', '.join(values)});"
    calls = []
    for one in filter(None, map(str.strip, text.split(";"))):
        operation, _, arguments = one.partition(" ")
        pattern = next((p for p in _NAMES if re.fullmatch(p, operation)), r"\W+")
        name = re.sub(pattern, _NAMES.get(pattern, "_"), operation)
        tokens = re.findall(r"%\d+|\w[\w.]+|\d", arguments)
        if name.startswith("mma_"):
            tokens = tokens[:10]  # the sums come a second time
        if name == "wgmma":
            sums, a, b = (re.findall(r"%\d+", p) for p in re.split(r"\}, ", arguments, maxsplit=2))
            parts = [", ".join(f"&{given(t)}" for t in some) for some in (sums, a)]
            calls.append(f"ptx::wgmma({{{parts[0]}}}, {{{parts[1]}}}, {given(b[0])});")
        else:
            calls.append(f"ptx::{name}({', '.join(map(given, tokens))});")
    return " ".join(calls)


def as_cpp(source: str) -> str:
    """CUDA C++ as C++ for `cuda_on_cpu.h`.

    Raises:
        ValueError: it has an asm of several instructions that has no function there.
    """
    parts, end = [], 0
    for match in re.finditer(r"\basm\s*(volatile\s*)?\(", source):
        close = _closing(source, match.end() - 1)
        parts += [source[end : match.start()], "{", _statement(source[match.end() : close]), "}"]
        end = close + 2  # and the semicolon
    text = "".join([*parts, source[end:]])
    memory = "gpu::current->block->memory.data()"
    text = re.sub(r"extern __shared__ [^;]*?char (\w+)\[\];", rf"char* const \1 = {memory};", text)
    return re.sub(
        r"__shared__ (?:__align__|alignas)\(8\) (\w+) (\w+)([^;]*);",
        rf"auto& \2 = *reinterpret_cast<\1(*)\3>({memory} + gpu::static_memory());",
        text,
    ).replace("__align__", "alignas")


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int * 3),
        *((name, ctypes.c_int) for name in ("cluster", "threads", "shared")),
        *((name, ctypes.c_int) for name in ("seed", "late", "bf16")),
        ("stale", ctypes.c_longlong),
    ]


@dataclass(frozen=True, slots=True)
class Compiler:
    """In place of `cuda_program.kernel`: kernels are compiled for the CPU, and run there.

    Args:
        folder: for what is compiled.
        late: copies and products happen when they are waited for, not at once.
        stale: is added to the positions that are read before the kernel ahead has ended.
        seed: of the order of threads.
        change: a piece of the source, which must be there, and what to put in its place.
    """

    folder: Path
    late: bool = True
    stale: int = 0
    seed: int = 0
    change: tuple[str, str] = ("", "")

    def __call__(
        self,
        source: str,
        name: str,
        macros: tuple[tuple[str, int], ...],
        index: object,
        before: str = "",
    ) -> "Kernel":
        library = _compiled(self.folder, source, name, macros, before, self.change)
        return Kernel(library, self, bool(dict(macros)["BF16"]))


@dataclass(frozen=True, slots=True)
class Kernel:
    """As cuda_program.Kernel; bf16 is what the source calls half."""

    library: ctypes.CDLL
    how: Compiler
    bf16: bool

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
        size = (grid[0] * cluster, *grid[1:])
        more = (self.how.seed, self.how.late, self.bf16, self.how.stale)
        how = _Launch(size, cluster, threads, shared, *more)
        memory = [a.untyped_storage() for a in arguments if isinstance(a, Tensor)]
        fault = self.library.run(
            ctypes.byref(how),
            (ctypes.c_ssize_t * len(arguments))(*map(_value, arguments)),
            (ctypes.c_void_p * len(memory))(*(some.data_ptr() for some in memory)),
            (ctypes.c_size_t * len(memory))(*(some.nbytes() for some in memory)),
            len(memory),
        )
        if fault:
            raise Fault(fault.decode())


def _value(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, ctypes.Array):
        return ctypes.addressof(argument)
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return int(argument)


def tensor_map(x: Tensor, box: int) -> "ctypes.Array[ctypes.c_uint64]":
    """In place of `cuda_program.tensor_map`."""
    return (ctypes.c_uint64 * 16)(x.data_ptr(), *x.shape, box)


@functools.cache
def _compiled(
    folder: Path,
    source: str,
    name: str,
    macros: tuple[tuple[str, int], ...],
    before: str,
    change: tuple[str, str],
) -> ctypes.CDLL:
    code = before + cuda_program.text(source)
    if change[0] not in code:
        raise ValueError(f"{source} has no {change[0]!r}")
    code = code.replace(*change) if change[0] else code
    text = f"""
#include "{_HEADER.name}"
{as_cpp(code)}
extern "C" const char* run(const gpu::Launch& how, const std::intptr_t* given,
                           const char* const* places, const std::size_t* sizes, int count) {{
    return gpu::run<{name}>(how, given, places, sizes, count);
}}
"""
    macros = (*macros, ("SM", 90))
    path = folder / f"{name}-{hashlib.sha256(f'{macros}{text}'.encode()).hexdigest()[:16]}"
    made, written = path.with_suffix(".so"), path.with_suffix(".cpp")
    written.write_text(text)
    machine = folder / "machine.o"
    if not machine.exists():
        header = folder / _HEADER.name
        header.write_text(_HEADER.read_text())
        _run("-x", "c++-header", header)  # to read it takes as long as to compile a kernel
        _run("-x", "c++", "-DMACHINE", "-c", header, "-o", machine)
    defined = [f"-D{macro}={value}" for macro, value in macros]
    _run("-shared", *defined, "-o", made, written, machine)
    library = ctypes.CDLL(str(made))
    library.run.restype = ctypes.c_char_p
    return library


def _run(*arguments: str | Path) -> None:
    options = ["-O1", "-std=c++20", "-fPIC", "-w", "-fno-strict-aliasing"]
    command = [COMPILER or "g++", *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr[:3000])
