# make demo   a virtual environment, demonstrations, a cloned policy, and the same policy tuned by DPPO
# make test   the same environment, and every test, with a report of branch coverage
# make quick  the tests that take seconds
# make lint   ruff and pyright
# make check  lint, and the quick tests: what a commit must pass
# make bench  run all benchmarks and update docs/performance.md; nothing else should run on the machine
# make lock   update constraints.txt from the installed packages

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := $(VENV)/bin
RUNS := runs/demo
SEED := 0
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test quick lint check bench lock install

install: $(VENV)/.installed

# Torch first and alone, so that the CPU build is used where it is available; the other packages then keep it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	test -f $(RUNS)/demonstrations.hdf5 || $(BIN)/dprl demos seed=$(SEED) out=$(RUNS)/demonstrations.hdf5
	$(BIN)/dprl pretrain seed=$(SEED) data.path=$(RUNS)/demonstrations.hdf5 out=$(RUNS)/bc resume=auto
	$(BIN)/dprl finetune algo=dppo seed=$(SEED) policy_from=$(RUNS)/bc out=$(RUNS)/dppo resume=auto

test: install
	$(PYTEST) --cov --cov-report=term

quick: install
	$(PYTEST) -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint quick

bench: install
	$(BIN)/python -m benchmarks.run
	$(BIN)/python scripts/tables.py

lock: install
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
