"""Read what bitsandbytes wrote (`make_bitsandbytes_checkpoints.py`), and compare.

    PYTHONPATH=src:tests python benchmarks/interop_bitsandbytes.py THEIRS -o RESULTS.jsonl

Prints one JSON line for each checkpoint. `weights` is the largest |theirs - ours| of a dequantized
weight over the largest weight; `rewritten` whether salience writes back what it read;
`error` is |theirs - ours| / |theirs| of the logits. Exits 1 when any is too large.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import salience
from helpers_checkpoint import config_of, qtensors, stored_tensors
from salience.formats import detect_format, get_format
from tiny_models import logits

LIMIT, LAST_BITS = 1e-3, 2**-22


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The same bytes, or fp32 numbers but for the last bit: SCB is divided by 127 and back."""
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=2**-23, atol=0)
    return torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))


def compare(folder: Path) -> dict[str, object]:
    path = folder.with_suffix(".safetensors")
    theirs, ours = load_file(path), qtensors(folder)
    form = get_format(detect_format(config_of(folder)["quantization_config"]).name)
    stored, apart, rewritten = stored_tensors(folder), 0.0, True
    for name, qt in ours.items():
        weight = theirs[f"{name}.weight"]
        apart = max(apart, ((weight - qt.dequantize()).abs().max() / weight.abs().max()).item())
        for local, tensor in form.write(qt).items():
            if "quant_state" not in local:  # which says the dtype the weight once had
                rewritten &= same(tensor, stored[f"{name}.{local}"])
    found = logits(salience.load(folder, "cpu"), theirs["input_ids"]).double()
    wanted = theirs["logits"].double()
    error = ((found - wanted).norm() / wanted.norm()).item()
    with safe_open(path, "pt") as file:
        versions = dict(sorted(file.metadata().items()))
    return {
        "checkpoint": folder.name,
        "format": form.name,
        "modules": len(ours),
        "weights": apart,
        "rewritten": rewritten,
        "error": error,
        "agrees": bool(ours) and apart <= LAST_BITS and rewritten and error <= LIMIT,
        "versions": versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("theirs", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="write the lines here, too")
    args = parser.parse_args()
    results = [compare(path) for path in sorted(args.theirs.iterdir()) if path.is_dir()]
    lines = [json.dumps(result) for result in results]
    print(*lines, sep="\n")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    return 0 if results and all(result["agrees"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
