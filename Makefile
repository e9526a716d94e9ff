# make demo   a virtual environment, demonstrations, a cloned policy, and the same policy tuned by DPPO
# make test   the same environment, and every test
# make quick  the tests that take seconds
# make check  what a commit must pass: ruff, pyright, the quick tests
# make bench  times what users wait for, beside the textbook version of it; nothing else should run
# make lock   renews constraints.txt from what is installed

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := $(VENV)/bin
RUNS := runs/demo
SEED := 0
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test quick check bench lock install

install: $(VENV)/.installed

# Torch first, and alone: where its CPU build is offered it is taken, and nothing after it asks for another.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	test -f $(RUNS)/demonstrations.hdf5 || $(BIN)/python scripts/demonstrations.py seed=$(SEED) out=$(RUNS)/demonstrations.hdf5
	$(BIN)/python pretrain.py seed=$(SEED) data.path=$(RUNS)/demonstrations.hdf5 out=$(RUNS)/bc resume=auto
	$(BIN)/python finetune.py algo=dppo seed=$(SEED) policy_from=$(RUNS)/bc out=$(RUNS)/dppo resume=auto

test: install
	$(PYTEST)

quick: install
	$(PYTEST) -m "not slow"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(PYTEST) -m "not slow"

bench: install
	$(BIN)/python scripts/benchmark.py
	$(BIN)/python scripts/results.py

lock: install
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
