"""Starting vLLM: the command line, what is refused before, and the process it becomes.

vLLM itself needs a GPU. A script of its name stands in for it: it writes down its arguments and
environment, and ends by a status of its own or when a signal comes.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import salience
from helpers_checkpoint import refuse
from salience.inspection import served
from salience.server import vllm
from salience.server.vllm import Options, check, command, minded
from salience.source import Source, open_source
from test_serving import served as profile_of
from test_serving import shapes_of, verdicts
from tiny_models import llama_config, make_model, save

STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys, time
def end(number, frame):
    print("ended by", number, flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
key = os.environ.get("VLLM_API_KEY")
print(json.dumps({{"argv": sys.argv, "key": key, "pid": os.getpid()}}), flush=True)
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(5)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in the AWQ format."""
    folder = tmp_path_factory.mktemp("vllm")
    config = llama_config(hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    source = save(make_model(config), folder / "float")
    salience.quantize(str(source), folder / "awq", scheme="w4g32", method="rtn", dtype="bfloat16")
    return folder / "awq"


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment in which `vllm` is the script above."""
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text(STAND_IN)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    source = str(Path(salience.__file__).parent.parent)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": source}


def started(folder: Path, environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    values = {"host": "127.0.0.1", "port": 8123, "api_key": "s3cret", "context": None}
    values |= {"served_name": None, "tensor_parallel": 1} | options
    code = f"from salience.server.vllm import run; run({str(folder)!r}, **{values!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_becomes_the_program(packed: Path, stand_in: dict[str, str]) -> None:
    process = started(packed, stand_in, extra=["--swap", "a b"], served_name="tiny")
    stdout, stderr = process.communicate(timeout=60)
    found = json.loads(stdout)
    assert process.returncode == 5, stderr
    assert found["pid"] == process.pid
    assert found["key"] == "s3cret"
    assert "s3cret" not in " ".join(found["argv"]) + stderr
    assert found["argv"][1:3] == ["serve", str(packed)]
    assert found["argv"][-2:] == ["--swap", "a b"]
    assert "starts: " in stderr


@pytest.mark.slow
def test_signals_reach_it(packed: Path, stand_in: dict[str, str]) -> None:
    process = started(packed, stand_in, extra=["--wait"])
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["pid"] == process.pid
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert stdout == f"ended by {signal.SIGTERM.value}\n"
    assert process.returncode == 7
    assert time.monotonic() - sent < 30


def test_the_key_of_the_environment_stays(
    packed: Path, stand_in: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        seen.update(path=path, arguments=arguments, key=environment.get("VLLM_API_KEY"))

    monkeypatch.setenv("PATH", stand_in["PATH"])
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    monkeypatch.setattr(os, "execve", execve)
    values: dict[str, Any] = {"host": "h", "port": 1, "context": None, "served_name": None}
    vllm.run(str(packed), api_key=None, tensor_parallel=1, **values)
    assert seen["key"] == "mine"
    assert seen["path"].endswith("/bin/vllm")
    vllm.run(str(packed), api_key="", tensor_parallel=1, **values)
    assert seen["key"] == ""


def test_it_is_not_installed(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refuse(vllm.find, "vllm", "PATH", "uv tool install vllm")


def line(folder: Path, options: Options) -> list[str]:
    source = open_source(str(folder))
    return command("vllm", source, served(source), options)


def test_the_command_line(packed: Path) -> None:
    usual = ["vllm", "serve", str(packed), "--host", "127.0.0.1", "--port", "8000"]
    assert line(packed, Options())[:7] == usual
    full = Options(
        host="::",
        port=9,
        context=4096,
        served_name="tiny",
        tensor_parallel=4,
        pipeline_parallel=2,
        ray=True,
        trust_remote_code=True,
        extra=("--dtype", "bfloat16"),
    )
    found = line(packed, full)
    assert found[3:] == [
        *("--host", "::", "--port", "9", "--served-model-name", "tiny"),
        *("--max-model-len", "4096", "--dtype", "float16", "--tensor-parallel-size", "4"),
        *("--pipeline-parallel-size", "2", "--distributed-executor-backend", "ray"),
        *("--trust-remote-code", "--dtype", "bfloat16"),
    ]


def test_the_dtype_is_that_of_the_scales(packed: Path) -> None:
    """AWQ's are fp16; what must not run in fp16 is left to vLLM, and so is what is fp16 anyway."""
    config = open_source(str(packed)).config
    awq, ct = (
        profile_of(name, "w4g128", dtype="bfloat16") for name in ("awq", "compressed-tensors")
    )
    assert vllm.serving_dtype(config, awq) == "float16"
    assert vllm.serving_dtype(config, ct) is None
    assert vllm.serving_dtype(config, replace(ct, dtype="float32")) == "float16"
    assert vllm.serving_dtype(config, replace(awq, dtype="float16")) is None
    assert vllm.serving_dtype(config, None) is None
    config.model_type = "gemma3_text"
    assert vllm.serving_dtype(config, awq) is None


@pytest.mark.parametrize(
    ("format", "scheme", "more", "expected"),
    [
        ("awq", "w4g128", {}, "yes"),
        ("awq", "w4g16", {}, "refuse"),
        ("awq", "w4channel", {}, "yes"),
        ("gptq", "w4g128-sym", {}, "yes"),
        ("gptq", "w8channel-sym", {}, "yes"),
        ("gptq", "w4g128", {}, "refuse"),
        ("gptq", "w3g128-sym", {}, "refuse"),
        ("gptq", "w4g16-sym", {}, "refuse"),
        ("gptq", "w4g128-sym", {"act_order": True}, "refuse"),
        ("compressed-tensors", "w4g128", {}, "yes"),
        ("compressed-tensors", "w8g128-sym", {}, "yes"),
        ("compressed-tensors", "w3g128", {}, "warn"),
        ("compressed-tensors", "w8g128", {}, "warn"),
        ("compressed-tensors", "w4g16-sym", {}, "warn"),
        ("compressed-tensors", "w4g128-sym", {"act_order": True}, "refuse"),
        ("awq-gemv", "w4g128", {}, "refuse"),
        ("llm-awq", "w4g128", {}, "refuse"),
    ],
)
def test_what_this_version_reads(
    format: str, scheme: str, more: dict[str, Any], expected: str
) -> None:
    found = minded(profile_of(format, scheme, shapes_of(4096, 14336, 1024), **more), 1)
    assert verdicts(found)[0] == expected


def test_odd_shapes_are_padded_and_groups_are_not_cut() -> None:
    odd = shapes_of(576, 1536, 192)  # SmolLM2-135M
    assert not minded(profile_of("awq", "w4g64", odd), 1)
    assert not minded(profile_of("compressed-tensors", "w4g64", odd), 1)
    cut = minded(profile_of("awq", "w4g64", odd, kv_heads=3), 2)
    assert {each.linear.rpartition(".")[2] for each in cut} >= {"o_proj"}
    assert verdicts(cut)[0] == "refuse"


def test_coded_embeddings_are_read_in_one_format() -> None:
    names = ("model.embed_tokens",)
    shapes = {names[0]: (320, 128)}
    assert not minded(profile_of("compressed-tensors", "w8g128-sym", shapes, embeddings=names), 1)


def sourced(folder: Path, **changes: Any) -> Source:
    source = open_source(str(folder))
    for key, value in changes.items():
        setattr(source.config, key, value)
    return source


def test_refusals_name_what_would_do(packed: Path) -> None:
    source = sourced(packed)
    profile = served(source)
    assert profile is not None
    assert check(source, profile, Options()) == []
    refuse(lambda: check(source, profile, Options(tensor_parallel=3)), packed, "4 heads", "1, 2, 4")
    eight = sourced(packed, num_attention_heads=12, num_key_value_heads=2)
    refuse(lambda: check(eight, None, Options(tensor_parallel=3)), "2 heads of keys")
    refuse(lambda: check(source, None, Options(pipeline_parallel=2)), "1 layers")
    nf4 = replace(profile, format="bitsandbytes")
    refuse(lambda: check(source, nf4, Options()), "bitsandbytes", "--format awq")
    asymmetric = replace(profile, format="gptq", dtype="float16")
    refuse(lambda: check(source, asymmetric, Options()), "convert it to --format awq", "linears")
    # Groups of 32 of 128 / 8 inputs.
    refuse(
        lambda: check(sourced(packed, num_attention_heads=8), profile, Options(tensor_parallel=8)),
        "no multiple of group size 32",
        "more",
    )
    three = profile_of("compressed-tensors", "w3g32", dict(profile.shapes))
    [said] = check(source, three, Options())
    assert "Humming" in said and "would take" in said


def test_a_float_model_is_served(llama: Path) -> None:
    source = open_source(str(llama))
    assert served(source) is None
    assert check(source, None, Options(tensor_parallel=2)) == []
    assert "--dtype" not in command("vllm", source, None, Options())


def test_gguf_takes_what_lies_beside_it(packed: Path, tmp_path: Path) -> None:
    salience.convert(packed, tmp_path / "gguf", "gguf")
    [file] = (tmp_path / "gguf").glob("*.gguf")
    source = open_source(str(tmp_path / "gguf"))
    found = command("vllm", source, served(source), Options())
    assert found[2] == str(file)
    assert found[found.index("--tokenizer") + 1] == str(tmp_path / "gguf")
    assert found[found.index("--hf-config-path") + 1] == str(tmp_path / "gguf")
    assert any("vllm-gguf-plugin" in said for said in check(source, served(source), Options()))

    (tmp_path / "alone").mkdir()
    alone = file.rename(tmp_path / "alone" / "x.gguf")
    source = open_source(str(alone))
    refuse(lambda: command("vllm", source, served(source), Options()), "--tokenizer OWNER/MODEL")
    named = Options(extra=("--tokenizer=a/b",))
    assert command("vllm", source, served(source), named)[-1] == "--tokenizer=a/b"


def test_what_is_no_checkpoint(
    tmp_path: Path, stand_in: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", stand_in["PATH"])
    values: dict[str, Any] = {"host": "h", "port": 1, "context": None, "served_name": None}
    refuse(
        lambda: vllm.run(str(tmp_path), api_key=None, tensor_parallel=1, **values),
        tmp_path,
        "no config.json",
    )
