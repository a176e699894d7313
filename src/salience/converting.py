"""convert(): a quantized checkpoint in another format, a linear at a time.

    for each quantized linear, by the names in the shard headers:
        source.read     -> QTensor: codes, scales, zeros, groups
        target.write    -> tensors of the other format
        target.read     -> the same QTensor, or the conversion is refused
    everything else is copied byte for byte under the name it is stored by

No module of the model is made, so the architecture need not be known to anyone; only GGUF, which
has names and an order of rows of its own, wants the model (`salience.gguf.exchange`). Before
anything is written one linear of each kind (scheme, shapes, order of groups) goes that way, and
with it nearly all that can be refused is. The output appears when it is whole; a kill leaves
OUT.partial, which the same command takes up.

`dense` is the one target that is not lossless: weights are dequantized and rounded to 16 bits.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from salience.blocks.journal import Journal, check_output, held_bytes, is_published
from salience.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint, read_json
from salience.containers import Writer, make_writer
from salience.errors import SalienceError
from salience.formats import Dense, Format, Reader, detect_format, get_format, stored_config
from salience.gguf.exchange import Modelled, open_modelled
from salience.machine import peak_rss_bytes, release_memory
from salience.modules import codable, is_transposed
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.source import copy_assets, locate, open_source
from salience.writer import (
    FLOAT_DTYPES,
    ShardWriter,
    check_disk,
    disk_errors,
    float_dtype,
    to_dtype,
    write_json,
)

_SKIPPED = ("modules_to_not_convert", "ignore", "llm_int8_skip_modules")
_QUANTIZATION = ("quantization_config", "compression_config")
_SMALL_BYTES = 1024  # tensors up to this say what a weight is: its shape, its table


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did.

    Args:
        lossless: whether codes, scales, zeros and groups are the same; only `dense` is not.
        linears: how many were converted; all else was copied.
        bytes: of the tensors written.
    """

    out: str
    source_format: str
    format: str
    lossless: bool
    linears: int
    bytes: int
    seconds: float
    peak_rss_bytes: int


@dataclass(slots=True)
class _Work:
    """What is converted into what.

    Args:
        stored: the source's tensors.
        config: its config.json.
        quantization: what that says of the quantization.
        source: its format.
        target: the format to write.
        linears: of each quantized linear, local names -> stored names.
        others: stored names of all else.
        schemes: of each linear, as the target is told.
        act_order: whether any has groups in activation order.
        bytes: of all tensors to write.
        modelled: the source as its model sees it, if that or the target is GGUF.
    """

    stored: Checkpoint
    config: dict[str, Any]
    quantization: dict[str, Any]
    source: Reader
    target: Format
    linears: dict[str, dict[str, str]]
    others: list[str]
    schemes: dict[str, Scheme] = field(default_factory=dict)
    act_order: bool = False
    bytes: int = 0
    modelled: Modelled | None = None

    def scheme(self, name: str) -> Scheme:
        """What the source's config says of a linear."""
        try:
            return self.source.scheme(self.quantization, name)
        except SalienceError as error:
            raise SalienceError(f"linear {name} of {self.stored.path}: {error}") from None

    def read(self, name: str) -> QTensor:
        """A linear, under the scheme that the target is told."""
        local = {key: self.stored.tensor(full) for key, full in self.linears[name].items()}
        own = self.scheme(name)
        try:
            qt = self.source.read(local, own)
        except (SalienceError, RuntimeError) as error:
            raise SalienceError(f"linear {name} of {self.stored.path}: {error}") from None
        scheme = self.schemes.get(name, qt.scheme)
        return qt if scheme == qt.scheme else replace(qt, scheme=scheme)

    def write(self, name: str, qt: QTensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Its tensors in the target, by local names.

        Raises:
            SalienceError: they would not be the same weight.
        """
        try:
            made = self.target.write(qt)
            if not isinstance(self.target, Dense):
                reader = detect_format(config)  # as whoever opens the checkpoint does
                _check_same(qt, reader.read(made, reader.scheme(config, name)))
        except SalienceError as error:
            raise SalienceError(f"linear {name} of {self.stored.path}: {error}") from None
        return made


def convert(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Write a quantized checkpoint in another format.

    A conversion that was interrupted is done by the same call.

    Args:
        source: a quantized checkpoint folder, a `.gguf` file, or a Hub name.
        out: the folder to make; it appears when it is whole.
        format: name of the format to write, or "dense" for dequantized weights.
        dtype: "float16" or "bfloat16", of a dense checkpoint; None is the source's.
        trust_remote_code: let the model's own Python code run; only "dense" and GGUF ask what its
            modules are.
        progress: called with (phase, done, total).

    Raises:
        SalienceError: bad input, or what the format cannot hold exactly; nothing is written.
        StorageError: a disk that is full or not writable.
    """
    start = time.perf_counter()
    target_folder = Path(out)
    check_output(target_folder)
    report = progress or (lambda _phase, _done, _total: None)
    path = locate(str(source))
    work = _open(path, get_format(format), dtype, trust_remote_code)
    _plan(work, report)
    if not is_published(target_folder):
        check_disk(target_folder, work.bytes - held_bytes(target_folder))
    transposed = _transposed(path, work, trust_remote_code)
    job = {"--format": format, "--dtype": dtype, "SRC": str(path.resolve())}
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")]) or [path]
    job |= {file.name: f"{file.stat().st_size} bytes" for file in files}
    with Journal(target_folder, job) as journal, torch.no_grad():
        if not journal.finished:
            with disk_errors(journal.final):
                if journal.final.exists():
                    shutil.rmtree(journal.final)  # of a run that was killed while it wrote
                journal.final.mkdir()
                _copy_assets(path, work, journal.final)
            _write(work, journal.final, transposed, report)
        journal.publish()
    return Conversion(
        out=str(out),
        source_format=work.source.name,
        format=format,
        lossless=not isinstance(work.target, Dense),
        linears=len(work.linears),
        bytes=work.bytes,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _open(path: Path, target: Format, dtype: str | None, trust_remote_code: bool) -> _Work:
    """A source's headers, sorted into quantized linears and all else."""
    stored, modelled = open_checkpoint(path), None
    if target.container == "gguf" or isinstance(stored, GgufCheckpoint):
        modelled = open_modelled(path, target, trust_remote_code)
        stored, config = modelled.weights, modelled.config
        quantization = modelled.quantization
    else:
        config = read_json(path / "config.json")
        quantization = stored_config(SimpleNamespace(**config), stored)
    if quantization is None:
        raise SalienceError(f"{path} is not quantized; make codes of it by salience quantize")
    fmt = detect_format(quantization)
    if isinstance(target, Dense):
        own = str(config.get("dtype") or config.get("torch_dtype"))
        default = own if own in FLOAT_DTYPES else "float16"
        target = Dense(float_dtype(dtype or default))
    elif dtype is not None:
        raise SalienceError(
            f"--dtype is for --format dense; --format {target.name} keeps all bytes"
        )
    names, ending = stored.names(), f".{fmt.marker}"
    owners = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    if not owners:
        raise SalienceError(f"{path} says it is {fmt.name} and has no tensor named *{ending}")
    linears = {
        owner: {each: full for each in sorted(fmt.tensors) if (full := f"{owner}.{each}") in names}
        for owner in sorted(owners, key=_natural)
    }
    used = {full for tensors in linears.values() for full in tensors.values()}
    if modelled is not None and modelled.is_gguf:
        used |= {f"{owner}.weight" for owner in owners}  # the blocks, dequantized
    others = sorted(names - used, key=_natural)
    endings = tuple(f".{local}" for local in fmt.tensors - {"weight"})
    orphans = [name for name in others if name.endswith(endings)]
    if orphans:
        raise SalienceError(f"tensor {orphans[0]} of {path} belongs to no quantized linear")
    if modelled is not None:
        others = modelled.others(others, target)
    return _Work(stored, config, quantization, fmt, target, linears, others, modelled=modelled)


def _plan(work: _Work, progress: Callable[[str, int, int], None]) -> None:
    """Do one linear of each kind, and with it refuse what the target cannot hold."""
    kinds: dict[object, list[str]] = {}
    for name in work.linears:
        kinds.setdefault(_kind(work, name), []).append(name)
    shapes: dict[str, tuple[int, int]] = {}
    schemes: dict[str, Scheme] = {}
    for names in kinds.values():
        qt = work.read(names[0])
        shapes |= dict.fromkeys(names, (qt.out_features, qt.in_features))
        schemes |= dict.fromkeys(names, qt.scheme)
        work.act_order |= qt.g_idx is not None
    work.schemes = _adapted(work, schemes, shapes, progress)
    outside = _outside(work.linears)
    if outside and not work.target.heads and not isinstance(work.target, Dense):
        raise SalienceError(
            f"readers of --format {work.target.name} take {outside[0]} for float, and it is "
            "quantized; use --format compressed-tensors"
        )
    config = _quantization(work)
    work.bytes = sum(work.stored.nbytes(name) for name in work.others)
    for names in kinds.values():
        made = work.write(names[0], work.read(names[0]), config)
        work.bytes += len(names) * sum(tensor.nbytes for tensor in made.values())


def _kind(work: _Work, name: str) -> object:
    """What linears have in common that are refused together, and are stored in as many bytes."""
    parts: list[object] = [work.scheme(name)]
    for local, full in work.linears[name].items():
        shape = work.stored.shape(full)
        parts += [local, shape]
        if work.stored.nbytes(full) <= _SMALL_BYTES:
            parts.append(tuple(work.stored.tensor(full).flatten().tolist()))
        elif len(shape) == 1 and not (groups := work.stored.tensor(full)).is_floating_point():
            parts.append(bool((groups.diff() >= 0).all()))  # of groups: whether they are in order
    return tuple(parts)


def _adapted(
    work: _Work,
    schemes: dict[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    progress: Callable[[str, int, int], None],
) -> dict[str, Scheme]:
    """The schemes as the target takes them: symmetric ones if it must be and all zeros allow it.

    AWQ has no word for symmetric weights, so those of a symmetric model are read as others are.
    """
    try:
        work.target.check(schemes, shapes)
        return schemes
    except SalienceError as error:
        refusal = error
    narrow = {name: s if s.codebook else replace(s, sym=True) for name, s in schemes.items()}
    try:
        work.target.check(narrow, shapes)
    except SalienceError:
        raise refusal from None
    if narrow == schemes:
        raise refusal
    for done, (name, scheme) in enumerate(schemes.items()):
        progress("zeros", done, len(schemes))
        if scheme != narrow[name] and (work.read(name).zeros != 2 ** (scheme.bits - 1)).any():
            raise refusal
    return narrow


def _quantization(work: _Work) -> dict[str, Any]:
    """The target's `quantization_config`.

    Float matrices are named as such, and so is a head that is tied and not stored at all. Full
    paths that the source lists mean the same to all readers; shorter ones differ by reader.
    """
    floats = [
        name.removesuffix(".weight")
        for name in work.others
        if name.endswith(".weight") and len(work.stored.shape(name)) == 2
    ]
    skipped = [work.quantization.get(key) for key in _SKIPPED]
    listed = [str(name) for names in skipped if isinstance(names, list) for name in names]
    floats += [name for name in listed if re.fullmatch(r"\w+(\.\w+)+", name)]
    floats += ["lm_head"]
    kept = [name for name in dict.fromkeys(floats) if name not in work.linears]
    outside = _outside(work.linears)
    return work.target.config(work.schemes, kept, outside, work.act_order)


def _outside(names: Mapping[str, object]) -> list[str]:
    """The linears that are in no numbered block."""
    return [name for name in names if not re.search(r"\.\d+\.", f".{name}.")]


def _transposed(path: Path, work: _Work, trust_remote_code: bool) -> set[str]:
    """The linears whose dense weight is stored as [in, out], which only their module knows."""
    if not isinstance(work.target, Dense) or work.modelled is not None:
        return set()  # no model that GGUF has is stored so
    source = open_source(str(path), trust_remote_code)
    model = source.skeleton()
    weights: Any = source.weights(model)
    found = set()
    for name, linear in codable(model).items():
        if is_transposed(linear):
            stored = weights.stored_names(f"{name}.{work.source.marker}")
            found |= {each.removesuffix(f".{work.source.marker}") for each in stored}
    return found


def _write(
    work: _Work,
    folder: Path,
    transposed: set[str],
    progress: Callable[[str, int, int], None],
) -> None:
    """The config, then all tensors in the order of their names."""
    quantization = _quantization(work)
    config = {key: value for key, value in work.config.items() if key not in _QUANTIZATION}
    if isinstance(work.target, Dense):
        config.pop("torch_dtype", None)
        config["dtype"] = str(work.target.dtype).removeprefix("torch.")
    else:
        config["quantization_config"] = quantization
    write_json(folder / "config.json", config)
    if work.target.config_file is not None:
        write_json(folder / work.target.config_file, quantization)
    writer = _writer(work, folder, config)
    total = len(work.linears)
    done = 0
    work.bytes = 0
    for name in sorted([*work.linears, *work.others], key=_natural):
        if name not in work.linears:
            work.bytes += writer.add(name, _other(work, name))
            continue
        progress("linear", done, total)
        made = work.write(name, work.read(name), quantization)
        if name in transposed:
            made = {local: tensor.T for local, tensor in made.items()}
        for local, tensor in made.items():
            work.bytes += writer.add(f"{name}.{local}", tensor)
        done += 1
        release_memory()
    writer.finish()
    progress("linear", total, total)


def _copy_assets(path: Path, work: _Work, folder: Path) -> None:
    """The tokenizer and all else beside the weights; a lone GGUF file has it inside."""
    if path.is_file() and work.modelled is not None:
        work.modelled.source.save_assets(folder)
    else:
        copy_assets(path, folder, code=True)


def _writer(work: _Work, folder: Path, config: Mapping[str, Any]) -> Writer:
    part = work.modelled
    if part is None:
        return ShardWriter(folder)
    return make_writer(work.target, folder, part.source, part.model, part.weights, config)


def _other(work: _Work, name: str) -> Tensor:
    """A tensor that is not quantized: its bytes, or for a dense checkpoint its 16-bit dtype."""
    part = work.modelled
    tensor = work.stored.tensor(name) if part is None else part.float_tensor(name)
    target = work.target
    if isinstance(target, Dense) and tensor.dtype in FLOAT_DTYPES.values():
        return to_dtype(tensor, name, target.dtype) if tensor.dtype != target.dtype else tensor
    return tensor


def _check_same(qt: QTensor, again: QTensor) -> None:
    """Refuse a weight that reads otherwise than it was."""
    ordered = (None if each.g_idx is None else each.g_idx.int() for each in (qt, again))
    parts = {
        "codes": (qt.q, again.q),
        "scales": (qt.scales.float(), again.scales.float()),
        "zeros": (qt.zeros, again.zeros),
        "groups of columns": tuple(ordered),
    }
    for what, (a, b) in parts.items():
        if (a is None) != (b is None) or (
            a is not None and b is not None and not torch.equal(a, b)
        ):
            raise SalienceError(f"its {what} would not be the same in the other format")


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that has layer 2 before layer 10."""
    return [(len(p), p) if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", name)]
