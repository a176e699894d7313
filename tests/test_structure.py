"""Blocks, sink groups and folds: on a tiny Llama, and on toy blocks made to mislead the probe."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salience.blocks.blockwise import run_block
from salience.errors import SalienceError
from salience.loading import load
from salience.structure import (
    Fold,
    apply_fold,
    discover_folds,
    find_blocks,
    kept,
    linears,
    relative_error,
    restore,
    search_folds,
    sink_groups,
    snapshot,
    unchanged,
    weight_of,
)
from tiny_models import first_inputs

WIDTH, INNER, HEAD = 32, 48, 8
HEADS = WIDTH // HEAD


class RmsNorm(nn.Module):
    """RMSNorm that multiplies by `offset` + weight: 0 for Llama's, 1 for Gemma's."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.randn(WIDTH) * 0.3 + 1 - offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * (self.offset + self.weight)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [batch, tokens, channels], key-value heads repeated as needed."""
    q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(-2)


class Toy(nn.Module):
    """A block given as named modules and a function of (self, x)."""

    def __init__(self, parts: dict[str, nn.Module], function: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def sample() -> Tensor:
    return torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))


def folds_of(block: nn.Module, x: Tensor | None = None) -> dict[str, Fold]:
    """The discovered folds by their first sink; finding them must leave the block as it was."""
    x = sample() if x is None else x
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        found = discover_folds(block, lambda: block(x), sink_groups(block, lambda: block(x)))
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    assert all(fold.error < 1e-5 for fold in found)
    check_function(block, x, found)
    return {fold.sinks[0]: fold for fold in found}


def check_function(block: nn.Module, x: Tensor, folds: list[Fold]) -> None:
    """Folds with random scales leave the block's function alone, in fp64."""
    block, x = block.double(), x.double()
    random = torch.Generator().manual_seed(9)
    with torch.no_grad():
        expected = block(x)
        saved = snapshot(block, [name for name, _ in block.named_modules()])
        for fold in folds:
            # Values of fp32, so that the division rounds only once.
            free = torch.exp(torch.randn(int(fold.index.max()) + 1, generator=random)).double()
            apply_fold(block, fold, free[fold.index])
        if folds:
            assert any(not torch.equal(parameter, value) for parameter, value in saved)
        assert relative_error(block(x), expected) < 1e-12
        restore(saved)
        assert torch.equal(block(x), expected)
    block.float()


def swiglu(block: Any, x: Tensor) -> Tensor:
    y = block.norm(x)
    return x + block.down(F.silu(block.gate(y)) * block.up(y))


def gated_mlp(norm: nn.Module, bias: bool = False) -> Toy:
    parts = {
        "norm": norm,
        "gate": nn.Linear(WIDTH, INNER, bias),
        "up": nn.Linear(WIDTH, INNER, bias),
        "down": nn.Linear(INNER, WIDTH, bias),
    }
    return Toy(parts, swiglu)


