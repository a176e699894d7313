"""quantize(): one model in, one low-bit checkpoint out, a block at a time.

    for each block:
        run the float block on the calibration tokens    -> second moments, next block's inputs
        find scales, fold them, prove each fold          -> same function, easier weights
        code each linear, compare with plain rounding    -> QTensor
        write                                            -> disk

Only one block's weights are in memory at a time, in fp32. What else is held are the hidden states
of the calibration tokens, samples x seqlen x hidden x 4 bytes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience.block import quantize_block, unit_moments
from salience.calibration import BlockInputs, Calibration, block_inputs, observe, run_block
from salience.checkpoint import (
    Checkpoint,
    ShardWriter,
    check_disk,
    check_free,
    disk_errors,
    read_json,
)
from salience.conversion import stored_module, stored_owner, stored_tensors
from salience.errors import SalienceError
from salience.formats import Format, get_format
from salience.loading import read_tensor, resolve_device, set_tensor
from salience.machine import peak_rss_bytes
from salience.methods import Method, get_method
from salience.plan import (
    MICRO_BATCH_TOKENS,
    SHARD_BYTES,
    check_scheme,
    check_source,
    checkpoint_bytes,
    mean_bits,
)
from salience.qtensor import QTensor
from salience.report import REPORT_NAME, Report, versions
from salience.scheme import Scheme
from salience.source import Source, open_source
from salience.stats import SecondMoment
from salience.structure import (
    Fold,
    discover_folds,
    find_blocks,
    kept,
    linears,
    sink_groups,
    weight_of,
)

_PROBE_SHAPE = (2, 16)  # sequences and tokens of the runs that discover folds

Progress = Callable[[str, int, int], None]


def quantize(
    model: str,
    out: str | Path,
    *,
    method: str = "awq",
    scheme: Scheme | str = "w4g128",
    format: str = "awq",
    calibration: Calibration | None = None,
    device: str = "auto",
    effort: str = "fast",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model into a new checkpoint folder.

    Args:
        model: a folder, a `.gguf` file, a Hub name, or `smollm2-135m`.
        out: the folder to make; it appears when it is whole.
        method: "awq" or "rtn".
        scheme: a Scheme, or its name such as "w4g128".
        format: "awq", AutoAWQ's gemm layout.
        calibration: which text; None is 128 sequences of 512 tokens of Python's documentation.
        device: where blocks run, "auto" for the GPU if there is one.
        effort: "fast".
        trust_remote_code: let the model's own Python code run.
        progress: called with (phase, done, total).

    Returns:
        The report, which is also in the folder.

    Raises:
        SalienceError: bad input; nothing is written.
    """
    start = time.perf_counter()
    if effort != "fast":
        raise SalienceError(f"effort {effort!r} is not available; use fast")
    target = Path(out)
    check_free(target)
    source = open_source(model, trust_remote_code)
    skeleton = source.skeleton()
    prefix, blocks = find_blocks(skeleton)
    job = _Job(
        source,
        skeleton,
        source.weights(skeleton),
        prefix,
        blocks,
        get_method(method),
        Scheme.parse(scheme) if isinstance(scheme, str) else scheme,
        get_format(format),
        resolve_device(device),
        progress or (lambda _phase, _done, _total: None),
    )
    check_source(source, skeleton, job.weights)
    check_scheme(skeleton, job.scheme, job.fmt)
    check_disk(target, checkpoint_bytes(skeleton, job.scheme))
    text = None if job.method.name == "rtn" else calibration or Calibration()
    report = Report(
        model=model,
        out=str(target),
        method=method,
        effort=effort,
        scheme=str(job.scheme),
        format=format,
        calibration=text.describe() if text else None,
        device=str(job.device),
        versions=versions(),
        bits_per_weight=mean_bits(blocks, job.scheme),
        kept_modules=list(kept(skeleton)),
    )
    tokens = text.tokens(source.tokenizer) if text else None
    _fill_buffers(job)
    with ShardWriter(target, SHARD_BYTES) as writer, torch.no_grad():
        _run(job, tokens, writer, report)
        report.phase_seconds = job.seconds
        report.seconds = time.perf_counter() - start
        report.peak_rss_bytes = peak_rss_bytes()
        report.summarize()
        writer.write_json(REPORT_NAME, asdict(report))
    return report


@dataclass(slots=True)
class _Job:
    """What every step needs to know."""

    source: Source
    skeleton: Any
    weights: Checkpoint
    prefix: str
    blocks: nn.ModuleList
    method: Method
    scheme: Scheme
    fmt: Format
    device: torch.device
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class _Structure:
    """What was discovered of blocks of one kind."""

    groups: list[tuple[str, ...]]
    folds: list[Fold]


def _run(job: _Job, tokens: Tensor | None, writer: ShardWriter, report: Report) -> None:
    inputs = probe = None
    if tokens is not None:
        with job.phase("statistics"):
            inputs, probe = _inputs(job, tokens)
    known: dict[tuple[object, ...], _Structure] = {}
    for index, block in enumerate(job.blocks):
        job.progress("block", index, len(job.blocks))
        name = f"{job.prefix}.{index}"
        with _materialized(job, block, name):
            if inputs is None or probe is None:
                folds: list[Fold] = []
                moments = unit_moments(block, job.device)
                run = _no_run
            else:
                kind = _signature(block)
                if kind not in known:
                    with job.phase("structure"):
                        known[kind] = _discover(block, probe, index)
                        report.folds += [_describe(fold) for fold in known[kind].folds]
                folds = known[kind].folds
                # The hidden states are about to become this block's outputs.
                first = inputs.hidden[: inputs.batch].clone()
                run = partial(run_block, block, first, inputs.arguments[index])
                with job.phase("statistics"):
                    moments = _observe(block, known[kind].groups, inputs, index)
                    _check_finite(moments, name)
            with job.phase("search"):
                coded = quantize_block(block, name, job.method, job.scheme, folds, moments, run)
            with job.phase("write"):
                report.linears += [linear for _, linear in coded.values()]
                _write_block(job, writer, block, name, {n: qt for n, (qt, _) in coded.items()})
    job.progress("block", len(job.blocks), len(job.blocks))
    del inputs  # the hidden states are done with; the embeddings come next
    with job.phase("write"):
        _write_rest(job, writer)


def _no_run() -> Tensor:
    raise SalienceError("a method without calibration text has no inputs to run a block on")


def _fill_buffers(job: _Job) -> None:
    """Read the buffers that are stored; they are small, so all stay in memory."""
    stored = job.weights.names()
    for name, buffer in job.skeleton.named_buffers():
        if name in stored:
            buffer.copy_(read_tensor(job.weights, name, buffer))


