"""`salience bench kernels`: the floor by hand, right kernels timed, wrong ones found."""

import dataclasses
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers_bench import Command, assert_png, make_command
from salience import kernels
from salience.bench import measure, peers
from salience.bench.kernels import Row, Table, bench_kernels
from salience.bench.measure import Rates, Timing, weight_bytes
from salience.errors import DoesNotFitError, SalienceError
from salience.kernels._reference import Reference
from salience.scheme import Scheme

CPU = torch.device("cpu")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return make_command(monkeypatch, capfd)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w4g128", 8_388_608 + 131_072 * 3),
        ("w4g128-sym", 8_388_608 + 131_072 * 2),
        ("w3channel", 6_291_456 + 4096 * 3),
        ("nf4", 8_388_608 + 262_144 * 4),
        ("nf4-dq", 8_388_608 + 262_144 + 1024 * 4),
    ],
)
def test_bytes_of_a_weight(scheme: str, expected: float) -> None:
    assert weight_bytes(Scheme.parse(scheme), 4096, 4096) == expected


def test_floor() -> None:
    rates = Rates(copy=2.4e12, read=2.96e12, flops=790e12)
    assert rates.bandwidth == 2.96e12
    # As the table of an H100 has it: 3.0 microseconds for one token, 10.9 for 256.
    moved = weight_bytes(Scheme(), 4096, 4096)
    assert rates.floor(moved + 2 * 8192, 2 * 4096**2) == pytest.approx(2.97e-6, rel=1e-3)
    assert rates.floor(moved + 256 * 2 * 8192, 256 * 2 * 4096**2) == pytest.approx(10.87e-6, 1e-3)


def test_what_takes_longer_is_seen_to() -> None:
    calls = {"slow": [lambda: time.sleep(0.004)], "fast": [lambda: None] * 2}
    found = measure.measure(calls, CPU)
    assert 0.004 <= found["slow"].best <= found["slow"].median < 0.1
    assert found["fast"].median < 0.002


def test_rates_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CPU_BYTES", 2**22)
    rates = measure.measure_rates(CPU, torch.float32)
    assert all(1e8 < rate < 1e15 for rate in dataclasses.astuple(rates))


def test_ratio_is_a_geometric_mean() -> None:
    rows = [
        Row("w4g128", 1, 1, 1, 1.0, 1.0, "cpu_int4", {"cpu_int4": 1.0, "dense": 2.0}),
        Row("w4g128", 1, 1, 2, 1.0, 1.0, "cpu_int4", {"cpu_int4": 8.0, "dense": 1.0}),
        Row("w4g128", 1, 1, 4, 1.0, 1.0, "cpu_int4", {"cpu_int4": 8.0}),
    ]
    table = Table("cpu", "float32", Rates(1.0, 1.0, 1.0), rows, {}, [])
    assert table.ratio("dense") == pytest.approx(2.0)
    assert table.peers() == ["dense"] and table.kernels() == ["dense", "cpu_int4"]
    assert rows[2].over_floor("cpu_int4") == 8 and math.isnan(rows[2].over_floor("dense"))


