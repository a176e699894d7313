"""What vLLM and SGLang would mind: rules on shapes, skip lists by independent matchers, and the way
to the user. `python tests/test_serving.py` writes the tables of docs/serving.md anew.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

import salience
from helpers_checkpoint import config_of, refuse
from salience.cli.app import main
from salience.formats import AutoAwq
from salience.inspection import inspect
from salience.reports.report import read_report
from salience.scheme import Scheme
from salience.serving import FUSED, Finding, Served, findings, rejection, summary, with_fused
from salience.source import open_source
from tiny_models import llama_config, make_model, save

TABLE = Path(__file__).parent.parent / "docs" / "serving.md"
BEGIN = "<!-- from here on written by: python tests/test_serving.py -->\n"
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes_of(
    hidden: int, inner: int, kv: int, heads: int | None = None
) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears of one block; `kv` outputs of k and of v, `heads` of q."""
    wide = heads or hidden
    sizes = ((wide, hidden), (kv, hidden), (kv, hidden), (hidden, wide))
    sizes += ((inner, hidden), (inner, hidden), (hidden, inner))
    owners = ["self_attn"] * 4 + ["mlp"] * 3
    names = [f"model.layers.0.{o}.{leaf}" for o, leaf in zip(owners, LEAVES, strict=True)]
    return dict(zip(names, sizes, strict=True))


def served(
    format: str, scheme: str, shapes: dict[str, tuple[int, int]] | None = None, **more: Any
) -> Served:
    shapes = shapes_of(4096, 11008, 1024) if shapes is None else shapes
    schemes = dict.fromkeys(shapes, Scheme.parse(scheme))
    return Served(format, schemes, shapes, **more)


def verdicts(found: list[Finding]) -> tuple[str, str]:
    """The worst that vLLM, and that SGLang, says: yes, warn or refuse."""
    order = ("yes", "warn", "refuse")
    worst = dict.fromkeys(("vllm", "sglang"), "yes")
    for each in found:
        worst[each.runtime] = max(worst[each.runtime], each.severity, key=order.index)
    return worst["vllm"], worst["sglang"]


@pytest.mark.parametrize(
    ("format", "scheme", "more", "expected"),
    [
        ("awq", "w4g128", {}, ("yes", "yes")),
        ("awq", "w4g32", {}, ("yes", "yes")),
        ("awq", "w4g128-sym", {}, ("yes", "yes")),
        ("awq", "w4g16", {}, ("refuse", "warn")),
        ("awq", "w4g256", {}, ("warn", "warn")),
        ("awq", "w4channel", {}, ("yes", "refuse")),
        ("awq", "w4g128", {"dtype": "bfloat16"}, ("warn", "warn")),
        ("compressed-tensors", "w4g128", {}, ("yes", "yes")),
        ("compressed-tensors", "w8g128-sym", {}, ("yes", "yes")),
        ("compressed-tensors", "w8channel-sym", {}, ("yes", "yes")),
        ("compressed-tensors", "w8g128", {}, ("refuse", "refuse")),
        ("compressed-tensors", "w3g128-sym", {}, ("warn", "refuse")),
        ("compressed-tensors", "w3g128", {}, ("refuse", "refuse")),
        ("compressed-tensors", "w4g16", {}, ("refuse", "refuse")),
        ("compressed-tensors", "w4g16-sym", {}, ("warn", "refuse")),
        ("compressed-tensors", "w4g128-sym", {"act_order": True}, ("warn", "warn")),
        ("gptq", "w4g128-sym", {}, ("yes", "yes")),
        ("gptq", "w8g128-sym", {}, ("yes", "yes")),
        ("gptq", "w4g128", {}, ("warn", "warn")),
        ("gptq", "w3g128-sym", {}, ("warn", "warn")),
        ("gptq", "w3g128-sym", {"dtype": "bfloat16"}, ("refuse", "refuse")),
        ("bitsandbytes", "nf4", {}, ("yes", "yes")),
        ("awq-gemv", "w4g128", {}, ("refuse", "refuse")),
        ("gguf", "w3g16", {}, ("yes", "yes")),
    ],
)
def test_schemes(format: str, scheme: str, more: dict[str, Any], expected: tuple[str, str]) -> None:
    """On shapes that every kernel likes."""
    assert verdicts(findings(served(format, scheme, shapes_of(4096, 14336, 1024), **more))) == (
        expected
    )


