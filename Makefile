# Everything runs in a virtual environment of its own, .venv. The first use of a target installs what it needs.
#
# torch: on Linux without an NVIDIA GPU the CPU build of TORCH_VERSION is installed, from your package index when that
# has it, else from PyTorch's own CPU index; everywhere else the ordinary build. To choose another, name it:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH ?=
TRIAL := build/trial
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CPU_ONLY := $(shell [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: help demo test test-slow test-gpu test-versions check docs fix bench dist clean

help:
	@echo "make demo       install, quantize the built-in model, show the report"
	@echo "make test       install what tests need, run them"
	@echo "make check      format, lint, types, layers, fast tests"
	@echo "make docs       build the documentation into build/site, check links and anchors"
	@echo "make fix        format and repair what can be repaired"
	@echo "make test-slow  tests that take minutes or need outside software (see CONTRIBUTING.md)"
	@echo "make test-gpu   tests that need a CUDA GPU"
	@echo "make test-versions  a part of the tests with the oldest and newest supported packages"
	@echo "make bench      timings; docs/benchmarks.md says what was measured"
	@echo "make dist       wheel and sdist in dist/, installed in a fresh environment and tried there"

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/pip
ifneq ($(TORCH),)
	$(PIP) $(TORCH)
else ifeq ($(CPU_ONLY),yes)
	$(PIP) "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH_VERSION)"
else
	$(PIP) "torch==$(TORCH_VERSION)"
endif
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable ".[test,dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV)/.dist: | $(BIN)/pip
	$(PIP) "build>=1.3,<2" "twine>=6.2,<8"
	touch $@

demo: $(VENV)/.run
	$(BIN)/qtool ptq recipes/quickstart.yaml --overwrite

# one process for each core, each with one thread of its own
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

test-versions: $(VENV)/.dev
	$(BIN)/python scripts/test_versions.py

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/quant tests/config tests/test_surface.py

# --strict: a warning, such as a link that leads nowhere, is an error
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python scripts/bench/table.py

# the wheel is built from the sdist; it is tried in an environment and a folder that know nothing of this tree
dist: $(VENV)/.dist
	rm -rf build dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(MAKE) --no-print-directory VENV=$(TRIAL) $(TRIAL)/.torch
	$(TRIAL)/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	$(TRIAL)/bin/pip check
	cd "$$(mktemp -d)" && env -u PYTHONPATH "$(CURDIR)/$(TRIAL)/bin/qtool" ptq quickstart && ls -l "$$PWD"/out/quickstart/report.html
	ls -l dist
	du -sh $(TRIAL)
	@echo "$$($(TRIAL)/bin/pip list --format=freeze | wc -l) packages"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
