"""The scripts under benchmarks/: that each starts, and is in the table of their README."""

import runpy
import sys
from pathlib import Path

import pytest
from transformers.dependency_versions_table import deps

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
# These run where salience is not, beside packages that are not here.
ELSEWHERE = {"interop_autoawq", "interop_transformers", "make_bitsandbytes_checkpoints"}


def test_none_hides_a_package() -> None:
    """A script's folder comes first on its path, and Transformers asks for packages by name.

    One called kernels.py was taken for the package of that name, and nothing could be imported.
    """
    names = {name.lower().replace("-", "_") for name in deps} | sys.stdlib_module_names
    assert not {script.stem for script in SCRIPTS} & names


def test_all_are_in_the_table() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [s.name for s in SCRIPTS if f"`{s.name}`" not in text] == []
    results = sorted(path.name for path in (FOLDER / "results").iterdir())
    assert [name for name in results if f"`{name}`" not in text] == []


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.stem not in ELSEWHERE], ids=str)
def test_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: most of a new one's time would go into importing torch once more.
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("usage: ")