def two_linears(activation: Callable[[Tensor], Tensor]) -> Toy:
    parts = {"fc1": nn.Linear(WIDTH, INNER), "fc2": nn.Linear(INNER, WIDTH)}
    return Toy(parts, lambda m, x: x + m.fc2(activation(m.fc1(x))))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_find_blocks(llama: Path) -> None:
    model = load(llama)
    name, blocks = find_blocks(model)
    assert name == "model.layers" and blocks is model.model.layers
    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    nested = Toy({"small": experts, "norms": nn.ModuleList([nn.LayerNorm(999)])}, swiglu)
    assert find_blocks(nested) == ("small", experts)
    blocks = nn.ModuleList([nested, nn.Linear(9, 9)])
    assert find_blocks(Toy({"outer": blocks}, swiglu)) == ("outer", blocks)
    with pytest.raises(SalienceError, match="Sequential has no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(8, 8)))


def test_folds_of_llama(llama: Path) -> None:
    model = load(llama)
    blocks = model.model.layers
    hidden, arguments = first_inputs(model, blocks)
    block = blocks[0]

    def run() -> Tensor:
        return run_block(block, hidden, arguments.of(0, 0))

    with torch.no_grad():
        groups = sink_groups(block, run)
        folds = discover_folds(block, run, groups)
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    assert groups == [attention, ("self_attn.o_proj",), mlp, ("mlp.down_proj",)]
    assert [(fold.prev, fold.sinks, fold.rule) for fold in folds] == [
        ("input_layernorm", attention, "norm"),
        ("self_attn.v_proj", ("self_attn.o_proj",), "rows"),
        ("post_attention_layernorm", mlp, "norm"),
        ("mlp.up_proj", ("mlp.down_proj",), "rows"),
    ]
    assert all(fold.error < 1e-5 for fold in folds)
    # Four heads of 16 share two key-value heads: query heads 0 and 1 read rows 0..15 of v.
    repeated = [16 * (head // 2) + channel for head in range(4) for channel in range(16)]
    indices = [fold.index.tolist() for fold in folds]
    assert indices == [list(range(64)), repeated, list(range(64)), list(range(128))]
    assert [fold.channels for fold in folds] == [64, 32, 64, 128]
    assert all(fold.index.dtype == torch.int64 for fold in folds)


def test_layer_norm_with_bias() -> None:
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias)
    found = folds_of(gated_mlp(norm, bias=True))
    assert (found["gate"].prev, found["gate"].sinks) == ("norm", ("gate", "up"))
    assert found["gate"].rule == "norm"
    assert (found["down"].prev, found["down"].rule) == ("up", "rows")


def test_one_plus_weight_norm() -> None:
    found = folds_of(gated_mlp(RmsNorm(offset=1.0)))
    assert (found["gate"].prev, found["gate"].rule) == ("norm", "1+w norm")
    assert found["gate"].index.tolist() == list(range(WIDTH))


def test_last_rows_of_fused_gate_up() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        gate, up = block.gate_up(block.norm(x)).chunk(2, -1)
        return x + block.down(F.silu(gate) * up)

    parts = {
        "norm": RmsNorm(),
        "gate_up": nn.Linear(WIDTH, 2 * INNER),
        "down": nn.Linear(INNER, WIDTH),
    }
    found = folds_of(Toy(parts, function))
    assert set(found) == {"gate_up", "down"}
    assert (found["down"].prev, found["down"].rule) == ("gate_up", "rows")
    assert found["down"].index.tolist() == list(range(INNER, 2 * INNER))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_last_rows_of_fused_qkv(kv_heads: int) -> None:
    shared = kv_heads * HEAD

    def function(block: Any, x: Tensor) -> Tensor:
        return x + block.o(attend(*block.qkv(block.norm(x)).split([WIDTH, shared, shared], -1)))

    parts = {
        "norm": RmsNorm(),
        "qkv": nn.Linear(WIDTH, WIDTH + 2 * shared),
        "o": nn.Linear(WIDTH, WIDTH),
    }
    found = folds_of(Toy(parts, function))
    assert (found["o"].prev, found["o"].rule) == ("qkv", "rows")
    first = WIDTH + shared
    rows = [
        first + HEAD * (head // (HEADS // kv_heads)) + i
        for head in range(HEADS)
        for i in range(HEAD)
    ]
    assert found["o"].index.tolist() == rows
    assert found["o"].channels == shared


def test_rows_of_interleaved_qkv() -> None:
    """GPT-NeoX's order: q, k and v of one head after those of another."""

    def function(block: Any, x: Tensor) -> Tensor:
        parts = block.qkv(x).unflatten(-1, (HEADS, 3, HEAD)).unbind(-2)
        return x + block.o(attend(*(part.flatten(-2) for part in parts)))

    toy = Toy({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "o": nn.Linear(WIDTH, WIDTH)}, function)
    found = folds_of(toy)["o"]
    assert (found.prev, found.rule) == ("qkv", "rows")
    assert found.index.tolist() == [
        3 * HEAD * head + 2 * HEAD + i for head in range(HEADS) for i in range(HEAD)
    ]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_rows_of_interleaved_groups(kv_heads: int) -> None:
    """InternLM2's wqkv: for each key-value head its query heads, its k and its v."""
    shared = HEADS // kv_heads

    def function(block: Any, x: Tensor) -> Tensor:
        parts = block.wqkv(block.norm(x)).unflatten(-1, (kv_heads, shared + 2, HEAD))
        q, k, v = parts[..., :shared, :], parts[..., shared, :], parts[..., shared + 1, :]
        return x + block.wo(attend(q.flatten(-3), k.flatten(-2), v.flatten(-2)))

    rows = kv_heads * (shared + 2) * HEAD
    parts = {
        "norm": RmsNorm(),
        "wqkv": nn.Linear(WIDTH, rows),
        "wo": nn.Linear(WIDTH, WIDTH),
    }
    found = folds_of(Toy(parts, function))
    assert set(found) == {"wqkv", "wo"}
    assert (found["wo"].prev, found["wo"].channels) == ("wqkv", kv_heads * HEAD)
    assert found["wo"].index.tolist() == [
        ((head // shared) * (shared + 2) + shared + 1) * HEAD + i
        for head in range(HEADS)
        for i in range(HEAD)
    ]


def test_up_before_gate() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        up, gate = block.up_gate(block.norm(x)).unflatten(-1, (INNER, 2)).unbind(-1)
        return x + block.down(F.silu(gate) * up)

    parts = {
        "norm": RmsNorm(),
        "up_gate": nn.Linear(WIDTH, 2 * INNER),
        "down": nn.Linear(INNER, WIDTH),
    }
    found = folds_of(Toy(parts, function))
    assert found["down"].index.tolist() == list(range(0, 2 * INNER, 2))


def test_transposed_weights() -> None:
    """GPT-2 keeps its weights as [in, out]."""

    class Conv1D(nn.Module):
        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
            self.bias = nn.Parameter(torch.randn(outputs))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    def function(block: Any, x: Tensor) -> Tensor:
        y = x + block.o(attend(*block.qkv(block.norm(x)).chunk(3, -1)))
        return y + block.down(F.relu(block.up(y)))

    parts = {
        "norm": nn.LayerNorm(WIDTH),
        "qkv": Conv1D(3 * WIDTH, WIDTH),
        "o": Conv1D(WIDTH, WIDTH),
        "up": Conv1D(INNER, WIDTH),
        "down": Conv1D(WIDTH, INNER),
    }
    toy = Toy(parts, function)
    assert weight_of(toy.up).shape == (INNER, WIDTH)
    found = folds_of(toy)
    assert {fold.prev: fold.sinks for fold in found.values()} == {
        "norm": ("qkv",),
        "qkv": ("o",),
        "up": ("down",),
    }
    assert found["o"].index.tolist() == list(range(2 * WIDTH, 3 * WIDTH))


def test_norm_of_each_head() -> None:
    """A norm whose weight is shared by the heads has as many free scales as a head channels."""

    class HeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(HEAD) + 0.5)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return F.rms_norm(x, (HEAD,)) * self.weight * F.silu(gate)

    def function(block: Any, x: Tensor) -> Tensor:
        heads = block.up(x).unflatten(-1, (-1, HEAD))
        return x + block.down(block.norm(heads, heads.flip(-1)).flatten(-2))

    parts = {
        "up": nn.Linear(WIDTH, INNER),
        "norm": HeadNorm(),
        "down": nn.Linear(INNER, WIDTH),
    }
    found = folds_of(Toy(parts, function))
    assert (found["down"].prev, found["down"].channels) == ("norm", HEAD)
    assert found["down"].index.tolist() == list(range(HEAD)) * (INNER // HEAD)


def test_parallel_attention() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        mlp = block.down(F.gelu(block.up(y)))
        return x + block.o(attend(block.q(y), block.k(y), block.v(y))) + mlp

    names = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "up": INNER}
    parts: dict[str, nn.Module] = {"norm": nn.LayerNorm(WIDTH)}
    parts |= {name: nn.Linear(WIDTH, rows) for name, rows in names.items()}
    parts |= {"o": nn.Linear(WIDTH, WIDTH), "down": nn.Linear(INNER, WIDTH)}
    found = folds_of(Toy(parts, function))
    assert {fold.prev: set(fold.sinks) for fold in found.values()} == {
        "norm": {"q", "k", "v", "up"},
        "v": {"o"},
    }


EXPERTS, CHOSEN = 8, 2


class Router(nn.Module):
    """Weights and numbers of the chosen experts; as many modules as models have of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(F.linear(x, self.weight), -1).topk(CHOSEN, dim=-1)


class StackedExperts(nn.Module):
    """Experts as stacked weights: [experts, out, in], or [experts, in, out] as in gpt-oss."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        shapes = (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        gate_up, down = (torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)
        self.gate_up_proj = nn.Parameter(gate_up.mT.contiguous() if transposed else gate_up)
        self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, odds: Tensor, chosen: Tensor) -> Tensor:
        gate_up = self.gate_up_proj if self.transposed else self.gate_up_proj.mT
        down = self.down_proj if self.transposed else self.down_proj.mT
        gate, up = torch.einsum("th,ehi->tei", x, gate_up).chunk(2, -1)
        y = torch.einsum("tei,eih->teh", self.act(gate) * up, down)
        return (y.take_along_dim(chosen[..., None], 1) * odds[..., None]).sum(1)


class ListedExperts(nn.ModuleList):
    """Experts as a list of modules, each called with the tokens sent to it."""

    def __init__(self) -> None:
        super().__init__(gated_mlp(RmsNorm()) for _ in range(EXPERTS))
        for expert in self:
            del expert.norm
            expert.function = lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x))

    def forward(self, x: Tensor, odds: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, expert(x[token]) * odds[token, slot, None])
        return out


def mixture(router: nn.Module, experts: nn.Module) -> Toy:
    """A norm that feeds a router, routed experts and a shared expert with a gate of its own."""

    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x).flatten(0, 1)
        routed = block.router(y)
        if isinstance(routed, Tensor):
            routed = torch.softmax(routed, -1).topk(CHOSEN, dim=-1)
        shared = block.down(F.silu(block.gate(y)) * block.up(y))
        shared = torch.sigmoid(block.shared_gate(y)) * shared
        return x + (block.experts(y, *routed) + shared).unflatten(0, x.shape[:2])

    toy = gated_mlp(RmsNorm())
    toy.router, toy.experts, toy.function = router, experts, function
    toy.shared_gate = nn.Linear(WIDTH, 1)
    return toy


