"""Exchange checkpoints with AutoAWQ, both ways, in each of its layouts; print what was found.

    PYTHONPATH=src:tests python benchmarks/interop_awq.py ~/autoawq/bin/python -o RESULTS.jsonl

The first argument is the Python of an environment with AutoAWQ; `interop_autoawq.py` says how to
make one. For each group size a random two-block Llama, with biases, is quantized into a gemm
checkpoint, and

    salience to AutoAWQ   AutoAWQ unpacks it: the codes and zeros must be ours; so must the logits
                          of the dense weights it makes of it, which are rounded to fp16. (What
                          the rounding alone does to this small model is `rounding`.)
    AutoAWQ to salience   AutoAWQ's own packers write it as gemm, gemv and gemv_fast, and
                          gemv_fast's tensors are saved as llm-awq does: salience reads the same
                          codes, zeros and scales, and computes the same logits

Prints a JSON line for each; exits 1 when codes differ or logits by more than 1e-3.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

import salience
from helpers_checkpoint import config_of, qtensors
from salience.formats import detect_format, stored_config
from salience.qtensor import QTensor
from salience.source import open_source
from salience.structure import linears
from tiny_models import VOCABULARY, logits, make_model, random_tokens, save

LIMIT = 1e-3
TOOL = Path(__file__).with_name("interop_autoawq.py")
# Qwen2 has biases. AutoAWQ's gemm packer takes multiples of 32 outputs only.
CONFIG = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    eos_token_id=0,
)


def read(folder: Path) -> dict[str, QTensor]:
    """The quantized linears of a checkpoint as salience reads them."""
    source = open_source(str(folder))
    config = stored_config(source.config, source.stored)
    assert config is not None
    form, found = detect_format(config), {}
    for name in linears(source.skeleton()):
        parts = {local: f"{name}.{local}" for local in form.tensors}
        if f"{name}.{form.marker}" in source.stored.names():
            tensors = {local: source.stored.tensor(full) for local, full in parts.items()}
            found[name] = form.read(tensors, form.scheme(config, name))
    return found


def same(a: dict[str, QTensor], b: dict[str, QTensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(getattr(a[name], part), getattr(b[name], part))
        for name in a
        for part in ("q", "zeros", "scales")
    )


def error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return ((theirs.double() - ours.double()).norm() / ours.double().norm()).item()


def as_llm_awq(folder: Path, out: Path) -> None:
    """What llm-awq would save: gemv_fast's tensors but for a name, a .pt, no word in the config."""
    out.mkdir()
    config = config_of(folder)
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    state = {name.replace(".qzeros", ".scaled_zeros"): tensor for name, tensor in state.items()}
    torch.save(state, out / "tiny-w4-awq-v2.pt")


def round_to_fp16(dense: Path, out: Path, weights: dict[str, QTensor]) -> None:
    """The dense checkpoint with our own weights, rounded as AutoAWQ does."""
    shutil.copytree(dense, out)
    tensors = load_file(dense / "model.safetensors")
    tensors |= {f"{name}.weight": qt.dequantize(torch.float16) for name, qt in weights.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def exchange(python: str, work: Path, scheme: str) -> list[dict[str, Any]]:
    tokens = random_tokens()
    save(make_model(CONFIG), work / "float")
    ours = work / "gemm"
    salience.quantize(str(work / "float"), ours, method="rtn", scheme=scheme, format="awq")
    want = qtensors(ours)
    expected = logits(salience.load(ours, "cpu", kernel="reference"), tokens)
    codes = {f"{name}.codes": qt.q for name, qt in want.items()}
    codes |= {f"{name}.zeros": qt.zeros for name, qt in want.items()}
    save_file(codes, work / "codes.safetensors")

    def peer(*arguments: str) -> str:
        done = subprocess.run(
            [python, str(TOOL), str(ours), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
        return done.stdout

    checked = json.loads(peer("--check", str(work / "codes.safetensors")))
    peer("--repack", "dense", str(work / "dense"))
    dense = logits(salience.load(work / "dense", "cpu"), tokens)
    round_to_fp16(work / "dense", work / "rounded", want)
    rounded = logits(salience.load(work / "rounded", "cpu"), tokens)
    results: list[dict[str, Any]] = [
        {
            "from": "salience",
            "to": "AutoAWQ",
            "layout": "gemm",
            "identical": checked["identical"],
            "error": error(dense, rounded),
            "rounding": error(rounded, expected),
            "versions": checked["versions"],
        }
    ]
    for layout in ("gemm", "gemv", "gemv_fast", "llm-awq"):
        folder = work / f"from_{layout}"
        if layout == "llm-awq":
            as_llm_awq(work / "from_gemv_fast", folder)
        else:
            peer("--repack", layout, str(folder))
        found = logits(salience.load(folder, "cpu", kernel="reference"), tokens)
        results.append(
            {
                "from": "AutoAWQ",
                "to": "salience",
                "layout": layout,
                "identical": same(read(folder), want),
                "error": error(found, expected),
            }
        )
    return [{"scheme": scheme, "modules": len(want)} | result for result in results]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="of the environment with AutoAWQ")
    parser.add_argument("-o", "--out", type=Path, help="write the lines here, too")
    args = parser.parse_args()
    results = []
    for scheme in ("w4g128", "w4g64", "w4g32"):
        with tempfile.TemporaryDirectory() as work:
            results += exchange(args.python, Path(work), scheme)
    lines = [json.dumps(result) for result in results]
    print(*lines, sep="\n")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    return 0 if all(each["identical"] and each["error"] <= LIMIT for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
