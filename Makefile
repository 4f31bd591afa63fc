# Every target sets up what it needs: `make demo` or `make test` on a fresh clone is enough.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The tensors of the tests and of the demo are small: more threads would wait for each other.
export OMP_NUM_THREADS ?= 2

# Three workers of pytest, as many tests wait for other processes; a file of tests to each at a time:
# what a file shares is made once. In their order: those of few long tests are then not the last,
# for which one worker would remain.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-all test-cluster test-cluster-quick cluster cluster-stop check clean
.DELETE_ON_ERROR:

help:
	@echo 'make setup     find Python >= 3.12 (or PYTHON=/path), make $(VENV), install Strata (about 6 GB)'
	@echo 'make demo      train a small model on real text, stop it, resume it, draw its curves; the same in NVFP4, compared'
	@echo 'make test      the tests but the slow ones'
	@echo 'make test-all  all tests but those on a cluster'
	@echo 'make cluster   start a small Slurm on this machine (root; installs Debian packages)'
	@echo 'make cluster-stop  end it'
	@echo 'make test-cluster  tests on such a Slurm, which they start themselves (half an hour)'
	@echo 'make test-cluster-quick  the first two minutes of them'
	@echo 'make check     format, lint and types'
	@echo 'make clean     remove caches; keeps $(VENV) and runs/'

setup: $(INSTALLED)

# An environment that was left half made, or has another Python, is made anew.
$(INSTALLED): setup.py pyproject.toml
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	    python=$$(.ci/find_python) && \
	    echo "Making $(VENV) with $$python" && \
	    "$$python" -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m train.demo experiment=tiny stage.train_steps=160 run.dir=runs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not cluster'

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m 'not cluster'

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster tests/cluster

test-cluster-quick: $(INSTALLED)
	$(BIN)/python -m pytest -m 'cluster and not slow' tests/cluster

cluster: $(INSTALLED)
	$(BIN)/python -m tests.cluster.lab start

cluster-stop: $(INSTALLED)
	$(BIN)/python -m tests.cluster.lab stop

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
