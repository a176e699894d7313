"""Models made, measured and compared: `salience compare`.

    recipes    -> checkpoints      one process for all recipes of a model: its text is read once
    each model -> receipt          one process each, so that its memory and its end are its own
    receipts   -> Comparison       intervals, paired differences, verdicts, the gate

What is done lies in the work folder, under names made of all that decides it, so that the same call
goes on where it was interrupted, and a call with one more candidate measures only that one.
"""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from salience.calibration import Calibration, read_text
from salience.errors import DoesNotFitError, SalienceError
from salience.evaluation.candidates import Candidate
from salience.evaluation.comparison import Comparison, Row, judge, make_row
from salience.evaluation.gate import parse_gate
from salience.evaluation.receipt import Request, read_receipt
from salience.machine import describe
from salience.pipeline.prepare import prepare
from salience.reports.report import read_report, versions
from salience.source import Source, open_source
from salience.writer import disk_errors, write_json

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and how.

    Args:
        text: a file or "pydoc"; None for no perplexity.
        context: tokens of a chunk.
        max_chunks: of the text; None for all.
        batches: for which speed is measured; none for no speed.
        prompt: tokens of a prompt there.
        new: tokens of a reply there.
        repeats: of each timing.
        tasks: of lm-eval.
        task_folder: of task files, instead of lm-eval's own.
        limit: documents of each task.
        calibration: what recipes are made with.
        device: where everything runs.
        kernel: of quantized linears.
        trust_remote_code: let the models' own code run.
    """

    text: str | None = "pydoc"
    context: int = 2048
    max_chunks: int | None = None
    batches: tuple[int, ...] = (1, 4, 16)
    prompt: int = 128
    new: int = 64
    repeats: int = 5
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    limit: int | None = None
    calibration: Calibration = field(default_factory=Calibration)
    device: str = "auto"
    kernel: str = "auto"
    trust_remote_code: bool = False

    @property
    def measured(self) -> dict[str, Any]:
        """What decides a measurement, as JSON."""
        values = asdict(self)
        del values["calibration"]
        return values


def compare(
    candidates: Sequence[Candidate],
    options: Options,
    work: Path,
    *,
    keep: Path | None = None,
    gate: str | None = None,
    command: str = "",
    progress: Progress | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Comparison:
    """Measure models and compare them with the first.

    Args:
        candidates: the reference first.
        options: what is measured.
        work: folder of what is done; made if it is not there.
        keep: folder for the checkpoints that are made; None for `work`.
        gate: conditions to hold the others against.
        command: to be written down.
        progress: called with (what, done, total).
        on_line: called with a line when something is done.

    Raises:
        SalienceError: bad input, before anything runs; or a reference that cannot be measured.
        DoesNotFitError: it does not fit.
        StorageError: a disk that is full or not writable.
    """
    start = time.perf_counter()
    conditions = parse_gate(gate, options.tasks, options.batches) if gate is not None else []
    for each in conditions:
        if options.text is None and each.metric in ("perplexity", "kl", "agreement"):
            raise SalienceError(f"--gate asks for {each.metric}, which needs a --text")
    run = _Run(candidates, options, work, keep, progress, on_line)
    run.make()
    rows = run.measure()
    comparison = Comparison(rows, _protocol(options, rows[0]), command, describe())
    if gate is not None:
        judge(comparison, gate, conditions)
    comparison.seconds = time.perf_counter() - start
    return comparison


class _Run:
    """The state of one comparison."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        options: Options,
        work: Path,
        keep: Path | None,
        progress: Progress | None,
        on_line: Callable[[str], None] | None,
    ) -> None:
        self.candidates, self.options = candidates, options
        self.work, self.keep = work.resolve(), keep.resolve() if keep is not None else None
        self.progress = progress or (lambda _what, _done, _total: None)
        self.say = on_line or (lambda _line: None)
        self.errors: dict[str, str] = {}
        text = options.text
        self._text = None if text is None else _digest(read_text(text))
        if options.tasks:
            from salience.evaluation.tasks import check_tasks  # needs lm-eval, which is an extra

            folder = options.task_folder
            check_tasks(options.tasks, None if folder is None else Path(folder))
        self._sources: dict[str, Source] = {}
        for each in candidates:
            self._check(each)
        with disk_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)

    def _check(self, candidate: Candidate) -> None:
        """Refuse what cannot be loaded or made, before anything runs."""
        options, recipe = self.options, candidate.recipe
        if candidate.model not in self._sources:
            source = open_source(candidate.model, options.trust_remote_code)
            source.tokenizer  # noqa: B018 - a model without one is no use here
            self._sources[candidate.model] = source
        if recipe is None:
            return
        prepare(
            self._sources[candidate.model],
            method=recipe.method,
            effort=recipe.effort,
            scheme=recipe.scheme,
            format=recipe.format,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            prove=False,
        )
        folder = self._folder(candidate)
        if self.keep is not None and folder.exists() and not self._is_made(candidate):
            raise SalienceError(
                f"{folder} exists and was made otherwise; move it, or name another --keep"
            )

    def make(self) -> None:
        """Quantize what has a recipe and is not there yet."""
        wanted: dict[str, list[Candidate]] = {}
        for each in self.candidates:
            if each.recipe is not None and not self._is_made(each):
                wanted.setdefault(each.model, []).append(each)
        for model, group in wanted.items():
            self._make(model, group)
            failed = [each for each in group if not self._is_made(each)]
            if len(group) > 1:  # one of them may be to blame
                for each in failed:
                    self._make(model, [each])

    def _make(self, model: str, group: list[Candidate]) -> None:
        request = {
            "model": model,
            "variants": [
                {"out": str(self._folder(each)), "format": recipe.format} | asdict(recipe)
                for each in group
                if (recipe := each.recipe) is not None
            ],
            "calibration": asdict(self.options.calibration),
            "device": self.options.device,
            "trust_remote_code": self.options.trust_remote_code,
        }
        names = ", ".join(each.name for each in group)
        start = time.perf_counter()
        error = self._child("make", names, request, f"make-{_slug(names)[:40]}")
        for each in group:
            self.errors.pop(each.name, None)
            if not self._is_made(each):
                self.errors[each.name] = error.message or "it was not made"
                self.say(f"{each.name} could not be made: {self.errors[each.name]}")
        made = [each.name for each in group if each.name not in self.errors]
        if made:
            self.say(f"made {', '.join(made)} in {time.perf_counter() - start:.0f} s")

    def measure(self) -> list[Row]:
        """Measure each model that has no receipt yet."""
        rows: list[Row] = []
        reference = None
        for each in self.candidates:
            row = Row(each.name, each.model, str(each.recipe or ""))
            if each.name in self.errors:
                row.error = self.errors[each.name]
            else:
                self._measure(each, row)
            if reference is None:
                if row.error:
                    kind = DoesNotFitError if "not fit" in row.error else SalienceError
                    raise kind(f"the reference {each.name} could not be measured: {row.error}")
                reference = row
                make_row(row, None)
            else:
                make_row(row, reference)
            if each.recipe is not None and not row.error:
                row.quantize_seconds = read_report(self._folder(each)).seconds
            rows.append(row)
        return rows

    def _measure(self, candidate: Candidate, row: Row) -> None:
        first = candidate is self.candidates[0]
        receipt, hidden = self._receipt(candidate), self.work / f"hidden-{self._key()}"
        lost = first and self.options.text is not None and not hidden.exists()
        if receipt.exists() and not (lost and self._missing()):
            with suppress(SalienceError):  # of another version: measured again
                row.receipt = read_receipt(receipt)
                return
        start = time.perf_counter()
        model = candidate.model if candidate.recipe is None else str(self._folder(candidate))
        theirs = self.candidates[0]
        path = theirs.model if theirs.recipe is None else str(self._folder(theirs))
        other = None if first else {"model": path, "receipt": str(self._receipt(theirs))}
        if lost:
            shutil.rmtree(hidden, ignore_errors=True)
        request = Request(model, str(receipt), self.options.measured, other, str(hidden))
        ended = self._child("measure", candidate.name, asdict(request), receipt.stem)
        if ended.code == 0:
            row.receipt = read_receipt(receipt)
            self.say(f"measured {candidate.name} in {time.perf_counter() - start:.0f} s")
        else:
            row.error = ended.message
            self.say(f"{candidate.name} could not be measured: {row.error}")

    def _missing(self) -> bool:
        """Whether a model is still to be compared with the reference's hidden states."""
        others = self.candidates[1:]
        return any(not self._receipt(e).exists() for e in others if e.name not in self.errors)

    def _child(self, module: str, names: str, request: object, stem: str) -> "_Ended":
        file, log = self.work / f"{stem}.request.json", self.work / f"{stem}.log"
        write_json(file, request)
        command = [sys.executable, "-m", f"salience.evaluation.{module}", str(file)]
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                for line in process.stdout or ():
                    with suppress(ValueError):
                        phase, done, total = json.loads(line)
                        self.progress(f"{names}: {phase}", done, total)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        return _Ended(code, _message(code, log))

    def _receipt(self, candidate: Candidate) -> Path:
        return self.work / f"{_slug(candidate.name)}-{self._key(candidate)}.json"

    def _key(self, candidate: Candidate | None = None) -> str:
        """A hash of all that decides a measurement; of the reference's without a candidate."""
        of = [self.candidates[0]] if candidate is None else [self.candidates[0], candidate]
        return _digest(
            [
                self.options.measured,
                self._text,
                versions(),
                *([self._origin(each), asdict(each)] for each in of),
            ]
        )

    def _origin(self, candidate: Candidate) -> list[Any]:
        """What decides the weights of a candidate."""
        files = self._sources[candidate.model].fingerprint()
        made = self.options.calibration.describe() if candidate.recipe is not None else None
        return [files, made]

    def _folder(self, candidate: Candidate) -> Path:
        """Where a recipe's checkpoint is."""
        slug = _slug(candidate.name)
        if self.keep is not None:
            return self.keep / slug
        return self.work / f"{slug}-{_digest([self._origin(candidate), versions()])}"

    def _is_made(self, candidate: Candidate) -> bool:
        folder, recipe = self._folder(candidate), candidate.recipe
        if recipe is None or not folder.exists():
            return False
        try:
            report = read_report(folder)
        except SalienceError:
            return False
        text = self.options.calibration.describe() if report.calibration else None
        made = (report.model, report.scheme, report.method, report.effort, report.calibration)
        return made == (candidate.model, recipe.scheme, recipe.method, recipe.effort, text)