def _inputs(job: _Job, tokens: Tensor) -> tuple[BlockInputs, BlockInputs]:
    """The first block's inputs for the calibration tokens, and for a few random ones."""
    head = job.skeleton.get_output_embeddings()
    own = {name for name, _ in job.skeleton.named_parameters()}
    own -= {f"{job.prefix}.{name}" for name, _ in job.blocks.named_parameters()}
    shared = {id(p) for p in job.skeleton.get_input_embeddings().parameters()}
    unused = {id(p) for p in head.parameters()} - shared if head is not None else set()
    for name, parameter in list(job.skeleton.named_parameters()):
        if name in own and id(parameter) not in unused:
            set_tensor(job.skeleton, name, _float(job, name))
    _move_buffers(job.skeleton, job.device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = job.skeleton.get_input_embeddings().weight.shape[0]
    random = torch.randint(vocabulary, _PROBE_SHAPE, generator=generator)
    batch = _micro_batch(len(tokens), tokens.shape[1], job.device)
    run = (job.skeleton, job.blocks)
    inputs = block_inputs(*run, tokens, batch, job.device)
    probe = block_inputs(*run, random, len(random), job.device)
    for name in own:
        parameter = job.skeleton.get_parameter(name)
        set_tensor(job.skeleton, name, torch.empty_like(parameter, device="meta"))
    return inputs, probe


def _micro_batch(samples: int, seqlen: int, device: torch.device) -> int:
    """The most sequences at once that divide the samples and stay within the token budget."""
    limit = max(1, MICRO_BATCH_TOKENS[device.type] // seqlen)
    return max(n for n in range(1, min(limit, samples) + 1) if samples % n == 0)


@contextmanager
def _materialized(job: _Job, block: nn.Module, name: str) -> Iterator[None]:
    """A block with its weights in fp32, and back to nothing."""
    for local, _ in list(block.named_parameters()):
        set_tensor(block, local, _float(job, f"{name}.{local}"))
    yield
    for local, parameter in list(block.named_parameters()):
        set_tensor(block, local, torch.empty_like(parameter, device="meta"))


def _float(job: _Job, name: str) -> Tensor:
    like = job.skeleton.get_parameter(name)
    tensor = read_tensor(job.weights, name, like).to(job.device, torch.float32)
    if not torch.isfinite(tensor).all():
        raise SalienceError(
            f"tensor {name} of {job.weights.path} has values that are not finite; "
            "the file is damaged or the model diverged"
        )
    return tensor


def _signature(block: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return (type(block), *shapes)


def _discover(block: nn.Module, probe: BlockInputs, index: int) -> _Structure:
    run = partial(run_block, block, probe.hidden, probe.arguments[index])
    groups = sink_groups(block, run)
    return _Structure(groups, discover_folds(block, run, groups))


def _observe(
    block: nn.Module, groups: list[tuple[str, ...]], inputs: BlockInputs, index: int
) -> dict[str, SecondMoment]:
    """The moment of each linear's input; the hidden states become the block's outputs."""
    found = linears(block)
    device = inputs.hidden.device
    of_group = {
        names[0]: SecondMoment.empty(weight_of(found[names[0]]).shape[1], device)
        for names in groups
    }
    for number, part in enumerate(inputs.hidden.split(inputs.batch)):
        out = observe(
            block,
            list(of_group),
            partial(run_block, block, part, inputs.of(index, number)),
            lambda name, x: of_group[name].update(x),
        )
        part.copy_(out)
    return {name: of_group[names[0]] for names in groups for name in names}


def _check_finite(moments: dict[str, SecondMoment], block: str) -> None:
    for name, moment in moments.items():
        if not torch.isfinite(moment.gram).all():
            raise SalienceError(
                f"inputs of {block}.{name} are not finite on the calibration text; "
                "the model overflows"
            )


def _describe(fold: Fold) -> dict[str, Any]:
    return {
        "prev": fold.prev,
        "sinks": list(fold.sinks),
        "rule": fold.rule,
        "channels": fold.channels,
        "error": fold.error,
    }


def _write_block(
    job: _Job, writer: ShardWriter, block: nn.Module, name: str, coded: dict[str, QTensor]
) -> None:
    for local, qt in coded.items():
        stored = stored_module(job.skeleton, job.weights, f"{name}.{local}")
        for part, tensor in job.fmt.write(qt).items():
            writer.add(f"{stored}.{part}", tensor)
    quantized = {f"{local}.weight" for local in coded}
    for local, parameter in block.named_parameters():
        if local not in quantized:
            _write(job, writer, f"{name}.{local}", _half(parameter, f"{name}.{local}"))


def _write(job: _Job, writer: ShardWriter, name: str, tensor: Tensor) -> None:
    for stored, part in stored_tensors(job.skeleton, job.weights, name, tensor).items():
        writer.add(stored, part)


def _write_rest(job: _Job, writer: ShardWriter) -> None:
    """Everything outside the blocks, all buffers as they are, config and tokenizer."""
    inside = f"{job.prefix}."
    parameters = {name for name, _ in job.skeleton.named_parameters()}
    buffers = {name for name, _ in job.skeleton.named_buffers()}
    for name in sorted(job.weights.names()):
        if name in buffers:
            _write(job, writer, name, job.weights.tensor(name))
        elif name in parameters and not name.startswith(inside):
            _write(job, writer, name, _half(_float(job, name), name))
    writer.write_json("config.json", _config(job))
    with disk_errors(writer.out):
        job.source.save_assets(writer.folder)


def _half(tensor: Tensor, name: str) -> Tensor:
    half = tensor.detach().to(torch.float16)
    if not torch.isfinite(half).all():
        raise SalienceError(
            f"tensor {name} overflows fp16, which --format awq stores; use another format"
        )
    return half


def _config(job: _Job) -> dict[str, Any]:
    if job.source.is_gguf:
        config = job.source.config.to_diff_dict()
        config.pop("_name_or_path", None)
    else:
        config = read_json(job.source.path / "config.json")
    config.setdefault("architectures", [type(job.skeleton).__name__])
    config.pop("torch_dtype", None)
    config["dtype"] = "float16"
    floats = list(kept(job.skeleton))
    floats += [stored_owner(job.weights, name) for name in floats]  # for runtimes that go by those
    config["quantization_config"] = job.fmt.config(
        {f"{job.prefix}.{name}": job.scheme for name in linears(job.blocks)},
        list(dict.fromkeys(floats)),
    )
    return config


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device), persistent=persistent)
