"""What programs that read checkpoints would say of one, and what to do when something is wrong.

vLLM's rules are those of the version in `salience.server.vllm`, SGLang's those of
`salience.serving`; Transformers and llama.cpp go by format. Nothing of them is run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from salience import kernels
from salience.checkpoint import GgufCheckpoint
from salience.doctor.complaint import Complaint
from salience.errors import SalienceError
from salience.gguf.metadata import architecture
from salience.machine import available_ram_bytes
from salience.server.vllm import Options, check
from salience.serving import Served, findings, summary
from salience.source import Source

# What Transformers asks for, by format: packages, as they are imported.
_NEEDS = {
    "awq": ("gptqmodel",),
    "awq-gemv": ("gptqmodel",),
    "awq-gemv-fast": ("gptqmodel",),
    "llm-awq": ("gptqmodel",),
    "gptq": ("optimum", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes",),
    "bitsandbytes-int8": ("bitsandbytes",),
}
_OURS = frozenset(("awq", "awq-gemv", "awq-gemv-fast", "llm-awq", "gptq"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a runtime would do with a checkpoint.

    Args:
        runtime: its name.
        answer: "yes", "in part" or "no".
        lines: what it minds, and the mend.
    """

    runtime: str
    answer: str
    lines: tuple[str, ...] = ()


def verdicts(
    source: Source, profile: Served | None, format: str, gpus: int, broken: bool
) -> list[Verdict]:
    """What each runtime would do.

    Args:
        source: the checkpoint.
        profile: of it, None of a float one.
        format: its name.
        gpus: that each linear is cut over.
        broken: whether something is wrong that keeps any from it.
    """
    if broken:
        found = ("its errors come first",)
        names = ("salience", "vLLM", "SGLang", "Transformers", "llama.cpp")
        return [Verdict(name, "no", found) for name in names]
    return [
        Verdict("salience", "yes"),
        _vllm(source, profile, gpus),
        _sglang(source, profile, gpus),
        _transformers(format),
        _llama_cpp(source, format),
    ]


def _vllm(source: Source, profile: Served | None, gpus: int) -> Verdict:
    try:
        lines = check(source, profile, Options(tensor_parallel=gpus))
    except SalienceError as error:
        return Verdict("vLLM", "no", (str(error),))
    return Verdict("vLLM", "in part" if lines else "yes", tuple(lines))


def _sglang(source: Source, profile: Served | None, gpus: int) -> Verdict:
    if isinstance(source.stored, GgufCheckpoint):
        return Verdict("SGLang", "in part", ("GGUF is slow there; use --format awq",))
    if profile is None:
        return Verdict("SGLang", "yes")
    minded = [each for each in findings(profile, gpus) if each.runtime == "sglang"]
    refused = any(each.severity == "refuse" for each in minded)
    answer = "no" if refused else "in part" if minded else "yes"
    return Verdict("SGLang", answer, tuple(summary(minded)))


def _transformers(format: str) -> Verdict:
    missing = [name for name in _NEEDS.get(format, ()) if find_spec(name) is None]
    if not missing:
        line = ("it dequantizes GGUF files when it loads them",) if format == "gguf" else ()
        return Verdict("Transformers", "yes", line)
    packages = " and ".join(name.replace("_", "-") for name in missing)
    ours = "salience.hf.enable(), or " if format in _OURS else ""
    return Verdict(
        "Transformers", "in part", (f"with {ours}{packages}, which {_is(missing)} not installed",)
    )


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _llama_cpp(source: Source, format: str) -> Verdict:
    if format == "gguf":
        return Verdict("llama.cpp", "yes")
    try:
        architecture(source.config)
    except SalienceError:
        line = "it reads GGUF, which salience does not write of this architecture"
        return Verdict("llama.cpp", "no", (line,))
    way = "quantize --format gguf" if format == "dense" else "convert --format gguf"
    if format.startswith("bitsandbytes"):
        way = "quantize the float model to --format gguf"
    return Verdict("llama.cpp", "in part", (f"after salience {way}",))


def mends(
    name: str, format: str, profile: Served | None, bytes: int, complaints: Sequence[Complaint]
) -> Iterator[tuple[str, str]]:
    """For each of the usual complaints, what to do with this checkpoint on this machine.

    Args:
        name: of the checkpoint, as the user wrote it.
        format: its name, "dense" or "gguf".
        profile: of it, None of a float one.
        bytes: of its weights.
        complaints: that were found.
    """
    gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if gpu else available_ram_bytes()
    has = f"{bytes / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB free"
    less = "fewer bits (w3g128) take less, and so does a shorter context"
    if format == "dense":
        less = f"salience quantize {name} takes a quarter"
    spread = "--device-map auto --max-memory SIZE --offload-folder DIR keeps the rest on the disk"
    yield "out of memory", f"{has}; {spread}; {less}"
    look = f"salience doctor {name} --run looks for overflow"
    if any(each.severity != "note" for each in complaints):
        accuracy = "first what is said above"
    elif profile is None:
        accuracy = f"{look}; serve it in bfloat16"
    else:
        accuracy = (
            f"{look}; then quantize with --effort balanced, in smaller groups (w4g64), or the "
            "worst linears of salience_report.json in w8g128-sym by --rule"
        )
    yield "accuracy gone", accuracy
    versions = "salience doctor tells of versions that do not go together"
    other = "compressed-tensors" if format == "awq" else "awq"
    elsewhere = f"; other programs: salience convert {name} -o OUT --format {other}"
    yield "does not load", versions + (elsewhere if profile is not None else "")
    yield "slow", " ".join(_slow(profile, gpu))


def _slow(profile: Served | None, gpu: bool) -> Iterator[str]:
    device = torch.device("cuda" if gpu else "cpu")
    slow: set[str] = set()
    for linear, scheme in (profile.schemes if profile else {}).items():
        rows, columns = profile.shapes[linear] if profile else (0, 0)
        chosen = kernels.choose(scheme, device, columns, rows).name
        if chosen in ("reference", "codebook"):
            slow.add(f"{scheme} [{rows}, {columns}]")
    if slow:
        some = sorted(slow)
        yield (
            f"{', '.join(some[:3])}{', ...' if len(some) > 3 else ''} has no fast kernel on this "
            f"{device.type}; w4g128, w4g64 and w4g32 have;"
        )
    if gpu:
        yield "salience bench kernels --save finds this GPU's fastest;"
    yield "salience doctor shows which kernels work and how many threads there are"
