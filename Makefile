# Everything runs in .venv, which is made on first use. Needs Python >= 3.10 with venv, nothing else.
#
#   PYTHON=python3.12      the interpreter that makes the environment
#   TORCH_FLAGS='...'      extra pip flags for torch alone. On a Linux machine without an NVIDIA
#                          card, '--index-url URL' with the CPU index that PyTorch's install page
#                          names saves gigabytes
#   PROCESSES=1            how many share the training of the quick start; two, where there are
#                          two CPU cores
#   PYTEST_ARGS='...'      extra arguments for pytest

PYTHON ?= python3
TORCH_FLAGS ?=
PYTEST_ARGS ?=
PROCESSES ?= $(shell [ "$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)" -ge 2 ] && echo 2 || echo 1)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# As people write, not only five ways to say a thing: that takes more updates to learn.
QUICKSTART := data.generator.wordings=many memory_aware.train.steps=2400 \
	evaluation.recall.dialogues=50
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(DEV) ## make .venv with the package and the development tools

quickstart: $(BASE) ## train a nano model through all stages, then watch it remember (minutes, CPU)
	$(BIN)/rxlm pipeline run stages/nano-linear --out runs/nano --processes $(PROCESSES) $(QUICKSTART)
	$(BIN)/rxlm demo runs/nano

test: $(DEV) ## run the test suite
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist loadgroup $(PYTEST_ARGS)

lint: $(DEV) ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove caches and build output (keeps .venv and runs)
	rm -rf build dist site .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find rxlm tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip appears last when an environment is made, so a half-made one is made again.
$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found. rxlm needs Python >= 3.10: install one," \
	       "or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). rxlm needs Python >= 3.10:" \
	       "install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot make environments (its venv or ensurepip module is missing)." \
	       "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@"$(PYTHON)" -m venv $(VENV)

# torch goes first and alone: its version is settled before anything that depends on it is resolved.
$(BASE) $(DEV): $(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing torch"
	@$(PIP) install -c constraints.txt $(TORCH_FLAGS) torch==2.13.0
	@echo "Installing reactive-lm and its dependencies ($*)"
	@$(PIP) install -c constraints.txt -e '.$(if $(filter dev,$*),[dev])'
	@touch $@
