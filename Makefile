# `make demo`: a venv, the package, pictures from every embedded checkpoint. `make test`: the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: demo test slow clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e . $(TORCH)
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]" $(TORCH)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py demo

test: $(VENV)/.tested
	$(BIN)/python -m pytest

slow: $(VENV)/.tested
	NEXUS_SLOW=1 $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) demo
