"""What a model's configs say of its context and of the tokens that end a text."""

from collections.abc import Sequence
from typing import Any

from salience.errors import SalienceError

_LONGEST_BY_DEFAULT = 8192
# What configs call the longest text that positions reach.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def context_limit(model: Any) -> int | None:
    """The tokens that a model's positions reach; None when its config tells no limit."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in _LIMITS]
    return next((each for each in found if isinstance(each, int) and each > 0), None)


def context(model: Any, wanted: int | None) -> int:
    """The context to use: the one wanted, or for None the model's own, at most 8192.

    Raises:
        SalienceError: it is longer than the model's.
    """
    limit = context_limit(model)
    if wanted is None:
        return min(limit or _LONGEST_BY_DEFAULT, _LONGEST_BY_DEFAULT)
    if wanted < 2:
        raise SalienceError(f"max_context is {wanted}, must be at least 2")
    if limit is not None and wanted > limit:
        raise SalienceError(f"max_context is {wanted}, the model was made for {limit} tokens")
    return wanted


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text, of the first config that tells any."""
    for owner in (model.generation_config, model.config, tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return {found} if isinstance(found, int) else set(found)
    return set()


def check_prompt(model: Any, prompt: Sequence[int], max_context: int) -> None:
    """Refuse a prompt that is empty, leaves no room for a reply or has tokens that do not exist."""
    vocabulary = model.config.get_text_config().vocab_size
    if not len(prompt):
        raise SalienceError("the prompt is empty")
    if len(prompt) >= max_context:
        raise SalienceError(
            f"the prompt has {len(prompt)} tokens, which leaves no room for a reply in a "
            f"context of {max_context}; shorten it or raise max_context"
        )
    wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise SalienceError(f"the prompt has token {wrong}, the model has {vocabulary} tokens")
