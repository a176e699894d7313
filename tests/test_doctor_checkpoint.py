"""`doctor PATH`: each check fails on a checkpoint that is broken so, and on no good one."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import salience
from helpers_awq import repacked
from helpers_checkpoint import refuse
from salience.calibration import Calibration
from salience.cli.app import main
from salience.doctor import weights
from salience.doctor.checkpoint import Checkup, examine
from salience.doctor.complaint import Complaint, sorted_complaints
from salience.doctor.runtimes import mends
from salience.doctor.texts import end_complaints, generation_complaints
from salience.doctor.weights import kept_complaints, saturation_limit, weight_complaints
from salience.grid import quantize
from salience.modules import codable
from salience.qtensor import QTensor
from salience.scheme import Scheme
from salience.source import open_source
from tiny_architectures import COMMON, architecture
from tiny_models import TEXT, llama_config, make_model, make_tokenizer, save

LINEAR = "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
# Format to (method, scheme); for those that are only read, what the config of AWQ says beside.
WAYS = {
    "awq": ("rtn", "w4g32"),
    "compressed-tensors": ("rtn", "w3g32"),
    "gptq": ("rtn", "w4g32-sym"),
    "gguf": ("rtn", "w4g32"),
    "bitsandbytes": ("nf4", "nf4"),
    "bitsandbytes-int8": ("rtn", "w8channel-sym"),
}
ORDERED = "gptq in activation order"
REPACKED = {
    "gemv": {"version": "gemv"},
    "gemv_fast": {"version": "gemv_fast"},
    "llm-awq": {"version": "gemv", "backend": "llm-awq"},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, float and in each format."""
    folder = tmp_path_factory.mktemp("doctor")
    found = {"dense": save(make_model(llama_config(num_hidden_layers=2)), folder / "dense")}
    for format, (method, scheme) in WAYS.items():
        out = folder / format
        salience.quantize(str(found["dense"]), out, method=method, scheme=scheme, format=format)
        found[format] = out
    found[ORDERED] = folder / "ordered"
    text = folder / "text.txt"
    text.write_text(TEXT[:20_000])
    salience.quantize(
        str(found["dense"]),
        found[ORDERED],
        method="gptq",
        scheme="w4g32",
        format="gptq",
        act_order=True,
        calibration=Calibration(str(text), samples=2, seqlen=32),
    )
    for kind, changes in REPACKED.items():
        found[kind] = out = folder / kind
        tensors = repacked(found["awq"], out, kind)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        quantization = json.loads((out / "config.json").read_text())["quantization_config"]
        change_json(out, "config.json", quantization_config=quantization | changes)
    return found


@pytest.fixture
def awq(good: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good["awq"], tmp_path / "awq"))


def checkup(folder: Path, run: bool = False) -> Checkup:
    return examine(open_source(str(folder)), run=run)


