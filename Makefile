# make train: environment, digits, the default job.  make test: lint and the suite.  make help: the rest.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PARITY := .venv-parity
CONFIG ?= configs/digits_vit.py
NOTEBOOK ?=
SHARD ?= 1/1
PART ?= 1/12
# The newest Python there is, on the PATH or among pyenv's.
HIGH := $(shell for p in python3.13 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.13.*/bin/python \
  python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12.*/bin/python; do \
  "$$p" -c 'import sys' 2>/dev/null && echo "$$p" && break; done)

.PHONY: help train plan-tools test test-slow test-high faults parity notebooks lint format golden clean

help:
	@echo "make train       install into $(VENV) and train $(CONFIG); again: go on, or say it is done"
	@echo "make plan-tools  what lsdl.plan --target compiles with, into \$$LSDL_PLAN_TOOLS or the user's cache"
	@echo "make test        lint and the suite, without what is marked slow or faults: about 14 minutes on two cores"
	@echo "make test-slow   the slow tests; SHARD=k/n runs the k-th of n parts"
	@echo "make test-high   make test once more, on the newest Python and jax found; SHARD=k/n likewise"
	@echo "make faults PART=k/12   the long fault tests, each part at most 15 minutes on 2 quiet cores;"
	@echo "                 PART=rest: those that no part has run yet"
	@echo "make parity      our models against Hugging Face's, in $(PARITY); GOLDEN=1 rewrites its golden files"
	@echo "make notebooks   the notebooks, run, as pages in build/notebooks; NOTEBOOK=02_sharding: that one"
	@echo "make format      let ruff format and mend"
	@echo "make golden      rewrite the golden curves and shardings (say why in the commit)"
	@echo "make clean       remove the environments and caches, never runs/"

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "lsdl needs Python 3.11, 3.12 or 3.13 on the PATH."; exit 2; }
	@echo "Installing lsdl into $(VENV) with $$($(PYTHON) --version), about a minute ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(VENV)/installed
	@$(BIN)/python -m lsdl.train --config $(CONFIG)

# 1.3 GB on disk, beside the environment: jax would load what lies in it whenever it starts.
plan-tools: $(VENV)/installed
	@$(BIN)/python -m lsdl.planner.toolchain

# Its programs run once or twice, and LLVM's passes would take longer than they save: the golden curves
# and the other tiers have them.
test: lint
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow and not faults" --shard $(SHARD)

test-slow: $(VENV)/installed-dev plan-tools
	@$(BIN)/python -m pytest -n 2 -q -m "slow and not faults" --shard $(SHARD)

# What they counted is kept in .cache/faults; python -m tests.faults.merge puts it into the document.
faults: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -n 2 -q -m faults --shard $(PART) tests/faults

test-high:
	@if [ -z "$(HIGH)" ]; then echo "No Python newer than 3.11 was found: nothing to repeat."; \
	else $(MAKE) --no-print-directory test VENV=.venv-high PYTHON=$(HIGH); fi

$(PARITY)/installed: pyproject.toml constraints.txt constraints-parity.txt
	@echo "Installing torch and transformers into $(PARITY), some minutes ..."
	@test -x $(PARITY)/bin/python || $(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  -c constraints-parity.txt -e '.[dev,parity]'
	@touch $@

parity: $(PARITY)/installed
	@$(PARITY)/bin/python -m pytest -q -s tests/parity/live.py $(if $(GOLDEN),--rewrite-golden)

notebooks: $(VENV)/installed-dev
	@$(BIN)/python notebooks/render.py $(NOTEBOOK)

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/installed-dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

golden: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -q tests/test_golden.py tests/test_shardings_golden.py --rewrite-golden

clean:
	rm -rf .venv .venv-high $(PARITY) .cache .pytest_cache .ruff_cache build *.egg-info
