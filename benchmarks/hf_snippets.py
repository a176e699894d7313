"""The lines of the two usual tutorials, on a real model: Transformers, an AWQ and a GPTQ folder.

    python benchmarks/hf_snippets.py -o benchmarks/results/hf_snippets.json

`salience quantize` rounds the model into a folder of each format. Then a new Python, on the CPU,
runs SNIPPET as it stands below, and once more without its two lines of salience, which shows what
Transformers says by itself. The same prompt goes to `salience chat`. The JSON has both replies,
seconds, peak memory, and which of the packages that Transformers would ask for are installed.
Exits 1 when a reply is empty or not that of `salience chat`, or when one of them is installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from main_job import salience

from salience.machine import describe

OTHERS = ("gptqmodel", "auto_gptq", "optimum", "awq")  # the last is AutoAWQ
ENABLE = """\
import salience.hf
salience.hf.enable()
"""
SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = [{"role": "user", "content": prompt}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
loaded = time.perf_counter()
output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
"""
BEFORE = """\
import json, resource, sys, time
from importlib.util import find_spec
folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
others = sys.argv[4:]
start = time.perf_counter()
"""
AFTER = """\
done = time.perf_counter()
count = inputs["input_ids"].shape[1]
names = [type(module).__name__ for module in model.modules()]
result = {
    "reply": tokenizer.decode(output[0, count:], skip_special_tokens=True),
    "tokens": output.shape[1] - count,
    "quantized_linears": names.count("QuantLinear"),
    "load_seconds": loaded - start,  # imports included
    "generate_seconds": done - loaded,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "importable": {name: find_spec(name) is not None for name in others},
}
print(json.dumps(result))
"""


def python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def run(args: argparse.Namespace, format: str, out: Path) -> dict[str, Any]:
    options = ("--method", "rtn", "--scheme", "w4g64", "--format", format, "--device", "cpu")
    made = salience("quantize", args.model, "-o", out, *options)
    told = (out, args.prompt, args.tokens, *OTHERS)
    done = python(BEFORE + ENABLE + SNIPPET + AFTER, *told)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(last_line(done.stdout))
    without = python(BEFORE + SNIPPET + AFTER, *told)
    chat = ("--prompt", args.prompt, "--max-new-tokens", args.tokens, "--device", "cpu")
    ours = salience("chat", out, *chat)
    result["reply_of_salience_chat"] = ours["text"]
    result["same_reply"] = result["reply"].strip() == ours["text"].strip() != ""
    result["without_salience"] = last_line(without.stderr) if without.returncode else "it loads"
    result["quantize_seconds"] = made["wall_seconds"]
    return {"format": format, **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = [run(args, format, Path(name) / format) for format in ("awq", "gptq")]
    for result in results:
        print(f"{result['format']}: {result['reply']}")
    if args.out is not None:
        told = {"model": args.model, "prompt": args.prompt, "machine": describe()}
        told |= {"snippet": ENABLE + SNIPPET, "results": results}
        args.out.write_text(json.dumps(told, indent=2) + "\n")
    failed = any(not r["same_reply"] or any(r["importable"].values()) for r in results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
