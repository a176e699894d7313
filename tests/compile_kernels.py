"""Compile the Triton kernels for GPUs that are not here, and print what came of each as JSON.

Run by test_kernels_compile.py in a process of its own: in that of the tests kernels are
interpreted. Each line: the GPU, the kernel and its constants, and counts of some instructions.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from salience.kernels import wna16_triton as kernels

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CASES = ((2, "fp16", 128, 16), (3, "bf16", 32, 64), (4, "fp16", 128, 16), (8, "bf16", 128, 32))
NAMES = {"mma": r"mma|mfma", "st.shared": r"st\.shared|ldmatrix"}
TYPES = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}


def compiled(kernel, target: GPUTarget, dtype: str, scales: str, **constants) -> dict[str, int]:
    """Instructions of a kernel: how many of each of NAMES."""
    pointers = {"x": TYPES[dtype], "y": TYPES[dtype], "w": TYPES[dtype], "scales": TYPES[scales]}
    pointers |= {"words": "*i32", "zeros": "*u8", "scratch": "*fp32"}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    divisible = [*pointers, "columns", "stride", "out", "group_size"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in divisible
        },
    )
    made = triton.compile(source, target=target, options={"num_warps": constants.get("TILES", 4)})
    text = made.asm["amdgcn" if target.backend == "hip" else "ptx"]
    return {name: len(re.findall(pattern, text)) for name, pattern in NAMES.items()}


def main() -> None:
    for name in sys.argv[1:]:
        target = TARGETS[name]
        prefix = "plain_" if target.backend == "hip" else ""
        for bits, dtype, chunk, tokens in CASES:
            counts = compiled(
                kernels._multiply, target, dtype, "fp16", EACH=4, TOKENS=tokens, STAGES=3,
                KIND=prefix + dtype, CHUNK=chunk, TILES=4, BITS=bits,
            )  # fmt: skip
            print(json.dumps([name, "multiply", bits, dtype, counts]))
        counts = compiled(
            kernels._unpack, target, "bf16", "fp16", CHUNK=64, TILES=4, BITS=3, KIND=f"{prefix}fp16"
        )
        print(json.dumps([name, "unpack", 3, "bf16", counts]))
        counts = compiled(
            kernels._multiply, target, "fp32", "fp32", CHUNK=64, TILES=8, BITS=4, EACH=2,
            TOKENS=32, STAGES=3, KIND=f"{prefix}bf16",
        )  # fmt: skip
        print(json.dumps([name, "multiply", 4, "fp32", counts]))
        counts = compiled(kernels._add, target, "fp16", "fp16", SPLIT=4, SOME=1024)
        print(json.dumps([name, "add", 0, "fp16", counts]))


if __name__ == "__main__":
    main()
