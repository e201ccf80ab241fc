# Every target does its own set-up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint parity clean

demo: $(VENV)/.base
	$(BIN)/jaxemo demo

test: $(VENV)/.test
	$(BIN)/python -m pytest tests --ignore=tests/parity

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy jaxemo kernels checkpoints

parity: $(VENV)/.parity
	$(BIN)/python -m pytest tests/parity -s

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[test,lint]'
	touch $@ $(VENV)/.base

$(VENV)/.parity: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[test,lint,parity]'
	touch $@ $(VENV)/.base $(VENV)/.test

clean:
	rm -rf $(VENV) build dist *.egg-info
