"""Kernels and formats, each tried on a problem so small that all of them take a second or two.

A weight of 64 x 64 is rounded, packed and multiplied, and the product held against one in fp64; a
format writes it into a file and reads it again. What is tried is what a user's model would call. A
trial fails by whatever error comes out of a compiler, a driver or a library, or by a wrong result.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from salience import kernels
from salience.checkpoint import SafetensorsCheckpoint
from salience.formats import FORMATS, Format
from salience.grid import quantize
from salience.kernels import fused, gpu
from salience.kernels.choice import Shape
from salience.linear import QuantLinear
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.writer import ShardWriter

SCHEMES = ("w4g64", "w4g32-sym", "w3g64", "w2g64", "w8g64-sym", "nf4", "nf4-dq", "fp4")
_SIZE = 64
_TOKENS = 3
_TOLERANCE = 0.02  # of |y|: bf16 within a kernel costs 0.004, a code out of place about 1
_NAME = "model.layers.0.mlp.up_proj"
# What formats hold that do not hold w4g64.
_HELD = {"bitsandbytes": "nf4", "gguf": "w4g32-sym"}


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing that was tried.

    Args:
        kind: "kernel", "variant", "op", "graph" or "format".
        name: of it, with the device and the scheme.
        status: "works", "fails", or "absent" for what this machine is not made for.
        detail: the error, or why it is absent.
        milliseconds: that it took, the compiling included.
    """

    kind: str
    name: str
    status: str
    detail: str = ""
    milliseconds: float = 0.0


def all_trials(devices: list[torch.device]) -> Iterator[Trial]:
    """Everything that there is, on each of some devices.

    Args:
        devices: the CPU, and one of each kind of GPU.
    """
    for device in devices:
        for scheme in SCHEMES:
            yield from kernel_trials(device, Scheme.parse(scheme))
        for name, check in _OPS.items():
            yield attempt("op", f"{name} on {device.type}", partial(check, device))
        if device.type == "cuda":
            yield from variant_trials(device)
            yield attempt("graph", f"CUDA graph on {device}", partial(_graph, device))
    for fmt in FORMATS:
        yield attempt("format", _format_name(fmt), partial(_round_trip, fmt))


def attempt(kind: str, name: str, check: Callable[[], float | None]) -> Trial:
    """Run a check, which gives the error of its result or None for a result that is right."""
    start = time.perf_counter()
    try:
        with torch.no_grad():
            off = check()
    except Exception as error:  # a driver and a compiler fail by errors of their own
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Trial(kind, name, "fails", detail, 1e3 * (time.perf_counter() - start))
    took = 1e3 * (time.perf_counter() - start)
    if off is not None and not off <= _TOLERANCE:
        return Trial(kind, name, "fails", f"its result is off by {100 * off:.0f} %", took)
    return Trial(kind, name, "works", "", took)


def kernel_trials(device: torch.device, scheme: Scheme) -> Iterator[Trial]:
    """Each backend that says it takes a scheme on a device."""
    for backend in kernels.BACKENDS:
        if backend.supports(scheme, device, _SIZE, _SIZE):
            name = f"{backend.name} {scheme} on {device.type}"
            yield attempt("kernel", name, partial(_product, backend.name, device, scheme))


def variant_trials(device: torch.device) -> Iterator[Trial]:
    """Each way of backend `gpu` to multiply, which a table would choose among."""
    for variant in gpu.VARIANTS:
        for bits in (2, 3, 4, 8):
            shape = Shape(bits, _SIZE, _SIZE, _SIZE, torch.float16)
            name = f"{variant.name} w{bits} on {device.type}"
            tokens = next((n for n in (4, 64, 128) if variant.supports(shape, n, device)), None)
            if tokens is None:
                yield Trial("variant", name, *_absence(variant, device))
                continue
            yield attempt("variant", name, partial(_variant, variant, shape, tokens, device))


def _absence(variant: gpu.Variant, device: torch.device) -> tuple[str, str]:
    """Why a variant is not to be had: by what this machine is, or by what could be mended."""
    if isinstance(variant, gpu.Triton | gpu.Dequantize):
        fault = gpu.triton_fault(device) or ""
        mendable = device.type == "cuda" and "compute capability" not in fault
        return ("fails" if mendable else "absent"), fault
    if device.type == "cuda" and find_spec("cuda") is None:
        return "absent", "cuda-core is not installed; pip install 'salience[cuda]'"
    return "absent", f"not made for {device.type} of this kind, or for a weight this small"


def random_weight(scheme: Scheme, rows: int = _SIZE, columns: int = _SIZE) -> QTensor:
    """A weight like any other, rounded to nearest."""
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(rows, columns, generator=generator) * 0.02, scheme)


def _inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, _SIZE, generator=generator).to(device, dtype)