def only(format: str, scheme: str, rows: int, columns: int, name: str = "a.q") -> tuple[str, str]:
    return verdicts(findings(served(format, scheme, {name: (rows, columns)})))


def test_outputs_and_inputs_are_whole_tiles() -> None:
    assert only("awq", "w4g64", 64, 128) == ("yes", "yes")
    assert only("awq", "w4g64", 72, 128) == ("refuse", "warn")  # AutoAWQ's kernel: 64, too
    assert only("awq", "w4g64", 68, 128) == ("refuse", "refuse")  # a word holds 8
    assert only("awq", "w4g64", 128, 192) == ("warn", "warn")
    assert only("awq", "w4g128", 64, 384) == ("yes", "yes")
    assert only("compressed-tensors", "w4g64-sym", 128, 192) == ("warn", "refuse")
    assert only("compressed-tensors", "w4g64", 128, 192) == ("refuse", "refuse")
    assert only("gptq", "w4g64-sym", 128, 192) == ("warn", "warn")


def test_the_sum_of_fused_outputs_counts() -> None:
    """k and v of 32 outputs each are served, since q, k and v are one linear."""
    shapes = shapes_of(256, 512, 32)
    assert shapes["model.layers.0.self_attn.k_proj"][0] % 64
    assert not findings(served("awq", "w4g64", shapes))
    alone = {"model.layers.0.self_attn.k_proj": (32, 256)}
    assert verdicts(findings(served("awq", "w4g64", alone))) == ("refuse", "warn")


