"""Convert a random checkpoint of 10 GB from AWQ to compressed-tensors, and measure its memory.

    nice python benchmarks/convert_large.py -o benchmarks/results/convert_large.json
    nice python benchmarks/convert_large.py --size 1.2 --format gguf \\
        -o benchmarks/results/convert_large_gguf.json

The checkpoint has the linears of Llama-2-70B, the widest 28672 x 8192, and as many blocks as make
up the size. Every bit pattern is a code, so its packed words are random bits. The command runs as a
process of its own, so that the peak is its own; the pages of mapped files that are resident count.
The output is then read linear by linear and its codes, scales and zeros compared with the source's.
Needs twice the size on the disk of the temporary folder.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from main_job import salience
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from salience.checkpoint import (
    Checkpoint,
    GgufCheckpoint,
    SafetensorsCheckpoint,
    open_checkpoint,
    read_json,
)
from salience.formats import detect_format, get_format
from salience.gguf.exchange import open_modelled
from salience.machine import describe, peak_rss_bytes
from salience.reports.report import versions
from salience.scheme import Scheme
from salience.writer import ShardWriter

HIDDEN, WIDE, KV, VOCABULARY = 8192, 28672, 1024, 32000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
HEAD = 128
GROUP = 128
PARTS = ("q", "scales", "zeros")


def make(folder: Path, size: int) -> int:
    """Write an AWQ checkpoint of about `size` bytes; its number of blocks."""
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        low, high = -(2**31), 2**31
        return torch.randint(low, high, shape, dtype=torch.int32, generator=generator)

    def floats(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 0.02 + 0.001).half()

    writer = ShardWriter(folder, 2**30)
    writer.add("model.embed_tokens.weight", floats(VOCABULARY, HIDDEN))
    writer.add("lm_head.weight", floats(VOCABULARY, HIDDEN))
    total, layer = 2 * 2 * VOCABULARY * HIDDEN, 0
    while total < size:
        for name, (rows, columns) in LINEARS.items():
            prefix = f"model.layers.{layer}.{name}"
            groups = columns // GROUP
            writer.add(f"{prefix}.qweight", words(columns, rows // 8))
            writer.add(f"{prefix}.qzeros", words(groups, rows // 8))
            writer.add(f"{prefix}.scales", floats(groups, rows))
            total += rows * columns // 2 + groups * (rows // 2 + 2 * rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"model.layers.{layer}.{norm}.weight", floats(HIDDEN))
        layer += 1
    writer.add("model.norm.weight", floats(HIDDEN))
    scheme = Scheme(4, GROUP)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layer,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": KV // HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }
    quantization = get_format("awq").config({"model.layers.0.mlp.up_proj": scheme}, [])
    writer.write_json("config.json", config | {"quantization_config": quantization})
    letters = {letter: i for i, letter in enumerate(ByteLevel.alphabet())}
    tokenizer = Tokenizer(BPE(letters, []))  # GGUF wants one
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    writer.finish()
    return layer


def compare(a: Path, b: Path) -> int:
    """How many linears of two checkpoints are the same; ends the program at one that is not."""
    folders = []
    for folder in (a, b):
        config = read_json(folder / "config.json")["quantization_config"]
        stored: Checkpoint = open_checkpoint(folder)
        if isinstance(stored, GgufCheckpoint):  # under the model's names
            stored = open_modelled(folder, get_format("awq"), False).weights
        folders.append((stored, config, detect_format(config)))
    marker = f".{folders[0][2].marker}"
    names = sorted(n.removesuffix(marker) for n in folders[0][0].names() if n.endswith(marker))
    for name in names:
        read = []
        for stored, config, fmt in folders:
            tensors = {local: f"{name}.{local}" for local in fmt.tensors}
            names_there = stored.names()
            there = {k: stored.tensor(full) for k, full in tensors.items() if full in names_there}
            read.append(fmt.read(there, fmt.scheme(config, name)))
        if not all(torch.equal(getattr(read[0], part), getattr(read[1], part)) for part in PARTS):
            sys.exit(f"{name} differs")
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=10, help="GB of the checkpoint")
    parser.add_argument("--source", type=Path, help="keep the checkpoint here, or find it here")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    console = Console(stderr=True)
    size = int(args.size * 1e9)
    with tempfile.TemporaryDirectory() as name:
        if shutil.disk_usage(name).free < 2.5 * size:
            sys.exit(f"{name} has less than {2.5 * args.size} GB free; set TMPDIR")
        source, out = args.source or Path(name) / "source", Path(name) / "out"
        if not source.exists():
            source.mkdir()
            start = time.perf_counter()
            layers = make(source, size)
            console.print(f"made {layers} blocks in {time.perf_counter() - start:.0f} s")
        done = salience("convert", source, "-o", out, "--format", args.format)
        stored = SafetensorsCheckpoint(source)
        result = {
            "source_bytes": sum(stored.nbytes(name) for name in stored.names()),
            "widest_linear": [WIDE, HIDDEN],
            "blocks": read_json(source / "config.json")["num_hidden_layers"],
            **{key: done[key] for key in ("source_format", "format", "linears", "bytes")},
            "lossless": done["lossless"],
            "seconds": round(done["seconds"], 1),
            "peak_rss_bytes": done["peak_rss_bytes"],
            "peak_rss_gib": round(done["peak_rss_bytes"] / 2**30, 3),
            "linears_compared_equal": compare(source, out),
            "versions": versions(),
            "machine": describe(),
        }
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    console.print(f"this program itself peaked at {peak_rss_bytes() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
