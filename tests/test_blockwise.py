"""Blocks run one at a time, exactly as the whole model runs them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    OPTConfig,
)

from salience.blocks import blockwise
from salience.blocks.blockwise import (
    BlockArguments,
    micro_batch,
    observe,
    record_inputs,
    run_block,
    run_tail,
)
from salience.errors import SalienceError
from salience.structure import find_blocks
from tiny_models import VOCABULARY, error, llama_config, make_model, random_tokens

CPU = torch.device("cpu")
GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama_config,
    # Sliding and full attention: masks and, in Gemma 3, rotations differ from block to block.
    "gemma2": lambda: Gemma2Config(**GEMMA),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    # Positions are added in front of the blocks.
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=64,
    ),
    # Blocks that return a tuple, of which the model takes the first item.
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=5, n_head=4),
    "gptj": lambda: GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=5,
        n_head=4,
        rotary_dim=8,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def recorded_inputs(
    model: Any, blocks: nn.ModuleList, tokens: Tensor, batch: int
) -> tuple[Tensor, BlockArguments]:
    """What enters the first block, all of it, and the arguments of each."""
    parts: list[Tensor] = []

    def keep(number: int, hidden: Tensor) -> None:
        assert number == len(parts) and len(hidden) == batch
        parts.append(hidden)

    arguments = record_inputs(model, blocks, tokens, batch, CPU, keep)
    return torch.cat(parts), arguments


def outputs_of_blocks(model: Any, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What goes into the first block and what comes out of each, in the model's own run."""
    _, blocks = find_blocks(model)
    seen: list[Tensor] = []

    def first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in blocks]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1:]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2, 6])
@torch.no_grad()
def test_blocks_run_alone_as_in_the_model(name: str, batch: int) -> None:
    model = make_model(MODELS[name]())
    _, blocks = find_blocks(model)
    tokens = random_tokens(6, 20)
    first, expected = outputs_of_blocks(model, tokens)
    hidden, arguments = recorded_inputs(model, blocks, tokens, batch)
    assert len(arguments.first) == len(blocks)
    assert torch.equal(hidden, first)
    for i, (block, after) in enumerate(zip(blocks, expected, strict=True)):
        parts = [
            run_block(block, part, arguments.of(i, number))
            for number, part in enumerate(hidden.split(batch))
        ]
        hidden = torch.cat(parts)
        assert error(hidden, after) < 1e-6
    # The stubs are gone: the model is what it was.
    again = outputs_of_blocks(model, tokens)[1]
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert all("forward" not in vars(block) for block in blocks)
    assert all(not block._forward_pre_hooks for block in blocks)


@torch.no_grad()
def test_hidden_states_are_those_that_transformers_reports() -> None:
    model = make_model(llama_config())
    tokens = random_tokens(2, 20)
    blocks = model.model.layers
    hidden, arguments = recorded_inputs(model, blocks, tokens, 2)
    out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    for i, block in enumerate(blocks):
        assert error(hidden, out.hidden_states[i]) < 1e-6
        hidden = run_block(block, hidden, arguments.of(i, 0))
    assert error(model.model.norm(hidden), out.hidden_states[-1]) < 1e-6


def test_blocks_differ_in_their_arguments() -> None:
    """Otherwise the test above would not show that each block gets its own."""
    model = make_model(MODELS["gemma3"]())
    _, arguments = recorded_inputs(model, find_blocks(model)[1], random_tokens(1, 20), 1)
    (_, sliding), (_, full) = arguments.first[:2]
    masks = [kwargs["attention_mask"] for kwargs in (sliding, full)]
    assert not torch.equal(*(torch.zeros(0) if mask is None else mask.float() for mask in masks))


@torch.no_grad()
def test_restored_after_a_failure() -> None:
    model = make_model(llama_config())
    blocks = model.model.layers
    with pytest.raises(IndexError):
        recorded_inputs(model, blocks, torch.full((1, 4), VOCABULARY + 1), 1)
    assert all("forward" not in vars(block) for block in blocks)
    assert all(not block._forward_pre_hooks for block in blocks)


@torch.no_grad()
def test_arguments_that_depend_on_the_text() -> None:
    class TextMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.blocks = nn.ModuleList([nn.Bilinear(8, 1, 8)])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = block(hidden, input_ids[..., None].float())
            return hidden

    model = TextMask()
    same = torch.zeros(2, 4, dtype=torch.int64)
    hidden, arguments = recorded_inputs(model, model.blocks, same, 1)
    assert hidden.shape == (2, 4, 8) and arguments.others == []
    tokens = random_tokens(2, 4)
    _, arguments = recorded_inputs(model, model.blocks, tokens, 1)
    for part in (0, 1):
        (mask,), kwargs = arguments.of(0, part)
        assert torch.equal(mask[0, :, 0], tokens[part].float()) and kwargs == {}