def test_all_that_fit_are_in_the_table(command: Command, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    found = command(
        "kernels", "--scheme", "w4g64,nf4", "--scheme", "w3g32", "--shapes", "128x64,64x32",
        "--tokens", "1,3", "--device", "cpu", "--json", "-o", out, "--plot", plot,
    )  # fmt: skip
    values = found.json
    assert found.stderr == "" and values["failed"] == {} and values["wrong"] == []
    assert_png(plot)
    assert out.read_text().startswith("{\n") and len(values["rows"]) == 3 * 2 * 2
    assert values["machine"]["torch"] == torch.__version__ and values["dtype"] == "float32"
    assert {row["tokens"] for row in values["rows"]} == {1, 3}
    for row in values["rows"]:
        own = {"w4g64": "cpu_int4", "nf4": "codebook", "w3g32": "reference"}[row["scheme"]]
        expected = {"dense", own} | ({"reference"} if row["scheme"] == "w4g64" else set())
        # Beside one of these, whatever backend a machine has.
        assert expected <= row["seconds"].keys() == row["best"].keys()
        assert row["auto"] in row["seconds"]
        assert all(error < 1e-2 for error in row["error"].values())
        assert all(row["best"][name] <= row["seconds"][name] for name in row["seconds"])
    rates = values["rates"]
    first = values["rows"][0]
    assert first["floor_bytes"] == 64 * 128 / 2 + 64 * 2 * 3 + 4 * (128 + 64)
    bandwidth, operations = max(rates["copy"], rates["read"]), 2 * 128 * 64
    assert first["floor"] == max(first["floor_bytes"] / bandwidth, operations / rates["flops"])


def test_the_table(command: Command) -> None:
    found = command("kernels", "--scheme", "w4g64", "--shapes", "64x32", "--tokens", "2")
    assert found.status == 0
    assert "64x32" in found.stdout and "auto takes" in found.stdout
    assert "dense" in found.stdout and "reference" in found.stdout


def test_only_some_kernels(command: Command) -> None:
    found = command(
        "kernels", "--scheme", "w4g64", "--shapes", "64x32", "--tokens", "1", "--json",
        "--kernel", "dense", "--kernel", "reference", "--dtype", "bfloat16",
    )  # fmt: skip
    assert found.json["rows"][0]["seconds"].keys() == {"dense", "reference"}


class Wrong(Reference):
    """Forgets the last column."""

    def matmul(
        self, x: Tensor, packed: list[Tensor], bits: int, group_size: int, out_features: int
    ) -> Tensor:
        x = x.clone()
        x[:, -1] = 0
        return super().matmul(x, packed, bits, group_size, out_features)


class Unwritten(Reference):
    """Leaves an output as it was."""

    def matmul(
        self, x: Tensor, packed: list[Tensor], bits: int, group_size: int, out_features: int
    ) -> Tensor:
        y = super().matmul(x, packed, bits, group_size, out_features)
        y[-1, -1] = math.nan
        return y


@pytest.mark.parametrize("backend", [Wrong, Unwritten])
def test_a_wrong_kernel_is_found_and_not_timed(
    backend: type[Reference], command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "BACKENDS", (backend(),))
    out = tmp_path / "out.json"
    found = command(
        "kernels", "--scheme", "w4g64", "--shapes", "64x32", "--tokens", "4", "-o", out, "--json"
    )
    assert found.status == 1
    assert "wrong: relative error" in found.stderr and "64x32 of w4g64, 4 tokens" in found.stderr
    assert found.stderr.splitlines()[-1] == "error: wrong results of reference"
    assert '"reference"' in out.read_text()


def test_a_peer_that_cannot_run_ends_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(peers.Dense, "prepare", fail)
    found = command("kernels", "--scheme", "w4g64", "--shapes", "64x32", "--tokens", "1", "--json")
    assert found.status == 0 and found.stderr == "dense did not run: RuntimeError: no compiler\n"


def test_memory_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2**20)
    with pytest.raises(DoesNotFitError, match=r"shape 4096x4096 of w4g128 needs .* GiB on cpu"):
        bench_kernels([Scheme()], [(4096, 4096)], [1], torch.float32, CPU)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--shapes", "64"], "shape '64' is not understood"),
        (["--shapes", "64x0"], "write it like 4096x14336"),
        (["--tokens", "1,,2"], "--tokens '1,,2' is not understood"),
        (["--scheme", "w9g64"], "scheme 'w9g64' is not understood"),
        (["--shapes", "96x64"], "group size 128 does not divide in_features 96"),
        (["--kernel", "marlin"], "there is no kernel 'marlin'; use dense, tinygemm, humming"),
        (["--plot", "/nowhere/out.png"], "/nowhere/out.png cannot be written"),
        (["--device", "tpu"], "device 'tpu' is not understood"),
    ],
    ids=str,
)
def test_wrong_use(args: list[str], said: str, command: Command) -> None:
    found = command("kernels", *args)
    assert found.status == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert said in found.stderr


def test_a_plot_wants_matplotlib(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = command("kernels", "--plot", "out.png")
    assert found.status == 2 and "pip install matplotlib" in found.stderr


def test_timing_is_a_pair() -> None:
    assert Timing(1.0, 2.0).best == 1.0
    with pytest.raises(SalienceError):
        Scheme(4, 128).groups(100)
