"""Tiny random checkpoints with a real tokenizer, for tests that need a whole model folder."""

import functools
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from salience.blocks.blockwise import BlockArguments, record_inputs
from salience.placement import input_device

VOCABULARY = 320
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "".join(topics.topics[key] + "\n" for key in sorted(topics.topics))


@functools.cache
def _trained() -> str:
    """A byte-level BPE, trained on Python's documentation, as JSON."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT[:200_000]], trainer)
    return str(inner.to_str())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all tiny models, a new one each time."""
    inner = Tokenizer.from_str(_trained())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_config(**changes: Any) -> LlamaConfig:
    """Three blocks of hidden size 64 with four heads on two key-value heads."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**values, **changes})


def make_model(config: Any, seed: int = 0) -> Any:
    """A random model whose linears meet a few large input channels, as those of real ones do."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Gemma's norms multiply by 1 + weight, the others by weight.
                one = 1.0 if parameter.eq(1).all() else 0.0
                parameter.add_(0.1 * torch.randn_like(parameter))
                if "norm" in name:
                    loud = torch.randperm(len(parameter))[: len(parameter) // 16]
                    parameter[loud] += 8 * max(one, 0.5)
            else:
                parameter.mul_(4)
                loud = torch.randperm(parameter.shape[0])[: parameter.shape[0] // 16]
                parameter[loud] *= 3
    return model


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Write a model and its tokenizer."""
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    make_tokenizer().save_pretrained(folder)
    return folder


def random_tokens(samples: int = 2, seqlen: int = 24, seed: int = 0) -> Tensor:
    """Token ids of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (samples, seqlen), generator=generator)


@torch.no_grad()
def first_inputs(model: Any, blocks: nn.ModuleList) -> tuple[Tensor, BlockArguments]:
    """What enters the first block on a few random tokens, and the arguments of each block."""
    hidden: list[Tensor] = []
    cpu = torch.device("cpu")
    tokens = random_tokens(2, 16)
    arguments = record_inputs(model, blocks, tokens, 2, cpu, lambda _, part: hidden.append(part))
    return hidden[0], arguments


@torch.no_grad()
def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    """The logits of a model, wherever it is, on a few random tokens; on the CPU."""
    ids = (random_tokens() if tokens is None else tokens).to(input_device(model))
    return model(input_ids=ids, use_cache=False).logits.cpu()


def error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, in fp64."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm()).item()