class Handing(nn.Module):
    """A model that is what it does with its two blocks."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.function = function

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.function(self, self.embed(input_ids))


def recorded(function: Callable[[Any, Tensor], Tensor]) -> BlockArguments:
    model = Handing(function)
    return recorded_inputs(model, model.blocks, random_tokens(4, 4), 2)[1]


@torch.no_grad()
def test_blocks_that_return_tuples() -> None:
    def unpack(model: Any, hidden: Tensor) -> Tensor:
        for block in model.blocks:
            hidden, _ = block(hidden)
        return hidden

    assert len(recorded(unpack).first) == 2

    def hand_on(model: Any, hidden: Tensor) -> Tensor:
        state = None
        for block in model.blocks:
            hidden, state = block(hidden, state)
        return hidden

    with pytest.raises(SalienceError, match="Linear is handed more than hidden states by the"):
        recorded(hand_on)


@torch.no_grad()
def test_models_that_call_their_blocks_in_another_way() -> None:
    def backwards(model: Any, hidden: Tensor) -> Tensor:
        for block in reversed(model.blocks):
            hidden = block(hidden)
        return hidden

    with pytest.raises(SalienceError, match="not called in the order of the list"):
        recorded(backwards)
    with pytest.raises(SalienceError, match="Handing runs 1 of its 2 blocks"):
        recorded(lambda model, hidden: model.blocks[0](hidden))
    with pytest.raises(SalienceError, match="more than one row of hidden states"):
        recorded(lambda model, hidden: model.blocks[1](model.blocks[0](torch.stack([hidden] * 3))))


@torch.no_grad()
def test_state_that_blocks_share_is_one_for_each_micro_batch() -> None:
    def shared(model: Any, hidden: Tensor) -> Tensor:
        state: dict[str, Tensor] = {}
        for block in model.blocks:
            hidden = block(hidden, state=state)
        return hidden

    arguments = recorded(shared)
    states = [[arguments.of(block, part)[1]["state"] for block in (0, 1)] for part in (0, 1)]
    assert (
        arguments.stateful
        and not recorded(lambda model, h: model.blocks[1](model.blocks[0](h))).stateful
    )
    assert states[0][0] is states[0][1] and states[1][0] is states[1][1]
    assert states[0][0] is not states[1][0]


@torch.no_grad()
def test_observe() -> None:
    model = make_model(llama_config())
    block = model.model.layers[1]
    hidden, arguments = recorded_inputs(model, model.model.layers, random_tokens(2, 20), 2)
    seen: dict[str, Tensor] = {}

    def run() -> Tensor:
        return run_block(block, hidden, arguments.of(1, 0))

    names = ["self_attn.q_proj", "mlp.gate_proj"]
    out = observe(block, names, run, seen.__setitem__)
    assert torch.equal(out, run())
    assert list(seen) == names
    assert torch.equal(seen["self_attn.q_proj"], block.input_layernorm(hidden))
    seen.clear()

    def fail() -> Tensor:
        run()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(block, names, fail, seen.__setitem__)
    seen.clear()
    run()
    assert not seen  # the hooks are gone


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_tail_sees_what_the_head_does_in_the_model(name: str) -> None:
    """The hidden states of the last block are enough; the tokens may be any."""
    model = make_model(MODELS[name]())
    _, blocks = find_blocks(model)
    head = model.get_output_embeddings()
    expected: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: expected.append(args[0]))
    tokens = random_tokens(2, 20)
    _, after = outputs_of_blocks(model, tokens)
    handle.remove()
    seen: dict[str, Tensor] = {}
    run_tail(model, blocks, torch.zeros_like(tokens), after[-1], seen.__setitem__)
    (found,) = [x for n, x in seen.items() if model.get_submodule(n) is head]
    assert error(found, expected[0]) < 1e-6
    assert all("forward" not in vars(block) for block in blocks)
    assert not head._forward_pre_hooks
    again = outputs_of_blocks(model, tokens)[1]
    assert all(torch.equal(a, b) for a, b in zip(again, after, strict=True))


def test_micro_batches_divide_the_samples_and_do_not_depend_on_memory() -> None:
    for samples in range(1, 40):
        for seqlen in (1, 64, 512, 2047, 2048, 4096):
            found = micro_batch(samples, seqlen, CPU)
            assert samples % found == 0
            assert found == 1 or found * seqlen <= blockwise.MICRO_BATCH_TOKENS["cpu"]
            larger = [n for n in range(found + 1, samples + 1) if samples % n == 0]
            assert all(n * seqlen > blockwise.MICRO_BATCH_TOKENS["cpu"] for n in larger)
