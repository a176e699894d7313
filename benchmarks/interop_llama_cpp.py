"""Let llama.cpp itself run the GGUF files that salience writes, and compare its replies with ours.

llama.cpp comes prebuilt in a package of its Node binding (Node 20 or newer):

    mkdir ~/llama.cpp && cd ~/llama.cpp && npm install --ignore-scripts \
        node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

    salience quantize smollm2-135m --format gguf --scheme w4g64 --samples 32 --seqlen 256 \\
        -o OUT/q4_1
    salience quantize smollm2-135m --format gguf --scheme w4g32-sym --samples 32 --seqlen 256 \\
        -o OUT/q4_0
    python benchmarks/interop_llama_cpp.py OUT/q4_1 OUT/q4_0 --llama ~/llama.cpp -o RESULTS.json

Of each folder llama.cpp reads `model.gguf`, and salience loads the folder. Both answer five prompts
through the chat template, greedily, on the same weights. `agree` counts the replies that are the
same for 16 tokens, or fewer if they end, of pairs of

    theirs    packed      llama.cpp on the file, which rounds the activations that enter a packed
                          linear to 8 bits, in blocks of 32 with a scale each
              fp32        llama.cpp on the file with every weight dequantized to fp32, which rounds
                          none: the same names, rows, metadata and tokenizer, exact arithmetic
    ours      exact       fp32, weights dequantized
              auto        the fastest kernel here, as a user has it
              emulated    as exact, with activations rounded to such blocks

`noise` is how far the logits are from those of `exact`, as the standard deviation over
llama.cpp's 20 best tokens at each place of its replies. Roundings feed roundings, so two programs
that round alike still part in the last bits and then everywhere: `packed` and `emulated` are to be
equal in size, not in sign. `best` and `gap` are over the same places: how often exact's best token
is packed llama.cpp's, and by how much its logit is above that one's at most. Where the replies part
`parting` has the same gap. `same_texts` counts the texts that both cut into the same tokens.

Exits 1 when fewer than four replies of packed and exact agree, or any of fp32 and exact, or a text
is cut otherwise.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor, nn

import salience
from salience.checkpoint import read_json
from salience.linear import QuantLinear
from salience.loading import load_source
from salience.source import open_source

TOKENS = 16
BLOCK = 32
BEST = 20
WANTED = 4
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three animals that live in the forest.",
    "Explain in one sentence why the sky is blue.",
    "Give me a short recipe for pancakes.",
)
TEXTS = (
    "In 2024, 1234567 people paid $3.50; that's 12% more than in 1999!",
    "  two spaces, a\ttab,\n\nand blank lines   \n end",
    "for i in range(10):\n    print(f'{i:>3}', end=\"\\n\")",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d\u4e16\u754c \u0440\u0438\u0432 \U0001f600",
    "I'LL don't we've IT'S they'd",
)


def round_activations(x: Tensor) -> Tensor:
    """To llama.cpp's Q8_0 blocks and back: 32 values, d = largest / 127, which is kept in fp16."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    d = blocks.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.where(d > 0, blocks / d, 0).round()
    return (codes * d.half().float()).flatten(-2).to(x.dtype)


