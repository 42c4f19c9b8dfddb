# Two commands do everything: `make demo` and `make test`. Both make .venv and install first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?=

.PHONY: demo test test-oldest fuzz faults mutants check site wheel install clean

demo: install
	$(BIN)/onebyone demo

# Two processes of one thread each: small networks gain nothing from more threads. The few tests that
# measure real time come first, by themselves.
test: install
	@status=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m clock || status=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  -m "not clock" || status=1; \
	exit $$status

# The same with the oldest versions that pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# Some CASES random inputs, about half of them records and plans; a sample of it is in `make test`.
CASES ?= 20000

fuzz: install
	ONEBYONE_FUZZ=$$(( $(CASES) / 20 + 1 )) OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n 2 --timeout=0 tests/fuzz

check: install
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

# The site, in site/. While writing: .venv/bin/mkdocs serve
site: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel as a user gets it: built, checked, installed into a new environment, the demo run there.
wheel:
	PYTHON="$(PYTHON)" scripts/wheel

# Kills, full disks and limits of memory: some dozens, in some minutes.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python scripts/faults.py

# Mutants of the mathematics: a test must fail for each. MUTANTS="statistics --sample 50" is less.
MUTANTS ?=

mutants: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py $(MUTANTS)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "onebyone needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e '.[dev]'
	@touch $@

clean:
	rm -rf dist site .venv .venv-oldest $(VENV) .mypy_cache .ruff_cache .pytest_cache .pytest_faults .hypothesis
