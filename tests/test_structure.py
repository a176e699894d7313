"""Blocks, sink groups and folds: on a tiny Llama, and on toy blocks made to mislead the probe."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salience.calibration import block_inputs, run_block
from salience.errors import SalienceError
from salience.loading import load
from salience.structure import (
    Fold,
    apply_fold,
    discover_folds,
    find_blocks,
    linears,
    relative_error,
    restore,
    sink_groups,
    snapshot,
)
from tiny_models import random_tokens

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
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    nested = Toy({"small": experts, "norms": nn.ModuleList([nn.LayerNorm(999)])}, swiglu)
    assert find_blocks(nested) == ("small", experts)
    blocks = nn.ModuleList([nested, nn.Linear(9, 9)])
    assert find_blocks(Toy({"outer": blocks}, swiglu)) == ("outer", blocks)
    with pytest.raises(SalienceError, match="Sequential has no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_folds_of_llama(llama: Path) -> None:
    model = load(llama)
    blocks = model.model.layers
    inputs = block_inputs(model, blocks, random_tokens(2, 16), 2, torch.device("cpu"))
    block = blocks[0]

    def run() -> Tensor:
        return run_block(block, inputs.hidden, inputs.arguments[0])

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


def test_interleaved_qkv_has_no_rows_to_divide() -> None:
    """In GPT-NeoX's order the last rows are a head's q, k and v: dividing them is no fold."""

    def function(block: Any, x: Tensor) -> Tensor:
        parts = block.qkv(x).unflatten(-1, (HEADS, 3, HEAD)).unbind(-2)
        return x + block.o(attend(*(part.flatten(-2) for part in parts)))

    toy = Toy({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "o": nn.Linear(WIDTH, WIDTH)}, function)
    assert folds_of(toy) == {}


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


def test_consumer_that_is_no_linear_forbids_the_norm() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        return x + torch.sigmoid(block.router(y)) * block.down(F.silu(block.gate(y)) * block.up(y))

    toy = gated_mlp(RmsNorm())
    toy.router, toy.function = Router(), function
    found = folds_of(toy)
    assert set(found) == {"down"}


def test_linear_router_is_a_sink() -> None:
    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        odds = torch.softmax(block.router(y), -1)
        experts = [expert[1](F.relu(expert[0](y))) for expert in block.experts]
        return x + sum(odds[..., i, None] * out for i, out in enumerate(experts))

    experts = [nn.ModuleList([nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)]) for _ in range(2)]
    parts = {
        "norm": RmsNorm(),
        "router": nn.Linear(WIDTH, 2),
        "experts": nn.ModuleList(experts),
    }
    found = folds_of(Toy(parts, function))
    assert found["router"].prev == "norm"
    assert set(found["router"].sinks) == {"router", "experts.0.0", "experts.1.0"}
    assert found["experts.1.1"].prev == "experts.1.0"


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


def test_same_shape_is_not_same_tensor() -> None:
    """A gate that reads a copy of the norm's output is a group of its own."""

    def function(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        return x + block.down(F.silu(block.gate(y.clone())) * block.up(y))

    toy = gated_mlp(RmsNorm())
    toy.function = function
    assert sink_groups(toy, lambda: toy(sample())) == [("gate",), ("up",), ("down",)]
    # Neither may take the norm alone: the other reads it too.
    assert set(folds_of(toy)) == {"down"}


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
