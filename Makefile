# `make demo`, `make test`, `make check`: each sets up what it needs on a machine with Python 3.11 and a network.
#
#   make demo        train, harden and attack a tiny model, and show its card
#   make test        the fast tests, on a CPU
#   make test-slow   the tests that take minutes; HARDENER_DATA names the folder of data sets that some of them need
#   make check       lint, format, types
#   make docs        write docs/reference/ anew from the code
#   make clean       remove the environment and what tools left behind

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.stamp
# One thread per process: the models of demo and tests are too small to gain from more.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check docs clean

demo: $(READY)
	$(BIN)/hardener demo

test: $(READY)
	$(BIN)/pytest

test-slow: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[fuzz]"
	$(BIN)/pytest -m slow

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/reference.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes by itself: beside other requirements pip would not take a CPU build that lies at hand.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