def _off(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|."""
    value, reference = value.double().cpu(), reference.double().cpu()
    return float((value - reference).norm() / reference.norm())


def _expected(x: Tensor, qt: QTensor) -> Tensor:
    return x.double().cpu() @ qt.dequantize().double().T


def _product(kernel: str, device: torch.device, scheme: Scheme) -> float:
    qt = random_weight(scheme)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = _inputs(_TOKENS, device, dtype)
    return _off(QuantLinear(qt.to(device), kernel=kernel)(x), _expected(x, qt))


def _variant(variant: gpu.Variant, shape: Shape, tokens: int, device: torch.device) -> float:
    qt = random_weight(Scheme(shape.bits, shape.group_size))
    x = _inputs(tokens, device, shape.dtype)
    packed = gpu.Gpu().pack(qt.to(device))
    y = variant.multiply(x, packed, shape.bits, shape.group_size, shape.rows)
    return _off(y, _expected(x, qt))


def _graph(device: torch.device) -> float:
    """A captured product, replayed on other inputs."""
    qt = random_weight(Scheme(4, _SIZE))
    linear = QuantLinear(qt.to(device))
    x = _inputs(_TOKENS, device, torch.float16)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        linear(x)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    x.neg_()
    graph.replay()
    torch.cuda.synchronize(device)
    return _off(y, _expected(x, qt))


def _format_name(fmt: Format) -> str:
    version = getattr(fmt, "version", 1)
    return f"{fmt.name}{f' v{version}' if version > 1 else ''}"


def _round_trip(fmt: Format) -> float:
    """Codes, scales and zeros, by a file on the disk: 0 if they come back as they were."""
    scheme = Scheme.parse(_HELD.get(fmt.name, "w4g64"))
    if fmt.name == "gptq" and _format_name(fmt) == "gptq":
        scheme = Scheme.parse("w4g64-sym")  # version 1 has no place for other zeros
    if fmt.name == "bitsandbytes-int8":
        scheme = Scheme.parse("w8channel-sym")
    qt = random_weight(scheme)
    if fmt.name == "bitsandbytes-int8":
        qt = QTensor(qt.q.clamp(min=1), qt.scales.float(), qt.zeros, scheme)
    tensors = {f"{_NAME}.{local}": value for local, value in fmt.write(qt).items()}
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder))
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()
        stored = SafetensorsCheckpoint(Path(folder))
        read = {name.removeprefix(f"{_NAME}."): stored.tensor(name).clone() for name in tensors}
        again = fmt.read(read, fmt.scheme(fmt.config({_NAME: scheme}, ["lm_head"]), _NAME))
        same = torch.equal(again.q, qt.q) and torch.equal(again.zeros, qt.zeros)
        return 0.0 if same and _off(again.dequantize(), qt.dequantize()) < 1e-6 else 1.0


def _like(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _norm(device: torch.device) -> float:
    x, weight = _like(device, 3, _SIZE), _like(device, _SIZE)
    mean = x.double().square().mean(-1, keepdim=True)
    expected = x.double() * (mean + 1e-6).rsqrt() * weight.double()
    summed = fused.add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)[0]
    return max(_off(fused.rms_norm(x, weight, 1e-6), expected), _off(summed, expected))


def _gates(device: torch.device) -> float:
    gate, up = _like(device, 3, _SIZE), _like(device, 3, _SIZE).flip(0)
    silu = F.silu(gate.double()) * up.double()
    gelu = F.gelu(gate.double()) * up.double()
    return max(_off(fused.silu_mul(gate, up), silu), _off(fused.gelu_mul(gate, up, False), gelu))


def _rope(device: torch.device) -> float:
    q, k, v = (_like(device, 2, heads, 16) for heads in (2, 1, 1))
    angles = torch.arange(16, device=device).double().remainder(8)[None].expand(2, 16) / 8
    cache_k, cache_v = (torch.zeros_like(_like(device, 2, 1, 4, 16)) for _ in range(2))
    positions = torch.tensor([1, 3], device=device)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    turned = fused.rope_update(q, k, v, cos, sin, cache_k, cache_v, positions)

    def rotated(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 8:], x[..., :8]], dim=-1).double()
        return x.double() * angles.cos()[:, None] + half * angles.sin()[:, None]

    stored = cache_k[torch.arange(2, device=device), :, positions]
    return max(_off(turned, rotated(q)), _off(stored, rotated(k)))


def _attention(device: torch.device) -> float:
    q, k, v = (
        _like(device, 2, 4, 16),
        _like(device, 2, 2, 8, 16),
        _like(device, 2, 2, 8, 16).flip(2),
    )
    positions = torch.tensor([7, 2], device=device)
    scale = 0.25
    y = fused.decode_attention(q, k, v, positions, scale)
    rows = []
    for row, last in enumerate((7, 2)):
        keys, values = (t[row, :, : last + 1].double().repeat_interleave(2, 0) for t in (k, v))
        weights = (torch.einsum("hd,htd->ht", q[row].double(), keys) * scale).softmax(-1)
        rows.append(torch.einsum("ht,htd->hd", weights, values).flatten())
    return _off(y, torch.stack(rows))


def _argmax(device: torch.device) -> float:
    logits = _like(device, 3, 1000)
    return 0.0 if torch.equal(fused.argmax(logits).cpu(), logits.cpu().argmax(-1)) else 1.0


_OPS: dict[str, Callable[[torch.device], float]] = {
    "rms_norm": _norm,
    "silu_mul, gelu_mul": _gates,
    "rope_update": _rope,
    "decode_attention": _attention,
    "argmax": _argmax,
}
