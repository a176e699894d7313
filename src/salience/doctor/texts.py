"""What lies beside the weights: tokenizer, chat template, generation config.

They come from other hands than the weights and go wrong without an error: a reply that never ends
has an end of text that the generation config does not know, and one that is noise may be of a
vocabulary larger than the embeddings.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from salience.checkpoint import read_json
from salience.doctor.complaint import Complaint
from salience.errors import SalienceError
from salience.source import Source

GENERATION = "generation_config.json"
_MARKER = re.compile(r"<\|[^<>|\s]{1,40}\|>")
_TALK = ({"role": "user", "content": "Hello."},)


def text_complaints(source: Source, rows: int) -> Iterator[Complaint]:
    """What is wrong with the tokenizer and the generation config.

    Args:
        source: the checkpoint.
        rows: of its embeddings.
    """
    generation: Mapping[str, Any] = {}
    folder = source.path.parent if source.path.is_file() else source.path
    file = folder / GENERATION
    if file.is_file():
        try:
            generation = read_json(file)
        except SalienceError as error:
            yield Complaint("error", (GENERATION,), str(error), "take the float model's")
    yield from generation_complaints(generation)
    text = source.config.get_text_config()
    known = _ids(generation.get("eos_token_id")) or _ids(getattr(text, "eos_token_id", None))
    try:
        tokenizer = source.tokenizer
    except SalienceError as error:
        mend = "copy the tokenizer's files from the float model"
        yield Complaint("error", ("tokenizer",), str(error), mend)
        tokenizer = None
    yield from end_complaints(known, tokenizer, rows)
    if tokenizer is not None:
        yield from template_complaints(tokenizer)


def generation_complaints(generation: Mapping[str, Any]) -> Iterator[Complaint]:
    """What samplers would mind of a generation config."""
    where = (GENERATION,)
    for key, least, most in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
        value = generation.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or not least <= value <= most:
            yield Complaint("error", where, f"has a {key} of {value!r}", "take it out, or mend it")
    sampled = [k for k in ("temperature", "top_p", "top_k") if generation.get(k) is not None]
    if generation.get("do_sample") is False and sampled:
        problem = f"says do_sample false and has {' and '.join(sampled)}"
        yield Complaint(
            "note", where, problem, "newer Transformers do not save it so; take them out"
        )


def end_complaints(known: set[int], tokenizer: Any, rows: int) -> Iterator[Complaint]:
    """What is wrong with the ends of text, and with the size of the vocabulary.

    Args:
        known: the ends that the configs tell.
        tokenizer: of Transformers, or None.
        rows: of the embeddings.
    """
    beyond = sorted(token for token in known if not 0 <= token < rows)
    if beyond:
        problem = f"ends a text by token {beyond[0]}, and there are {rows}"
        yield Complaint("error", ("eos_token_id",), problem, "take the float model's configs")
    if tokenizer is None:
        return
    own = tokenizer.eos_token_id
    if not known and own is None:
        problem = "there is no end of text: replies stop at their longest"
        yield Complaint("warning", ("eos_token_id",), problem, f"give {GENERATION} an eos_token_id")
    elif known and own is not None and own not in known:
        problem = (
            f"the tokenizer ends a text by {own} ({tokenizer.eos_token}), the configs by "
            f"{sorted(known)}: a reply may not stop"
        )
        mend = f"add {own} to the eos_token_id of {GENERATION}"
        yield Complaint("warning", ("eos_token_id",), problem, mend)
    added = tokenizer.get_added_vocab()
    large = {text: token for text, token in tokenizer.get_vocab().items() if token >= rows}
    if large.keys() - added.keys():
        problem = f"has tokens up to {max(large.values())}, and there are {rows} embeddings"
        mend = "take the tokenizer that belongs to these weights"
        yield Complaint("error", ("tokenizer",), problem, mend)
    elif large:
        problem = f"has added tokens without embeddings, such as {min(large)}"
        yield Complaint("note", ("tokenizer",), problem, "nothing, if no prompt has them")


def template_complaints(tokenizer: Any) -> Iterator[Complaint]:
    """What is wrong with the chat template."""
    where = ("chat template",)
    if tokenizer.chat_template is None:
        mend = "nothing for a model that only continues texts"
        yield Complaint("note", where, "there is none", mend)
        return
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(_TALK), add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        line = " ".join(str(error).split())
        yield Complaint("error", where, f"does not work ({line})", "take the float model's")
        return
    vocabulary = tokenizer.get_vocab()
    strange = sorted({mark for mark in _MARKER.findall(text) if mark not in vocabulary})
    if strange:
        problem = f"writes {strange[0]}, which is no token of the vocabulary"
        mend = "take the tokenizer and template of the float model"
        yield Complaint("warning", where, problem, mend)


def _ids(value: Any) -> set[int]:
    """The tokens of an eos_token_id: one, several, or none."""
    values = value if isinstance(value, list) else [value]
    return {each for each in values if isinstance(each, int)}
