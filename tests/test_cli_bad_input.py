"""The command on bad input: one clear line on stderr, exit 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import salience.pipeline.engine
from helpers_bad import QUICK, save_llama
from salience.calibration import Calibration
from salience.checkpoint import INDEX_NAME
from salience.cli.app import main
from workshop import Workshop, without_warnings

Run = Callable[..., str]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("bad") / "llama")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A good tiny model, to be broken."""
    return Path(shutil.copytree(pristine, tmp_path / "llama"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the checkpoint must not appear, in a folder of its own."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], out: Path) -> Run:
    """Run the command in this process; returns the one line it must end with."""

    def run(*args: object, status: int = 2) -> str:
        before = sorted(out.parent.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["salience", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", None)  # nothing is piped in
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        stdout, said = capfd.readouterr()
        stderr = without_warnings(said)
        assert stderr.startswith("error: ") and stderr.endswith("\n")
        assert stderr.count("\n") == 1
        assert stdout == ""
        assert stop.value.code == status
        assert sorted(out.parent.rglob("*")) == before
        return stderr

    return run


@pytest.fixture
def refuse_partly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], out: Path
) -> Run:
    """As `refuse`, of what can be continued: OUT.partial is left, and nothing else."""

    def run(*args: object, status: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["salience", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        stdout, said = capfd.readouterr()
        stderr = without_warnings(said)
        assert stderr.startswith("error: ") and stderr.count("\n") == 1
        assert (stdout, stop.value.code) == ("", status)
        assert [path.name for path in out.parent.iterdir()] == [f"{out.name}.partial"]
        return stderr

    return run


@pytest.fixture
def quantize(refuse: Run, model: Path, out: Path) -> Run:
    """`salience quantize` of the model, quick options first, refused."""
    return lambda *args, **kw: refuse("quantize", model, "-o", out, *QUICK, *args, **kw)


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (model / "config.json").write_text(json.dumps(kept))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_the_model_is_good(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: Path, out: Path
) -> None:
    """What the tests below break does work; stderr off a terminal holds warnings at most."""
    argv = ["salience", "quantize", str(model), "-o", str(out), *QUICK, "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        main()
    stdout, stderr = capfd.readouterr()
    assert (stop.value.code, without_warnings(stderr)) == (0, "")
    assert json.loads(stdout)["out"] == str(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# Schemes.


def test_group_size_that_does_not_divide(quantize: Run) -> None:
    line = quantize("--scheme", "w4g128")
    assert "group size 128 does not divide the 64 inputs of model.layers.0." in line
    assert line.endswith("schemes that fit this model: w4g64, w4g32, w4g16\n")


def test_group_size_is_refused_before_any_weight_is_read(quantize: Run, model: Path) -> None:
    """The weights are not numbers, and nobody has looked."""
    edit_weights(model, lambda tensors: tensors[WEIGHT].fill_(torch.nan))
    assert "does not divide" in quantize("--scheme", "w4g48")
    assert "not finite" in quantize()


def test_no_group_size_fits(refuse: Run, tmp_path: Path, out: Path) -> None:
    odd = save_llama(tmp_path / "odd", hidden_size=80, intermediate_size=88)
    line = refuse("quantize", odd, "-o", out, "--scheme", "w4g32")
    assert "schemes that fit this model: none of the usual ones" in line


@pytest.mark.parametrize("scheme", ["w4", "int4", "w9g32", "w4g0", "", "w4g32 "])
def test_unknown_scheme(quantize: Run, refuse: Run, model: Path, scheme: str) -> None:
    assert f"scheme {scheme!r} is not understood" in quantize("--scheme", scheme)
    assert f"scheme {scheme!r} is not understood" in refuse("plan", model, "--scheme", scheme)


def test_scheme_the_format_does_not_hold(quantize: Run) -> None:
    line = quantize("--format", "awq", "--scheme", "w3g32")
    assert "--format awq holds 4-bit codes, not w3g32 as model.layers.0." in line
    assert line.endswith("wants; use --scheme w4g32, or --format compressed-tensors\n")
    assert "w4channel does not fit linears of different widths" in quantize("--scheme", "w4channel")


def test_outputs_that_the_format_cannot_pack(refuse: Run, tmp_path: Path, out: Path) -> None:
    odd = save_llama(tmp_path / "odd", intermediate_size=132)
    line = refuse("quantize", odd, "-o", out, *QUICK, "--scheme", "w4g4")
    assert "packs 8 outputs a word and model.layers.0.mlp.gate_proj has 132" in line


def test_plan_refuses_the_same(refuse: Run, model: Path) -> None:
    assert "does not divide" in refuse("plan", model, "--scheme", "w4g128")
    assert "w3g32" in refuse("plan", model, "--scheme", "w3g32")
    edit_weights(model, lambda tensors: tensors.pop(WEIGHT))
    assert WEIGHT in refuse("plan", model, "--scheme", "w4g32")


# Files of the model.


def test_model_that_does_not_exist(refuse: Run, tmp_path: Path, out: Path) -> None:
    for name in (tmp_path / "nowhere", "nowhere", "./no/where", tmp_path / "nowhere.gguf"):
        assert str(name) in refuse("quantize", name, "-o", out)
        assert str(name) in refuse("inspect", name)
        assert str(name) in refuse("chat", name, "--prompt", "hello")


def test_model_that_is_a_file(refuse: Run, model: Path, out: Path) -> None:
    line = refuse("quantize", model / "model.safetensors", "-o", out)
    assert "neither a model folder nor a .gguf file" in line


def test_folder_without_config(quantize: Run, model: Path) -> None:
    (model / "config.json").unlink()
    assert f"{model} has no config.json" in quantize()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": ', "\x00"])
def test_garbage_config(quantize: Run, model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert str(model / "config.json") in quantize()


def test_unknown_architecture(quantize: Run, model: Path) -> None:
    edit_config(model, model_type="from_the_future")
    assert "does not know the architecture 'from_the_future'" in quantize()
    edit_config(model, model_type=...)
    assert "has no model_type" in quantize()
    edit_config(model, model_type="vit")  # known, and no language model
    assert "AutoModelForCausalLM" in quantize()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "abc"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_act": "nope"},
        {"num_hidden_layers": 0},
        {"model_type": ["llama"]},
        {"dtype": "nope"},
        {"quantization_config": [1]},
    ],
    ids=str,
)
def test_config_that_makes_no_model(quantize: Run, model: Path, changes: dict[str, Any]) -> None:
    edit_config(model, **changes)
    assert "Traceback" not in quantize()


def test_remote_code_is_not_run(quantize: Run, model: Path, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit_config(model, model_type="mine", auto_map=auto_map)
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert f"{model} brings its own Python code; read it, then pass --trust-remote-code" in (
        quantize()
    )
    assert not (tmp_path / "ran").exists()


def test_missing_shard(quantize: Run, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, model / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (model / "model-2.safetensors").unlink()
    assert f"shard {model / 'model-2.safetensors'} is missing" in quantize()


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_safetensors(quantize: Run, model: Path, length: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    line = quantize()
    assert f"{file} is truncated or no safetensors file" in line
    assert "download it again" in line


def test_unknown_dtype(quantize: Run, model: Path) -> None:
    edit_weights(model, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)}))
    assert f"tensor {WEIGHT} of {model / 'model.safetensors'} has dtype F8_E4M3" in quantize()


@pytest.mark.parametrize("method", ["awq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite(
    quantize: Run, model: Path, method: str, value: float, name: str
) -> None:
    edit_weights(model, lambda tensors: tensors[name].flatten()[-1:].fill_(value))
    line = quantize("--method", method)
    assert f"tensor {name} of {model} has values that are not finite" in line


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_weights_that_fp16_does_not_hold(quantize: Run, model: Path, method: str) -> None:
    edit_weights(model, lambda tensors: tensors["lm_head.weight"].mul_(1e8))
    assert "tensor lm_head.weight overflows fp16" in quantize("--method", method)
    edit_weights(model, lambda tensors: tensors[WEIGHT].mul_(1e9))
    assert f"{WEIGHT.removesuffix('.weight')}: a group's range" in quantize("--method", method)


def test_missing_tensor(quantize: Run, model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop(WEIGHT))
    assert f"tensor {WEIGHT} is missing from {model}" in quantize()


@pytest.mark.parametrize("method", ["awq", "rtn"])
@pytest.mark.parametrize("changes", [{"intermediate_size": 192}, {"vocab_size": 300}], ids=str)
def test_config_of_another_model(
    quantize: Run, model: Path, method: str, changes: dict[str, Any]
) -> None:
    edit_config(model, **changes)
    assert "the model wants [" in quantize("--method", method)


def test_model_that_is_quantized_already(quantize: Run, model: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    edit_config(model, quantization_config=config)
    assert "is quantized already" in quantize()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}'])
def test_garbage_tokenizer(quantize: Run, model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    assert f"{model} has no usable tokenizer" in quantize()


def test_no_tokenizer(quantize: Run, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert f"{model} has no usable tokenizer" in quantize()


def write_gguf(path: Path, arch: str) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", numpy.zeros((4, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(refuse: Run, tmp_path: Path, out: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "from_the_future")
    assert "from_the_future" in refuse("quantize", path, "-o", out)
    data = path.read_bytes()
    for bad in (data[:-1], data[:40], b"", b"not a GGUF file"):
        path.write_bytes(bad)
        assert f"{path} is truncated" in refuse("quantize", path, "-o", out)


# The output folder.


def test_output_that_is_taken(quantize: Run, out: Path) -> None:
    out.mkdir()
    (out / "theirs").write_text("keep me")
    assert f"output {out} exists and is not an empty folder" in quantize()
    assert (out / "theirs").read_text() == "keep me"


def test_output_that_is_a_file(quantize: Run, out: Path) -> None:
    out.write_text("keep me")
    assert f"output {out} exists and is not an empty folder" in quantize()
    assert out.read_text() == "keep me"


def test_output_below_a_file(refuse: Run, model: Path, out: Path) -> None:
    out.write_text("keep me")
    line = refuse("quantize", model, "-o", out / "deeper", *QUICK)
    assert f"cannot write to {out}" in line


def test_output_is_checked_first(refuse: Run, out: Path) -> None:
    """Before anything is fetched from the Hub."""
    out.write_text("keep me")
    assert "exists" in refuse("quantize", "owner/model", "-o", out)


def test_output_that_cannot_be_made(
    quantize: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: Path, *_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    assert f"cannot write to {out}.partial: Permission denied" in quantize()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_that_may_not_be_written(quantize: Run, out: Path) -> None:
    out.parent.chmod(0o555)
    try:
        assert f"cannot write to {out}.partial: Permission denied" in quantize()
    finally:
        out.parent.chmod(0o755)


def test_no_disk_space(quantize: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr("salience.machine.shutil.disk_usage", lambda _path: usage)
    line = quantize()
    assert f"the disk of {out} has 0 MiB free and the work needs" in line


def test_plan_without_disk_space(
    model: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A plan is no error: it says what is short, and exits with 3."""
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr("salience.machine.shutil.disk_usage", lambda _path: usage)
    argv = ["salience", "plan", str(model), "--scheme", "w4g32", "-o", str(out), "--json"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        main()
    stdout, stderr = capfd.readouterr()
    assert (stop.value.code, stderr) == (3, "")
    result = json.loads(stdout)
    assert result["fits"] is False
    assert any(f"the disk of {out} is short" in line for line in result["advice"])


def test_disk_that_fills_up_at_the_last_files(
    refuse_partly: Run, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done is kept, and the same command goes on when there is room."""

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        line = refuse_partly("quantize", model, "-o", out, *QUICK)
    assert f"writing {out}.partial/final failed: [Errno 28] No space left on device" in line
    goes_on(monkeypatch, model, out)


def goes_on(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path) -> None:
    """The same command ends well, and does no block again."""
    solve = salience.pipeline.engine.solve
    with monkeypatch.context() as patch:
        patch.setattr(
            salience.pipeline.engine, "solve", lambda *_args: pytest.fail("a block again")
        )
        patch.setattr(sys, "argv", ["salience", "quantize", str(model), "-o", str(out), *QUICK])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code and salience.pipeline.engine.solve is solve
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def interrupted(*_args: object) -> None:
    raise KeyboardInterrupt


def test_interrupt(
    model: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["salience", "quantize", str(model), "-o", str(out), *QUICK])
    with monkeypatch.context() as patch:
        patch.setattr("salience.pipeline.quantize.assemble", interrupted)
        with pytest.raises(SystemExit) as end:
            main()
    stdout, stderr = capfd.readouterr()
    assert (end.value.code, stdout) == (130, "")
    said = without_warnings(stderr)
    assert said == "interrupted; what can be continued goes on with the same command\n"
    assert [path.name for path in out.parent.iterdir()] == ["out.partial"]
    goes_on(monkeypatch, model, out)


def test_another_command_does_not_go_on(
    model: Path,
    out: Path,
    refuse_partly: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("salience.pipeline.quantize.assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            salience.quantize(
                str(model), out, scheme="w4g32", calibration=Calibration(samples=2, seqlen=16)
            )
    line = refuse_partly("quantize", model, "-o", out, *QUICK, "--scheme", "w4g64")
    assert f"{out}.partial was begun with --scheme w4g32, now it is w4g64; use that, or d" in line
    line = refuse_partly("quantize", model, "-o", out, *QUICK, "--method", "gptq")
    assert f"{out}.partial was begun with --method awq, now it is gptq" in line
    goes_on(monkeypatch, model, out)


# Recipes, memory, searches.


@pytest.mark.parametrize("rule", ["mlp", "", "w4g32"])
def test_rule_without_a_scheme(quantize: Run, refuse: Run, model: Path, rule: str) -> None:
    for line in (quantize("--rule", rule), refuse("plan", model, "--rule", rule)):
        assert f'--rule {rule!r} is not understood; write it "REGEX=SCHEME"' in line


def test_rules(quantize: Run, refuse: Run, model: Path) -> None:
    assert "scheme 'w4' is not understood" in quantize("--rule", "mlp=w4")
    assert "scheme '' is not understood" in quantize("--rule", "mlp=")
    assert "pattern '(' is no regular expression" in quantize("--rule", "(=w4g32")
    assert "pattern 'norm' matches no linear of the model" in quantize("--rule", "norm=w4g32")
    line = quantize("--rule", "mlp=w4g64")
    assert "--format awq stores one scheme for all linears, not w4g32 and w4g64" in line
    line = quantize("--rule", "o_proj=w8g32")
    assert "--format awq holds 4-bit codes, not w8g32 as model.layers.0.self_attn.o_proj" in line
    line = quantize("--format", "compressed-tensors", "--rule", "down_proj=w8g256")
    assert "group size 256 does not divide the 128 inputs of model.layers.0.mlp.down_proj" in line
    line = refuse("plan", model, "--scheme", "w4g32", "--rule", "norm=w4g32")
    assert "pattern 'norm' matches no linear of the model" in line


@pytest.mark.parametrize("option", ["--skip", "--only"])
def test_patterns(quantize: Run, refuse: Run, model: Path, option: str) -> None:
    assert "pattern '[' is no regular expression" in quantize(option, "[")
    assert "pattern 'q_prj' matches no linear of the model" in quantize(option, "q_prj")
    line = refuse("plan", model, "--scheme", "w4g32", option, "q_prj")
    assert "pattern 'q_prj' matches no linear of the model" in line
    assert "leave no linear to quantize" in quantize("--skip", "", "--only", "mlp")


@pytest.mark.parametrize("size", ["", "8", "GiB", "-1GiB", "0GB", "eight GiB", "8 bytes", "1e3MB"])
def test_memory_that_is_no_size(quantize: Run, refuse: Run, model: Path, size: str) -> None:
    for line in (
        quantize(f"--max-memory={size}"),
        refuse("plan", model, "--scheme", "w4g32", f"--max-memory={size}"),
    ):
        assert f"size {size!r} is not understood; write it like 8GiB or 500MB" in line


def test_memory_that_does_not_suffice(quantize: Run) -> None:
    line = quantize("--max-memory", "1MiB", status=3)
    assert "GiB on cpu and has 0.0 GiB; use a shorter --seqlen, --method rtn or a larger" in line
    line = quantize("--max-memory", "1 mb", "--method", "rtn", status=3)
    assert "use --method rtn or a larger --max-memory" in line


def test_efforts_and_methods(quantize: Run) -> None:
    for method in ("gptq", "rtn", "nf4"):
        line = quantize("--effort", "balanced", "--method", method)
        assert f"--effort balanced is for --method awq, not {method}" in line
    assert "--act-order is for --method gptq, not awq" in quantize("--act-order")
    line = quantize("--act-order", "--method", "gptq", "--format", "awq")
    assert "--format awq has no place for the groups of --act-order" in line
    assert "--method awq makes no nf4; use --method nf4" in quantize("--scheme", "nf4")
    assert "--method nf4 makes no w4g32; use --scheme nf4" in quantize("--method", "nf4")
    assert "finest" in quantize("--effort", "finest")
    assert "magic" in quantize("--method", "magic")
    line = quantize("--method", "nf4", "--scheme", "nf4", "--format", "awq")
    assert "--format awq holds 4-bit codes, not nf4" in line and "--format bitsandbytes" in line
    assert "--format bitsandbytes holds nf4 and fp4, not w4g32" in quantize(
        "--format", "bitsandbytes"
    )


def test_search_files(quantize: Run, model: Path, out: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    assert f"search file {there} does not exist" in quantize("--from-search", there)
    there.write_bytes(b"nonsense")
    line = quantize("--from-search", there)
    assert f"{there} is damaged or no search file" in line
    line = quantize("--from-search", model / "model.safetensors")
    assert "model.safetensors is no search file; make one with --save-search" in line
    assert f"{there} exists; name another file" in quantize("--save-search", there)
    nowhere = tmp_path / "no" / "x"
    assert f"the folder of {nowhere} does not exist; make it first" in (
        quantize("--save-search", nowhere)
    )
    for text in (b"", b"nonsense", b"\x80\x02K\x01."):
        (tmp_path / "theirs.pt").write_bytes(text)
        line = quantize("--from-search", tmp_path / "theirs.pt")
        assert f"{tmp_path / 'theirs.pt'} is " in line
        assert "no search result of llm-awq" in line or "damaged" in line


# Calibration.


def test_calibration_that_is_too_short(quantize: Run, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("0123456789")  # one token a byte
    line = quantize("--calibration", text)
    assert f"{text} has 10 tokens, 22 too few for 2 samples of 16" in line
    text.write_text("")
    assert "has 0 tokens, 32 too few" in quantize("--calibration", text)


@pytest.mark.parametrize(
    "second", ['{"words": "x"}', "[1]", "7", "null", "{", "plain text", '{"text": "x"'], ids=str
)
def test_jsonl_without_text(quantize: Run, tmp_path: Path, second: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a good row"}}\n{second}\n')
    line = quantize("--calibration", path)
    assert f'{path} line 2 is no JSON object with a "text"' in line


def test_jsonl_that_is_no_text(quantize: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n")
    assert str(path) in quantize("--calibration", path)


def test_calibration_that_is_no_file(quantize: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    line = quantize("--calibration", "no/such-text")
    assert "no/such-text is no file; for a Hub dataset, pip install datasets" in line


def test_calibration_that_the_hub_does_not_give(
    quantize: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'no/such-text' on the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    line = quantize("--calibration", "no/such-text")
    assert "no/such-text is no file and no dataset: Couldn't reach" in line
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_kwargs: [{"words": "x"}])
    line = quantize("--calibration", "no/such-text")
    assert 'dataset no/such-text has no "text" column' in line


# Devices, kernels, texts and prompts.


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "meta", "nonsense", ""])
def test_device(
    quantize: Run, refuse: Run, model: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for line in (
        quantize("--device", device),
        refuse("eval", model, "--device", device),
        refuse("chat", model, "--prompt", "hello", "--device", device),
        refuse("plan", model, "--scheme", "w4g32", "--device", device),
    ):
        assert f"device {device}" in line or f"device {device!r}" in line


def test_kernel(refuse: Run, model: Path) -> None:
    """Also for a float model, which needs none."""
    for command in (("eval", model), ("chat", model, "--prompt", "hello")):
        line = refuse(*command, "--kernel", "nonsense")
        assert "there is no kernel 'nonsense'; use auto or one of" in line


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_empty_prompt(refuse: Run, model: Path, prompt: str) -> None:
    assert "the prompt is empty" in refuse("chat", model, "--prompt", prompt)


def test_text_to_evaluate(refuse: Run, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    assert f"text {text} does not exist" in refuse("eval", model, "--text", text)
    text.write_text("0123456789")
    line = refuse("eval", model, "--text", text, "--context", 11)
    assert "the text has 10 tokens, fewer than one chunk of 11" in line


def test_checkpoint_that_is_not_read(refuse: Run, model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "magic", "bits": 4})
    for command in (("eval",), ("chat", "--prompt", "hello"), ("inspect",)):
        line = refuse(command[0], model, *command[1:])
        assert "'quant_method': 'magic'" in line and "it reads awq" in line


def test_generation_config_of_no_use(refuse: Run, model: Path) -> None:
    (model / "generation_config.json").write_text("{")
    line = refuse("chat", model, "--prompt", "hello")
    assert str(model / "generation_config.json") in line


def test_line_ends_in_names_stay_on_one_line(quantize: Run, model: Path) -> None:
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "x\nerror: y.safetensors"}}))
    assert "x error: y.safetensors is missing" in quantize()


# The real command, in a process of its own.


def run(*args: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "salience", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_script(model: Path, out: Path) -> None:
    script = Path(sys.executable).parent / "salience"
    done = subprocess.run(
        [str(script), "quantize", str(model), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: group size 128 does not divide")
    assert done.stderr.count("\n") == 1
    assert list(out.parent.iterdir()) == []


def test_full_disk_in_a_process(
    workshop: Workshop, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on a file's size fails the write of the weights; what was done before is kept."""
    run = workshop("quantize", model, "-o", out, *QUICK, cwd=out.parent, file_bytes=60_000)
    assert run.status == 2
    assert run.line.startswith(f"error: writing {out}.partial/final failed: ")
    assert [path.name for path in out.parent.iterdir()] == ["out.partial"]
    goes_on(monkeypatch, model, out)


def test_no_warnings_beside_the_error(model: Path, out: Path) -> None:
    """Transformers warns of this config before it fails."""
    edit_config(model, rope_parameters={"rope_type": "nope", "rope_theta": 10000.0})
    done = run("quantize", model, "-o", out, *QUICK)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(out.parent.iterdir()) == []