def change(folder: Path, name: str, to: Callable[[Tensor], Tensor | None]) -> None:
    """Replace a tensor of a checkpoint, or take it out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    value = to(tensors.pop(name))
    if value is not None:
        tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(values | changes))


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def to(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return to


def complaint(found: Checkup, *parts: str) -> Complaint:
    """The one complaint with all of these in its text."""
    texts = {
        each: f"{each.severity} {each.where} {each.problem} {each.mend}"
        for each in found.complaints
    }
    [only] = [each for each, text in texts.items() if all(part in text for part in parts)]
    return only


@pytest.mark.parametrize("format", ["dense", *WAYS, ORDERED, *REPACKED])
def test_a_good_one_gives_no_complaint(good: dict[str, Path], format: str) -> None:
    found = checkup(good[format], run=True)
    assert found.complaints == []
    assert found.healthy and found.linears == (0 if format == "dense" else 14)
    assert found.largest is not None and 0 < found.largest[0] < 8000
    assert found.verdicts[0].answer == "yes"
    assert found.bytes > 50_000


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMON)
def test_no_architecture_gives_a_false_alarm(name: str, tmp_path: Path) -> None:
    config = architecture(name)
    config.eos_token_id = 0
    source = save(make_model(config), tmp_path / "in")
    out = tmp_path / "out"
    salience.quantize(str(source), out, method="rtn", scheme="w4g16", format="compressed-tensors")
    for folder in (source, out):
        found = checkup(folder, run=True)
        assert [each for each in found.complaints if each.severity != "note"] == []


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_gives_no_false_alarm(smollm2: str) -> None:
    found = examine(open_source(smollm2))
    assert found.complaints == [] and found.format == "gguf"


@pytest.mark.parametrize(
    ("name", "to", "severity", "problem"),
    [
        (f"{LINEAR}.scales", filled(float("nan")), "error", "scales that are not finite"),
        (f"{LINEAR}.scales", filled(float("inf")), "error", "scales that are not finite"),
        (f"{LINEAR}.scales", filled(0.0), "error", "scales of 0"),
        (f"{LINEAR}.scales", lambda x: x * 1e-4, "warning", "below fp16's normal range"),
        (f"{LINEAR}.scales", filled(60000.0), "warning", "beyond fp16's range"),
        (f"{LINEAR}.qweight", torch.zeros_like, "error", "same code everywhere (0)"),
        (f"{LINEAR}.qweight", lambda x: x[:8], "error", "cannot be read"),
        (NORM, filled(float("nan")), "error", "values that are not finite"),
        (NORM, filled(float("-inf")), "error", "values that are not finite"),
        ("lm_head.weight", torch.zeros_like, "warning", "is all zeros"),
        (NORM, lambda x: None, "error", "is missing"),
        (NORM, lambda x: x[:8], "error", "is [8], the model wants [64]"),
        (f"{LINEAR}.qzeros", lambda x: None, "error", "cannot be read"),
    ],
)
def test_a_tensor_is_wrong(
    awq: Path, name: str, to: Callable[[Tensor], Tensor | None], severity: str, problem: str
) -> None:
    change(awq, name, to)
    found = checkup(awq)
    seen = complaint(found, severity, problem)
    assert any(name.startswith(where) for where in seen.where)
    assert seen.mend
    assert found.healthy == (severity != "error")
    assert [v.answer for v in found.verdicts if v.runtime == "salience"] == [
        "yes" if found.healthy else "no"
    ]
    assert found.complaints[0].severity == severity


def test_saturated_codes(awq: Path) -> None:
    """Codes of 0 and 15, a quarter of them something else."""

    def saturate(x: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 2, (*x.shape, 8), generator=random) * 15
        codes[..., ::4] = torch.randint(1, 15, codes[..., ::4].shape, generator=random)
        words = (codes << torch.arange(0, 32, 4)).sum(-1)
        return torch.where(words >= 2**31, words - 2**32, words).int()

    change(awq, f"{LINEAR}.qweight", saturate)
    found = checkup(awq)
    seen = complaint(found, "saturated codes", "salience eval")
    assert seen.severity == "warning" and seen.where[0].startswith(f"{LINEAR} (7")


@pytest.mark.parametrize("scheme", ["w3g32", "w4g16", "w4g128", "w4channel", "w8g64-sym", "nf4"])
def test_saturation_that_is_normal(scheme: str) -> None:
    """Of weights with heavier tails, and of weights without any."""
    kind = Scheme.parse(scheme)
    random = torch.Generator().manual_seed(1)
    size = (64, 1024)
    for weight in (
        torch.empty(size).exponential_(generator=random) * torch.randn(size, generator=random),
        torch.rand(size, generator=random) - 0.5,
    ):
        qt = quantize(weight, kind)
        assert list(weight_complaints("a", qt)) == []
        share = ((qt.q == 0) | (qt.q == kind.levels)).float().mean()
        assert share < saturation_limit(kind)
    assert saturation_limit(kind) < 0.6


def test_a_constant_weight_is_not_a_zero_one() -> None:
    scheme = Scheme(4, 32)
    like = quantize(torch.randn(8, 64), scheme)
    constant = torch.full_like(like.q, 9)
    zeros = torch.full_like(like.zeros, 9)
    [same] = weight_complaints("a", QTensor(constant, like.scales, like.zeros.clamp(max=8), scheme))
    assert same.severity == "error" and "same code everywhere (9)" in same.problem
    [none] = weight_complaints("a", QTensor(constant, like.scales, zeros, scheme))
    assert none.severity == "warning" and "all zeros" in none.problem


def test_codes_are_counted_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In activation order too, and of codebooks, where code 7 of NF4 is 0."""
    order = torch.randperm(64).int() // 32
    plain = quantize(torch.randn(8, 64), Scheme(4, 32))
    ordered = QTensor(plain.zeros[:, order.long()], plain.scales, plain.zeros, plain.scheme, order)
    seven = quantize(torch.randn(8, 64), Scheme.parse("nf4"))
    seven = QTensor(torch.full_like(seven.q, 7), seven.scales, seven.zeros, seven.scheme)
    for rows in (1, 3, 100):
        monkeypatch.setattr(weights, "_SOME_CODES", 64 * rows)
        counts, zero = weights._count(plain)
        assert counts.tolist() == [int((plain.q == code).sum()) for code in range(16)] and not zero
        for qt in (ordered, seven):
            [seen] = weight_complaints("a", qt)
            assert "all zeros" in seen.problem
    constant = QTensor(torch.full_like(seven.q, 3), seven.scales, seven.zeros, seven.scheme)
    [seen] = weight_complaints("a", constant)
    assert "same code everywhere (3)" in seen.problem


