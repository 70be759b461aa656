# `make quickstart` trains a small model on the embedded data; `make test` lints and runs the tests.
# Each sets up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: setup quickstart test test-oldest test-newest lint format docs clean

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"error: Python {v.major}.{v.minor} was found, 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --upgrade pip
	$(BIN)/python $(PIP) --editable '.[test]'
	@touch $@

quickstart: setup
	$(BIN)/effseg train --config=afformer/synthetic --workdir=runs/quickstart

test: setup lint
	$(BIN)/python -m pytest -n 2

# The tests with the oldest supported release of every dependency (Python 3.11), and with the newest.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) --editable '.[test]' --constraint requirements/oldest.txt
	.venv-oldest/bin/python -m pytest -n 2

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[test]'
	.venv-newest/bin/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation in site/; a warning or a dead link is an error.
docs: setup
	$(BIN)/python $(PIP) --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs site .cache
