"""The main job on a real model, through the real command line: quantize, inspect, eval, chat."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import salience
from salience.calibration import read_text
from salience.chat.session import Session
from salience.evaluation.perplexity import perplexity
from salience.formats import AutoAwq
from salience.runtime import Engine, Sampling
from tiny_models import error
from workshop import Workshop

# One worker quantizes the model, for all of these.
pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.xdist_group("model")]

SCHEME = "w4g64"
# The first ten of thirty blocks: all of them took minutes, and `make demo` does them.
BLOCKS = ("--only", r"layers\.\d\.")
LINEARS = 10 * 7
CONTEXT = 1024
PROMPT = "Write one sentence about the sea."


@dataclass(frozen=True)
class Made:
    """A quantized folder and what the command said of it."""

    folder: Path
    said: dict[str, Any]


@pytest.fixture(scope="session")
def awq(
    smollm2: str, command: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    out = tmp_path_factory.mktemp("smollm2") / "awq"
    options = ("--scheme", SCHEME, "--samples", "4", *BLOCKS)
    return Made(out, command("quantize", smollm2, "-o", out, *options))


@pytest.fixture(scope="session")
def command(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The JSON that a command prints."""
    place = tmp_path_factory.mktemp("command")

    def run(*words: object) -> Any:
        done = workshop(*words, "--json", cwd=place)
        assert done.status == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def dense(awq: Made) -> Any:
    """The same weights in a model that Transformers alone made, fp32."""
    fmt, stored = AutoAwq(), load_file(awq.folder / "model.safetensors")
    config = json.loads((awq.folder / "config.json").read_text())
    scheme = fmt.scheme(config.pop("quantization_config"), "")
    state = {}
    for name, tensor in stored.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            parts = {part: stored[f"{owner}.{part}"] for part in fmt.tensors}
            state[f"{owner}.weight"] = fmt.read(parts, scheme).dequantize()
        elif leaf not in fmt.tensors:
            state[name] = tensor.float()
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32)
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer(awq: Made) -> Any:
    return AutoTokenizer.from_pretrained(awq.folder)


@pytest.fixture(scope="session")
def text(tokenizer: Any) -> torch.Tensor:
    return torch.tensor(tokenizer(read_text("pydoc")[:20_000])["input_ids"])[None, :256]


def test_quantize_and_inspect(awq: Made, command: Callable[..., Any]) -> None:
    assert awq.said["scheme"] == SCHEME and awq.said["bits_per_weight"] == 4.3125
    assert len(awq.said["quantized_modules"]) == LINEARS
    seen = command("inspect", awq.folder)
    assert (seen["format"], seen["scheme"], len(seen["modules"])) == ("awq", SCHEME, LINEARS)
    assert len(seen["kept"]) == 20 * 7 + 1 and "lm_head" in seen["kept"]
    assert seen["bits_per_weight"] == pytest.approx(4.3125)
    assert seen["bytes"] < 215 * 2**20
    report = json.loads((awq.folder / "salience_report.json").read_text())
    assert all(one["error"] <= one["error_rtn"] * (1 + 1e-6) for one in report["linears"])
    assert report["error"] < 0.8 * report["error_rtn"]
    assert [fold["prev"] for fold in report["folds"]] == [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    ]


def test_awq_loses_half_of_what_rtn_loses(
    awq: Made,
    tokenizer: Any,
    smollm2: str,
    command: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rtn = tmp_path_factory.mktemp("smollm2") / "rtn"
    salience.quantize(smollm2, rtn, method="rtn", scheme=SCHEME, only=[BLOCKS[1]], format="awq")
    words = read_text("pydoc")
    least, most = (
        perplexity(salience.load(model), tokenizer, words, CONTEXT, max_chunks=1).perplexity
        for model in (smollm2, rtn)
    )
    found = command("eval", awq.folder, "--context", CONTEXT, "--max-chunks", 1)
    assert found["tokens"] == CONTEXT - 1
    assert 0 < found["perplexity"] - least < 0.5 * (most - least)


@torch.no_grad()
def test_reply_is_that_of_the_dequantized_model(awq: Made, dense: Any, tokenizer: Any) -> None:
    model = salience.load(awq.folder, kernel="reference")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    count = inputs["input_ids"].shape[1]
    ids = dense.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert ids.shape[1] > count + 8
    # Greedy text is one's own when each of its tokens is one's likeliest after those before it.
    likeliest = model(input_ids=ids[:, :-1], use_cache=False).logits[0, count - 1 :].argmax(-1)
    assert torch.equal(likeliest, ids[0, count:])
    found = Session(Engine(model, tokenizer), Sampling(max_new_tokens=6)).ask(PROMPT)
    expected = tokenizer.decode(ids[0, count : count + 6], skip_special_tokens=True)
    assert found.text == expected


@torch.no_grad()
def test_kernels_agree_with_the_dequantized_model(
    awq: Made, dense: Any, tokenizer: Any, text: torch.Tensor
) -> None:
    exact = salience.load(awq.folder, kernel="reference")
    fast = salience.load(awq.folder, kernel="cpu_int4")
    expected = dense(input_ids=text).logits
    assert error(exact(input_ids=text).logits, expected) < 1e-4
    # On a prompt the fast kernel is exact in the weights; for a few tokens it computes in bf16.
    assert error(fast(input_ids=text).logits, expected) < 1e-4
    few = text[:, :12]
    assert error(fast(input_ids=few).logits, dense(input_ids=few).logits) < 1e-2
    words = read_text("pydoc")[:20_000]
    values = [
        perplexity(model, tokenizer, words, context=context, max_chunks=chunks).perplexity
        for context, chunks in ((16, 16), (512, 1))
        for model in (dense, fast)
    ]
    assert values[1] == pytest.approx(values[0], rel=3e-3)
    assert values[3] == pytest.approx(values[2], rel=3e-3)


def test_chat_command(awq: Made, command: Callable[..., Any]) -> None:
    said = command("chat", awq.folder, "--prompt", PROMPT, "--max-new-tokens", 16)
    assert 0 < said["tokens"] <= 16 and said["text"].strip()
    assert "sea" in said["text"].lower() or "ocean" in said["text"].lower()
