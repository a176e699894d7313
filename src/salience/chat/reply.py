"""One reply to one prompt, streamed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from salience.errors import SalienceError
from salience.placement import input_device


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

    Raises:
        SalienceError: an empty prompt.
    """
    from transformers import TextStreamer

    if not prompt.strip():
        raise SalienceError("the prompt is empty")
    inputs = _encode(tokenizer, prompt, system).to(input_device(model))
    count = inputs["input_ids"].shape[1]
    times: list[float] = []

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None and text:
                on_text(text)

    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )[0, count:]
    # The streamer is first handed the prompt, then each token.
    first, last = times[1], times[-1]
    return Reply(
        text=tokenizer.decode(output, skip_special_tokens=True),
        prompt_tokens=count,
        tokens=len(output),
        first_token_seconds=first - start,
        tokens_per_second=(len(output) - 1) / max(last - first, 1e-9) if len(output) > 1 else 0.0,
    )


def _encode(tokenizer: Any, prompt: str, system: str | None) -> Any:
    if tokenizer.chat_template is None:
        text = prompt if system is None else f"{system}\n\n{prompt}"
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
