"""Numbers on the pages, read from `benchmarks/results` at the time of the build."""

import json
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_GIB = 2**30
_SHAPES = {(4096, 4096), (4096, 28672), (14336, 4096)}
_NAMES = {
    ("rtn", "fast"): "`--method rtn`",
    ("gptq", "fast"): "`--method gptq`",
    ("awq", "fast"): "`--method awq` (the default)",
    ("awq", "balanced"): "`--effort balanced`",
}


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _main_job(name: str) -> dict[str, Any]:
    return next(row for row in load("main_job_h100")["rows"] if row["name"] == name)


def _ladder(method: str, effort: str, scheme: str) -> dict[str, Any]:
    return next(
        row
        for row in load("ladder_h100")["rows"]
        if (row["method"], row["effort"], row["scheme"]) == (method, effort, scheme)
    )


def _rows(head: str, rows: list[list[str]]) -> str:
    columns = head.count("|") - 1
    lines = [head, "|" + "---|" * columns]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _hundredths(value: float) -> str:
    return str(Decimal(str(value)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def quality() -> str:
    """Perplexity of each method and scheme, and the seconds of its search."""
    rows = [["float", _hundredths(_main_job("float")["perplexity"]), "", ""]]
    for (method, effort), name in _NAMES.items():
        four, three = (_ladder(method, effort, scheme) for scheme in ("w4g64", "w3g64"))
        phases = four["phase_seconds"]
        seconds = f"{phases.get('statistics', 0) + phases['search']:.1f}"
        rows.append([name, *(_hundredths(row["perplexity"]) for row in (four, three)), seconds])
    return _rows("| | w4g64 | w3g64 | statistics and search, seconds |", rows)


_PARTS = {
    "rtn": "round to nearest",
    "+ gptq": "+ gptq: `--effort balanced`",
    "+ end to end": "+ end to end: `--effort best`",
    "without learned rounding": "end to end, without learned rounding",
    "auto-round": "AutoRound 0.15.1",
}


def best() -> str:
    """Perplexity on two texts, and seconds of the whole command."""
    rows = [
        [
            _PARTS.get(row["row"], row["row"]),
            "" if row["row"] == "float" else row["scheme"],
            *(_hundredths(row[text]) for text in ("text", "pydoc")),
            f"{row['seconds']:.0f}" if row["seconds"] else "",
        ]
        for row in load("ablation_wikitext_h100")["rows"]
    ]
    return _rows("| | scheme | WikiText-2 test | Python's documentation | seconds |", rows)


def target_bits() -> str:
    """Perplexity of one width for all, of widths chosen, and of the same at random."""
    rows = []
    for row in load("target_bits_h100")["rows"]:
        chosen = row["allocation"]["linears_of_bits"] if row["bits"] == "chosen" else {}
        counts = ", ".join(f"{count} at {bits}" for bits, count in chosen.items())
        name = {"one width": "3 bits for all", "chosen": f"chosen: {counts} bits"}
        rows.append(
            [
                name.get(row["bits"], "the same widths, dealt out at random"),
                _hundredths(row["perplexity"]),
                f"{row['seconds']:.0f}",
            ]
        )
    return _rows("| | perplexity | seconds |", rows)


def other_domain() -> str:
    """Perplexity by the text that the model was calibrated on."""
    usual = {(row["scheme"], row["row"]): row for row in load("ablation_wikitext_h100")["rows"]}
    rows = [
        [
            _PARTS.get(row["row"], row["row"]),
            row["scheme"],
            _hundredths(usual[row["scheme"], row["row"]]["text"]),
            _hundredths(row["text"]),
        ]
        for row in load("ablation_pydoc_h100")["rows"]
        if row["row"] != "float"
    ]
    head = "| | scheme | calibrated on WikiText-2 valid | calibrated on Python's documentation |"
    return _rows(head, rows)


def decode() -> str:
    """Tokens a second and memory of an 8B shape."""
    rows = []
    for file, name in (
        ("decode_llama_3_8b_h100", "Llama-3-8B"),
        ("decode_llama_3_8b_head8_h100", "Llama-3-8B, head in 8 bits"),
        ("decode_llama_3_8b_w3_h100", "Llama-3-8B"),
        ("decode_llama_2_7b_h100", "Llama-2-7B"),
    ):
        for variant in load(file)["variants"]:
            scheme = "fp16" if variant["name"] == "dense" else variant["name"].split()[0]
            for row in variant["rows"]:
                peak = f"{row['peak_bytes'] / _GIB:.2f} GiB"
                rate = f"{row['tokens_per_second']:.0f}"
                rows.append([name, scheme, str(row["batch"]), rate, peak])
    return _rows("| model | weights | batch | tokens a second | peak GPU memory |", rows)


def cost() -> str:
    """Seconds and memory of whole `quantize` commands."""
    rows = []
    for row in sorted(load("llama_3_8b_h100")["rows"], key=lambda r: r["seconds"]):
        rows.append(_cost("Llama-3-8B shape, w4g128, one H100", row))
    for row in load("tinyllama_cpu")["rows"]:
        rows.append(_cost("TinyLlama-1.1B shape, w4g128, one CPU thread", row))
    own = load("quantize_cpu")
    rows.append(_cost("SmolLM2-135M, w4g64, two CPU cores", own))
    head = "| | effort | statistics | search | whole | peak RAM | peak GPU |"
    return _rows(head, rows)


def _cost(name: str, row: dict[str, Any]) -> list[str]:
    phases = row["phase_seconds"]
    vram = row.get("peak_vram_bytes") or 0
    return [
        name,
        row["effort"],
        f"{phases['statistics']:.0f} s",
        f"{phases['search']:.0f} s",
        f"{row.get('wall_seconds', row['seconds']):.0f} s",
        f"{row['peak_rss_bytes'] / _GIB:.1f} GiB",
        f"{vram / _GIB:.1f} GiB" if vram else "",
    ]


def cpu() -> str:
    """Tokens a second on two CPU cores."""
    names = {
        "dense": "Transformers, bf16",
        "packed": "Transformers on the packed model",
        "optimized": "salience's engine",
        "float": "salience's engine on the dense model, bf16",
        "llama.cpp": "llama.cpp on the model's Q4_1 file",
    }
    rates = load("decode_cpu")["tokens_per_second"]
    return _rows(
        "| SmolLM2-135M, w4g64, two CPU cores | tokens a second |",
        [[name, f"{rates[key]:.0f}"] for key, name in names.items()],
    )


def schemes() -> str:
    """Bits a weight of each scheme, for rows of 4096."""
    from salience import Scheme

    names = ("w8g128", "w4g32", "nf4", "w4g64", "w4g128", "nf4-dq", "w3g64", "w3g128", "w2g64")
    rows = []
    for name in names:
        bits = Scheme.parse(name).bits_per_weight(4096)
        rows.append([f"`{name}`", _hundredths(bits), f"{16 / bits:.1f}"])
    return _rows("| scheme | bits a weight | times smaller than fp16 |", rows)


def kernels() -> str:
    """Microseconds of a linear on an H100, by tokens."""
    rows = []
    found = {bits: load(f"kernels_w{bits}_h100")["rows"] for bits in (4, 3)}
    three = {(r["in"], r["out"], r["tokens"]): r for r in found[3]}
    for row in found[4]:
        place = (row["in"], row["out"], row["tokens"])
        if row["tokens"] not in (1, 16, 64, 256) or (row["in"], row["out"]) not in _SHAPES:
            continue
        other = min(three[place]["times"].values()) if place in three else None
        rows.append(
            [
                f"{row['in']} x {row['out']}",
                str(row["tokens"]),
                f"{row['floor']:.1f}",
                f"{row['cublas']:.1f}",
                f"{min(row['times'].values()):.1f}",
                "" if other is None else f"{other:.1f}",
            ]
        )
    return _rows("| in x out | tokens | floor | cuBLAS fp16 | 4 bits | 3 bits |", rows)


_TABLES: dict[str, Callable[[], str]] = {
    "cost": cost,
    "cpu": cpu,
    "decode": decode,
    "kernels": kernels,
    "quality": quality,
    "best": best,
    "other_domain": other_domain,
    "target_bits": target_bits,
    "schemes": schemes,
}


def table(name: str) -> str:
    """A table, in Markdown.

    Raises:
        KeyError: there is none of that name.
    """
    return _TABLES[name]()


def figure(name: str, *which: str) -> str:
    """One number.

    Raises:
        KeyError: there is none of that name.
    """
    return _FIGURES[name](*which)


def _perplexity(method: str, effort: str = "fast", scheme: str = "w4g64") -> str:
    if method == "float":
        return _hundredths(_main_job("float")["perplexity"])
    return _hundredths(_ladder(method, effort, scheme)["perplexity"])


def _faster(batch: str) -> str:
    quantized, dense = (
        next(row for row in variant["rows"] if row["batch"] == int(batch))["tokens_per_second"]
        for variant in load("decode_llama_3_8b_h100")["variants"]
    )
    return f"{quantized / dense:.1f}"


_FIGURES: dict[str, Callable[..., str]] = {
    "faster": _faster,
    "fuzzed": lambda: f"{load('fuzz_readers')['executions']}",
    "kills": lambda: f"{load('kill_and_continue')['kills']}",
    "perplexity": _perplexity,
}
