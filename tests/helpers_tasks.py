"""A folder of lm-eval tasks of each kind, with data on the disk."""

import json
from pathlib import Path
from typing import Any

_COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
metadata:
  version: 1.0
"""
_CHOICE = """
task: tiny_choice
tag: tiny
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
_ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
_GENERATE = """
task: tiny_generate
tag: tiny
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{reply}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
  do_sample: false
filter_list:
  - name: first
    filter:
      - function: regex
        regex_pattern: "(.)"
      - function: take_first
  - name: whole
    filter:
      - function: take_first
metric_list:
  - metric: exact_match
"""
_GROUP = """
group: tiny_group
task: [tiny_choice]
aggregate_metric_list:
  - metric: acc
metadata:
  version: 1.0
"""

ROWS = [
    {
        "question": f"The {noun} is",
        "choices": [" red", " very large", " an old idea", " b"],
        "answer": i % 4,
        "text": f"The {noun} of the function is an argument of the class number {i}.",
        "reply": "e",
    }
    for i, noun in enumerate(["name", "value", "type", "string", "loop", "key", "scope", "class"])
]


def write_tasks(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Tasks tiny_choice, tiny_rolling and tiny_generate, and group tiny_group of the first."""
    (folder / "data").mkdir(parents=True)
    lines = [json.dumps(row) for row in rows or ROWS]
    (folder / "data" / "rows.jsonl").write_text("\n".join(lines))
    tasks = {"choice": _CHOICE, "rolling": _ROLLING, "generate": _GENERATE}
    for name, body in tasks.items():
        (folder / f"{name}.yaml").write_text(body + _COMMON.format(file="data/rows.jsonl"))
    (folder / "group.yaml").write_text(_GROUP)
    return folder
