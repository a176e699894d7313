"""`doctor`: what is tried, what fits, and what is known not to go together."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from salience import kernels
from salience.cli.app import main
from salience.doctor import machine, trials
from salience.doctor.fits import SIZES, fits_on
from salience.doctor.known import PAIRS, bad_pairs, bad_settings, own_needs, unmet
from salience.doctor.machine import Machine, cpu_features, examine, usable_cpus
from salience.doctor.trials import Trial, all_trials, attempt, kernel_trials, variant_trials
from salience.formats import FORMATS, AutoAwq
from salience.formats.dense import Dense
from salience.kernels import fused, gpu
from salience.kernels.gpu import Triton
from salience.qtensor import QTensor
from salience.scheme import Scheme

CPU = torch.device("cpu")


def test_everything_works_here() -> None:
    found = list(all_trials([CPU]))
    assert [trial for trial in found if trial.status != "works"] == []
    names = {(trial.kind, trial.name) for trial in found}
    assert len(names) == len(found)
    assert {("kernel", "cpu_int4 w4g64 on cpu"), ("kernel", "codebook nf4-dq on cpu")} < names
    assert sum(kind == "op" for kind, _ in names) == 5
    assert {name.split()[0] for kind, name in names if kind == "format"} == {
        fmt.name for fmt in FORMATS
    }


@pytest.mark.slow
def test_variants_of_the_gpu_by_triton_s_interpreter() -> None:
    found = {trial.name: trial for trial in variant_trials(CPU)}
    if Triton().supports(trials.Shape(4, 64, 64, 64, torch.float16), 4, CPU):
        assert found["triton w4 on cpu"].status == found["triton w3 on cpu"].status == "works"
    assert found["wgmma w4 on cpu"].status == "absent" and found["wgmma w4 on cpu"].detail


def test_what_is_missing_on_a_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that Triton would run on and does not is not as it should be; an old one is."""
    cuda = torch.device("cuda")
    for fault, status in (
        ("Triton is not installed (pip install triton)", "fails"),
        ("Triton's kernels need an NVIDIA GPU of compute capability 8.0 or later", "absent"),
    ):
        monkeypatch.setattr(gpu, "triton_fault", lambda device, fault=fault: fault)
        assert trials._absence(Triton(), cuda) == (status, fault)
    monkeypatch.setattr(trials, "find_spec", lambda name: None)
    assert "salience[cuda]" in trials._absence(gpu.Mma(), cuda)[1]


def test_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.Reference.matmul
    monkeypatch.setattr(kernels.Reference, "matmul", lambda *args: 2 * right(*args))
    found = {trial.name: trial for trial in kernel_trials(CPU, Scheme(4, 64))}
    assert found["cpu_int4 w4g64 on cpu"].status == "works"
    wrong = found["reference w4g64 on cpu"]
    assert wrong.status == "fails" and wrong.detail == "its result is off by 100 %"


