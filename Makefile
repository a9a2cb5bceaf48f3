# Two commands do everything on a fresh machine: `make demo` and `make test`. The README has the plain pip commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,cpu,rtx,dev
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest --durations=10

.PHONY: demo check test test-long lint format clean

demo: $(STAMP)
	$(BIN)/sdq-deploy demo --out build/demo

# For every save: what needs no export and no training.
check: lint
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not export and not slow and not long"

# Whole files are dealt out: a file's tests share what is expensive.
test: lint
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

# What is long by nature.
test-long: lint
	$(PYTEST) -m long

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist
