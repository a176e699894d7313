"""What the site is made of beside its pages: figures, excerpts, diagrams, the command line.

A page asks for it with `{{ name argument }}`, and gets what the sources say at the time of the
build, so that nothing on a page is a copy that goes stale:

    {{ source salience.grid.make_grid }}   the code of a function, without its docstring
    {{ bits awq }}                         a diagram of what a format writes, found by writing
    {{ table quality }}                    a table of measured results
    {{ figure perplexity float }}          a number of them
    {{ layers }}                           the layers of tests/test_layers.py
    {{ packages }}                         what each package is for, by its docstring
    {{ slash }}, {{ settings }}            what `salience chat` understands
    {{ pairs }}                            what the doctor knows not to go together
    {{ scripts }}                          benchmarks/README.md

Three pages are made whole: the reference of the command line, from the options themselves, and the
two files beside README. Formulas become MathML, which browsers draw without a script.
"""

import ast
import re
from collections.abc import Callable, Iterable
from html import unescape
from pathlib import Path
from typing import Any

import cli_page
import diagrams
import figures
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_ASKED = re.compile(r"\{\{ (\w+)((?: [\w.@-]+)*) \}\}")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_SOURCE = '<details class="mkdocstrings-source"'
_ROOT_FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def source(name: str) -> str:
    """The code of a function, class or constant, without docstring, and where it is.

    Args:
        name: its full name.

    Raises:
        KeyError: there is none.
    """
    module, _, local = name.rpartition(".")
    path = Path("src", *module.split("."))
    path = path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
    text = (ROOT / path).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        targets = [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
        if local in (getattr(node, "name", None), *targets):
            lines = text.splitlines()
            decorators = getattr(node, "decorator_list", ())
            first = min([node.lineno, *(each.lineno for each in decorators)])
            last = node.end_lineno
            kept = [lines[first - 1 : last]]
            body = getattr(node, "body", None)
            if body and ast.get_docstring(node) is not None:
                kept = [lines[first - 1 : body[0].lineno - 1], lines[body[0].end_lineno : last]]
            code = "\n".join(line for part in kept for line in part)
            return f'```python title="{path}, line {first}"\n{code}\n```'
    raise KeyError(f"{path} has no {local}")


def layers() -> str:
    """The packages and modules of each layer, lowest first, from the test that holds them."""
    tree = ast.parse((ROOT / "tests/test_layers.py").read_text(encoding="utf-8"))
    table = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    packages = {name.rpartition(".")[0] for name in table}  # what is in them has the layers
    rows = ["| layer | modules |", "|---|---|"]
    for ten in sorted({layer // 10 for layer in table.values()}):
        names = {
            ".".join(name.split(".")[1:2])
            for name, layer in table.items()
            if layer // 10 == ten and name.count(".") and name not in packages
        }
        shown = ", ".join(f"`{name}`" for name in sorted(names) if not name.startswith("_"))
        rows.append(f"| {10 * ten} to {10 * ten + 9} | {shown} |")
    return "\n".join(rows)


def packages() -> str:
    """The first sentence of each package's docstring."""
    rows = []
    for path in sorted((ROOT / "src/salience").glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append((path.parent.name, " ".join(text.split()).split(". ")[0].rstrip(".")))
    return _two("package", rows)


def slash() -> str:
    """What can be said to `salience chat` instead of the model."""
    from salience.chat.commands import COMMANDS

    rows = ((f"{name} {each.arguments}", each.help) for name, each in COMMANDS.items())
    return _two("command", rows)


def settings() -> str:
    """What `/set` of `salience chat` sets."""
    from salience.chat.commands import SETTINGS

    return _two("setting", SETTINGS.items())


def pairs() -> str:
    """Packages that do not go together."""
    from salience.doctor.known import PAIRS

    rows = ["| packages | what happens | mend |", "|---|---|---|"]
    for pair in PAIRS:
        both = [
            f"{name} {its}".strip()
            for name, its in ((pair.one, pair.its), (pair.other, pair.others))
            if name
        ]
        rows.append(f"| {' with '.join(both)} | {pair.problem} | {pair.mend} |")
    return "\n".join(rows)


def scripts() -> str:
    """The tables of `benchmarks/README.md`."""
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    return "\n".join(line.replace("## ", "### ") for line in text.splitlines()[1:])


def _two(head: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = (f"| `{name.strip()}` | {text} |" for name, text in rows)
    return "\n".join([f"| {head} | |", "|---|---|", *lines])


_ANSWERS: dict[str, Callable[..., str]] = {
    "bits": diagrams.bits,
    "figure": figures.figure,
    "layers": layers,
    "packages": packages,
    "pairs": pairs,
    "scripts": scripts,
    "settings": settings,
    "slash": slash,
    "source": source,
    "table": figures.table,
}


def filled(markdown: str) -> str:
    """A page with what it asks for.

    Raises:
        KeyError: it asks for what there is not.
    """

    def answer(match: re.Match[str]) -> str:
        return _ANSWERS[match[1]](*match[2].split())

    return _ASKED.sub(answer, markdown)


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "reference/cli.md", content=cli_page.page()))
    for page, name in _ROOT_FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    try:
        return filled(markdown)
    except (KeyError, TypeError) as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_page_content(html: str, **_: Any) -> str:
    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(unescape(match[2]), display=display))

    # The search finds what a page says; code would fill its list.
    html = html.replace(_SOURCE, f"{_SOURCE} data-search-exclude")
    return _FORMULA.sub(mathml, html)