def test_qwen2_72b() -> None:
    """29568 = 231 groups of 128: the pitfall that padding to 29696 is for."""
    odd, even = shapes_of(8192, 29568, 1024), shapes_of(8192, 29696, 1024)
    assert not findings(served("awq", "w4g128", odd))
    for gpus in (2, 4, 8):
        found = findings(served("awq", "w4g128", odd, kv_heads=8), gpus)
        wrong = {each.linear for each in found if each.severity == "refuse"}
        assert "model.layers.0.mlp.down_proj" in wrong
        assert "model.layers.0.self_attn.o_proj" not in wrong
        [mend] = {f.mend for f in found if f.linear.endswith("down_proj") and "pad" in f.mend}
        multiple = int(re.search(r"--pad-intermediate (\d+)", mend)[1])  # type: ignore[index]
        assert multiple == 128 * gpus
        assert -(-29568 // multiple) * multiple == 29696
        assert not findings(served("awq", "w4g128", even, kv_heads=8), gpus)
    mend = findings(served("awq", "w4g128", odd, kv_heads=8), 2)[0].mend
    assert mend == "use a group size of 64 or --pad-intermediate 256"
    assert verdicts(findings(served("awq", "w4g64", odd), 2)) == ("warn", "warn")


def test_outputs_are_cut_and_inputs_are_cut() -> None:
    name = "model.layers.0.mlp"
    up, down = (
        served("awq", "w4g128", {f"{name}.{leaf}": (256, 256)}) for leaf in ("up_proj", "down_proj")
    )
    assert not findings(up, 4) and verdicts(findings(up, 8)) == ("refuse", "warn")  # 32 outputs
    assert not findings(down, 2) and verdicts(findings(down, 4)) == ("refuse", "refuse")
    problem = findings(served("awq", "w4g128", {f"{name}.up_proj": (256, 256)}), 3)[0].problem
    assert problem == "its 256 outputs cannot be cut for 3 GPUs"


def test_more_gpus_than_heads_of_keys_have_copies() -> None:
    """q 512 / 8 + k and v 64 each, not 64 / 4."""
    shapes = shapes_of(512, 1024, 128)

    def of_qkv(heads: int | None) -> list[Finding]:
        found = findings(served("awq", "w4g64", shapes, kv_heads=heads), 8)
        return [each for each in found if each.linear.endswith("qkv_proj")]

    assert not of_qkv(2)
    assert verdicts(of_qkv(None)) == ("refuse", "warn")  # were k and v cut in 8: 64 + 16 + 16


def test_parts_of_a_fused_linear_have_one_scheme() -> None:
    shapes = shapes_of(256, 512, 256)
    schemes = dict.fromkeys(shapes, Scheme(4, 128))
    v = "model.layers.0.self_attn.v_proj"
    mixed = findings(Served("compressed-tensors", {**schemes, v: Scheme(8, 128, True)}, shapes))
    assert verdicts(mixed) == ("refuse", "refuse")
    assert {each.linear for each in mixed} == {"model.layers.0.self_attn.qkv_proj"}
    assert "w4g128 and w8g128-sym" in mixed[0].problem
    some = {name: scheme for name, scheme in schemes.items() if name != v}
    partly = findings(Served("compressed-tensors", some, shapes, kept=[v]))
    assert verdicts(partly) == ("refuse", "refuse") and "v_proj would be float" in partly[0].problem
    # A model without v_proj (its values are its keys) is no such case.
    assert not findings(Served("compressed-tensors", some, shapes))


def test_parts_of_a_fused_linear_have_one_order() -> None:
    shapes = shapes_of(256, 512, 256)
    order = torch.arange(256, dtype=torch.int32) // 128
    qkv = [f"model.layers.0.self_attn.{leaf}" for leaf in LEAVES[:3]]
    alike = served("gptq", "w4g128-sym", shapes, g_idx=dict.fromkeys(qkv, order), act_order=True)
    assert not findings(alike)
    other = served(
        "gptq",
        "w4g128-sym",
        shapes,
        g_idx={**dict.fromkeys(qkv[:2], order), qkv[2]: order.flip(0)},
        act_order=True,
    )
    assert verdicts(findings(other)) == ("refuse", "refuse")
    assert "different orders" in findings(other)[0].problem


@pytest.mark.parametrize(("scheme", "expected"), [("w4g64-sym", "warn"), ("w4g64", "refuse")])
def test_activation_order_over_several_gpus(scheme: str, expected: str) -> None:
    shapes = {"model.layers.0.mlp.down_proj": (256, 512)}
    one, two = (findings(served("gptq", scheme, shapes, act_order=True), n) for n in (1, 2))
    assert not any("activation order" in each.problem for each in one)
    assert {f.severity for f in two if "activation order" in f.problem} == {expected}


def test_coded_embeddings_are_refused_and_heads_are_not() -> None:
    shapes = {"model.embed_tokens": (320, 128), "lm_head": (320, 128)}
    found = findings(
        served("compressed-tensors", "w8g128-sym", shapes, embeddings=["model.embed_tokens"])
    )
    assert {each.linear for each in found} == {"model.embed_tokens"}
    assert verdicts(found) == ("refuse", "refuse")


# Lines.


def test_one_line_for_all_layers() -> None:
    shapes = {
        name.replace("layers.0", f"layers.{i}"): shape
        for i in range(50)
        for name, shape in shapes_of(576, 1536, 192).items()
    }
    lines = summary(findings(served("awq", "w4g64", shapes)))
    assert lines == [
        "vLLM and SGLang would take 150 linears (model.layers.*.self_attn.qkv_proj, "
        "model.layers.*.self_attn.o_proj, model.layers.*.mlp.gate_up_proj): 576 inputs, no "
        "multiple of 128; expect a slower kernel"
    ]


def test_a_rejection_is_of_both_runtimes() -> None:
    assert rejection(findings(served("awq", "w4channel"))) is None  # vLLM serves it
    line = rejection(findings(served("awq", "w4g128", shapes_of(8192, 29568, 1024)), 2))
    assert line is not None and line.startswith(
        "vLLM and SGLang would refuse model.layers.0.mlp.down_proj: its 14784 inputs on each of 2 "
        "GPUs are no multiple of group size 128; use a group size of 64 or --pad-intermediate 256"
    )


# Skip lists, as each reader matches them.


def hf_skips(entries: list[str], name: str) -> bool:
    """Transformers: a pattern from the start of a name to where a step ends, or the name's end."""
    ends = r"(?:(?=\.)|(?<=\.)|$)"
    found = any(re.match(f"(?:{e}){ends}", name) or name.endswith(e) for e in entries)
    assert found != should_convert_module(name, entries)
    return found


def vllm_skips(entries: list[str], name: str) -> bool | None:
    """vLLM: part of a name; of a fused linear, of the names of its parts, which must agree."""
    owner, _, leaf = name.rpartition(".")
    parts = [f"{owner}.{part}" for part in FUSED.get(leaf, (leaf,))]
    answers = {any(entry in part for entry in entries) for part in parts}
    return answers.pop() if len(answers) == 1 else None


def sglang_skips(entries: list[str], name: str) -> bool:
    """SGLang: part of the fused name."""
    return any(entry in name for entry in entries)


def check_skips(entries: list[str], floats: set[str], coded: set[str]) -> None:
    """Each reader keeps float what shall be, and nothing else."""
    for name in floats | coded:
        assert hf_skips(entries, name) == (name in floats), name
    for names, expected in ((floats, True), (coded, False)):
        for name in names:
            owner, _, leaf = name.rpartition(".")
            fused = next((f for f, parts in FUSED.items() if leaf in parts), leaf)
            assert vllm_skips(entries, f"{owner}.{fused}") is expected, name
            assert sglang_skips(entries, f"{owner}.{fused}") is expected, name


def test_the_matchers_know_the_traps() -> None:
    """The examples of the readers' differences that the format's facts list."""
    one, eleven = "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"
    assert hf_skips(["model.layers.1."], eleven) and hf_skips(["model.layers.1."], one)
    assert vllm_skips(["model.layers.1"], eleven) and not hf_skips(["model.layers.1"], eleven)
    assert vllm_skips(["gate"], "model.layers.1.mlp.gate_up_proj") is None
    assert not hf_skips(["gate"], "model.layers.1.mlp.gate_proj")
    three = [f"model.layers.1.self_attn.{leaf}" for leaf in LEAVES[:3]]
    assert vllm_skips(three, "model.layers.1.self_attn.qkv_proj")
    assert not sglang_skips(three, "model.layers.1.self_attn.qkv_proj")
    with pytest.raises(AssertionError):
        check_skips(["model.layers.1"], {one}, {eleven})


def test_skip_lists_mean_the_same_to_all(tmp_path: Path) -> None:
    """Layer 1's attention, layer 2's gate and up, and nothing of layers 10 to 12."""
    source = save(make_model(llama_config(num_hidden_layers=13)), tmp_path / "in")
    skip = (r"layers\.1\.self_attn", r"layers\.2\.mlp\.(gate|up)_proj", r"layers\.3\.")
    report = salience.quantize(
        str(source), tmp_path / "out", method="rtn", scheme="w4g32", skip=skip
    )
    config = config_of(tmp_path / "out")["quantization_config"]
    coded = {linear.name for linear in report.linears}
    floats = set(report.kept_modules) - {"lm_head"}
    assert len(floats) == 4 + 2 + 7 and len(coded) == 13 * 7 - 13
    check_skips(config["modules_to_not_convert"], floats, coded)
    assert not any("skip list" in each["problem"] for each in report.serving)
    # Without the fused names SGLang would quantize what is float.
    with pytest.raises(AssertionError):
        check_skips(sorted(floats), floats, coded)


def test_fused_names_are_listed_where_all_parts_are() -> None:
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "b.gate_proj", "c.o_proj"]
    assert with_fused(names) == [*names, "a.qkv_proj"]
    config = AutoAwq().config({"d": Scheme()}, [*names, "lm_head"])
    assert config["modules_to_not_convert"] == [*names, "a.qkv_proj"]


