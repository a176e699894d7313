"""A model too large to play with: random weights of its shape, streamed from disk, and measured.

    python benchmarks/large_model.py --shape llama-3-8b --efforts fast balanced \
        -o benchmarks/results/llama_3_8b_h100.json
    python benchmarks/large_model.py --shape tinyllama-1.1b --samples 16 --seqlen 256 \
        --max-memory 3GiB -o benchmarks/results/tinyllama_cpu.json

The checkpoint is made on the spot. `plan` and `quantize` run as commands of their own, so that the
peak memory is theirs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from main_job import machine, salience
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def make(shape: dict[str, Any], folder: Path, layers: int | None) -> int:
    """Write a random bf16 checkpoint of a shape, a shard for each four blocks; its bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    values = shape | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**values, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    hidden, wide = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, device=device) * 0.02).to(torch.bfloat16).cpu()

    weight_map: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())

    for start in range(0, config.num_hidden_layers, 4):
        tensors = {}
        for i in range(start, min(start + 4, config.num_hidden_layers)):
            prefix = f"model.layers.{i}"
            for name, size in linears.items():
                tensors[f"{prefix}.{name}.weight"] = random(*size)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                # A few channels are loud, as in every trained model.
                weight = 1 + 0.1 * torch.randn(hidden)
                weight[torch.randperm(hidden)[: hidden // 64]] *= 8
                tensors[f"{prefix}.{norm}.weight"] = weight.to(torch.bfloat16)
        write(f"blocks-{start:03d}.safetensors", tensors)
    vocabulary = config.vocab_size
    write("embeddings.safetensors", {"model.embed_tokens.weight": random(vocabulary, hidden)})
    norm = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    write("head.safetensors", {"lm_head.weight": random(vocabulary, hidden), **norm})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer or more blocks than the model has")
    parser.add_argument("--efforts", nargs="+", default=["fast"])
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-memory")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    console = Console(stderr=True)
    options: list[object] = ["--scheme", args.scheme, "--device", args.device]
    options += ["--samples", args.samples, "--seqlen", args.seqlen]
    options += ["--max-memory", args.max_memory] if args.max_memory else []
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        start = time.perf_counter()
        total = make(SHAPES[args.shape], folder, args.layers)
        console.print(f"made {total / 2**30:.1f} GiB in {time.perf_counter() - start:.0f} s")
        for effort in args.efforts:
            out = Path(name) / effort
            plan = salience("plan", folder, *options, "--effort", effort, "-o", out)
            made = salience("quantize", folder, "-o", out, *options, "--effort", effort)
            kept = ("seconds", "phase_seconds", "peak_vram_bytes", "wall_seconds", "peak_rss_bytes")
            row = {"effort": effort, "plan": plan, **{key: made[key] for key in kept}}
            row |= {"error_rtn": made["error_rtn"], "error": made["error"]}
            rows.append(row)
            console.print({key: value for key, value in row.items() if key != "plan"})
            seconds = sum(plan["seconds"].values())
            console.print(
                f"plan: {seconds:.0f} s, RAM {plan['ram_bytes'] / 2**30:.2f} GiB, "
                f"VRAM {plan['vram_bytes'] / 2**30:.2f} GiB, {plan['seconds']}, {plan['memory']}"
            )
            if args.out:
                result = {"shape": args.shape, "layers": args.layers, "checkpoint_bytes": total}
                result |= {"options": [str(each) for each in options], "rows": rows}
                result |= {"machine": machine()}
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
