"""What is wrong with a checkpoint: shard by shard, with nothing but one linear in memory.

Only `run` makes a model of it: a few tokens in fp32, to see how large the activations get, since a
model whose hidden states pass fp16's 65504 answers "!!!!" there and well in bf16.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salience.doctor.complaint import Complaint, sorted_complaints
from salience.doctor.runtimes import Verdict, mends, verdicts
from salience.doctor.texts import text_complaints
from salience.doctor.weights import (
    FLOAT16_MAX,
    float_complaints,
    kept_complaints,
    name_complaints,
    packed_complaints,
    packed_linears,
)
from salience.errors import SalienceError
from salience.formats import detect_format, stored_config
from salience.inspection import served
from salience.loading import load_source
from salience.runtime.limits import context
from salience.source import Source

_CLOSE = FLOAT16_MAX / 8
_TEXT = "The capital of France is Paris, and that of Italy is Rome. 12 + 30 = 42."


@dataclass(frozen=True, slots=True)
class Checkup:
    """What `doctor PATH` says.

    Args:
        name: as the user wrote it.
        format: its name, "dense" or "gguf".
        linears: that are quantized.
        bytes: of all tensors on disk.
        complaints: the worst first.
        verdicts: of other programs.
        mends: for each of the usual complaints, what to do.
        largest: of the activations of `_TEXT`, and the module it came from; None if not run.
    """

    name: str
    format: str
    linears: int
    bytes: int
    complaints: list[Complaint]
    verdicts: list[Verdict]
    mends: dict[str, str]
    largest: tuple[float, str] | None = None

    @property
    def healthy(self) -> bool:
        """Whether it loads and answers, as far as can be seen."""
        return all(each.severity != "error" for each in self.complaints)


def examine(source: Source, tensor_parallel: int = 1, run: bool = False) -> Checkup:
    """Read everything of a checkpoint once.

    Args:
        source: the checkpoint.
        tensor_parallel: GPUs that would serve it.
        run: compute a few tokens, too.

    Raises:
        SalienceError: it cannot be read at all, or its config is of no format.
    """
    model = source.skeleton()
    config = stored_config(source.config, source.stored)
    fmt = detect_format(config) if config else None
    stored = source.weights(model)
    packed = packed_linears(model, stored, fmt, config) if fmt and config else {}
    found = list(name_complaints(model, stored, packed, fmt))
    if config and not packed:
        problem = "says it is quantized, and no linear is"
        found.append(
            Complaint("error", ("config.json",), problem, "take out its quantization_config")
        )
    for each in packed.values():
        if fmt is not None:
            found += packed_complaints(stored, fmt, each)
    taken = {full for each in packed.values() for full in each.tensors.values()}
    places = model.state_dict()
    for name in sorted((stored.names() & places.keys()) - taken):
        found += float_complaints(stored, name, places[name])
    found += kept_complaints(model, packed)
    found += text_complaints(source, model.get_input_embeddings().weight.shape[0])
    broken = any(each.severity == "error" for each in found)
    largest = None
    if run and not broken:
        largest, more = run_complaints(load_source(source, "cpu", torch.float32), source)
        found += more
    complaints = sorted_complaints(found)
    broken = any(each.severity == "error" for each in complaints)
    kind = fmt.name if fmt else "gguf" if source.is_gguf else "dense"
    profile = served(source) if packed and not broken else None
    total = sum(source.stored.nbytes(name) for name in source.stored.names())
    return Checkup(
        name=source.name,
        format=kind,
        linears=len(packed),
        bytes=total,
        complaints=complaints,
        verdicts=verdicts(source, profile, kind, tensor_parallel, broken),
        mends=dict(mends(source.name, kind, profile, total, complaints)),
        largest=largest,
    )


@torch.no_grad()
def run_complaints(model: Any, source: Source) -> tuple[tuple[float, str] | None, list[Complaint]]:
    """The largest activation of a few tokens and its module, None if some are not finite, and what
    is wrong with it.

    Args:
        model: in fp32.
        source: whose tokenizer makes the tokens; without one they are the first of the vocabulary.
    """
    try:
        tokens = list(source.tokenizer(_TEXT)["input_ids"])
    except SalienceError:
        tokens = list(range(16))
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = [token % rows for token in tokens][: context(model, None) - 1]
    found: list[tuple[float, str]] = []
    handles = [
        module.register_forward_hook(_watch(name, found))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    wrong = next((name for most, name in found if most != most or most == float("inf")), None)
    if wrong is not None:
        problem = "computes values that are not finite, in fp32"
        return None, [
            Complaint("error", (wrong,), problem, "quantize it anew from the float model")
        ]
    most, name = max(found)
    if most > _CLOSE:
        mend = "serve it with --dtype bfloat16"
        problem = (
            f"reaches {most:.0f} on a plain sentence: fp16, which ends at {FLOAT16_MAX:.0f}, "
            f"{'overflows' if most > FLOAT16_MAX else 'may overflow'}"
        )
        return (most, name), [Complaint("warning", (name,), problem, mend)]
    return (most, name), []


def _watch(name: str, found: list[tuple[float, str]]) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        for each in tensors:
            if isinstance(each, Tensor) and each.is_floating_point() and each.numel():
                found.append((float(each.abs().max()), name))

    return hook