@pytest.mark.parametrize(
    ("skips", "wrong"),
    [
        (["gate"], {("vllm", "model.layers.0.mlp.gate_proj"), ("sglang", "both")}),
        (["model.layers.0.self_attn.q_proj"], {("vllm", "model.layers.0.self_attn.q_proj")}),
        ([], set()),
    ],
)
def test_skip_lists_that_say_something_else(skips: list[str], wrong: set[tuple[str, str]]) -> None:
    found = findings(served("awq", "w4g128", skips=skips))
    seen = {(f.runtime, f.linear) for f in found if f.severity == "refuse"}
    gate_up = {f"model.layers.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj")}
    if ("sglang", "both") in wrong:
        wrong = wrong - {("sglang", "both")} | {("sglang", name) for name in gate_up}
    assert seen == wrong


def test_a_float_linear_that_no_list_names() -> None:
    shapes = shapes_of(4096, 11008, 1024)
    down = "model.layers.0.mlp.down_proj"
    schemes = {name: Scheme() for name in shapes if name != down}
    found = {
        tuple(skips): verdicts(findings(Served("awq", schemes, shapes, [down], list(skips))))
        for skips in ((), ("model.layers.9.mlp",), (down,))
    }
    # vLLM makes a list of its own only where there is none.
    assert list(found.values()) == [("yes", "refuse"), ("refuse", "refuse"), ("yes", "yes")]


