"""Calibration: text to token batches.

The search needs typical inputs, not much of them: 128 sequences of 512 tokens are the field's
habit. Which text was used is part of the result and goes into its report.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError

DEFAULT_TEXT = "pydoc"
# Read at most this many characters for each token asked for; a token is about four.
_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which text, and how much of it.

    Args:
        text: a .txt or .jsonl file, a Hub dataset, or "pydoc": the text of Python's own
            documentation (`pydoc_data.topics`), which every machine has.
        samples: sequences.
        seqlen: tokens in each.
        seed: which sequences of the text are taken.
    """

    text: str = DEFAULT_TEXT
    samples: int = 128
    seqlen: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seqlen < 1:
            raise SalienceError("--samples and --seqlen must be at least 1")

    def tokens(self, tokenizer: Any) -> Tensor:
        """Token ids, int64 [samples, seqlen]: random chunks of the text, in random order.

        Raises:
            SalienceError: no such text, or one that is too short.
        """
        text = "".join(_limited(_documents(self.text), self.samples * self.seqlen))
        ids = tokenizer(text, verbose=False)["input_ids"]
        chunks = len(ids) // self.seqlen
        if chunks < self.samples:
            missing = self.samples * self.seqlen - len(ids)
            raise SalienceError(
                f"calibration text {self.text} has {len(ids)} tokens, {missing} too few for "
                f"{self.samples} samples of {self.seqlen}; give more text or lower --samples"
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(chunks, generator=generator)[: self.samples]
        return torch.tensor(ids[: chunks * self.seqlen]).view(chunks, self.seqlen)[order]

    def describe(self) -> dict[str, Any]:
        """What the report says of it."""
        return {**asdict(self), "tokens": self.samples * self.seqlen}


def read_text(text: str) -> str:
    """A whole evaluation text: a file, or "pydoc".

    Raises:
        SalienceError: no such file.
    """
    if text != DEFAULT_TEXT and not Path(text).is_file():
        raise SalienceError(f"text {text} does not exist")
    return "".join(_documents(text))


def _documents(text: str) -> Iterator[str]:
    if text == DEFAULT_TEXT:
        from pydoc_data import topics

        yield from (topics.topics[key] + "\n" for key in sorted(topics.topics))
        return
    path = Path(text)
    if path.is_dir() or (path.suffix in (".txt", ".jsonl") and not path.is_file()):
        raise SalienceError(f"calibration text {text} is no file")
    if not path.is_file():
        yield from _hub_documents(text)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _jsonl_text(path, number, line) + "\n"
    else:
        with path.open(encoding="utf-8", errors="replace") as file:
            while part := file.read(2**20):
                yield part


def _jsonl_text(path: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise SalienceError(f'{path} line {number} is no JSON object with a "text"') from None


def _hub_documents(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise SalienceError(
            f"calibration text {name} is no file; for a Hub dataset, pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for row in rows:
            yield str(row["text"]) + "\n"
    except KeyError:
        raise SalienceError(f'dataset {name} has no "text" column') from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SalienceError(
            f"calibration text {name} is no file and no dataset: {reason}"
        ) from None


def _limited(documents: Iterator[str], tokens: int) -> Iterator[str]:
    """Documents until there is plenty for `tokens` tokens: a huge file is not read whole."""
    left = tokens * _CHARACTERS_PER_TOKEN
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return
