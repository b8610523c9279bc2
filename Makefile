# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow test-real test-gpu check bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/medseg-ssl demo runs/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -q -m "slow and not realdata and not gpu" --timeout 1200

test-real: setup
	$(BIN)/python -m pytest -q -m "realdata and not gpu" --timeout 1200 -rs

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu --timeout 1200 -rs

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup  # MEDSEG_PEER_PYTHON names a Python that has nnunetv2
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/train_step.py --network all
	$(BIN)/python benchmarks/fit_overhead.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
