"""The docs: the site builds strictly and loads nothing, and what it shows is what the code does."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "use": "href"}


def blocks(path: Path, *languages: str) -> list[str]:
    """The code blocks of some languages; "" is of those that name none."""
    found = _FENCE.findall(path.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each shell command, those behind pipes too."""
    for code in blocks(path, "", "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            for part in line.split(" | "):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # a quotation over several lines, as of sbatch
                    continue
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words and "…" not in part:
                    yield words


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("hooks")


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Run mkdocs as `make docs` does: with -q it would drop warnings before it counts them."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "-d", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    run = build(ROOT / "mkdocs.yml", out)
    assert run.returncode == 0, run.stderr
    return out


class Page(HTMLParser):
    """The ids, links and loaded files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in _LOADING and _LOADING[tag] in values:
            self.loaded.append(values[_LOADING[tag]])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values.get("href", ""))
        self.loaded += re.findall(r"url\(([^)]*)\)", values.get("style", ""))


@pytest.mark.parametrize("link", ["other.md", "index.md#nowhere", "#nowhere"])
def test_a_wrong_link_fails_the_build(tmp_path: Path, link: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n[link]({link})\n", encoding="utf-8")
    own = f"INHERIT: {ROOT}/mkdocs.yml\ndocs_dir: docs\nnav: [index.md]\nhooks: []\nplugins: []\n"
    (tmp_path / "mkdocs.yml").write_text(own, encoding="utf-8")
    run = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert run.returncode == 1
    assert f"contains a link '{link}'" in run.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_links_and_anchors_of_the_site_resolve(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) >= len(PAGES) + 3  # and the three that are made whole
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = pages[target].ids if target in pages else set()
            if not target.is_file() or (anchor and anchor not in known | {"__consent"}):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert not wrong


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        outside = [each for each in Page(path).loaded if urlsplit(each).netloc]
        assert not outside, f"{path.relative_to(site)} loads {outside}"
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\([\"']?(https?:)?//", text), path.name


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_nothing_on_the_site_was_left_to_be_filled_in(site: Path) -> None:
    assert not list(site.rglob("*.py*"))
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\{\{ |arithmatex|\\\(|shared/", text), path.relative_to(site)
    awq = (site / "methods/awq.html").read_text(encoding="utf-8")
    assert awq.count("<math") >= 8 and "def</span>" in awq
    assert (site / "formats/gguf.html").read_text(encoding="utf-8").count("<svg width") == 3


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_of_files_resolve(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    own = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES}
    assert named - own == {"reference/cli.md", "contributing.md", "changelog.md"}
    assert not own - named


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_parse(path: Path, hooks: Any) -> None:
    known = hooks.cli_page.commands()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for words in commands(path):
        match words:
            case ["salience", *rest]:
                size = 2 if rest[0] == "bench" else 1
                name = " ".join(["salience", *rest[:size]])
                assert name in known, f"there is no command {name}"
                known[name].make_context(name, rest[size:])  # raises for what does not parse
            case ["make", *rest]:
                assert set(rest) <= set(targets), words
            case ["python", script, *rest]:
                text = (ROOT / script).read_text(encoding="utf-8")
                for option in (word for word in rest if word.startswith("-")):
                    assert f'"{option}"' in text, f"{script} has no {option}"
            case ["pip", "install", *_]:
                for name in re.findall(r"\[(\w+)\]", " ".join(words)):
                    assert f"\n{name} = [" in extras, f"there is no extra {name}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_options_in_sentences_exist(path: Path, hooks: Any) -> None:
    known = hooks.cli_page.commands()
    options = {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)}
        for name, c in known.items()
    }
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    for code in re.findall(r"`(salience [^`]*)`", text):
        words = code.partition(" -- ")[0].split()
        size = 3 if words[1] == "bench" and len(words) > 2 else 2
        name = " ".join(words[:size])
        assert name in known or any(each.startswith(f"{name} ") for each in known), code
        for option in (word for word in words if word.startswith("-")):
            assert option in options[name], code


def test_an_option_that_is_not_there_is_found(hooks: Any) -> None:
    command = hooks.cli_page.commands()["salience quantize"]
    with pytest.raises(Exception, match="--nothing"):
        command.make_context("quantize", ["model", "-o", "out", "--nothing"])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_compile(path: Path) -> None:
    for code in blocks(path, "python"):
        compile(code, path.name, "exec")


SHOWN = [
    pytest.param(code, text, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, (code, text) in enumerate(
        re.findall(
            r"^```python\n(.*?)^```\n\n```text\n(.*?)^```",
            path.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        )
    )
]


@pytest.mark.parametrize(("code", "text"), SHOWN)
def test_blocks_print_what_the_page_shows(
    code: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == text


def test_the_pages_show_the_words_of_the_upstream_tools() -> None:
    """By AutoAWQ, GPTQModel, compressed-tensors and gguf; see tests/golden for whole tensors."""
    shown = {
        "awq": "0x75316420",
        "gptq": "0x88fac688 0xc688fac6 0xfac688fa",
        "compressed-tensors": "0x88fac688 0xc688fac6 0xfac688fa",
        "gguf": "18 00 3c 00 11 22",
        "bitsandbytes": "01 23 45 67",
    }
    for name, words in shown.items():
        text = (ROOT / "docs/formats" / f"{name}.md").read_text(encoding="utf-8")
        assert any(words in block for block in _FENCE.findall(text) for block in block)


def test_diagrams_show_where_codes_lie(hooks: Any) -> None:
    labels = {name: make() for name, make in hooks.diagrams.LABELS.items()}
    nibbles = {name: [word[::4] for word in labels[name]] for name in ("awq", "gptq-4", "q4_0")}
    assert nibbles["awq"] == [["0", "2", "4", "6", "1", "3", "5", "7"]]
    assert nibbles["gptq-4"] == [[str(k) for k in range(8)]]
    assert labels["compressed-tensors-4"] == labels["gptq-4"]
    assert nibbles["q4_0"] == [["", ""]] * 2 + [[str(j), str(j + 16)] for j in range(16)]
    assert [word[::4] for word in labels["nf4"]] == [[str(2 * j + 1), str(2 * j)] for j in range(8)]
    stream = [bit for word in labels["gptq-3"] for bit in word]
    assert stream == [str(bit // 3) for bit in range(96)]
    assert labels["q8_0"][2:] == [[str(j)] * 8 for j in range(32)]
    assert [word[0] for word in labels["q4_1"][:5]] == ["", "", "", "", "0"]


def test_diagrams_draw_what_is_known(hooks: Any) -> None:
    drawn = hooks.diagrams.bits("awq")
    assert re.findall(r'class="" [^>]*>(\d+)<', drawn) == list("75316420")  # the high bit first
    assert "\n" not in drawn
    assert re.findall(r">([dm])<", hooks.diagrams.bits("q4_1")) == list("ddmm")


def test_tables_hold_the_numbers_of_the_readme(hooks: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    kills = hooks.figures.load("kill_and_continue")
    assert kills["identical"] == kills["jobs"]  # as the pages say
    table = hooks.figures.table("quality")
    for option in ("--method gptq", "--effort balanced"):
        four, three = re.search(rf"`{option}` \| ([*\d.]+) \| ([*\d.]+)", readme).groups()  # type: ignore[union-attr]
        assert f"`{option}` | {four.strip('*')} | {three.strip('*')} |" in table
    best = hooks.figures.table("best")
    for scheme, value in (("w4g64", "18.78"), ("w3g64", "20.11"), ("w3g64", "21.89")):
        assert value in readme and f"| {scheme} | {value} |" in best
    mixed = hooks.figures.table("target_bits")
    for value in ("22.80", "23.62"):
        assert value in readme and f"| {value} |" in mixed
    for rate in ("454", "6154", "166", "2514", "495", "6260"):
        assert rate in readme and f"| {rate} |" in hooks.figures.table("decode")


@pytest.mark.parametrize(
    "name",
    [
        "cost",
        "cpu",
        "decode",
        "kernels",
        "quality",
        "best",
        "other_domain",
        "target_bits",
        "schemes",
    ],
)
def test_tables_are_whole(hooks: Any, name: str) -> None:
    rows = hooks.figures.table(name).splitlines()
    assert len(rows) > 3
    assert len({row.count("|") for row in rows}) == 1
    assert "nan" not in "".join(rows) and "None" not in "".join(rows)


def test_pages_are_filled(hooks: Any) -> None:
    assert hooks.filled("{{ figure kills }}, {{ figure faster 1 }}") == "100, 2.7"
    excerpt = hooks.filled("{{ source salience.grid.value_range }}")
    assert excerpt.startswith('```python title="src/salience/grid.py, line ')
    assert "def value_range(" in excerpt and "stretched to hold 0: two" not in excerpt
    assert "| `cli` |" in hooks.layers()
    for wrong in ("{{ nothing }}", "{{ source salience.grid.nothing }}", "{{ bits awq-9 }}"):
        with pytest.raises(KeyError):
            hooks.filled(wrong)


def test_the_page_of_options_has_them_all(hooks: Any) -> None:
    page = hooks.cli_page.page()
    for name, command in hooks.cli_page.commands().items():
        assert f"\n## {name}\n" in page
        own = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for param in command.params:
            if param.param_type_name == "option" and not param.hidden:
                assert all(f"`{option}`" in own for option in param.opts), (name, param.name)
    assert "One of `awq`, `gptq`, `rtn`, `nf4`." in page


@pytest.mark.parametrize("name", ["salience", "salience.runtime", "salience.hf"])
def test_the_reference_has_every_public_name(name: str) -> None:
    public = importlib.import_module(name).__all__
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES if path.parent != ROOT)
    for each in public:
        assert re.search(rf"^::: {name}\.{each}$|members: \[.*\b{each}\b", text, re.MULTILINE), each


def test_routes_on_the_server_page_exist() -> None:
    text = (ROOT / "docs/server.md").read_text(encoding="utf-8")
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "src/salience/server").glob("*.py")
    )
    routes = [
        r
        for row in re.findall(r"^\| (`/.*?) \|", text, re.MULTILINE)
        for r in re.findall(r"`(/[^`]*)`", row)
    ]
    assert len(routes) > 8
    for route in routes:
        assert f'"{route}"' in sources, route


def test_the_library_blocks_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the quickstart and the engine, on a tiny model in place of the real one."""
    monkeypatch.chdir(tmp_path)
    (quickstart,) = blocks(ROOT / "docs/quickstart.md", "python")
    (engine,) = blocks(ROOT / "docs/engine.md", "python")
    tiny = quickstart.replace('"smollm2-135m"', repr(str(llama))).replace("w4g64", "w4g32")
    calibration = ", calibration=salience.Calibration(samples=2, seqlen=32))"
    tiny = tiny.replace('scheme="w4g32")', f'scheme="w4g32"{calibration}')
    assert tiny.count("Calibration") == 1
    exec(compile(tiny, "quickstart", "exec"), {})
    assert 0 < float(capsys.readouterr().out) <= 1
    exec(compile(engine, "engine", "exec"), {})
    assert capsys.readouterr().out.strip()
