"""torch.compile takes a model of QuantLinears whole, and gives what the model gives."""

import pytest
import torch
from torch import nn

from salience import grid
from salience.linear import QuantLinear
from salience.qtensor import QTensor
from salience.scheme import Scheme
from tiny_models import error, llama_config, logits, make_model, random_tokens


def quantized(act_order: bool, kernel: str) -> nn.Module:
    """A tiny Llama with biases, each linear packed."""
    config = llama_config(num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    model = make_model(config)
    generator = torch.Generator().manual_seed(0)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        qt = grid.quantize(linear.weight.data, Scheme(4, 32))
        if act_order:
            g_idx = torch.arange(qt.in_features)[
                torch.randperm(qt.in_features, generator=generator)
            ]
            qt = QTensor(qt.q, qt.scales, qt.zeros, qt.scheme, (g_idx // 32).int())
        parent, _, own = name.rpartition(".")
        bias = None if linear.bias is None else linear.bias.data
        setattr(model.get_submodule(parent), own, QuantLinear(qt, bias, kernel))
    assert sum(isinstance(m, QuantLinear) and m.bias is not None for m in model.modules()) == 7
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "act_order", "backend"),
    [("reference", True, "eager"), ("cpu_int4", False, "aot_eager")],
)
def test_whole_graph(kernel: str, act_order: bool, backend: str) -> None:
    model = quantized(act_order, kernel)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in (random_tokens(), random_tokens(1, 40, seed=1)):
        assert error(logits(compiled, tokens), logits(model, tokens)) < 1e-5
