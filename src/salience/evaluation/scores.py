"""Perplexity, divergence from a reference model, and agreement with it, in one pass over a text.

The whole text is tokenized once with the tokenizer's defaults and cut into chunks of `context`
tokens that do not overlap; the tail that fills no chunk is dropped. In each chunk tokens 2..L are
predicted from those before them. With p the reference model's distribution of a token, q the
model's, and t the token that came:

    perplexity = exp(mean of -log q(t))
    divergence = mean of sum_v p(v) (log p(v) - log q(v))       in nats
    agreement  = share of tokens where p and q have the same largest

Perplexity sees one number of each distribution and the text's luck with it; the divergence sees all
of them, so it tells models apart on a hundredth of the text. Numbers of different contexts do not
compare: longer ones are lower.

Tokens of a chunk share their context, so a chunk is the unit of all statistics.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.errors import SalienceError
from salience.evaluation.parts import Parts, take_apart
from salience.writer import disk_errors

Progress = Callable[[str, int, int], None]

_HEAD_NUMBERS = 2**24  # logits that are made at once
# Logits that are looked at together: on a CPU a few such fit in a cache; on a GPU, where starting
# the kernels took longer than all else, they are many.
_SLICE_NUMBERS = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over the tokens of each chunk.

    Args:
        protocol: what was done, in words.
        context: tokens of a chunk.
        nll: negative log-likelihood, in nats.
        tokens: how many were predicted.
        kl: divergence from the reference, in nats; None without one.
        agree: tokens where the likeliest is the reference's; None without one.
    """

    protocol: str
    context: int
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    kl: tuple[float, ...] | None = None
    agree: tuple[int, ...] | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(math.fsum(self.nll) / sum(self.tokens))

    @property
    def mean_kl(self) -> float | None:
        """Nats a token."""
        return None if self.kl is None else math.fsum(self.kl) / sum(self.tokens)

    @property
    def agreement(self) -> float | None:
        """Between 0 and 1."""
        return None if self.agree is None else sum(self.agree) / sum(self.tokens)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """A text, cut."""

    ids: Tensor  # [chunks, context]
    protocol: str

    @property
    def context(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A folder that stays."""

    name: str


class Reference:
    """The logits of a model on a text, to compare others with. Made by `record`.

    They are not kept, for they are too many: the last hidden states of each chunk are, in a file,
    and logits are made of them by what comes after the decoder, which stays in memory. A model that
    cannot be taken apart is kept whole, and run again each time.

    Args:
        parts: of the model.
        chunks: the text.
        scores: of the model itself.
        folder: of the file, which is removed with it.
    """

    def __init__(self, parts: Parts, chunks: _Chunks, scores: Scores, folder: Any) -> None:
        self.scores = scores
        self._parts = parts
        self._chunks = chunks
        self._folder = folder

    @classmethod
    def record(
        cls,
        model: Any,
        tokenizer: Any,
        text: str,
        context: int = 2048,
        max_chunks: int | None = None,
        folder: str | Path | None = None,
        progress: Progress | None = None,
    ) -> "Reference":
        """Run a model over a text. Its own scores are in `scores` then, at no other run.

        Args:
            model: on any device. It can be let go of afterwards, if `portable`.
            tokenizer: its tokenizer.
            text: the whole text.
            context: tokens in a chunk.
            max_chunks: stop after this many chunks.
            folder: where the file is for as long as the reference lives; None for the system's.
            progress: called with (phase, done, total).

        Raises:
            SalienceError: a text shorter than one chunk.
            StorageError: the disk is full or not writable.
        """
        chunks = _cut(tokenizer, text, context, max_chunks)
        parts = take_apart(model, chunks.ids[0])
        place = Path(tempfile.gettempdir() if folder is None else folder)
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            kept = tempfile.TemporaryDirectory(prefix="reference-", dir=place)
        reference = cls(parts.without_first(), chunks, Scores("", 0, (), ()), kept)
        sums = _Sums(chunks)
        for i, chunk in enumerate(_counted(chunks.ids, progress)):
            hidden = parts.hidden(chunk)
            if parts.second is not None:
                reference._keep(i, hidden)
            sums.add(parts, hidden, chunk)
        reference.scores = sums.scores()
        return reference

    def keep(self, folder: Path) -> None:
        """Leave the hidden states in a folder of their own, for `reopen` in another process.

        Raises:
            StorageError: the disk is full or not writable.
        """
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file in Path(self._folder.name).glob("*.pt"):
                file.replace(folder / file.name)
            self._folder.cleanup()
        self._folder = _Kept(str(folder))

    @classmethod
    def reopen(
        cls, model: Any, tokenizer: Any, text: str, context: int, scores: Scores, folder: Path
    ) -> "Reference":
        """The reference that `keep` left, with the model that made it.

        Args:
            model: the same model; of it stays what comes after the decoder, if it is `portable`.
            tokenizer: its tokenizer.
            text: the same text.
            context: tokens in a chunk.
            scores: of the reference, of as many chunks.
            folder: that of `keep`.
        """
        chunks = _cut(tokenizer, text, context, len(scores.nll))
        parts = take_apart(model, chunks.ids[0])
        return cls(parts.without_first(), chunks, scores, _Kept(str(folder)))

    def to(self, device: torch.device) -> None:
        """Move what is kept of the model."""
        self._parts = self._parts.to(device)

    @property
    def portable(self) -> bool:
        """Whether the model can be let go of: only what comes after the decoder is needed."""
        return self._parts.first is None

    def check(self, chunks: _Chunks) -> None:
        """Refuse another text, another way to cut it, or another tokenizer.

        Raises:
            SalienceError: naming the first token that differs.
        """
        mine, other = self._chunks.ids, chunks.ids
        if mine.shape[1] != other.shape[1]:
            raise SalienceError(
                f"the reference was recorded in chunks of {mine.shape[1]} tokens, not of "
                f"{other.shape[1]}; use one --context for both"
            )
        same = min(mine.shape[0], other.shape[0])
        wrong = (mine[:same] != other[:same]).flatten().nonzero()
        if len(wrong) or mine.shape != other.shape:
            at = int(wrong[0]) if len(wrong) else same * mine.shape[1]
            raise SalienceError(
                f"the reference and the model cut the text into other tokens, from token {at} on; "
                "compare models of one tokenizer, on one text"
            )

    def hidden(self, index: int) -> Tensor:
        """Of a chunk: what `logits` makes logits of."""
        if self._parts.second is None:
            return self._parts.hidden(self._chunks.ids[index])
        return torch.load(self._file(index), weights_only=True)

    def logits(self, index: int, hidden: Tensor, rows: slice) -> Tensor:
        """Of some rows of a chunk, fp32 [rows, vocabulary]."""
        return self._parts.logits(self._chunks.ids[index, rows], hidden[rows])

    def _file(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.pt"

    def _keep(self, index: int, hidden: Tensor) -> None:
        with disk_errors(self._file(index)):
            torch.save(hidden.contiguous().cpu(), self._file(index))


def score(
    model: Any,
    tokenizer: Any,
    text: str,
    context: int = 2048,
    max_chunks: int | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score a Transformers causal language model on a text.

    Args:
        model: on any device.
        tokenizer: its tokenizer.
        text: the whole text.
        context: tokens in a chunk.
        max_chunks: stop after this many chunks.
        reference: also the divergence from it, over the entries that both vocabularies have: some
            models have a few at the end that stand for no token.
        progress: called with (phase, done, total).

    Raises:
        SalienceError: a text shorter than one chunk, or a reference of another tokenizer.
    """
    chunks = _cut(tokenizer, text, context, max_chunks)
    if reference is not None:
        reference.check(chunks)
    parts = take_apart(model, chunks.ids[0])
    sums = _Sums(chunks, reference)
    for chunk in _counted(chunks.ids, progress):
        sums.add(parts, parts.hidden(chunk), chunk)
    return sums.scores()


class _Sums:
    """Sums of chunk after chunk."""

    def __init__(self, chunks: _Chunks, reference: Reference | None = None) -> None:
        self._chunks, self._reference = chunks, reference
        self._nll: list[float] = []
        self._kl: list[float] = []
        self._agree: list[int] = []

    def add(self, parts: Parts, hidden: Tensor, chunk: Tensor) -> None:
        """The next chunk [context], with its hidden states."""
        nll, kl, agree, index = 0.0, 0.0, 0, len(self._nll)
        theirs = None if self._reference is None else self._reference.hidden(index)
        last, step = len(chunk) - 1, max(1, _HEAD_NUMBERS // parts.width)
        for start in range(0, last, step):
            rows = slice(start, min(start + step, last))
            logits = parts.logits(chunk[rows], hidden[rows])
            targets = chunk[rows.start + 1 : rows.stop + 1].to(logits.device)
            if self._reference is None or theirs is None:
                nll += _negative_log_likelihood(logits, targets)
            else:
                expected = self._reference.logits(index, theirs, rows).to(logits.device)
                more = _compared(logits, expected, targets)
                nll, kl, agree = nll + more[0], kl + more[1], agree + more[2]
        self._nll.append(nll)
        self._kl.append(kl)
        self._agree.append(agree)

    def scores(self) -> Scores:
        """Of all chunks."""
        each, compared = self._chunks.context - 1, self._reference is not None
        return Scores(
            protocol=self._chunks.protocol,
            context=self._chunks.context,
            nll=tuple(self._nll),
            tokens=(each,) * len(self._nll),
            kl=tuple(self._kl) if compared else None,
            agree=tuple(self._agree) if compared else None,
        )


def _cut(tokenizer: Any, text: str, context: int, max_chunks: int | None) -> _Chunks:
    if context < 2:
        raise SalienceError(f"--context is {context}; a chunk needs at least 2 tokens")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    chunks = len(ids) // context
    if chunks == 0:
        raise SalienceError(
            f"the text has {len(ids)} tokens, fewer than one chunk of {context}; "
            "give more text or a smaller --context"
        )
    used = chunks if max_chunks is None else min(chunks, max_chunks)
    protocol = (
        f"{used} of {chunks} non-overlapping chunks of {context} tokens, "
        "tokens 2..L of each predicted, tail dropped"
    )
    return _Chunks(ids[: used * context].view(used, context), protocol)


def _counted(chunks: Tensor, progress: Progress | None) -> Iterator[Tensor]:
    for i, chunk in enumerate(chunks):
        if progress is not None:
            progress("chunk", i, len(chunks))
        yield chunk
    if progress is not None:
        progress("chunk", len(chunks), len(chunks))


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time."""
    numbers = _SLICE_NUMBERS.get(tensors[0].device.type, _SLICE_NUMBERS["cpu"])
    rows = max(1, numbers // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over rows, of fp32 logits [rows, vocabulary]."""
    total = 0.0
    for part, right in _slices(logits, targets[:, None]):
        losses = torch.logsumexp(part, -1) - part.gather(1, right)[:, 0]
        total += losses.double().sum().item()
    return total


def _compared(logits: Tensor, expected: Tensor, targets: Tensor) -> tuple[float, float, int]:
    """Sums over rows: negative log-likelihood, divergence from `expected`, rows that agree."""
    width = min(logits.shape[1], expected.shape[1])
    nll = _negative_log_likelihood(logits, targets) if logits.shape[1] > width else 0.0
    whole, kl, agree = logits.shape[1] == width, 0.0, 0
    shared = _slices(logits[:, :width], expected[:, :width], targets[:, None])
    for own, theirs, right in shared:
        agree += int((own.max(-1).indices == theirs.max(-1).indices).sum())
        log_q = torch.log_softmax(own, -1)
        log_p = torch.log_softmax(theirs, -1)
        if whole:
            nll -= log_q.gather(1, right).double().sum().item()
        p = log_p.exp()
        kl += p.mul_(log_p.sub_(log_q)).sum(-1).double().sum().item()
    return nll, kl, agree
