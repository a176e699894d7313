"""The page of a report: whole HTML that loads nothing and trusts nothing in the report."""

import json
import re
import sys
import time
import warnings
from dataclasses import asdict, replace
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import salience
from helpers_svg import assert_affine, marks
from salience.calibration import Calibration
from salience.cli.app import main
from salience.errors import SalienceError
from salience.reports.page import page, write_page
from salience.reports.report import BlockReport, LinearReport, Report, read_report

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Reads a page and insists that each element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open or tag in VOID, f"<{tag}/> is open in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def plots(self) -> list[str]:
        labels = [attrs.get("aria-label") for tag, attrs in self.tags if tag == "svg"]
        return [label for label in labels if label]


def assert_loads_nothing(text: str) -> None:
    """No address at all, references only to ids that the page has, no script."""
    assert "//" not in re.sub(r"<p>.*?</p>|<td>.*?</td>", "", text, flags=re.DOTALL)
    read = Page(text)
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in read.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "base", "a"}
        for name, value in attrs.items():
            assert not name.startswith("on") and name not in {"src", "xlink:href"}
            if name == "href":
                assert value and value[0] == "#" and value[1:] in ids
            for target in re.findall(r"url\((.*?)\)", value or ""):
                assert target[0] == "#" and target[1:] in ids
    assert "@import" not in text and "default-src 'none'" in text


def linear(name: str, **changes: Any) -> LinearReport:
    return replace(
        LinearReport(name, 64, 32, "w4g32", 0.5, 0.2, 0.95, 0.02, 0.01, False), **changes
    )


def make(blocks: int = 1, kinds: tuple[str, ...] = KINDS[:1]) -> Report:
    """A report with numbers that differ from block to block."""
    linears = [
        linear(f"model.layers.{i}.mlp.{kind}", error=0.001 * (1 + i % 7), clip=1 - 0.001 * (i % 9))
        for i in range(blocks)
        for kind in kinds
    ]
    whole = Report("m", "o", "awq", "fast", "w4g32", "awq", None, "cpu", {}, linears=linears)
    whole.folds = [{"prev": "norm", "sinks": [f"mlp.{k}" for k in kinds], "rule": "norm"}]
    whole.blocks = [
        BlockReport(f"b.{i}", 0.02, 0.01, 1, 30 + i % 5, 2**32, 2**33) for i in range(blocks)
    ]
    whole.summarize()
    return whole


@pytest.fixture(scope="module")
def text(text_file: Path) -> Calibration:
    return Calibration(str(text_file), samples=4, seqlen=64)


