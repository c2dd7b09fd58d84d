# SPDX-License-Identifier: Apache-2.0
# Each target does all of its own setting up. Needs: make, g++, Python >= 3.10 with headers and venv.
#
#   make demo    trains a small GPT with these kernels and with plain PyTorch, side by side
#   make test    every test this machine can run (with a GPU: the GPU tests too)
#   make build   the libraries and an editable install in .venv, again and again quickly
#   make lint    formatters, linters, types          make format  lets the formatters write
#   make wheel   the release wheel, in dist/         make bench   operator benchmarks
#   make docs    the site of docs/, in build/site
#   make clean   removes builds (not .venv)
#
# FASTKERN_CUDA=auto|on|off and CUDAARCHS="90a;100" choose what is compiled; JOBS=n how many at a time.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)
FASTKERN_CUDA ?= auto
DEMO_ARGS ?= --kernels both
BENCH_ARGS ?=
PYTEST_ARGS ?=
FASTKERN_BUILD ?= build/editable
export PYTHON VENV JOBS FASTKERN_CUDA CUDAARCHS FASTKERN_BUILD

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

.PHONY: demo test build build-tests lint format wheel bench docs clean

demo: build $(STAMPS)/bench
	$(BIN)/python examples/train_gpt.py $(DEMO_ARGS)

test: build-tests
	tools/run_tests.sh $(PYTEST_ARGS)

bench: build $(STAMPS)/bench
	$(BIN)/python -m fastkern.bench $(BENCH_ARGS)

build: $(STAMPS)/env
	tools/build_editable.sh

build-tests: $(STAMPS)/env $(STAMPS)/bench $(STAMPS)/test
	tools/build_editable.sh tests

docs: build $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(STAMPS)/env $(STAMPS)/lint $(STAMPS)/test
	tools/lint.sh

format: $(STAMPS)/env $(STAMPS)/lint
	tools/lint.sh fix

wheel: $(STAMPS)/env $(STAMPS)/wheel
	tools/build_release_wheel.sh

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The virtual environment with torch and the build tools.
$(STAMPS)/env: tools/setup_env.sh
	tools/setup_env.sh
	@mkdir -p $(STAMPS) && touch $@

# The extras of pyproject.toml.
$(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/test $(STAMPS)/lint $(STAMPS)/wheel: $(STAMPS)/%: pyproject.toml $(STAMPS)/env
	$(BIN)/python tools/install_extra.py $*
	@touch $@
