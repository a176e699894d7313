"""Several checkpoints from one pass over the calibration text are those of a pass for each."""

from pathlib import Path
from typing import Any

import pytest

import salience
from salience.calibration import Calibration
from salience.errors import SalienceError
from salience.pipeline import engine
from salience.pipeline import quantize as pipeline
from salience.pipeline.quantize import Variant, quantize_all

WAYS: dict[str, dict[str, str]] = {
    "awq": {"method": "awq", "scheme": "w4g32", "format": "compressed-tensors"},
    "gptq": {"method": "gptq", "scheme": "w3g32", "format": "compressed-tensors"},
    "balanced": {"effort": "balanced", "scheme": "w3g32", "format": "compressed-tensors"},
    "rtn": {"method": "rtn", "scheme": "w4g32", "format": "compressed-tensors"},
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    from tiny_models import TEXT

    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(TEXT[:20_000], encoding="utf-8")
    return Calibration(str(path), samples=4, seqlen=32)


@pytest.fixture(scope="module")
def alone(
    llama: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The weights of each way, made by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for name, way in WAYS.items():
        salience.quantize(str(llama), folder / name, calibration=calibration, **way)
    return {name: weights(folder / name) for name in WAYS}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def variants(folder: Path) -> list[Variant]:
    return [Variant(folder / name, **way) for name, way in WAYS.items()]


@pytest.mark.parametrize("together", [1, 4])
def test_same_bytes_as_alone(
    together: int,
    llama: Path,
    calibration: Calibration,
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where blocks are solved side by side, as on a GPU."""
    monkeypatch.setattr(engine, "window", lambda *_: together)
    reports = quantize_all(str(llama), variants(tmp_path), calibration=calibration)
    assert {name: weights(tmp_path / name) for name in WAYS} == alone
    assert [report.scheme for report in reports] == ["w4g32", "w3g32", "w3g32", "w4g32"]
    assert reports[0].folds and not reports[1].folds and not reports[3].folds


def test_the_text_is_run_once(
    llama: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    right = engine.observe

    def observe(*args: Any) -> Any:
        calls.append(args)
        return right(*args)

    monkeypatch.setattr(engine, "observe", observe)
    salience.quantize(str(llama), tmp_path / "one", calibration=calibration, **WAYS["awq"])
    once = len(calls)
    quantize_all(str(llama), variants(tmp_path / "all"), calibration=calibration)
    assert 0 < len(calls) - once == once


def test_goes_on_where_one_is_ahead(
    llama: Path,
    calibration: Calibration,
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a stop between two of one block."""
    saved: list[int] = []
    right = pipeline.Journal.save_block

    def save_block(self: Any, index: int, *rest: Any) -> None:
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(index)
        right(self, index, *rest)

    monkeypatch.setattr(pipeline.Journal, "save_block", save_block)
    with pytest.raises(KeyboardInterrupt):
        quantize_all(str(llama), variants(tmp_path), calibration=calibration)
    monkeypatch.undo()
    assert saved == [0, 0, 0, 1]
    quantize_all(str(llama), variants(tmp_path), calibration=calibration)
    assert {name: weights(tmp_path / name) for name in WAYS} == alone


def test_bad_input_of_one_is_refused_before_the_first(
    llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    ways = [*variants(tmp_path), Variant(tmp_path / "bad", scheme="w4g48", format="gptq")]
    with pytest.raises(SalienceError, match="group size 48"):
        quantize_all(str(llama), ways, calibration=calibration)
    assert list(tmp_path.iterdir()) == []
