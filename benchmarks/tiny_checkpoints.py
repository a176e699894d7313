"""Write tiny checkpoints of a format and the logits salience has of them, for another tool to read.

    PYTHONPATH=src:tests python benchmarks/tiny_checkpoints.py compressed-tensors -o OUT
    ~/peer/bin/python benchmarks/interop_transformers.py OUT

Makes OUT/NAME, a checkpoint of a random two-block Llama for each scheme NAME, and
OUT/NAME.safetensors with `input_ids` [2, 24] and `logits` fp32. The "mixed" ones have several
schemes, the "actorder" ones groups of columns in an order of their own.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import salience
from salience import grid
from salience.formats import get_format
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.structure import find_blocks, linears
from tiny_models import llama_config, logits, make_model, random_tokens, save

SCHEMES = {
    "compressed-tensors": (
        *("w4g32", "w4g32-sym", "w4channel", "w3g32", "w3g64-sym", "w2g32", "w5g32", "w8g64-sym"),
        *("mixed", "mixed-sym", "actorder", "actorder-sym"),
    ),
    "bitsandbytes": ("nf4", "nf4-dq", "nf4g32", "fp4", "fp4-dq"),
    "bitsandbytes-int8": ("w8channel-sym",),
}
MIXED = {  # of each linear, the first that is found in its name
    "mixed": {"down_proj": "w8channel-sym", "o_proj": "w4g16", "": "w4g32"},
    "mixed-sym": {"down_proj": "w8channel-sym", "o_proj": "w3g64-sym", "": "w4g32-sym"},
    "actorder": {"": "w4g32"},
    "actorder-sym": {"": "w4g32-sym"},
}


def make(folder: Path, out: Path, name: str, fmt: str) -> None:
    method = "nf4" if name[:3] in ("nf4", "fp4") else "rtn"
    scheme = "w4g32" if name in MIXED else name
    salience.quantize(str(folder), out, method=method, scheme=scheme, format=fmt)
    if name in MIXED:
        mix(folder, out, fmt, MIXED[name])


def mix(folder: Path, out: Path, fmt: str, rules: dict[str, str]) -> None:
    """Code the linears of a checkpoint again, by the first of `rules` found in their names."""
    form, floats = get_format(fmt), load_file(folder / "model.safetensors")
    model = make_model(llama_config(num_hidden_layers=2))
    prefix, blocks = find_blocks(model)
    stored: dict[str, Any] = load_file(out / "model.safetensors")
    schemes = {}
    for local in linears(blocks):
        name = f"{prefix}.{local}"
        schemes[name] = Scheme.parse(next(s for part, s in rules.items() if part in name))
        for part in form.tensors:
            stored.pop(f"{name}.{part}", None)
        weight, scheme = floats[f"{name}.weight"], schemes[name]
        if "actorder" in out.name:
            written = form.write(shuffled(weight, scheme))
        else:
            written = form.write(grid.quantize(weight, scheme))
        stored |= {f"{name}.{part}": tensor for part, tensor in written.items()}
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = form.config(
        schemes, ["lm_head"], act_order="actorder" in out.name
    )
    (out / "config.json").write_text(json.dumps(config, indent=2))


def shuffled(weight: torch.Tensor, scheme: Scheme) -> QTensor:
    """A weight rounded in groups of columns that lie anywhere, as act-order forms them."""
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    place = order.argsort()
    qt = grid.quantize(weight[:, order], scheme)
    g_idx = (place // scheme.group_columns(columns)).int()
    return QTensor(qt.q[:, place], qt.scales, qt.zeros, scheme, g_idx)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("format", choices=SCHEMES)
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--keep-float", action="store_true", help="leave OUT/float there")
    parser.add_argument("--only", nargs="*", help="names of schemes; all by default")
    args = parser.parse_args()
    source = args.out / "float"
    save(make_model(llama_config(num_hidden_layers=2)), source)
    tokens = random_tokens()
    for name in args.only or SCHEMES[args.format]:
        make(source, args.out / name, name, args.format)
        kernel = "codebook" if args.format == "bitsandbytes" else "reference"
        model = salience.load(args.out / name, "cpu", kernel=kernel)
        with torch.no_grad():
            expected = {"input_ids": tokens, "logits": logits(model, tokens).contiguous()}
        save_file(expected, args.out / f"{name}.safetensors")
    if not args.keep_float:
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
