"""The rewritten step of a real model: its logits, and the likelihood of a text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import salience
from salience.calibration import read_text
from salience.runtime.merge import merge_linears
from salience.runtime.step import DecodeStep, Step, make_step
from salience.runtime.trace import optimize
from salience.source import open_source
from tiny_models import error

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.xdist_group("model")]

TOKENS = 12


@pytest.fixture(scope="module")
def text(smollm2: str) -> Tensor:
    return torch.tensor(open_source(smollm2).tokenizer(read_text("pydoc")[:5000])["input_ids"])


@pytest.fixture(scope="module")
def packed(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    salience.quantize(smollm2, out, method="rtn", scheme="w4g64")
    return out


def step_of(model: Any) -> Step:
    step = make_step(model, 1, 192)
    assert isinstance(step, Step)
    return step


def logits(step: DecodeStep, cache: Any, text: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] after each token of a text, one step for each."""
    found = []
    for place in range(TOKENS):
        positions = torch.tensor([place])
        cache.at_rows(positions)
        found.append(step(text[place][None, None], positions)[0].float().clone())
    return torch.stack(found)


def both(model: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the model's own step, and with linears merged of the rewritten one."""
    step = step_of(model)
    plain = logits(step, step.cache, text)
    merge_linears(model)
    fast = optimize(step, torch.tensor([[1]]), torch.tensor([0]))
    assert fast is not step
    return plain, logits(fast, step.cache, text)


def loss(found: Tensor, text: Tensor) -> float:
    """Nats a token of the text."""
    return float(torch.nn.functional.cross_entropy(found[:-1].double(), text[1:TOKENS]))


@torch.no_grad()
def test_in_fp32_the_logits_are_the_same(smollm2: str, text: Tensor) -> None:
    plain, fast = both(salience.load(smollm2, device="cpu"), text)
    errors = torch.tensor([error(a, b) for a, b in zip(fast, plain, strict=True)])
    assert float(errors.median()) < 1e-5
    assert float(errors.max()) < 1e-4
    assert torch.equal(fast.argmax(-1), plain.argmax(-1))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("packed", torch.float32), ("packed", torch.bfloat16), ("float", torch.bfloat16)],
)
@torch.no_grad()
def test_the_text_is_as_likely(
    packed: Path, smollm2: str, text: Tensor, kind: str, dtype: torch.dtype
) -> None:
    model = salience.load(packed if kind == "packed" else smollm2, device="cpu", dtype=dtype)
    plain, fast = both(model, text)
    expected, found = loss(plain, text), loss(fast, text)
    assert 1 < expected < 5
    assert found == pytest.approx(expected, rel=5e-3)