def test_float_experts_are_a_warning() -> None:
    more = {"kept": ["model.layers.0.mlp.experts"], "skips": ["model.layers.0.mlp.experts"]}
    assert verdicts(findings(served("awq", "w4g128", **more))) == ("warn", "warn")


# The way to the user.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with shapes that are served by one GPU, and not by two."""
    config = llama_config(hidden_size=256, intermediate_size=384, num_hidden_layers=2)
    return save(make_model(config), tmp_path_factory.mktemp("wide"))


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> object:
    monkeypatch.setattr(sys, "argv", ["salience", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_command(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    quick = ("quantize", wide, "--method", "rtn", "--scheme", "w4g128", "--json", "-o")
    assert run(monkeypatch, *quick, tmp_path / "one") == 0
    stdout, stderr = capfd.readouterr()
    assert (json.loads(stdout)["serving"], stderr) == ([], "")
    # 384 / 2 is no multiple of 128.
    assert run(monkeypatch, *quick, tmp_path / "two", "--tensor-parallel", 2) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.count("\n") == 1 and not (tmp_path / "two").exists()
    for words in ("error: ", "layers.0.mlp.down_proj", "use a group size of 64", "on each of 2"):
        assert words in stderr
    assert run(monkeypatch, *quick, tmp_path / "slow", "--tensor-parallel", 1) == 0
    capfd.readouterr()
    assert run(monkeypatch, "inspect", tmp_path / "one", "--tensor-parallel", 2) == 0
    stdout, _ = capfd.readouterr()
    assert (
        stdout.count("vLLM and SGLang would refuse 2 linears (model.layers.*.mlp.down_proj)") == 1
    )
    assert run(monkeypatch, "inspect", tmp_path / "one", "--json", "--tensor-parallel", 2) == 0
    found = json.loads(capfd.readouterr()[0])["serving"]
    assert {each["linear"].rpartition(".")[2] for each in found} >= {"down_proj"}
    assert {each["runtime"] for each in found} == {"vllm", "sglang"}


def test_warnings_are_lines_and_in_the_report(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "rtn", "--scheme", "w4g32", "-o", tmp_path / "out")
    assert run(monkeypatch, "quantize", llama, *options) == 0
    stderr = capfd.readouterr()[1]
    assert stderr.count("\n") == 1 and stderr.startswith("warning: vLLM and SGLang would take 9 ")
    stored = read_report(tmp_path / "out").serving
    assert len(stored) == 2 * 9 and {each["severity"] for each in stored} == {"warn"}
    looked = inspect(open_source(str(tmp_path / "out"))).serving
    assert [vars_of(each) for each in looked] == stored


def vars_of(finding: Finding) -> dict[str, str]:
    return {name: getattr(finding, name) for name in Finding.__slots__}


def test_wrong_number_of_gpus(llama: Path, tmp_path: Path) -> None:
    refuse(
        lambda: salience.quantize(str(llama), tmp_path / "out", scheme="w4g32", tensor_parallel=0),
        "--tensor-parallel is 0",
    )


# The tables of the documentation.

WORDS = {"yes": "yes", "warn": "in part", "refuse": "no"}
SCHEMES = (
    *(("awq", s) for s in ("w4g128", "w4g64", "w4g32", "w4g16", "w4channel")),
    *(("compressed-tensors", s) for s in ("w4g128", "w4g128-sym", "w4g16-sym", "w4channel-sym")),
    *(("compressed-tensors", s) for s in ("w8g128-sym", "w8g128", "w3g128-sym", "w3g128")),
    *(("gptq", s) for s in ("w4g128-sym", "w8g128-sym", "w4g128", "w3g128-sym")),
    ("bitsandbytes", "nf4"),
)
MODELS = (
    ("Llama-3-8B", shapes_of(4096, 14336, 1024), 8),
    ("Qwen2.5-7B", shapes_of(3584, 18944, 512), 4),
    ("Qwen2-72B", shapes_of(8192, 29568, 1024), 8),
    ("Qwen2-72B, `--pad-intermediate 1024`", shapes_of(8192, 29696, 1024), 8),
    ("Qwen2.5-0.5B", shapes_of(896, 4864, 128), 2),
    ("SmolLM2-135M", shapes_of(576, 1536, 192), 3),
)


def tables() -> str:
    """Formats and schemes on shapes that fit, and shapes of models."""
    lines = ["| format | scheme | vLLM | SGLang | why not |", "|---|---|---|---|---|"]
    for format, scheme in SCHEMES:
        found = findings(served(format, scheme, shapes_of(4096, 14336, 1024)))
        verdict = " | ".join(WORDS[each] for each in verdicts(found))
        why = "; ".join(dict.fromkeys(each.problem for each in found))
        lines.append(f"| {format} | {scheme} | {verdict} | {why} |")
    for title, format, scheme in (
        ("awq, w4g128", "awq", "w4g128"),
        ("awq, w4g64", "awq", "w4g64"),
        ("compressed-tensors, w4g64", "compressed-tensors", "w4g64"),
    ):
        head = "| vLLM / SGLang, on | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |"
        lines += ["", f"**{title}**", "", head, "|---|---|---|---|---|"]
        for name, shapes, kv_heads in MODELS:
            cells = []
            for gpus in (1, 2, 4, 8):
                if any(columns % Scheme.parse(scheme).group_size for _, columns in shapes.values()):
                    cells.append("group size")
                    continue
                found = findings(served(format, scheme, shapes, kv_heads=kv_heads), gpus)
                said = [WORDS[each] for each in verdicts(found)]
                cells.append(" / ".join(dict.fromkeys(said)))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_committed_tables_are_what_the_rules_say() -> None:
    assert TABLE.read_text(encoding="utf-8").partition(BEGIN)[2] == tables()


if __name__ == "__main__":
    text = TABLE.read_text(encoding="utf-8").partition(BEGIN)[0] if TABLE.is_file() else ""
    TABLE.write_text(text + BEGIN + tables(), encoding="utf-8")
    sys.stderr.write(f"wrote {TABLE}\n")
