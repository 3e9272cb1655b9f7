# Everything happens in .venv. `make PYTHON=python3.12 test` chooses the interpreter that creates it.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed-test
COMPILED := .venv/.compiled-for-tests
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# DeepSpeed looks for ninja on PATH, and pip puts it next to python.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-quick test-full lint format clean

help:  ## show these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

install: $(STAMP)  ## create .venv and install everything into it (again only when setup.py changes)

$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ibq needs Python 3.10 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -e ".[test]"
	@touch $@

quickstart: install  ## install, then train and judge a small tokenizer on real photographs (minutes, CPU is enough)
	$(BIN)/ibq quickstart

$(COMPILED): $(STAMP)
	$(BIN)/python tests/ranks.py
	@touch $@

test: $(COMPILED)  ## install, then run the tests but for the longest (JOBS=2 files at a time)
	$(PYTEST) -m "not full"

test-quick: install  ## the tests that start no process
	$(PYTEST) -m "not ranks and not process and not full"

test-full: $(COMPILED)  ## every test
	$(PYTEST)

lint: install  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove build leftovers and caches; .venv, runs and shards stay
	rm -rf build dist ibq.egg-info .pytest_cache .ruff_cache
	find trainer model_zoo data tools ds_configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