@pytest.mark.parametrize("linear_router", [True, False])
@pytest.mark.parametrize("kind", ["stacked", "transposed", "listed"])
def test_routers_and_experts_are_scaled_but_not_coded(kind: str, linear_router: bool) -> None:
    experts = ListedExperts() if kind == "listed" else StackedExperts(kind == "transposed")
    router = nn.Linear(WIDTH, EXPERTS, bias=False) if linear_router else Router()
    toy = mixture(router, experts)
    assert set(linears(toy)) == {"gate", "up", "down"}
    model = Toy({"layers": nn.ModuleList([toy])}, swiglu)
    assert kept(model) == {
        "layers.0.experts": "expert",
        "layers.0.router": "router",
        "layers.0.shared_gate": "narrow",
    }
    found = folds_of(toy)
    assert set(found) == {"gate", "down"}
    fold = found["gate"]
    assert (fold.prev, fold.sinks) == ("norm", ("gate", "up"))
    assert found["down"].others == ()
    names = {
        "listed": [f"experts.{i}.{part}.weight" for i in range(EXPERTS) for part in ("gate", "up")]
    }
    axis = 1 if kind in ("transposed", "listed") else 2
    expected = {(name, axis) for name in names.get(kind, ["experts.gate_up_proj"])}
    assert set(fold.others) == expected | {("router.weight", 1), ("shared_gate.weight", 1)}


