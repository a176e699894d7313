"""Linears that read the same tensor, as one product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salience.linear import QuantLinear
from salience.qtensor import QTensor
from salience.runtime.merge import MergedLinear, MergedQuantLinear, merge_linears
from salience.scheme import Scheme
from tiny_architectures import architecture
from tiny_models import error, logits, make_model, random_tokens

SCHEME = Scheme(bits=4, group_size=32)


def packed(model: Any) -> Any:
    """The model with its blocks' linears in 4 bits."""
    random = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "head" not in name and module.in_features % 32 == 0:
            rows, columns = module.weight.shape
            qt = QTensor(
                torch.randint(16, (rows, columns), dtype=torch.uint8, generator=random),
                (torch.rand(rows, columns // 32, generator=random) * 0.02 + 0.005).half(),
                torch.randint(6, 10, (rows, columns // 32), dtype=torch.uint8, generator=random),
                SCHEME,
            )
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, QuantLinear(qt, bias, dtype=torch.float32))
    return model


# The groups of the first block by the last part of their names.
GROUPS = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "qwen2": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
    "phi3": [],
    "gpt_neox": [],
    "cohere": [("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")],
    "gptj": [("q_proj", "k_proj", "v_proj", "fc_in")],
    "deepseek_v3": [("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")],
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_and_logits(name: str) -> None:
    model = make_model(architecture(name))
    expected = logits(model)
    groups = merge_linears(model)
    first = [g for g in groups if ".0." in g[0] and ".experts." not in g[0]]
    assert [tuple(n.split(".")[-1] for n in g) for g in first] == GROUPS[name]
    assert error(logits(model), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "cohere"])
def test_packed(name: str) -> None:
    model = packed(make_model(architecture(name)))
    expected = logits(model)
    weights = {n: m.qtensor() for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    size = sum(b.nbytes for b in model.buffers())
    groups = merge_linears(model)
    assert groups
    assert error(logits(model), expected) < 1e-2  # the product rounds to bf16
    assert sum(b.nbytes for b in model.buffers()) <= size * 1.05
    for names in groups:
        for member in names:
            module = model.get_submodule(member)
            assert isinstance(module, QuantLinear)
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.weight.dtype == torch.float32
            qt = module.qtensor()
            for part in ("q", "scales", "zeros"):
                assert torch.equal(getattr(qt, part), getattr(weights[member], part))


def test_a_member_may_be_called_with_anything() -> None:
    """Out of order, twice, alone: each gives what the linear would."""
    model = make_model(architecture("llama"))
    before = {n: m.weight.detach().clone() for n, m in model.named_modules()
              if type(m) is nn.Linear}  # fmt: skip
    names = merge_linears(model)[0]
    q, k, v = (model.get_submodule(name) for name in names)
    wq, wk, wv = (before[name] for name in names)
    x, y = torch.randn(2, 3, 64), torch.randn(1, 3, 64)
    for member, weight, given in ((k, wk, x), (q, wq, x), (q, wq, x), (v, wv, y), (k, wk, x),
                                  (k, wk, y), (q, wq, y), (v, wv, y)):  # fmt: skip
        assert torch.allclose(member(given), given @ weight.T, atol=1e-5)
    for member in (q, k, v):
        member(x)
    assert q.product.x is None
    assert q.product.y is None


def test_an_input_written_to_between_two_calls_is_another() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            x.mul_(2)
            return y + self.c(x)

    block = Block().requires_grad_(False)
    expected = block(torch.ones(1, 8))
    assert merge_linears(block, lambda: block(torch.ones(1, 8))) == [("a", "b")]
    assert torch.allclose(block(torch.ones(1, 8)), expected)


def test_moved_and_saved(tmp_path: Path) -> None:
    model = make_model(architecture("llama"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    merge_linears(model)
    kinds = {type(m) for m in model.modules()}
    assert MergedLinear in kinds
    assert MergedQuantLinear not in kinds
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    expected = logits(model)
    model.to(torch.float64)
    assert error(logits(model), expected) < 1e-5
    assert model.model.layers[0].self_attn.v_proj.weight.dtype == torch.float64


def test_compile_has_no_breaks() -> None:
    model = make_model(architecture("llama"))
    expected = logits(model)
    merge_linears(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=random_tokens(), use_cache=False).logits
    assert error(found, expected) < 1e-5
