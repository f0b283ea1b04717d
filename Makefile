# One environment (.venv), made when missing from pyproject.toml and constraints.txt. Needs make and Python 3.11 to 3.13, nothing else.
# On Linux without a GPU the CPU build of PyTorch saves a large download:
#     make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2

BIN     := $(VENV)/bin
RUN     := $(VENV)/.run-installed
DEV     := $(VENV)/.dev-installed
SOURCES := src tests benchmarks examples

# Tests run in WORKERS processes with one thread each: more threads than cores makes small models many times slower.
PYTEST  := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help demo evaluate test test-slow check lint types imports docs benchmarks format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(RUN)  ## morph the small LLM, evaluate it, write runs/demo/report.html and report.json
	HF_HUB_OFFLINE=1 $(BIN)/metamorph demo

evaluate: $(RUN)  ## the metrics table of the shipped model
	HF_HUB_OFFLINE=1 $(BIN)/metamorph evaluate

test: $(DEV)  ## the default suite, at most 10 minutes on 2 cores
	$(PYTEST) -m "not slow and not multiprocess and not browser and not gpu"

test-slow: $(DEV)  ## several processes, faults, fuzzing; at most 25 minutes
	$(PYTEST) -m "(slow or multiprocess or browser) and not gpu"

check: lint types imports test  ## what CI runs first

lint: $(DEV)  ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(DEV)  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(DEV)  ## who may import whom
	$(BIN)/lint-imports --no-cache

docs: $(DEV)  ## the documentation site, in build/docs; fails on warnings
	$(BIN)/zensical build --strict --clean

benchmarks: $(DEV)  ## imports, data, waiting for data, generation: half an hour on an idle machine
	for name in imports data data_wait loader images index packing generation table; do $(BIN)/python benchmarks/$$name.py || exit 1; done

format: $(DEV)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove the environment and the caches, never runs/
	rm -rf $(VENV) .cache .ruff_cache .hypothesis .pytest_cache build dist

$(RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "$(PYTHON) is Python %d.%d but 3.11 to 3.13 is needed. Name another one: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[decoder,video,reporting]"
	@touch $@

$(DEV): $(RUN)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