@pytest.mark.parametrize("missing", ["router.weight", "shared_gate.weight", "experts.gate_up_proj"])
def test_a_fold_that_misses_a_consumer_is_seen(missing: str) -> None:
    toy = mixture(Router(), StackedExperts(transposed=False))
    fold = folds_of(toy)["gate"]
    x = sample()
    scales = torch.linspace(0.5, 2, WIDTH)
    with torch.no_grad():
        expected = toy(x)
        saved = snapshot(toy, fold.modules)
        apply_fold(toy, fold, scales)
        assert unchanged(toy, toy(x), expected)
        restore(saved)
        wrong = replace(fold, others=tuple(o for o in fold.others if o[0] != missing))
        assert len(wrong.others) == 2
        apply_fold(toy, wrong, scales)
        assert not unchanged(toy, toy(x), expected)


def test_experts_without_tokens_are_scaled_with_the_others() -> None:
    router = Router()
    with torch.no_grad():
        router.weight[3:].fill_(0)
        router.weight[0].copy_(-router.weight[1])  # one of both is always chosen
    toy = mixture(router, ListedExperts())
    scaled = {name for name, _ in folds_of(toy)["gate"].others}
    assert {"experts.7.gate.weight", "experts.7.up.weight"} <= scaled


def test_consumer_that_cannot_be_scaled_forbids_the_norm() -> None:
    class Loudest(nn.Module):
        """Something that depends on how its input channels compare with each other."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return (x.abs() + self.weight.abs()).amax(-1, keepdim=True)

    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        return x + block.loudest(y) * block.down(F.silu(block.gate(y)) * block.up(y))

    toy = gated_mlp(RmsNorm())
    toy.loudest, toy.function = Loudest(), function
    assert set(folds_of(toy)) == {"down"}
    with torch.no_grad():
        groups = sink_groups(toy, lambda: toy(sample()))
        _, reasons = search_folds(toy, lambda: toy(sample()), groups)
    assert reasons == {"gate": "norm feeds loudest, too, whose inputs cannot be scaled"}


def test_consumer_that_is_no_module_forbids_the_norm() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        return y + block.down(F.silu(block.gate(y)) * block.up(y))

    toy = gated_mlp(RmsNorm())
    toy.function = function
    assert set(folds_of(toy)) == {"down"}
    with torch.no_grad():
        groups = sink_groups(toy, lambda: toy(sample()))
        _, reasons = search_folds(toy, lambda: toy(sample()), groups)
    assert reasons == {"gate": "norm feeds something else, too"}


def test_ties_of_a_router() -> None:
    """One token in a hundred may change where there is a router; nowhere else."""
    plain, routed = gated_mlp(RmsNorm()), mixture(Router(), StackedExperts(False))
    reference = torch.randn(200, WIDTH)
    once, often = reference.clone(), reference.clone()
    once[7] += 1
    often[::20] += 1
    assert unchanged(routed, once, reference) and not unchanged(plain, once, reference)
    assert not unchanged(routed, often, reference)
    assert not unchanged(routed, once * float("nan"), reference)


def test_linear_with_a_forward_of_its_own() -> None:
    class Plain(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    class Gate(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    block = nn.ModuleDict({"a": Plain(8, 16), "b": Plain(8, 16, bias=False), "c": Gate(8, 16)})
    assert set(linears(block)) == {"a", "b"}
    model = Toy({"layers": nn.ModuleList([block])}, swiglu)
    assert kept(model) == {"layers.0.c": "own forward"}


@pytest.mark.parametrize("activation", [F.gelu, F.silu, torch.tanh, lambda x: x + 1])
def test_activation_that_does_not_scale(activation: Callable[[Tensor], Tensor]) -> None:
    assert folds_of(two_linears(activation)) == {}


def test_relu_scales_and_dead_channels_have_their_place() -> None:
    toy = two_linears(F.relu)
    dead = [0, 7, INNER - 1]
    with torch.no_grad():
        toy.fc1.bias[dead] = -100
    found = folds_of(toy)
    assert (found["fc2"].prev, found["fc2"].rule) == ("fc1", "rows")
    assert found["fc2"].index.tolist() == list(range(INNER))


def test_dead_channels_of_unknown_place() -> None:
    """A permuted input with a dead channel: which row feeds it cannot be told."""
    order = torch.randperm(INNER)
    toy = two_linears(lambda x: F.relu(x)[..., order])
    assert folds_of(toy)["fc2"].index.tolist() == order.tolist()
    with torch.no_grad():
        toy.fc1.bias[3] = -100
    assert folds_of(toy) == {}


def test_all_channels_dead() -> None:
    toy = two_linears(F.relu)
    with torch.no_grad():
        toy.fc1.bias.fill_(-100)
    assert folds_of(toy) == {}


def test_channels_that_mix() -> None:
    mix = torch.randn(INNER, INNER)
    assert folds_of(two_linears(lambda x: F.relu(x) @ mix.to(x.dtype))) == {}


def test_norm_between_two_linears() -> None:
    """The norm is divided, not the linear before it, whose scale the norm undoes."""

    def function(block: Any, x: Tensor) -> Tensor:
        return x + block.fc2(block.norm(block.fc1(x)))

    parts = {
        "fc1": nn.Linear(WIDTH, WIDTH),
        "norm": RmsNorm(),
        "fc2": nn.Linear(WIDTH, WIDTH),
    }
    found = folds_of(Toy(parts, function))
    assert {name: fold.prev for name, fold in found.items()} == {"fc2": "norm"}


def test_uncalled_linear() -> None:
    toy = gated_mlp(RmsNorm())
    toy.spare = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(SalienceError, match="linear spare was not reached"):
        sink_groups(toy, lambda: toy(sample()))


def test_reader_of_a_copy() -> None:
    """A gate that reads a copy of the norm's output is a group of its own, in the same fold."""

    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        return x + block.down(F.silu(block.gate(y.clone())) * block.up(y))

    toy = gated_mlp(RmsNorm())
    toy.function = function
    assert sink_groups(toy, lambda: toy(sample())) == [("gate",), ("up",), ("down",)]
    found = folds_of(toy)
    assert set(found) == {"gate", "down"} and found["gate"].sinks == ("gate", "up")


