"""What several commands can be asked for, in the words of `--help`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class MethodName(str, Enum):
    awq = "awq"
    gptq = "gptq"
    rtn = "rtn"
    nf4 = "nf4"


class EffortName(str, Enum):
    fast = "fast"
    balanced = "balanced"
    best = "best"


class FormatName(str, Enum):
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    bitsandbytes = "bitsandbytes"
    gptq = "gptq"
    bitsandbytes_int8 = "bitsandbytes-int8"
    gguf = "gguf"
    dense = "dense"


class DtypeName(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[str, typer.Argument(help="A folder, a .gguf file, a Hub name, or smollm2-135m.")]
SchemeOption = Annotated[
    str | None, typer.Option("--scheme", help="Bits and group size: w4g128 (default), w3g64.")
]
RulesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help='"REGEX=SCHEME": another scheme for the linears whose name it matches; repeatable. '
        'Reaches head and embeddings too: "lm_head|embed_tokens=w8g128".',
    ),
]
SkipOption = Annotated[
    list[str] | None, typer.Option("--skip", help="REGEX of linears that stay float; repeatable.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", help="REGEX that a linear must match to be quantized; repeatable."),
]
MethodOption = Annotated[
    MethodName | None, typer.Option("--method", help="How weights are coded (default awq).")
]
EffortOption = Annotated[
    EffortName | None,
    typer.Option(
        "--effort",
        help="fast: AWQ (default); balanced: AWQ, then GPTQ's codes; best: balanced, then tuned.",
    ),
]
ActOrderOption = Annotated[
    bool,
    typer.Option(
        "--act-order", help="Groups of columns of like importance: --method gptq --format gptq."
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--max-memory", help="Most memory of --device to use, such as 8GiB."),
]
FormatOption = Annotated[
    FormatName | None,
    typer.Option(
        "--format",
        help="Checkpoint format (default awq); dense: scales folded in, nothing rounded.",
    ),
]
TextOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        help='A .txt or .jsonl file, a Hub dataset, or "pydoc": Python\'s own documentation.',
    ),
]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")]
SeqlenOption = Annotated[int, typer.Option("--seqlen", min=1, help="Tokens in each.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Where weights lie: auto, balanced, sequential, cpu or disk. With --max-memory, auto.",
    ),
]
OffloadOption = Annotated[
    Path | None, typer.Option("--offload-folder", help="Keeps what is to lie on the disk.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code the model brings.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
GpusOption = Annotated[
    int | None,
    typer.Option("--tensor-parallel", min=1, help="GPUs that vLLM or SGLang will cut it over."),
]
PadOption = Annotated[
    int | None,
    typer.Option(
        "--pad-intermediate",
        min=1,
        help="Widen the MLPs to a multiple of this, by zeros: group size times GPUs.",
    ),
]
KernelOption = Annotated[
    str, typer.Option("--kernel", help="auto, gpu, cpu_int4, reference or codebook.")
]