@pytest.fixture(scope="module")
def awq(llama: Path, text: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("awq") / "w4g32"
    salience.quantize(str(llama), out, scheme="w4g32", calibration=text)
    return out


def test_page_of_awq(awq: Path) -> None:
    report = read_report(awq)
    report.blocks = [
        BlockReport(f"model.layers.{i}", 0.02, 0.01, 4, 1.5, 2**30, 2**20) for i in range(3)
    ]
    result = page(report)
    assert_loads_nothing(result)
    read = Page(result)
    for kind in KINDS:
        assert f"output error of {kind}" in read.plots()
    exponents = [label for label in read.plots() if label.startswith("alpha and beta of")]
    assert len(exponents) == len(report.folds) == 4
    for label in ("clip ratio of each kind of linear", "clip ratio over the blocks"):
        assert label in read.plots()
    for label in ("seconds of each phase", "seconds of each block"):
        assert label in read.plots()
    assert {"Process memory, GiB", "GPU memory, GiB"} <= set(read.plots())
    names = [name for name in read.text("code") if name.startswith("model.layers.")]
    worst = sorted(report.linears, key=lambda linear: -linear.error)
    assert names == [linear.name for linear in worst[:20]]
    facts = " ".join(read.text("td"))
    for fact in ("w4g32 (21 linears)", "lm_head", "samples 4", report.versions["torch"], "4.625"):
        assert fact in facts
    for fold in report.folds:
        assert f"{fold['error']:.2g}" in facts and fold["prev"] in read.text("code")
    assert f"{report.error / report.error_rtn:.2f} \u00d7" in read.text("b")


def test_page_of_plain_rounding(llama: Path, tmp_path: Path) -> None:
    salience.quantize(str(llama), tmp_path / "rtn", method="rtn", scheme="w4g32")
    report = read_report(tmp_path / "rtn")
    report.blocks = []  # as reports were at first
    result = page(report)
    assert_loads_nothing(result)
    read = Page(result)
    assert "No scale was folded into this model." in read.text("p")
    assert "This report has no times of its blocks." in read.text("p")
    assert sum(label.startswith("output error of") for label in read.plots()) == 7
    assert "none" in read.text("td")  # no calibration


def test_a_report_with_nothing_in_it() -> None:
    empty = Report("", "", "awq", "", "", "", None, "", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_loads_nothing(page(empty))


EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp; $\\frac$ \ud800\u0000"


def test_everything_in_the_report_is_escaped() -> None:
    report = make(3)
    for name in ("model", "out", "method", "effort", "scheme", "format", "device"):
        setattr(report, name, EVIL)
    report.calibration = {EVIL: EVIL, "list": [EVIL]}
    report.versions = {EVIL: EVIL}
    report.kept_modules = [EVIL]
    report.phase_seconds = {EVIL: 1.0}
    report.folds = [
        {"prev": EVIL, "sinks": [EVIL, "x"], "rule": EVIL, "channels": EVIL, "error": EVIL},
        {"prev": {EVIL: 1}, "sinks": EVIL},
        {},
    ]
    report.linears = [linear(f"model.{i}.{EVIL}", scheme=EVIL) for i in range(3)]
    report.linears.append(linear(EVIL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = page(report)
    read = Page(result)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in read.tags)
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert any("<script>alert('x')</script>" in text for text in read.text("td"))
    assert any(label.startswith("alpha and beta of <script>") for label in read.plots())
    for name in ("title", "h1"):
        assert read.count(name) == 1 and len(read.text(name)) == 1


@pytest.mark.parametrize("value", [nan, inf, -inf, 1e308, -1.0, 0.0, 1e-320])
def test_numbers_of_any_size(value: float) -> None:
    report = make(3, KINDS[:2])
    names = ("alpha", "beta", "clip", "error_rtn", "error")
    report.linears[1:3] = [
        replace(one, **dict.fromkeys(names, value)) for one in report.linears[1:3]
    ]
    report.linears += [linear("model.layers.0.x.q_proj", **dict.fromkeys(names, value))]
    report.blocks = [replace(block, seconds=value) for block in report.blocks]
    report.phase_seconds = {"search": value}
    report.seconds = report.bits_per_weight = report.error = report.error_rtn = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_loads_nothing(page(report))


def test_many_kinds_share_a_plot() -> None:
    kinds = (*KINDS, *(f"rare_{i}" for i in range(20)))
    report = make(2, kinds)
    report.linears += [linear(f"model.layers.2.mlp.{kind}") for kind in KINDS]
    report.folds = report.blocks = []
    labels = [label for label in Page(page(report)).plots() if label.startswith("output error")]
    assert len(labels) == 24 and labels[-1] == "output error of all other kinds"
    assert {f"output error of {kind}" for kind in KINDS} <= set(labels)


def test_names_without_numbers_are_one_block() -> None:
    report = make()
    report.linears = [linear("lm_head"), linear("encoder.proj")]
    labels = Page(page(report)).plots()
    assert {"output error of lm_head", "output error of proj"} <= set(labels)


def svg_of(text: str, label: str) -> str:
    (svg,) = re.findall(rf'<svg [^>]*aria-label="{label}.*?</svg>', text, flags=re.DOTALL)
    return svg


def test_the_numbers_are_those_of_the_report() -> None:
    rng = np.random.default_rng(0)
    report = make(5, KINDS[:2])
    names = ("error_rtn", "error", "alpha", "beta", "clip")
    report.linears = [
        replace(one, **dict(zip(names, rng.uniform(0.01, 0.9, 5).tolist(), strict=True)))
        for one in report.linears
    ]
    # A scale is its fold's, whichever of the sinks one looks at.
    q, k = report.linears[::2], report.linears[1::2]
    k = [replace(b, alpha=a.alpha, beta=a.beta) for a, b in zip(q, k, strict=True)]
    report.linears = [one for pair in zip(q, k, strict=True) for one in pair]
    text = page(report)

    def heights(label: str) -> np.ndarray:
        svg = svg_of(text, label)
        found = [marks(svg, variable) for variable in ("--first", "--second")]
        return np.concatenate([part[:, 1] for part in found if len(part)])

    for kind, linears in (("q_proj", q), ("k_proj", k)):
        errors = [one.error for one in linears] + [one.error_rtn for one in linears]
        assert_affine(heights(f"output error of {kind}"), np.log10(errors), -1)
    exponents = [one.alpha for one in q] + [one.beta for one in q]
    assert_affine(heights("alpha and beta of norm"), np.array(exponents), -1)
    clips = np.array([[one.clip for one in linears] for linears in (q, k)])
    assert_affine(heights("clip ratio over the blocks"), np.median(clips, 0), -1)
    by_kind = marks(svg_of(text, "clip ratio of each kind"), "--first")
    assert by_kind[:, 0].argsort().tolist() == np.median(clips, 1).argsort().tolist()
    seconds = np.array([block.seconds for block in report.blocks])
    assert_affine(heights("seconds of each block"), seconds, -1)


@pytest.mark.parametrize("value", [nan, inf])
def test_what_is_no_number_is_worst(value: float) -> None:
    report = make(30)
    report.linears[7] = linear("model.layers.7.bad", error=value)
    report.linears[21] = linear("model.layers.21.bad", error=value)
    names = [name for name in Page(page(report)).text("code") if name.startswith("model.")]
    assert len(names) == 20
    assert set(names[:2]) == {"model.layers.7.bad", "model.layers.21.bad"}
    assert names[2] == "model.layers.6.mlp.q_proj"  # the first of those with the largest error


def test_a_large_report(tmp_path: Path) -> None:
    start = time.perf_counter()
    write_page(make(80, KINDS), tmp_path / "report.html")
    assert time.perf_counter() - start < 30  # about 2 on an idle core
    assert 100_000 < (tmp_path / "report.html").stat().st_size < 2_000_000


def test_a_file_is_replaced_only_when_forced(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(SalienceError, match=r"report\.html exists; pass --force"):
        write_page(make(), out)
    assert out.read_text() == "mine"
    write_page(make(), out, force=True)
    assert Page(out.read_text()).count("html") == 1
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_not_replaced(tmp_path: Path, force: bool) -> None:
    with pytest.raises(SalienceError, match="is a folder; name a file with -o"):
        write_page(make(), tmp_path, force)


def test_a_page_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SalienceError, match=r"writing .*report\.html failed"):
        write_page(make(), tmp_path / "nowhere" / "report.html")

    def denied(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("salience.reports.page.os.replace", denied)
    with pytest.raises(SalienceError, match="Permission denied"):
        write_page(make(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["salience", "report", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "quantized"
    folder.mkdir()
    (folder / "salience_report.json").write_text(json.dumps(asdict(make())))
    assert run(monkeypatch, folder) == 0
    assert capfd.readouterr() == ("report.html: open it in a browser\n", "")
    assert "output error of q_proj" in Page((tmp_path / "report.html").read_text()).plots()
    assert run(monkeypatch, folder) == 2
    stdout, stderr = capfd.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1) and "report.html exists" in stderr
    (tmp_path / "report.html").write_text("mine")
    file = folder / "salience_report.json"
    assert run(monkeypatch, file, "-o", "report.html", "--force", "--json") == 0
    stdout, stderr = capfd.readouterr()
    assert (json.loads(stdout), stderr) == ({"out": "report.html"}, "")
    assert (tmp_path / "report.html").read_text() != "mine"
    assert [path.name for path in folder.iterdir()] == ["salience_report.json"]


def test_command_on_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for value, words in (("{", "not readable as JSON"), ('{"method": ""}', "linears is missing")):
        (tmp_path / "salience_report.json").write_text(value)
        assert run(monkeypatch, tmp_path) == 2
        stdout, stderr = capfd.readouterr()
        assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
        assert words in stderr
    assert not (tmp_path / "report.html").exists()


def test_same_report_same_page(tmp_path: Path) -> None:
    report = make(2)
    (tmp_path / "salience_report.json").write_text(json.dumps(asdict(report)))
    assert page(read_report(tmp_path)) == page(report)