def test_the_proof_catches_a_wrong_index() -> None:
    toy = gated_mlp(RmsNorm())
    fold = folds_of(toy)["down"]
    wrong = replace(fold, index=fold.index.flip(0))
    x = sample()
    with torch.no_grad():
        expected = toy(x)
        apply_fold(toy, wrong, torch.linspace(0.5, 2, INNER))
        assert relative_error(toy(x), expected) > 1e-2


def test_relative_error() -> None:
    ones = torch.ones(4)
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(ones * float("nan"), ones) == float("inf")
    assert list(linears(gated_mlp(RmsNorm()))) == ["gate", "up", "down"]


@pytest.mark.parametrize("gate_first", [True, False])
def test_a_gate_that_is_linear(gate_first: bool) -> None:
    """With a ReLU gate the input follows gate and up alike: one of them is divided, not both."""

    def function(block: Any, x: Tensor) -> Tensor:
        a, b = block.both(block.norm(x)).chunk(2, -1)
        gate, up = (a, b) if gate_first else (b, a)
        return x + block.down(F.relu(gate) * up)

    parts = {
        "norm": RmsNorm(),
        "both": nn.Linear(WIDTH, 2 * INNER),
        "down": nn.Linear(INNER, WIDTH),
    }
    found = folds_of(Toy(parts, function))
    assert found["down"].index.tolist() == list(range(INNER, 2 * INNER))


