"""What a model thinks before it answers, told apart from the answer.

Models that think write <think> ... </think> first; some templates open the tag at the end of the
prompt, so that only its end is in the reply. Nothing else is needed to know which is which.
"""

_OPEN, _CLOSE = "<think>", "</think>"


def opened(prompt: str) -> bool:
    """Whether a prompt ends inside of a thought."""
    return prompt.rstrip().endswith(_OPEN)


def split(reply: str, inside: bool, ended: bool = False) -> tuple[str, str]:
    """The thought and the answer of a reply, or of its beginning.

    Both only grow while the reply does: what may be a part of a tag waits.

    Args:
        reply: its text so far.
        inside: whether it begins inside of a thought.
        ended: whether nothing follows.
    """
    text = reply.lstrip()
    if not ended and _OPEN.startswith(text):
        return "", ""
    if text.startswith(_OPEN):
        text = text[len(_OPEN) :]
    elif not inside:
        return "", reply
    thought, closed, answer = text.partition(_CLOSE)
    if not closed and not ended:
        # An end of the text that may be the beginning of the tag.
        held = next((n for n in range(len(_CLOSE) - 1, 0, -1) if thought.endswith(_CLOSE[:n])), 0)
        thought = thought[: len(thought) - held]
    return thought.strip(), answer.lstrip()
