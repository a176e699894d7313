"""Reports are read back as they were written, and those of other versions as far as they go."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salience.errors import SalienceError
from salience.reports.report import REPORT_NAME, BlockReport, LinearReport, Report, read_report

INTS = st.integers(0, 2**53)
FLOATS = st.floats(allow_nan=False)
LINEARS = st.builds(
    LinearReport,
    **dict.fromkeys(("in_features", "out_features"), INTS),
    **dict.fromkeys(("alpha", "beta", "clip", "error_rtn", "error"), FLOATS),
)
BLOCKS = st.builds(
    BlockReport,
    **dict.fromkeys(("folds", "peak_rss_bytes", "peak_vram_bytes"), INTS),
    **dict.fromkeys(("error_rtn", "error", "seconds"), FLOATS),
)


def report(**changes: Any) -> dict[str, Any]:
    linear = LinearReport("a.0.q", 8, 4, "w4g32", 0.5, 0.0, 0.9, 0.02, 0.01, False)
    whole = Report("m", "o", "awq", "fast", "w4g32", "awq", None, "cpu", {}, linears=[linear])
    return asdict(whole) | changes


def write(folder: Path, value: Any) -> Path:
    (folder / REPORT_NAME).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@given(linears=st.lists(LINEARS, max_size=3), blocks=st.lists(BLOCKS, max_size=3), text=st.text())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    linears: list[LinearReport],
    blocks: list[BlockReport],
    text: str,
) -> None:
    folder = tmp_path_factory.getbasetemp()  # a new one each time takes longer than the rest
    whole = Report(text, "o", "awq", "fast", "w4", "awq", {"text": text}, "cpu", {"torch": "2"})
    whole.linears, whole.blocks, whole.folds = linears, blocks, [{"prev": text, "sinks": [text]}]
    write(folder, asdict(whole))
    assert read_report(folder) == whole
    assert read_report(folder / REPORT_NAME) == whole


def test_what_a_later_version_adds_is_left_out(tmp_path: Path) -> None:
    value = report(added={"x": 1})
    value["linears"][0]["added"] = [1]
    assert asdict(read_report(write(tmp_path, value))) == report()


def test_what_an_older_version_lacks_has_its_default(tmp_path: Path) -> None:
    value = report()
    for name in ("blocks", "seconds", "effort", "calibration", "versions"):
        del value[name]
    del value["linears"][0]["scheme"], value["linears"][0]["beta"]
    read = read_report(write(tmp_path, value))
    assert (read.blocks, read.seconds, read.effort, read.calibration, read.versions) == (
        [],
        0.0,
        "",
        None,
        {},
    )
    assert (read.linears[0].scheme, read.linears[0].beta, read.linears[0].alpha) == ("", 0.0, 0.5)


def test_whole_numbers_may_stand_for_fractions(tmp_path: Path) -> None:
    assert read_report(write(tmp_path, report(seconds=3))).seconds == 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "not readable as JSON"),
        ('{"linears": [', "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "should hold a JSON object"),
        ({}, "is not a salience report: method is missing"),
        ({"method": "awq"}, "is not a salience report: linears is missing"),
        (report(linears={}), "linears is no list"),
        (report(linears=[3]), "linears[0] is not an object"),
        (report(linears=[{"name": "x", "error": 1.0}]), "linears[0].error_rtn is missing"),
        (report(linears=[{"name": 1, "error": 1, "error_rtn": 1}]), "linears[0].name is no str"),
        (report(error="0.1"), "error is no float"),
        (report(error=True), "error is no float"),
        (report(error=10**400), "error is out of range"),
        (report(peak_rss_bytes=1.5), "peak_rss_bytes is no int"),
        (report(peak_rss_bytes=True), "peak_rss_bytes is no int"),
        (report(peak_rss_bytes=10**400), "peak_rss_bytes is out of range"),
        (report(versions={"torch": 2}), "versions.torch is no str"),
        (report(calibration=[]), "calibration is no dict"),
        (report(folds=["x"]), "folds[0] is no dict"),
        (report(blocks=[None]), "blocks[0] is not an object"),
    ],
)
def test_what_is_no_report(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(SalienceError) as caught:
        read_report(write(tmp_path, value))
    message = str(caught.value)
    assert words in message and str(tmp_path / REPORT_NAME) in message and "\n" not in message


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SalienceError, match="does not exist; name a folder"):
            read_report(path)
