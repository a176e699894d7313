"""What importing the package and asking for help must not cost."""

import importlib
import json
import subprocess
import sys

import pytest

import salience

HEAVY = {
    "torch",
    "transformers",
    "triton",
    "fastapi",
    "ray",
    "lm_eval",
    "accelerate",
    "gguf",
    "prompt_toolkit",
    "rich",
    "typer",
    "datasets",
    "numpy",
    "matplotlib",
}


def loaded_by(program: str) -> set[str]:
    """The heavy packages that a Python program has loaded at its end."""
    ending = "\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))\n"
    done = subprocess.run(
        [sys.executable, "-c", program + ending], capture_output=True, text=True, check=True
    )
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_light() -> None:
    assert loaded_by("import salience; salience.__version__; dir(salience)") == set()


def test_the_check_sees_a_heavy_import() -> None:
    assert "numpy" in loaded_by("import numpy")


@pytest.mark.parametrize(
    "command",
    [[], ["plan"], ["quantize"], ["inspect"], ["eval"], ["chat"], ["report"], ["bench"]],
    ids=str,
)
def test_help_is_light(command: list[str]) -> None:
    program = f"""
import runpy, sys
sys.argv = ["salience", *{command!r}, "--help"]
try:
    runpy.run_module("salience", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
else:
    raise AssertionError("help did not exit")
"""
    assert loaded_by(program) <= {"rich", "typer"}


def test_scheme_and_errors_are_light() -> None:
    program = "import salience; salience.Scheme.parse('w4g64'); salience.SalienceError"
    assert loaded_by(program) == set()


@pytest.mark.parametrize("name", salience.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(salience, name)
    assert value.__name__ == name
    assert getattr(importlib.import_module(value.__module__), name) is value


def test_public_names_are_listed() -> None:
    assert dir(salience) == salience.__all__
    assert salience.__all__ == sorted(salience.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = salience.nothing  # type: ignore[attr-defined]