@dataclass(frozen=True, slots=True)
class _Ended:
    code: int
    message: str


def _message(code: int, log: Path) -> str:
    """Why a process ended, from its status and the last line it said."""
    if code == 0:
        return ""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", likely for want of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"its process ended with status {code}"


def _protocol(options: Options, reference: Row) -> dict[str, str]:
    """How each thing was measured, in words."""
    found = {
        "process": "each model is loaded and measured in a fresh process, one after the other",
        "disk": "bytes of all tensors of the checkpoint",
        "bits": "stored bits a weight of the linears, scales and zeros included",
        "RAM, VRAM": "resident memory of the process (Python and libraries included), and what "
        "torch has reserved on GPUs: once loaded, and the most while text is generated",
    }
    if options.batches:
        found["speed"] = (
            f"prompts of {options.prompt} random tokens, replies of {options.new}, "
            f"{options.repeats} repeats in salience's engine; tokens a second of all replies"
        )
    own = reference.receipt
    if own is not None and own.text is not None:
        found["text"] = f"{options.text}: {own.text['protocol']}"
        found["KL, agreement"] = (
            f"of each predicted token's distribution from {reference.name}'s, in nats; share of "
            "tokens whose likeliest is the same"
        )
    if options.tasks:
        limit = "" if options.limit is None else f", the first {options.limit} documents of each"
        found["tasks"] = f"lm-eval: {', '.join(options.tasks)}{limit}"
    found["intervals"] = (
        "95 %; chunks in batches of neighbours with Student's t, documents by Wilson and by Bonett "
        "and Price, timings of repeats; differences are of the same chunks and documents"
    )
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower() or "model"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
