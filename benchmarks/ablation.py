"""What each part of `--effort best` is worth: perplexity, seconds and memory, one part added at a
time, on a text of the calibration's domain and on one of another.

    python benchmarks/ablation.py --text wikitext2/test.txt --calibration wikitext2/valid.txt \
        -o benchmarks/results/ablation_wikitext_h100.json

The other domain is Python's documentation. With `--calibration pydoc` the two change places: the
model is calibrated there, and --text is the other domain. Where auto-round is installed
(`pip install auto-round`, in another environment than yours), `--autoround` measures it in the same
run, by the same perplexity.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import salience
from salience.calibration import DEFAULT_TEXT, read_text
from salience.evaluation.perplexity import perplexity
from salience.machine import describe
from salience.methods import AWQ, AWQ_GPTQ, EFFORTS
from salience.methods.base import full_grids
from salience.source import open_source

BEST = EFFORTS["best"]["awq"]
# Each has the parts of those above it; the last two leave one of the two out.
LADDER = {
    "rtn": None,
    "+ scale": replace(AWQ, grids=full_grids),
    "+ clip": AWQ,
    "+ gptq": AWQ_GPTQ,
    "+ learned rounding": replace(BEST, end_to_end=None),
    "+ end to end": BEST,
    "without learned rounding": replace(BEST, learns=None),
}
# 192 is the largest group of the real model's widths, 576 and 1536, in place of 128.
SCHEMES = ("w4g64", "w3g64", "w2g64", "w4g192", "w3g32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--rows", nargs="*", default=list(LADDER), choices=list(LADDER))
    parser.add_argument("--calibration", default=DEFAULT_TEXT)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-chunks", type=int)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--autoround", type=int, nargs="?", const=200, help="its iterations")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    tokenizer = open_source(args.model).tokenizer
    calibration = salience.Calibration(args.calibration, args.samples, args.seqlen)
    texts = {"text": read_text(args.text), "pydoc": read_text(DEFAULT_TEXT)}
    if args.calibration == DEFAULT_TEXT:
        del texts["pydoc"]  # it was calibrated on that very text
    rows: list[dict[str, Any]] = []

    def add(name: str, scheme: str, seconds: float, vram: int | None, model: Any) -> None:
        found = {
            key: perplexity(
                model, tokenizer, text, context=args.context, max_chunks=args.max_chunks
            )
            for key, text in texts.items()
        }
        row = {key: each.perplexity for key, each in found.items()}
        rows.append({"row": name, "scheme": scheme, **row, "seconds": seconds, "vram": vram})
        shown = ", ".join(f"{key} {value:.3f}" for key, value in row.items())
        Console(stderr=True).print(f"{scheme} {name}: {shown}; {seconds:.1f} s")
        options = {key: value for key, value in vars(args).items() if key != "out"}
        options["protocol"] = next(iter(found.values())).protocol
        made = {"rows": rows, "machine": describe(), "options": options}
        if args.out:
            args.out.write_text(json.dumps(made, indent=1, default=str) + "\n", encoding="utf-8")

    whole = salience.load(args.model, device=args.device, dtype=torch.float32)
    add("float", "float", 0.0, None, whole)
    for scheme in args.schemes:
        for name in args.rows:
            with made_by_salience(args, scheme, name, calibration) as made:
                add(name, scheme, *made)
        if args.autoround:
            tokens = calibration.tokens(tokenizer)
            add("auto-round", scheme, *made_by_autoround(args, scheme, tokens, tokenizer))


@contextmanager
def made_by_salience(
    args: argparse.Namespace, scheme: str, name: str, calibration: salience.Calibration
) -> Iterator[tuple[float, int | None, Any]]:
    """Seconds, peak bytes on the GPU and the model, whose files are there as long as it is."""
    parts = LADDER[name]
    if parts is not None:
        EFFORTS["ablation"] = {"awq": parts}
    with tempfile.TemporaryDirectory() as folder:

        def quantize() -> Any:
            return salience.quantize(
                args.model,
                Path(folder) / "out",
                method="rtn" if parts is None else "awq",
                effort="fast" if parts is None else "ablation",
                scheme=scheme,
                format="compressed-tensors" if scheme[1] in "48" else "gptq",
                calibration=calibration,
                device=args.device,
            )

        seconds, report = timed(quantize)
        model = salience.load(Path(folder) / "out", device=args.device, dtype=torch.float32)
        yield seconds, report.peak_vram_bytes, model


def made_by_autoround(
    args: argparse.Namespace, scheme: str, tokens: torch.Tensor, tokenizer: Any
) -> tuple[float, int | None, Any]:
    """The same of AutoRound, in fp32 with its rounded weights."""
    from auto_round import AutoRound

    wanted = salience.Scheme.parse(scheme)
    with tempfile.TemporaryDirectory() as folder:
        salience.load(args.model, device="cpu", dtype=torch.float32).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def quantize() -> Any:
        tuner = AutoRound(
            model,
            tokenizer,
            bits=wanted.bits,
            group_size=wanted.group_size,
            sym=wanted.sym,
            iters=args.autoround,
            seqlen=args.seqlen,
            nsamples=args.samples,
            batch_size=8,
            dataset=list(tokens.split(8)),
            device_map="cuda:0" if cuda else "cpu",
        )
        return tuner.quantize()[0]

    seconds, rounded = timed(quantize)
    vram = torch.cuda.max_memory_allocated() if cuda else None
    return seconds, vram, rounded.float().to("cuda:0" if cuda else "cpu").eval()


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    made = make()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


if __name__ == "__main__":
    main()
