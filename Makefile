# Needs python3 (3.11 or newer) and make; everything else is installed into $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# Setuptools warns of every editable installation from a folder that holds the package.
INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet

.PHONY: help demo test check docs site pass bench clean

help:            ## Show this help.
	@sed -n 's/^\([a-z]*\): *.*## /\1\t/p' $(MAKEFILE_LIST)

$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ccompile needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) --editable '.[test]'
	@touch $@

demo: $(VENV)/.core    ## Compile the shipped example and print its evidence.
	mkdir -p out
	$(BIN)/ccompile examples/01_digits/digits.onnx -s examples/01_digits/spec.yaml -o out/digits.onnx

test: $(VENV)/.test    ## Run all tests.
	$(BIN)/python -m pytest

check: $(VENV)/.test   ## Lint, format, types, and that generated files are fresh.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.test    ## Refresh the schema and the pass reference.
	$(BIN)/python docs/generate.py

$(VENV)/.docs: $(VENV)/.core
	$(INSTALL) --editable '.[docs]'
	@touch $@

site: $(VENV)/.docs    ## Build the documentation site: out/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pass: $(VENV)/.test    ## Start a new pass: make pass NAME=verb-object
	$(BIN)/python docs/new_pass.py $(NAME)

bench: $(VENV)/.test   ## Measure what a compile costs on models of the onnx package.
	$(BIN)/python bench/overhead.py --shipped

clean:           ## Remove the environment and everything built.
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
