# Needs Python 3.11 or newer with pip, and make. `make help` lists the targets.
PYTHON ?= python3
# torch goes in first, on its own, so that what follows keeps the build chosen here. For a build from another index:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help test lint demo slow sweep support clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf-tpp needs Python 3.11 or newer, got " + sys.version.split()[0] + "; set PYTHON, as in: make test PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) $(TORCH)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: .venv
.venv: $(STAMP) ## create the virtual environment .venv with the tested versions

test: lint ## everything CI runs: the linters, then the tests
	$(BIN)/python -m pytest

lint: $(STAMP) ## ruff, ruff format, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

demo: $(STAMP) ## run examples/demo.py
	$(BIN)/python examples/demo.py

slow: $(STAMP) ## the long tests that `make test` leaves out
	$(BIN)/python -m pytest -m slow

sweep: $(STAMP) ## check every causal language model of transformers, then write docs/support.md
	$(BIN)/python -m hf_tpp.check.sweep; status=$$?; $(MAKE) support && exit $$status

SUPPORT ?= docs/support/transformers-5.23.0.json
support: $(STAMP) ## write docs/support.md and docs/support/versions.md from the results of `make sweep`
	$(BIN)/python -m hf_tpp.check.support_table $(SUPPORT) > docs/support.md
	$(BIN)/python -m hf_tpp.check.versions_table $(SUPPORT) docs/support/*.json > docs/support/versions.md

clean: ## remove the virtual environment, the caches and what the demo wrote
	rm -rf $(VENV) build dist out demo_out *.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
