"""The vocabulary of a GGUF file, from a tokenizer.json.

llama.cpp tokenizes by itself, so the file must say how. Byte-level BPE (Llama 3, Qwen, SmolLM) is
its "gpt2": tokens, merges, and the name of one of its ways to cut a text into words, which is found
here by the regular expressions in tokenizer.json. SentencePiece (Llama 2, Mistral, Gemma), which
Transformers keeps as BPE with bytes to fall back on, is its "llama": there each token has a score,
and the pair of highest score is joined first. The rank of the merge that makes a token, negated,
is such a score.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salience.checkpoint import read_json
from salience.errors import SalienceError
from salience.gguf.metadata import Value

NAME = "tokenizer.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# How words are cut, by llama.cpp's name. An individual digit is a "digit", Python's "words" are
# what GPT-2 cut by, and the bytes of what is left are always looked at one by one.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    ("words",): "gpt-2",
    ("digit", "words"): "smollm",
    (_QWEN2, "bytes"): "qwen2",
    (_LLAMA3, "bytes"): "smaug-bpe",
    (_LLAMA3, "bytes", "whole words"): "llama-bpe",
    (_TEKKEN, "bytes"): "tekken",
    (_TEKKEN, "bytes", "whole words"): "tekken",
}


def check_tokenizer(folder: Path) -> None:
    """Refuse a model folder whose tokenizer cannot be written.

    Raises:
        SalienceError: no tokenizer.json, or one of a kind that llama.cpp has no use for.
    """
    _read(folder)


def vocabulary(folder: Path, size: int) -> dict[str, Value]:
    """The tokens and how text becomes them; merges and special tokens are not in it.

    Args:
        folder: of the tokenizer.json.
        size: rows of the embeddings; rows without a token get one that is not used.

    Raises:
        SalienceError: see `check_tokenizer`; or more tokens than rows.
    """
    tokenizer = _read(folder)
    model = tokenizer["model"]
    spm = is_sentencepiece(tokenizer)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [_UNUSED] * size
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens") or ()}
    ids = {**{i: text for text, i in model["vocab"].items()}}
    ids |= {i: str(entry["content"]) for i, entry in added.items()}
    for i, text in ids.items():
        if i >= size:
            raise SalienceError(f"token {i} of {folder / NAME} is beyond the {size} embeddings")
        tokens[i], types[i] = text, _NORMAL
        if i in added:
            special = added[i].get("special") or _looks_special(text)
            types[i] = _CONTROL if special else _USER_DEFINED
            tokens[i] = text if special else text.replace("\u2581", " ")
        elif spm and len(text) == 6 and text.startswith("<0x"):
            types[i] = _BYTE
        if spm and text == model.get("unk_token"):
            types[i] = _UNKNOWN
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "llama" if spm else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if spm:
        values["tokenizer.ggml.pre"] = "default"
        values["tokenizer.ggml.scores"] = _scores(tokens, model["merges"])
        values["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
        return values
    pre = pre_tokenizer(tokenizer)
    if pre is None:
        warnings.warn(
            f"{folder / NAME} cuts text in a way that has no llama.cpp name here, so the GGUF "
            "file names none: llama.cpp will warn, and may cut some texts otherwise",
            stacklevel=2,
        )
    else:
        values["tokenizer.ggml.pre"] = pre
    return values


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is SentencePiece's: BPE with bytes to fall back on."""
    return bool(tokenizer["model"].get("byte_fallback"))


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a byte-level tokenizer.json cuts words; None if it is not known."""
    steps: list[str] = []
    for step in _steps(tokenizer):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            steps.append("words" if step.get("use_regex", True) else "bytes")
        elif kind == "Digits" and step.get("individual_digits"):
            steps.append("digit")
        elif kind == "Split" and not step.get("invert"):
            steps.append(str((step.get("pattern") or {}).get("Regex")))
        else:
            return None
    if tokenizer["model"].get("ignore_merges"):
        steps.append("whole words")
    return _PRE.get(tuple(steps))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.is_file():
        raise SalienceError(
            f"--format gguf wants {path}; make it with Transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = read_json(path)
    if not _is_sound(tokenizer):
        raise SalienceError(f"{path} is damaged; download it again")
    model = tokenizer["model"]
    byte_level = any(step.get("type") == "ByteLevel" for step in _steps(tokenizer))
    if (
        model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
        or not (byte_level or model.get("byte_fallback"))
    ):
        raise SalienceError(
            f"{path} is neither byte-level BPE nor SentencePiece BPE; --format gguf writes these"
        )
    return tokenizer


def _is_sound(tokenizer: Mapping[str, Any]) -> bool:
    """Whether what is there is of the types that a tokenizer.json has it in."""
    model = tokenizer.get("model")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        return False
    vocab, merges = model.get("vocab"), model.get("merges")
    entries = [e if isinstance(e, dict) else {} for e in added]
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(e.get("id") for e in entries)]
    pairs = merges if isinstance(merges, list) else []
    steps: list[Any] = []
    for key, inner in (("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers")):
        whole = tokenizer.get(key) or {}
        parts = whole.get(inner) or [] if isinstance(whole, dict) else None
        steps += parts if isinstance(parts, list) else [None]
        steps.append(whole)
    return (
        all(type(i) is int and i >= 0 for i in ids)
        and all(isinstance(e.get("content"), str) for e in entries)
        and all(isinstance(part, str) for pair in pairs for part in _halves(pair))
        and all(isinstance(step, dict) for step in steps)
        and all(isinstance(step.get("pattern") or {}, dict) for step in steps)
    )


def _halves(merge: object) -> list[Any]:
    """The two that a merge joins, as older and newer files have them."""
    if isinstance(merge, str):
        return merge.split(" ")
    return merge if isinstance(merge, list) else [None]


def _steps(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    pre = tokenizer.get("pre_tokenizer") or {}
    return list(pre.get("pretokenizers") or [pre])


def _looks_special(text: str) -> bool:
    """Tokens that mark something though their tokenizer does not say so."""
    marks = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(a) and text.endswith(b) for a, b in marks
    )


def _scores(tokens: list[str], merges: list[Any]) -> list[Value]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(_halves(merge)), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether text gets a space in front, as Llama 2's does and Gemma's does not."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never"
        for step in _steps(tokenizer)
    )