def test_towers_are_not_for_text() -> None:
    model = make_model(llama_config(num_hidden_layers=1))
    model.tower = torch.nn.Linear(64, 64)
    blocks = [name for name in codable(model) if name.startswith("model.layers.")]
    fine = dict.fromkeys([*blocks, "lm_head", "model.embed_tokens"])
    assert list(kept_complaints(model, fine)) == []  # type: ignore[arg-type]
    [seen] = kept_complaints(model, fine | {"tower": None})  # type: ignore[arg-type]
    assert seen.where == ("tower",) and seen.severity == "warning"
    [noted] = kept_complaints(model, dict.fromkeys(blocks[1:]))  # type: ignore[arg-type]
    assert noted.where == (blocks[0],) and noted.severity == "note"


def test_extra_tensors(awq: Path) -> None:
    file = awq / "model.safetensors"
    tensors = load_file(file)
    more = {
        "model.mtp.weight": torch.ones(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.7.mlp.up_proj.qweight": torch.ones(2, 2, dtype=torch.int32),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(64),
    }
    save_file(tensors | more, file, metadata={"format": "pt"})
    found = checkup(awq)
    assert complaint(found, "belongs to no linear").where == ("model.layers.7.mlp.up_proj.qweight",)
    assert "has no bias" in complaint(found, "error", "has no place").problem
    noted = complaint(found, "note", "in the files and not in the model").where
    assert "model.mtp.weight" in noted and not any("inv_freq" in name for name in noted)


def test_a_config_that_says_quantized_and_is_not(good: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["dense"], tmp_path / "dense"))
    config = json.loads((good["awq"] / "config.json").read_text())["quantization_config"]
    change_json(folder, "config.json", quantization_config=config)
    assert complaint(checkup(folder), "error", "no linear is").where == ("config.json",)


