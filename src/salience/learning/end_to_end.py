"""The last step of `--effort best`: scales, norms and biases tuned for the model as a whole.

Codes are chosen block by block, and what is left of their errors adds up over the blocks in ways
that no block sees. Here the quantized model is a student of the float one: over the calibration
text, the divergence of its next-token distributions from the teacher's
(`salience.learning.distillation`) is brought down by Adam, by moving what is stored in floating
point (`salience.learning.student`). Codes and zeros stay, so the checkpoint has the same size and
layout, and every runtime loads it.

    teacher   one pass over the float blocks; the hidden states that leave the last one are kept
    step      forward     block after block, keeping what enters each (activation checkpointing)
              loss        logits a piece at a time, turned into gradients
              backward    from the last block to the first, each run once more, for its gradients
              Adam        on the whole vector of relative changes; the rate falls along a cosine

Memory is one block of float weights and its activations, the inputs of all blocks for one
micro-batch, four numbers for each scale, and the teacher's hidden states, on the device or on the
disk. Time is that of three to four forward passes a pass over the text.

One step in sixteen is never trained on. The divergence there is measured at the start and after
each pass; the best of these is what is written, and where the start is best it stays, byte for
byte. The state goes to the journal now and then, and steps come in an order that the seed decides,
so a run that was killed goes on to the same bytes (on a CPU; a GPU's sums have no fixed order).

Seen on a CPU, with little text (SmolLM2-135M at w3g64; 20 sequences of 256 tokens of WikiText-2
valid, a sequence a step, two passes): rates of 0.007 bring the held-out divergence from 0.242 to
0.198 nats and that of what was trained on from 0.215 to 0.141; rates of 0.03, to 0.219 and 0.158.
The first brought the perplexity of 4 chunks of the test text from 27.36 to 25.86.
"""

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.blocks.blockwise import micro_batch, record_inputs, run_block
from salience.blocks.job import Job
from salience.blocks.journal import Journal
from salience.blocks.outside import embeddings_loaded
from salience.errors import DoesNotFitError
from salience.formats import Dense
from salience.learning.student import Student
from salience.learning.trainer import Trainer
from salience.machine import fast_matmul, release_memory
from salience.methods import EndToEnd
from salience.writer import disk_errors

SAVE_SECONDS = 60.0


def tune(job: Job, journal: Journal, tokens: Tensor | None, on_disk: bool) -> str | None:
    """Tune a model whose blocks are all in the journal; what changes goes there, too.

    Args:
        job: how they were made.
        journal: where they are.
        tokens: calibration token ids [samples, seqlen].
        on_disk: keep the teacher's hidden states on the disk, and codes nowhere else.

    Returns:
        Why nothing was tuned, if nothing can be.

    Raises:
        DoesNotFitError: out of memory.
        StorageError: the disk is full or not writable.
    """
    settings = job.method.end_to_end
    if settings is None or tokens is None or isinstance(job.fmt, Dense):
        return None
    if journal.tuning() is None:
        try:
            with torch.no_grad(), fast_matmul():
                record = _tune(job, journal, tokens, settings, on_disk)
        except torch.OutOfMemoryError as error:
            raise DoesNotFitError(
                f"{job.device} is out of memory ({str(error).split('. ')[0]}); give a --max-memory "
                "that is really free, a shorter --seqlen, or --effort balanced"
            ) from None
        journal.save_tuning(record)
    done = journal.tuning() or {}
    reason = done.get("skipped")
    return None if reason is None else f"{job.source.name} is not tuned end to end: {reason}"


def _tune(
    job: Job, journal: Journal, tokens: Tensor, settings: EndToEnd, on_disk: bool
) -> dict[str, Any]:
    size = settings.step_samples(*tokens.shape)
    if size == len(tokens):
        return {"skipped": "a text of one sequence leaves none to hold out"}
    with ExitStack() as stack:
        stack.enter_context(embeddings_loaded(job, head=True))
        with job.phase("teacher"):
            targets = head_inputs(job, tokens, journal.teacher_file if on_disk else None)
        if targets is None:
            return {"skipped": "its blocks leave something for later ones"}
        with job.phase("end to end"):
            count = len(job.blocks) + bool(job.outside)
            student = Student(job, journal.checkpoint(range(count)), not on_disk)
            trainer = Trainer(job, student, tokens, targets, settings)
            state = journal.load_state()
            if state is not None:
                trainer.restore(*state)
            _run(trainer, job, journal)
            if not math.isfinite(trainer.history[0]["held_out"]):
                return {"skipped": "it or the float model overflows on the text"}
            _write(trainer, job, journal)
            release_memory()
            return trainer.record()


def _run(trainer: Trainer, job: Job, journal: Journal) -> None:
    saved = time.monotonic()
    said = ""
    while trainer.step < trainer.total:
        job.progress(f"end to end{said}", trainer.step, trainer.total)
        kl = trainer.advance()
        if not math.isfinite(kl):
            break
        said = f", KL {kl:.4f}"
        if time.monotonic() - saved > SAVE_SECONDS:
            journal.save_state(*trainer.state())
            saved = time.monotonic()
    trainer.finish()
    job.progress(f"end to end{said}", trainer.total, trainer.total)


def _write(trainer: Trainer, job: Job, journal: Journal) -> None:
    best, student = trainer.best, trainer.student
    for index in range(len(job.blocks)):
        journal.save_tuned(index, student.tensors(index, best[student.part(index)]))
    journal.save_tuned(len(job.blocks), trainer.outside(best))


def head_inputs(job: Job, tokens: Tensor, file: Path | None) -> Tensor | None:
    """What leaves the last block of the float model, fp32 [samples, seqlen, ..., hidden].

    Args:
        job: with the weights of what is in no block.
        tokens: [samples, seqlen].
        file: where they are kept; None for the device.

    Returns:
        None of a model that has blocks leave something for later ones.
    """
    samples, seqlen = tokens.shape
    batch = micro_batch(samples, seqlen, job.device)
    made: list[Tensor] = []

    def keep(part: int, hidden: Tensor) -> None:
        if not made:
            shape = (samples, seqlen, *hidden.shape[2:])
            made.append(_mapped(file, shape) if file else torch.empty(shape, device=job.device))
        made[0][part * batch : (part + 1) * batch] = hidden

    arguments = record_inputs(job.skeleton, job.blocks, tokens, batch, job.device, keep)
    if arguments.stateful:
        return None
    for index in range(len(job.blocks)):
        job.progress("teacher", index, len(job.blocks))
        with job.loaded(index) as block:
            for part, states in enumerate(made[0].split(batch)):
                states[:] = run_block(block, states.to(job.device), arguments.of(index, part))
    return made[0]


def _mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose memory is a file's, for the operating system to give and take."""
    count = math.prod(shape)
    with disk_errors(file):
        with file.open("wb") as stream:
            # Filled now: on a full disk, writing to a hole would end the process.
            for start in range(0, 4 * count, 2**24):
                stream.write(bytes(min(2**24, 4 * count - start)))
        return torch.from_file(str(file), shared=True, size=count).view(shape)
