# Everything a newcomer needs; each target does its own set-up in $(VENV).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= weights/default
DEVICE ?= auto

.PHONY: serve test check bench bench-gpu docs setup

serve: $(STAMP)
	exec $(BIN)/speechllm serve --model "$(MODEL)" --host "$(HOST)" --port "$(PORT)" --device "$(DEVICE)"

# Most of the time goes into starting servers, which leaves a core idle.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi
	$(MAKE) --no-print-directory test

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.decode_step --output benchmarks/results/decode-step
	$(BIN)/python -m benchmarks.suite --output benchmarks/results/suite
	$(BIN)/python -m benchmarks.startup --output benchmarks/results/startup

bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

setup: $(STAMP)

# The lock lets two of these run side by side; the second finds the first one's work done. setuptools is installed
# ahead of the project so that the build uses the pinned one, and not asked to warn of what editable installations are.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, and $(PYTHON) is {sys.version.split()[0]}: name another with make PYTHON=python3.12")'
	@exec 9> $(VENV).lock; flock 9; \
	if [ $@ -nt pyproject.toml ] && [ $@ -nt constraints.txt ]; then exit 0; fi; \
	echo "Installing into $(VENV); the first time this downloads torch and takes minutes"; \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools; \
	PYTHONWARNINGS=ignore:Editable $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,docs,tensorboard]'; \
	touch $@
