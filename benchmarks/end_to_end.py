"""The end-to-end pass of `--effort best` with several settings, on one start.

The model is quantized once with the effort "balanced"; each setting then tunes the same codes
against the same teacher. Divergences are those of held-out calibration tokens, before and after.
With --keep, the tuned checkpoints stay, for `salience eval`.

    python benchmarks/end_to_end.py --scheme w3g64 --rate 5e-4 1e-3 2e-3 -o end_to_end.json
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import salience
from salience.blocks.outside import embeddings_loaded
from salience.calibration import Calibration
from salience.checkpoint import SafetensorsCheckpoint
from salience.learning.end_to_end import head_inputs
from salience.learning.student import Student
from salience.learning.trainer import Trainer
from salience.loading import read_tensor
from salience.machine import describe, fast_matmul
from salience.methods import EndToEnd
from salience.pipeline.prepare import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scheme", default="w3g64")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rate", type=float, nargs="+", default=[EndToEnd().rate])
    parser.add_argument("--float-rate", type=float, nargs="+", default=[EndToEnd().float_rate])
    parser.add_argument("--passes", type=int, nargs="+", default=[EndToEnd().passes])
    parser.add_argument("--keep", type=Path, help="folder for a checkpoint of each setting")
    parser.add_argument("-o", "--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(run(args, Path(folder) / "start"))
    if args.out is not None:
        result = {"machine": describe(), "options": vars(args), "rows": rows}
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")


def run(args: argparse.Namespace, start: Path) -> Iterator[dict[str, Any]]:
    text = Calibration(args.calibration, args.samples, args.seqlen)
    common = {"scheme": args.scheme, "format": "compressed-tensors", "device": args.device}
    salience.quantize(args.model, start, effort="balanced", calibration=text, **common)
    job = prepare(args.model, effort="best", **common).job
    tokens = text.tokens(job.source.tokenizer)
    with torch.no_grad(), fast_matmul():
        for name, buffer in job.skeleton.named_buffers():
            if name in job.weights.names():
                buffer.copy_(read_tensor(job.weights, name, buffer))
        with embeddings_loaded(job, head=True):
            with clock() as teacher:
                targets = head_inputs(job, tokens, None)
            if targets is None:
                raise SystemExit("the model cannot be tuned end to end")
            student = Student(job, SafetensorsCheckpoint(start), True)
            print(f"teacher {teacher[0]:.1f} s")
            for rate, float_rate, passes in product(args.rate, args.float_rate, args.passes):
                settings = replace(EndToEnd(), rate=rate, float_rate=float_rate, passes=passes)
                trainer = Trainer(job, student, tokens, targets, settings)
                with clock() as seconds:
                    while trainer.step < trainer.total:
                        trainer.advance()
                    trainer.finish()
                row = asdict(settings) | {"seconds": seconds[0]} | trainer.record()
                if torch.cuda.is_available():
                    row["peak_vram_bytes"] = torch.cuda.max_memory_allocated()
                print(
                    f"rate {rate:g} float {float_rate:g} passes {passes}: held out "
                    f"{row['held_out_before']:.4f} -> {row['held_out_after']:.4f}, trained "
                    f"{row['trained_before']:.4f} -> {row['trained_after']:.4f}, "
                    f"{seconds[0]:.1f} s",
                    flush=True,
                )
                if args.keep is not None:
                    keep(trainer, start, args.keep / f"{rate:g}-{float_rate:g}-{passes}")
                yield row


def keep(trainer: Trainer, start: Path, folder: Path) -> None:
    """A checkpoint with the best numbers in the place of the start's."""
    shutil.copytree(start, folder)
    tensors = load_file(folder / "model.safetensors")
    for index in range(len(trainer.student.slots)):
        part = trainer.student.part(index)
        tensors |= trainer.student.tensors(index, trainer.best[part])
    tensors |= trainer.outside(trainer.best)
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@contextmanager
def clock() -> Iterator[list[float]]:
    """A list that has the seconds of what is inside when it ends."""
    found = [0.0]
    start = time.perf_counter()
    yield found
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    found[0] = time.perf_counter() - start


if __name__ == "__main__":
    main()
