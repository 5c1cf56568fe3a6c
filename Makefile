PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real data is used where it lies beside the checkout; tests that need it are skipped, loudly, where it does not.
export INNERMAX_DATA ?= $(realpath ../shared/data)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types unit slow coverage browser release try wheel-test docs bench fuzz networks mutants clean

demo: $(VENV)/installed
	$(BIN)/innermax train digits --run-dir runs/digits --overwrite

test: lint types unit

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# In a random order, whose seed is printed.
unit: $(VENV)/installed browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs --numprocesses auto --dist worksteal

# The tests marked as slow, which `unit` leaves out.
slow: $(VENV)/installed browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -rs --numprocesses auto --dist worksteal -m slow

# Lines and branches that no test passes through; what runs in processes of its own is not seen.
coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal --cov

# The report's page is looked at in Chromium; where it is not there and cannot be installed, those tests are skipped.
browser:
	@{ command -v chromium && command -v chromedriver; } > /dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq \
	&& apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null; } \
	|| echo "Chromium is not here and cannot be installed: nobody looks at the report's page" >&2

# Wheel and source distribution, checked and tried in empty environments, each with the demo from another folder. Nothing
# is uploaded: what is in dist afterwards can be, with twine.
release: $(VENV)/installed
	grep -q "^## \[$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)\] - 20" CHANGELOG.md
	rm -rf dist build/release && mkdir -p build/release
	$(BIN)/hatchling build
	$(BIN)/pip install --quiet --constraint constraints.txt twine
	$(BIN)/twine check --strict dist/*
	for file in dist/*; do $(MAKE) --no-print-directory try FILE=$$file || exit 1; done

# One distribution, FILE, in an environment with nothing but what it asks for: first core alone, then the command line.
try:
	rm -rf build/try && mkdir -p build/try/elsewhere
	$(PYTHON) -m venv build/try/environment
	build/try/environment/bin/pip install --quiet --constraint constraints.txt torch
	build/try/environment/bin/pip install --quiet --constraint constraints.txt $(FILE)
	build/try/environment/bin/python tests/helpers/core_alone.py build/try/elsewhere --installed
	build/try/environment/bin/pip install --quiet --constraint constraints.txt "$(FILE)[cli]"
	cd build/try/elsewhere && ../environment/bin/innermax train digits --run-dir demo
	cd build/try/elsewhere && ../environment/bin/innermax evaluate innermax/digits-linf-0.15 --data digits --attacks pgd-20
	build/try/environment/bin/pip check

# The wheel alone; minutes, for torch.
wheel-test: $(VENV)/installed
	rm -rf dist
	$(BIN)/hatchling build -t wheel
	$(MAKE) --no-print-directory try FILE="$$(echo dist/*.whl)"

docs: $(VENV)/installed
	$(BIN)/python docs/assemble.py build/docs
	$(BIN)/zensical build --strict --clean

bench: $(VENV)/peers
	$(BIN)/python bench/speed.py --write results/speed.md

# Damaged files of every kind that innermax reads; an hour or two.
fuzz: $(VENV)/installed
	$(BIN)/python checks/fuzz.py

# Networks of many kinds, step by step; with timm and torchvision in the environment theirs, too, an hour or two.
networks: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python checks/networks.py --write results/networks.md

# How many of 100 small faults in the source the tests notice; an hour or two.
mutants: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python checks/mutants.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The libraries that the benchmarks compare with; torchattacks and secml-torch ask for what their PGD does not need.
$(VENV)/peers: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1 secml-torch==1.5 pyautoattack==0.2.0
	touch $@

clean:
	rm -rf $(VENV) build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