def test_a_gate_that_is_linear_in_some_channels() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        gate, up = block.both(block.norm(x)).chunk(2, -1)
        return x + block.down(F.silu(gate) * up)

    parts = {
        "norm": RmsNorm(),
        "both": nn.Linear(WIDTH, 2 * INNER),
        "down": nn.Linear(INNER, WIDTH),
    }
    toy = Toy(parts, function)
    with torch.no_grad():
        toy.both.bias[[3, 11]] = 50.0  # silu(50) is 50
        toy.both.bias[[5, 7]] = 8.0  # nearly linear
    found = folds_of(toy)
    assert found["down"].index.tolist() == list(range(INNER, 2 * INNER))


def test_router_beside_a_shared_expert_of_as_many_outputs() -> None:
    """Qwen3-Next has 512 experts and a shared expert of 512 channels."""
    for router in (Router(), nn.Linear(WIDTH, EXPERTS, bias=False)):
        mlp = nn.ModuleDict({"gate": router, "experts": StackedExperts(False)})
        mlp["shared"] = nn.ModuleDict(
            {"up": nn.Linear(WIDTH, EXPERTS), "down": nn.Linear(EXPERTS, WIDTH)}
        )
        block = nn.ModuleDict({"q": nn.Linear(WIDTH, EXPERTS), "mlp": mlp})
        assert set(linears(block)) == {"q", "mlp.shared.up", "mlp.shared.down"}


def test_router_of_several_layers_with_a_spare_output() -> None:
    gate = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, EXPERTS + 1))
    block = nn.ModuleDict({"gate": gate, "experts": StackedExperts(False)})
    assert linears(block) == {}
    block = nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH), "mlp": block})
    model = Toy({"layers": nn.ModuleList([block, block])}, swiglu)
    assert set(kept(model).values()) == {"router", "expert"}
    assert "layers.0.mlp.gate" in kept(model)


def test_decoder_beside_other_lists() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.ModuleList([nn.Linear(99, 99)])
            self.text = nn.ModuleDict(
                {
                    "layers": nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]),
                    "mtp": nn.ModuleList([nn.Linear(16, 16)]),
                }
            )

        def get_decoder(self) -> nn.Module:
            return self.text

    assert find_blocks(Model())[0] == "text.layers"
    assert set(kept(Model()).items()) == {
        ("vision.0", "outside the blocks"),
        ("text.mtp.0", "outside the blocks"),
    }