def test_float_linears_are_noted(good: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    salience.quantize(
        str(good["dense"]), out, method="rtn", scheme="w4g32", skip=["layers.0.*down_proj"]
    )
    found = checkup(out)
    assert complaint(found, "note", "is float among").where == ("model.layers.0.mlp.down_proj",)
    assert found.healthy and len(found.complaints) == 1


def test_weights_beyond_fp16(good: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["dense"], tmp_path / "dense"))
    change(folder, NORM, filled(70000.0))
    seen = complaint(checkup(folder), "warning", "beyond fp16's range")
    assert seen.where == (NORM,) and "bfloat16" in seen.mend


@pytest.mark.parametrize(("by", "word"), [(500.0, "may overflow"), (1e6, "overflows")])
def test_activations_beyond_fp16(
    good: dict[str, Path], tmp_path: Path, by: float, word: str
) -> None:
    folder = Path(shutil.copytree(good["dense"], tmp_path / "dense"))
    change(folder, f"{LINEAR}.weight", lambda x: x * by / x.abs().max())
    if word == "may overflow":
        most = checkup(folder, run=True).largest
        assert most is not None
        change(folder, f"{LINEAR}.weight", lambda x: x * 30000 / most[0])
    found = checkup(folder, run=True)
    assert found.largest is not None and found.largest[0] > 8188
    seen = complaint(found, "warning", word)
    assert seen.where == (found.largest[1],) and found.healthy
    assert checkup(folder).largest is None


def test_activations_that_are_not_finite(good: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["dense"], tmp_path / "dense"))
    change(folder, f"{LINEAR}.weight", lambda x: x * 1e30)
    change(folder, "model.layers.0.mlp.down_proj.weight", lambda x: x * 1e30)
    found = checkup(folder, run=True)
    assert found.largest is None and not found.healthy
    assert complaint(found, "error", "not finite, in fp32").where[0].startswith("model.layers.0")


@pytest.mark.parametrize(
    ("values", "severity", "problem"),
    [
        ({"temperature": -1}, "error", "temperature of -1"),
        ({"top_p": "high"}, "error", "top_p of 'high'"),
        ({"min_p": 2}, "error", "min_p of 2"),
        ({"do_sample": False, "temperature": 0.6}, "note", "do_sample false"),
    ],
)
def test_generation_config(awq: Path, values: dict[str, Any], severity: str, problem: str) -> None:
    change_json(awq, "generation_config.json", **values)
    [seen] = checkup(awq).complaints
    assert seen.severity == severity and problem in seen.problem
    fine = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "min_p": 0.0}
    assert list(generation_complaints(fine)) == []


def test_generation_config_that_is_no_json(awq: Path) -> None:
    (awq / "generation_config.json").write_text("{")
    assert "JSON" in complaint(checkup(awq), "error", "generation_config.json").problem


def test_ends_of_text(awq: Path) -> None:
    change_json(awq, "generation_config.json", eos_token_id=[5, 7])
    seen = complaint(checkup(awq), "warning", "may not stop")
    assert "[5, 7]" in seen.problem and "add 0" in seen.mend
    change_json(awq, "generation_config.json", eos_token_id=[0, 4000])
    assert "4000" in complaint(checkup(awq), "error", "ends a text by").problem
    tokenizer = make_tokenizer()
    assert list(end_complaints({0}, tokenizer, 320)) == []
    tokenizer.eos_token = None
    [none] = end_complaints(set(), tokenizer, 320)
    assert none.severity == "warning" and "longest" in none.problem
    assert list(end_complaints({0}, None, 320)) == []


def test_a_vocabulary_of_another_model() -> None:
    tokenizer = make_tokenizer()
    [seen] = end_complaints({0}, tokenizer, 300)
    assert seen.severity == "error" and "300 embeddings" in seen.problem
    tokenizer.add_tokens(["<|new|>"])
    [noted] = end_complaints({0}, tokenizer, 320)
    assert noted.severity == "note" and "<|new|>" in noted.problem


def test_no_tokenizer(awq: Path) -> None:
    for file in awq.glob("tokenizer*"):
        file.unlink()
    assert "float model" in complaint(checkup(awq), "error", "tokenizer").mend


