"""One reply to one prompt, streamed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from salience.chat.prompt import defaults, encode
from salience.errors import SalienceError
from salience.runtime import Engine, context_limit


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer and what it took: seconds to the first token, and tokens a second after it."""

    text: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float
    tokens_per_second: float


def reply(
    model: Any,
    tokenizer: Any,
    prompt: str,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    engine: Engine | None = None,
) -> Reply:
    """Answer a prompt through the tokenizer's chat template (or as it is, when there is none).

    Args:
        model: a Transformers causal language model.
        tokenizer: its tokenizer.
        prompt: what the user says.
        system: a system message before it.
        max_new_tokens: stop after this many.
        temperature: 0 for the likeliest token each time.
        seed: of the sampling.
        on_text: called with each piece of text as it comes.
        engine: of this model, to use again; what it has in its cache need not be computed.

    Raises:
        SalienceError: an empty prompt, or one longer than the model's context.
    """
    if not prompt.strip():
        raise SalienceError("the prompt is empty")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids = encode(tokenizer, messages)
    sampling = defaults(model, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if engine is None:
        needed = len(ids) + max_new_tokens
        engine = Engine(model, tokenizer, max_context=min(needed, context_limit(model) or needed))
        engine.prepare(sampling)
    request = engine.submit(ids, sampling)
    for event in engine.events(request):
        if on_text is not None and event.text:
            on_text(event.text)
    result = request.result()
    return Reply(
        text=result.text,
        prompt_tokens=result.prompt_tokens,
        tokens=len(result.tokens),
        first_token_seconds=result.first_token_seconds,
        tokens_per_second=result.tokens_per_second,
    )