def test_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no\nsuch driver")

    monkeypatch.setattr(kernels.CpuInt4, "matmul", fail)
    [first, second] = kernel_trials(CPU, Scheme(4, 64))
    assert (first.status, first.detail) == ("fails", "OSError: no such driver")
    assert second.status == "works"


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("rms_norm", "rms_norm"),
        ("rms_norm", "add_rms_norm"),
        ("silu_mul, gelu_mul", "silu_mul"),
        ("silu_mul, gelu_mul", "gelu_mul"),
        ("rope_update", "rope_update"),
        ("decode_attention", "decode_attention"),
        ("argmax", "argmax"),
    ],
)
def test_an_op_that_is_wrong(name: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(fused, op)

    def wrong(*args: Any) -> Any:
        result = right(*args)
        return tuple(1 - each for each in result) if isinstance(result, tuple) else 1 - result

    monkeypatch.setattr(fused, op, wrong)
    found = attempt("op", name, lambda: trials._OPS[name](CPU))
    assert found.status == "fails" and "off by" in found.detail


def test_a_format_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AutoAwq.read

    def read(self: AutoAwq, tensors: Any, scheme: Scheme) -> QTensor:
        qt = right(self, tensors, scheme)
        return replace(qt, q=qt.q.flip(0))

    monkeypatch.setattr(AutoAwq, "read", read)
    assert attempt("format", "awq", lambda: trials._round_trip(AutoAwq())).status == "fails"
    assert attempt("format", "dense", lambda: trials._round_trip(Dense())).status == "fails"


def test_not_a_number_is_no_result() -> None:
    assert attempt("op", "x", lambda: float("nan")).status == "fails"
    assert attempt("op", "x", lambda: None).status == "works"


@pytest.mark.parametrize(
    ("name", "parameters"), [("1B", 1.24e9), ("3B", 3.21e9), ("8B", 8.03e9), ("14B", 14.8e9),
                             ("32B", 32.8e9), ("70B", 70.6e9)],
)  # fmt: skip
def test_sizes_are_those_of_the_models(name: str, parameters: float) -> None:
    [size] = [each for each in SIZES if each.name == name]
    assert size.coded + size.floats == pytest.approx(parameters, rel=0.01)


def test_what_fits() -> None:
    found = {(fit.size, fit.scheme): fit for fit in fits_on(CPU, has=8 * 2**30)}
    assert len(found) == 3 * len(SIZES)
    assert found["1B", "w4g128"].fits and found["3B", "w3g128"].fits
    assert not found["70B", "w3g128"].fits and not found["8B", "fp32"].fits
    for name in ("1B", "70B"):
        three, four, whole = (found[name, each].bytes for each in ("w3g128", "w4g128", "fp32"))
        assert three < four < whole
    # 8.03e9 weights of 4 bytes, 32 layers of 4096 tokens of 2 x 1024 fp32 numbers, and a tenth.
    assert found["8B", "fp32"].bytes == pytest.approx(
        1.1 * (8.03e9 * 4 + 32 * 4096 * 8192), rel=0.01
    )


def test_a_cpu_s_features(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_int8 avx512f zzz\n\nflags\t: avx2\n")
    assert cpu_features(info) == ["avx2", "avx512f", "amx_int8"]
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert cpu_features(info) == ["asimd", "asimddp", "i8mm"]
    assert cpu_features(tmp_path / "none") == []


def test_a_cgroup_s_share_of_processors(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    whole = usable_cpus(tmp_path / "none")
    assert whole >= 1
    quota.write_text("50000 100000\n")
    assert usable_cpus(quota) == 0.5
    quota.write_text("max 100000\n")
    assert usable_cpus(quota) == whole


def test_pairs_that_do_not_go_together() -> None:
    versions = {"autoawq": "0.2.9", "transformers": "5.23.0"}
    [line] = bad_pairs(versions)
    assert "autoawq 0.2.9 with transformers 5.23.0" in line and "pip uninstall autoawq" in line
    assert bad_pairs(versions | {"transformers": "4.51.3"}) == []
    old = bad_pairs({"compressed-tensors": "0.16.1", "torch": "2.13.0+cpu"})
    assert len(old) == 1 and "3, 5, 6 and 7 bits" in old[0]
    assert bad_pairs({"compressed-tensors": "0.17.0", "transformers": "5.23.0"}) == []
    assert bad_pairs({"compressed-tensors": "unknown"}) == []


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.one} {pair.other}")
def test_each_pair_says_what_to_do(pair: Any) -> None:
    assert pair.problem and pair.mend and pair.seen
    lines = bad_pairs({pair.one: "0.0.1", pair.other or "x": "99"})
    assert pair.its.startswith(">=") or any(pair.mend in line for line in lines)


def test_what_packages_need_of_each_other() -> None:
    versions = {"torch": "2.13.0+cpu", "triton": "3.6.0", "numpy": "2.4.6"}
    needs = {
        "torch": ["triton==3.7.0; platform_system != 'None'", "numpy>=1", "sympy>=1"],
        "x": ["torch>=99; extra == 'gpu'", "torch>=99; python_version < '3'", "torch>=2.8", "no !"],
    }
    [line] = unmet(versions, needs)
    assert line.startswith("torch needs triton ==3.7.0, and triton 3.6.0 is here")
    assert 'pip install "triton==3.7.0"' in line
    assert {"torch", "transformers"} <= own_needs().keys()


def settings(**changes: Any) -> list[str]:
    values: dict[str, Any] = {"versions": {"torch": "2.13.0", "triton": "3.6.0"}, "cuda": "13.0"}
    values |= {"driver": "580.82.07", "gpus": 1, "threads": 2, "cpus": 2.0, "environment": {}}
    return list(bad_settings(**values | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cuda": None}, "made for CPUs"),
        ({"driver": "535.104.05"}, "needs driver 580 or later"),
        ({"gpus": 0}, "run nvidia-smi"),
        ({"gpus": 0, "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "CUDA_VISIBLE_DEVICES is ''"),
        ({"environment": {"TRITON_INTERPRET": "1"}}, "unset it"),
        ({"versions": {"torch": "2.13.0"}}, "pip install triton"),
        ({"threads": 16, "cpus": 2.5}, "OMP_NUM_THREADS=2"),
        ({"threads": 2, "cpus": 0.5}, "OMP_NUM_THREADS=1"),
    ],
)
def test_settings_that_cost(changes: dict[str, Any], said: str) -> None:
    [line] = settings(**changes)
    assert said in line


def test_settings_that_are_fine() -> None:
    assert settings() == []
    assert settings(cuda="12.8", driver="550.54.14") == []
    assert settings(cuda=None, driver=None, gpus=0, versions={}, threads=1, cpus=0.5) == []


def test_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver_version() is None
    program = tmp_path / "nvidia-smi"
    for said, version in (("580.82.07", "580.82.07"), ("NVIDIA-SMI has failed", None)):
        program.write_text(f"#!{sys.executable}\nprint({said!r})\n")
        program.chmod(0o755)
        assert machine.driver_version() == version
    program.write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    assert machine.driver_version() is None


@pytest.fixture(scope="module")
def here() -> Machine:
    return examine()


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: Machine, *more: str
) -> tuple[int, str]:
    monkeypatch.setattr(machine, "examine", lambda: found)
    monkeypatch.setattr(sys, "argv", ["salience", "doctor", *more])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capsys.readouterr().out


def test_the_command(
    here: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run(monkeypatch, capsys, here)
    assert status == 0 and "all that was tried works" in out
    assert "w4g128 on cpu" in out and "torch 2." in out and "cpu_int4 w4g64" in out
    status, out = run(monkeypatch, capsys, here, "--json")
    values = json.loads(out)
    assert status == 0 and values["works"] is True
    assert values["versions"]["torch"] == torch.__version__
    assert values["fits"][0].keys() == {"size", "scheme", "device", "bytes", "has", "fits"}
    assert values["trials"][0].keys() == {"kind", "name", "status", "detail", "milliseconds"}
    assert values["ram"] > values["ram_free"] > 0 and all(values["disk_free"].values())


def test_the_command_when_something_fails(
    here: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Trial("kernel", "gpu w4", "fails", "RuntimeError: [no] image")
    absent = Trial("variant", "wgmma", "absent", "another GPU's")
    status, out = run(
        monkeypatch,
        capsys,
        replace(here, trials=[broken, absent], warnings=["x with y"], ram_limit=2**30),
    )
    assert status == 1 and "1 of 2 trials fail" in out
    assert "RuntimeError: [no] image" in out and "warning: x with y" in out
    assert "cgroup's limit is 1.00 GiB" in out
    status, out = run(monkeypatch, capsys, replace(here, trials=[absent]))
    assert status == 0