@pytest.mark.parametrize(
    ("template", "severity", "problem"),
    [
        ("{{ messages[7].content }", "error", "does not work"),
        ("{{ raise_exception('no') }}", "error", "does not work (no)"),
        ("<|im_start|>{{ messages[0].content }}", "warning", "<|im_start|>"),
    ],
)
def test_chat_template(awq: Path, template: str, severity: str, problem: str) -> None:
    for file in awq.glob("chat_template*"):
        file.unlink()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(awq)
    [seen] = checkup(awq).complaints
    assert seen.severity == severity and problem in seen.problem


def test_no_chat_template(awq: Path) -> None:
    for file in awq.glob("chat_template*"):
        file.unlink()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(awq)
    [seen] = checkup(awq).complaints
    assert (seen.severity, seen.where) == ("note", ("chat template",))


def test_what_readers_say(good: dict[str, Path]) -> None:
    def answers(format: str) -> dict[str, str]:
        return {each.runtime: each.answer for each in checkup(good[format]).verdicts}

    assert answers("dense")["vLLM"] == "yes"
    assert answers("bitsandbytes")["vLLM"] == "no"
    assert answers("gemv")["SGLang"] == "no"
    assert answers("gguf")["llama.cpp"] == "yes"
    assert answers(ORDERED)["vLLM"] == "no"
    assert answers("compressed-tensors")["SGLang"] == "no"  # 3 bits
    found = {each.runtime: each for each in checkup(good["bitsandbytes"]).verdicts}
    assert "quantize the float model" in found["llama.cpp"].lines[0]
    three = examine(open_source(str(good["awq"])), tensor_parallel=3)
    vllm = {each.runtime: each for each in three.verdicts}["vLLM"]
    assert vllm.answer == "no" and "4 heads" in vllm.lines[0]


def test_mends_for_the_usual_complaints(good: dict[str, Path]) -> None:
    found = checkup(good["compressed-tensors"]).mends
    assert list(found) == ["out of memory", "accuracy gone", "does not load", "slow"]
    assert "w3g32" in found["slow"] and "no fast kernel" in found["slow"]
    assert "no fast kernel" not in checkup(good["awq"]).mends["slow"]
    assert "takes a quarter" in checkup(good["dense"]).mends["out of memory"]
    bad = [Complaint("error", ("a",), "b", "c")]
    assert "said above" in dict(mends("x", "awq", None, 1, bad))["accuracy gone"]


def test_complaints_of_one_problem_are_one() -> None:
    found = sorted_complaints(
        [
            Complaint("note", ("a",), "p", "m"),
            Complaint("error", ("b",), "q", "m"),
            Complaint("note", ("c",), "p", "m"),
        ]
    )
    assert [(each.severity, each.where) for each in found] == [
        ("error", ("b",)),
        ("note", ("a", "c")),
    ]


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["salience", "doctor", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_command(
    awq: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = command(monkeypatch, capsys, awq, "--run")
    assert status == 0 and "nothing is wrong with it" in out
    assert "largest activation" in out and "out of memory" in out
    assert len(out.splitlines()) < 30
    change(awq, NORM, filled(float("nan")))
    status, out, err = command(monkeypatch, capsys, awq)
    assert status == 1 and f"error: {NORM}: has values" in out and err == ""
    status, out, _ = command(monkeypatch, capsys, awq, "--json")
    values = json.loads(out)
    assert status == 1 and values["healthy"] is False
    assert values["complaints"][0]["severity"] == "error"
    assert {"name", "format", "linears", "bytes", "verdicts", "mends", "largest"} < values.keys()


def test_what_cannot_be_read_is_one_line(
    awq: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (awq / "config.json").write_text("{")
    status, out, err = command(monkeypatch, capsys, awq)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    file = awq / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refuse(lambda: checkup(awq), file)
