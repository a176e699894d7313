"""Let llama.cpp itself run the GGUF files that salience writes, and compare its replies with ours.

llama.cpp comes prebuilt in a package of its Node binding (Node 20 or newer):

    mkdir ~/llama.cpp && cd ~/llama.cpp && npm install --ignore-scripts \
        node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1

    salience quantize smollm2-135m --format gguf --scheme w4g64 --method rtn -o OUT/q4_1
    salience quantize smollm2-135m --format gguf --scheme w4g64-sym --method rtn -o OUT/q4_0
    python benchmarks/interop_llama_cpp.py OUT/q4_1 OUT/q4_0 --llama ~/llama.cpp -o RESULTS.json

Of each folder llama.cpp reads `model.gguf`, and salience loads the folder. Both answer five prompts
through the chat template, greedily, on the same weights; llama.cpp rounds activations to 8 bits, so
later tokens may part. `same_tokens` says after how many of the 16 first ones, or of fewer if the
reply ends. `same_texts` counts the texts that both cut into the same tokens. Exits 1 when fewer
than four replies agree, or any text is cut otherwise.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import salience
from salience.loading import load_source
from salience.source import open_source

TOKENS = 16
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


def ours(folder: Path) -> tuple[Any, Any]:
    source = open_source(str(folder))
    return load_source(source), source.tokenizer


@torch.no_grad()
def compare(folder: Path, llama: Path) -> dict[str, Any]:
    model, tokenizer = ours(folder)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    theirs = ask_llama(folder / "model.gguf", llama, prompts)
    replies = []
    for prompt, text, answer in zip(PROMPTS, prompts, theirs["replies"], strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        made = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        reply = made[0, len(ids) :].tolist()
        same = 0
        while same < len(reply) and reply[: same + 1] == answer["reply_ids"][: same + 1]:
            same += 1
        replies.append(
            {
                "prompt": prompt,
                "same_prompt_tokens": ids == answer["prompt_ids"],
                "same_tokens": same,
                "tokens": len(reply),
                "salience": tokenizer.decode(reply),
                "llama_cpp": tokenizer.decode(answer["reply_ids"]),
            }
        )
    cut = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    return {
        "folder": folder.name,
        "scheme": json.loads((folder / "config.json").read_text())["quantization_config"]["scheme"],
        "bytes": (folder / "model.gguf").stat().st_size,
        "agree": sum(r["same_tokens"] == r["tokens"] for r in replies),
        "of": len(replies),
        "same_texts": sum(a == b for a, b in zip(cut, theirs["ids"], strict=True)),
        "texts": len(TEXTS),
        "replies": replies,
        "llama_cpp": theirs["llama_cpp"],
    }


def ask_llama(file: Path, llama: Path, prompts: list[str]) -> dict[str, Any]:
    script = Path(__file__).with_suffix(".mjs")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        json.dump({"texts": TEXTS, "prompts": prompts, "tokens": TOKENS}, request)
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
    good = all(r["agree"] >= WANTED and r["same_texts"] == r["texts"] for r in results["results"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
