"""The CUDA C++ kernels: what can be said of them without a GPU, then on one against fp64."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from salience.kernels import _fragments, cuda_program
from salience.kernels.choice import TOKENS, Shape
from salience.kernels.mma_cuda import Mma
from salience.kernels.wgmma_cuda import Config, Wgmma, instruction, usual

FP16, BF16 = torch.float16, torch.bfloat16
SHAPES = [  # columns, rows
    (4096, 4096), (4096, 28672), (14336, 4096), (8192, 8192), (4096, 1024), (4096, 6144),
    (768, 3072), (64, 64), (96, 40), (128, 100), (1000, 333),
]  # fmt: skip
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("bits", _fragments.BITS)
def test_options_of_wgmma_fit_the_gpu(bits, columns, rows):
    for tokens in TOKENS:
        if tokens < 16:
            continue
        options = Wgmma().options(Shape(bits, 32, columns, rows, FP16), tokens)
        assert 1 <= len(options) <= 12
        assert len({tuple(one.items()) for one in options}) == len(options)
        for config in (*(Config(**one) for one in options), usual(bits, rows, columns, tokens)):
            assert (config.shared + 1024) * config.resident <= 228 * 1024  # of a processor
            assert config.threads * config.resident <= 2048
            assert config.split <= 8  # blocks of a portable cluster
            assert config.tokens % 8 == 0 and config.tokens % config.split == 0
            assert config.tokens <= 256 and config.stages >= 2 and config.buffers in (2, 4)
            sums = config.tokens // 2 * config.row_tiles
            words = config.depth * config.row_tiles * (2 * bits + 2)
            # Registers of a consumer, as wgmma.cu shares them out
            even = min(248, 65536 // (config.threads * config.resident) // 8 * 8)
            assert sums + words < min(240, even + (even - 40) // (config.warpgroups * config.parts))


def test_a_tile_for_few_tokens_is_narrow():
    assert usual(4, 4096, 4096, 9).tokens == 16
    assert usual(4, 4096, 4096, 33).tokens == 64
    assert usual(4, 28672, 4096, 4096).tokens == 256


def test_the_instruction_names_each_register_once():
    text = instruction(64, True)
    assert "m64n64k16.f32.bf16.bf16" in text and text.count('"+f"') == 32
    assert "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;" in text


# ---- launches, recorded ----------------------------------------------------------------------


class Recorded:
    """In place of `cuda_program.kernel`: what would be compiled and launched."""

    def __init__(self, monkeypatch):
        self.compiled, self.launched = {}, []
        monkeypatch.setattr(cuda_program, "kernel", self.kernel)
        monkeypatch.setattr(cuda_program, "capability", lambda index: 90)
        monkeypatch.setattr(cuda_program, "tensor_map", lambda x, box: (x.shape, box))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def kernel(self, source, name, macros, index, before=""):
        self.compiled[source, macros, before] = None
        return self

    def launch(self, grid, threads, arguments, **more):
        self.launched.append((grid, threads, arguments, more))


def packed_weight(bits, group, rows, columns, scales=FP16, device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=random)
    size = (rows, -(-columns // group))
    scale = (torch.rand(size, generator=random) / 50 + 0.001).to(scales)
    zero = torch.randint(2**bits, size, dtype=torch.uint8, generator=random)
    packed = [
        _fragments.pack_fragments(codes, bits),
        _fragments.order_rows(scale),
        _fragments.order_rows(zero),
    ]
    spread = [t.double().repeat_interleave(group, 1)[:, :columns] for t in (scale, zero)]
    return [t.to(device) for t in packed], ((codes.double() - spread[1]) * spread[0]).to(device)


def test_what_wgmma_launches(monkeypatch):
    recorded = Recorded(monkeypatch)
    packed, _ = packed_weight(4, 32, 333, 1003)
    y = Wgmma().multiply(torch.zeros(77, 1003, dtype=FP16), packed, 4, 32, 333, tokens=32)
    assert y.shape == (77, 333)
    [(grid, threads, arguments, more)] = recorded.launched
    assert grid == (3 * 3, 1, 1) and threads == 384  # of 128 rows, of 32 tokens
    assert arguments[0] == ((77, 1008), 32)  # rows of a multiple of 16 bytes
    assert more == {"shared": 33 * 1024, "cluster": 1, "overlap": True}
    assert arguments[5:] == (77, 333, 24, 8, 32, 3, 4)
    [(_, macros, _)] = recorded.compiled
    assert dict(macros)["GROUP"] == 32 and dict(macros)["STREAM"] == 0


def test_x_that_has_no_room_comes_in_blocks(monkeypatch):
    """The options of a weight may be those measured on a narrower one."""
    recorded = Recorded(monkeypatch)
    for columns in (1024, 16384):
        packed, _ = packed_weight(4, 128, 64, columns)
        x = torch.zeros(4, columns, dtype=FP16)
        Mma().multiply(x, packed, 4, 128, 64, deep=2, stages=0)
    stages = [dict(macros)["STAGES"] for _, macros, _ in recorded.compiled]
    assert stages == [0, 2]
    shared = [more["shared"] for *_, more in recorded.launched]
    assert shared == [4 * (2 * 1024 + 16), 4 * 2 * 2 * 272]


def _every_option(monkeypatch, variant, tokens, shapes, bits, group, dtype, scales):
    recorded = Recorded(monkeypatch)
    for (columns, rows), most in itertools.product(shapes, tokens):
        size = (-(-rows // 64) * 4, -(-columns // 128))
        packed = [
            torch.empty(*size, 64 * bits, dtype=torch.int32),
            torch.empty(size[0], columns // group, 16, dtype=scales),
            torch.empty(size[0], columns // group, 16, dtype=torch.uint8),
        ]
        shape = Shape(bits, group, columns, rows, dtype)
        for options in ({}, *variant.options(shape, most)):
            x = torch.empty(most, columns, dtype=dtype)
            variant.multiply(x, packed, bits, group, rows, **options)
    return list(recorded.compiled)


def _compile(case):
    from cuda.bindings import nvrtc

    source, macros, before = case
    text = before + cuda_program.text(source)
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), source.encode(), 0, [], [])
    flags = [f"-D{name}={value}".encode() for name, value in (*macros, ("SM", 90))]
    flags += [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    # It is written to, so it must not be the one b" " that all of Python shares.
    log = b" " * (nvrtc.nvrtcGetProgramLogSize(program)[1] + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.decode(errors="replace") if int(status) else "", case


def _compile_all(cases):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no NVRTC: {str(error)[:100]}")
    with ThreadPoolExecutor() as pool:
        for log, case in pool.map(_compile, cases):
            assert not log, (case[1], log[:2000])


@pytest.mark.slow
@pytest.mark.parametrize("variant", [Mma(), Wgmma()], ids=["mma", "wgmma"])
def test_options_compile(monkeypatch, variant):
    tokens = (1, 8, 16, 32, 64) if variant.name == "mma" else (32, 64, 128, 256, 4096)
    shapes = SHAPES[:2]
    cases = _every_option(monkeypatch, variant, tokens, shapes, 4, 128, FP16, FP16)
    _compile_all(cases[:: 23 if variant.name == "mma" else 4])  # they differ in numbers alone


@pytest.mark.slow
@pytest.mark.parametrize("variant", [Mma(), Wgmma()], ids=["mma", "wgmma"])
def test_kinds_of_weights_compile(monkeypatch, variant):
    recorded = Recorded(monkeypatch)
    kinds = itertools.product(_fragments.BITS, (32, 256), (FP16, BF16))
    for bits, group, dtype in kinds:
        for scales in (torch.float32,) if bits == 4 and group == 32 else (dtype,):
            packed, _ = packed_weight(bits, group, 64, 256, scales)
            variant.multiply(torch.zeros(16, 256, dtype=dtype), packed, bits, group, 64)
    _compile_all(list(recorded.compiled))


# ---- on a GPU --------------------------------------------------------------------------------

TOLERANCE = {FP16: 6e-4, BF16: 6e-3}


def worst(variant, options, bits, group, dtype, tokens, rows, columns, scales=None):
    size = columns if group == -1 else group
    packed, weight = packed_weight(bits, size, rows, columns, scales or dtype, "cuda")
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=random).to("cuda", dtype)
    torch.full((tokens, rows), torch.nan, dtype=dtype, device="cuda")  # y is given this memory
    y = variant.multiply(x, packed, bits, group, rows, **options)
    want = x.double() @ weight.T
    assert y.shape == want.shape and y.dtype == dtype
    return ((y.double() - want).norm() / want.norm()).item() / TOLERANCE[dtype]


def _all_right(variant, cases):
    shape = Shape(4, 128, 4096, 4096, FP16)
    if not variant.supports(shape, 32, torch.device("cuda")):
        pytest.skip(f"{variant.name} is not for this GPU")

    def run(case):
        positional, options = case
        return worst(variant, options, *positional), case

    with ThreadPoolExecutor(8) as pool:
        wrong = [(ratio, case) for ratio, case in pool.map(run, cases) if not ratio <= 1]
    assert not wrong


@on_gpu
@pytest.mark.parametrize("bits", _fragments.BITS)
@pytest.mark.parametrize("variant", [Mma(), Wgmma()], ids=["mma", "wgmma"])
def test_against_fp64(variant, bits):
    cases = [
        ((bits, group, dtype, 16, 256, 1024), {})
        for group, dtype in itertools.product((32, 64, 128, 256, -1), (FP16, BF16))
    ]
    cases += [((bits, 128, BF16, 16, 256, 512, scales), {}) for scales in (FP16, torch.float32)]
    odd = [(1, 64, 128), (17, 333, 256), (41, 100, 1152), (64, 48, 640)]
    cases += [((bits, 128, FP16, *size), {}) for size in odd]
    cases += [((bits, 32, FP16, 33, 333, 1056), {}), ((bits, -1, BF16, 19, 65, 1003), {})]
    _all_right(variant, cases)


@on_gpu
@pytest.mark.parametrize(
    ("variant", "tokens"),
    [(Mma(), n) for n in (1, 3, 8, 13)] + [(Wgmma(), n) for n in (32, 64, 128, 300, 1100)],
    ids=lambda one: getattr(one, "name", str(one)),
)
def test_every_way_to_cut_the_work(variant, tokens):
    columns, rows = 2048, 1000
    shape = Shape(4, 128, 4096, 4096, FP16)
    options = variant.options(shape, 1 << (tokens - 1).bit_length())
    _all_right(variant, [((4, 128, FP16, tokens, rows, columns), one) for one in options])


@on_gpu
def test_memory_used_again_in_another_shape():
    """A tensor map is made of an address and a shape; both must be those of this call."""
    variant = Wgmma()
    if not variant.supports(Shape(4, 128, 256, 64, FP16), 32, torch.device("cuda")):
        pytest.skip("not for this GPU")
    memory = torch.randn(64 * 512, device="cuda").half()
    for tokens, columns in ((64, 512), (128, 256), (64, 256), (64, 512)):
        packed, weight = packed_weight(4, 128, 64, columns, device="cuda")
        x = memory[: tokens * columns].view(tokens, columns)
        y = variant.multiply(x, packed, 4, 128, 64)
        want = x.double() @ weight.T
        assert (y.double() - want).norm() <= TOLERANCE[FP16] * want.norm()


@on_gpu
@pytest.mark.parametrize(("variant", "tokens"), [(Mma(), 3), (Wgmma(), 32)], ids=["mma", "wgmma"])
def test_in_a_graph_one_after_the_other(variant, tokens):
    """Each kernel may start before the one ahead has ended, and must wait for its output."""
    if not variant.supports(Shape(4, 128, 512, 512, FP16), 32, torch.device("cuda")):
        pytest.skip("not for this GPU")
    layers = [packed_weight(4, 128, 512, 512, device="cuda", seed=seed) for seed in range(4)]
    x = torch.randn(tokens, 512, device="cuda").half()

    def chain(y):
        for packed, _ in layers:
            y = variant.multiply(y, packed, 4, 128, 512)
        return y

    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(tokens, 512))
        graph.replay()
        want = x.double()
        for _, weight in layers:
            want = (want @ weight.T).half().double()
        assert (y.double() - want).norm() <= 4 * TOLERANCE[FP16] * want.norm()