@contextmanager
def rounded_activations(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Round what enters these linears."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args: (round_activations(args[0]),)
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def same_start(a: list[int], b: list[int]) -> int:
    """How many first tokens two replies share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def answer(model: Any, ids: list[int]) -> list[int]:
    made = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    return [int(i) for i in made[0, len(ids) :]]


def next_logits(model: Any, ids: list[int], reply: list[int]) -> Tensor:
    """The logits [len(reply), tokens] that each token of a reply is chosen from."""
    logits = model(torch.tensor([ids + reply])).logits[0]
    return logits[len(ids) - 1 : -1].float()


def differences(logits: Tensor, best: list[dict[str, float]]) -> Tensor:
    """Of the best tokens at each place: logits minus llama.cpp's, but for a constant."""
    rows = []
    for row, scores in zip(logits, best, strict=True):
        ids = torch.tensor([int(token) for token in scores])
        apart = row[ids].double() - torch.tensor(list(scores.values()), dtype=torch.float64)
        rows.append(apart - apart.mean())
    return torch.cat(rows)


def in_fp32(file: Path, out: Path) -> None:
    """The same GGUF file with every weight dequantized."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def compare(folder: Path, llama: Path) -> dict[str, Any]:
    source = open_source(str(folder))
    tokenizer, auto = source.tokenizer, load_source(source)
    packed = {n: m.kernel for n, m in auto.named_modules() if isinstance(m, QuantLinear)}
    exact = load_source(open_source(str(folder)), keep=["."])
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    theirs = {"packed": ask_llama(folder / "model.gguf", llama, texts)}
    places = [reply["reply_ids"] for reply in theirs["packed"]["replies"]]
    with tempfile.TemporaryDirectory() as name:
        in_fp32(folder / "model.gguf", Path(name) / "model.gguf")
        theirs["fp32"] = ask_llama(Path(name) / "model.gguf", llama, texts, places)
    replies = {
        way: [reply["reply_ids"] for reply in answers["replies"]] for way, answers in theirs.items()
    }
    logits = {}
    for way, model in (("exact", exact), ("auto", auto), ("emulated", exact)):
        with rounded_activations(model, list(packed) if way == "emulated" else []):
            replies[way] = [answer(model, each) for each in ids]
            if way != "auto":
                logits[way] = torch.cat(
                    [next_logits(model, *each) for each in zip(ids, places, strict=True)]
                )
    best = {
        way: [place for reply in answers["replies"] for place in reply["best"]]
        for way, answers in theirs.items()
    }
    # Against exact; ours at the places and tokens of packed llama.cpp.
    apart = {way: differences(logits["exact"], each) for way, each in best.items()}
    apart["emulated"] = differences(logits["emulated"], best["packed"]) - apart["packed"]
    chosen = torch.tensor([token for reply in places for token in reply])[:, None]
    gaps = (logits["exact"].amax(dim=1, keepdim=True) - logits["exact"].gather(1, chosen))[:, 0]
    cut = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    return {
        "folder": folder.name,
        "scheme": source.config.quantization_config["scheme"],
        "method": read_json(folder / "salience_report.json")["method"],
        "bytes": (folder / "model.gguf").stat().st_size,
        "kernel": next(iter(packed.values())),
        "of": len(PROMPTS),
        "agree": {
            f"{a} and {b}": sum(x == y for x, y in zip(replies[a], replies[b], strict=True))
            for a in theirs
            for b in ("exact", "auto", "emulated")
        },
        "noise": {way: round(each.std().item(), 5) for way, each in apart.items()},
        "places": len(gaps),
        "best": int((gaps == 0).sum()),
        "gap": round(gaps.max().item(), 4),
        "same_texts": sum(a == b for a, b in zip(cut, theirs["packed"]["ids"], strict=True)),
        "texts": len(TEXTS),
        "same_prompts": sum(
            a == reply["prompt_ids"]
            for a, reply in zip(ids, theirs["packed"]["replies"], strict=True)
        ),
        "replies": [
            {
                "prompt": prompt,
                **{way: tokenizer.decode(each[i]) for way, each in replies.items()},
                "parting": parting(replies["exact"][i], places[i], exact, ids[i]),
            }
            for i, prompt in enumerate(PROMPTS)
        ],
        "llama_cpp": theirs["packed"]["llama_cpp"],
    }


def parting(
    own: list[int], reply: list[int], exact: Any, ids: list[int]
) -> dict[str, float] | None:
    """After how many tokens replies part, and how near the two next are; None if they do not."""
    at = same_start(own, reply)
    if at >= len(reply):
        return None
    logits = next_logits(exact, ids, reply)[at]
    return {"after": at, "gap": round(float(logits[own[at]] - logits[reply[at]]), 4)}


def ask_llama(
    file: Path, llama: Path, prompts: list[str], places: list[list[int]] | None = None
) -> dict[str, Any]:
    """What llama.cpp makes of a file; `best` is along its own replies, or along `places`."""
    script = Path(__file__).with_suffix(".mjs")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        wanted = {"texts": TEXTS, "prompts": prompts, "tokens": TOKENS, "best": BEST}
        json.dump(wanted | {"places": places}, request)
        request.flush()
        done = subprocess.run(
            ["node", str(script), str(file.resolve()), request.name],
            cwd=llama,
            timeout=600,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"llama.cpp did not run {file}: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare salience with llama.cpp on GGUF files.")
    parser.add_argument("folders", type=Path, nargs="+", help="made with --format gguf")
    parser.add_argument("--llama", type=Path, required=True, help="where npm put node-llama-cpp")
    parser.add_argument("-o", "--out", type=Path, help="write the results here, too")
    args = parser.parse_args()
    results = {
        "results": [compare(folder, args.llama) for folder in args.folders],
        "versions": {
            "salience": salience.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    text = json.dumps(results, indent=2, ensure_ascii=False)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    good = all(
        r["agree"]["packed and exact"] >= WANTED
        and r["agree"]["fp32 and exact"] == r["of"]
        and r["same_texts"] == r["texts"]
        for r in results["results"]
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
