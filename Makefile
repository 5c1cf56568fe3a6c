PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real data is used where it lies beside the checkout; tests that need it are skipped, loudly, where it does not.
export INNERMAX_DATA ?= $(realpath ../shared/data)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types unit docs bench clean

demo: $(VENV)/installed
	$(BIN)/innermax train digits --run-dir runs/digits --overwrite

test: lint types unit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

unit: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs --numprocesses auto

docs: $(VENV)/installed
	$(BIN)/python docs/assemble.py build/docs
	$(BIN)/zensical build --strict --clean

bench: $(VENV)/peers
	$(BIN)/python bench/speed.py --write results/speed.md

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The libraries that the benchmarks compare with; torchattacks and secml-torch ask for what their PGD does not need.
$(VENV)/peers: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1 secml-torch==1.5 pyautoattack==0.2.0
	touch $@

clean:
	rm -rf $(VENV) build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
