# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# One process a core; tests that lie together stay together until a worker runs dry.
WORKERS := -n logical --maxprocesses 8 --dist worksteal

# What `make test-torch` installs, in an environment of its own.
TORCH ?= 2.15.0
TRITON ?= 3.9.0
TRANSFORMERS ?= 5.24.0
OTHER := .venv-$(TORCH)

.PHONY: demo test test-slow test-torch lint docs golden clean

demo: $(VENV)/.installed-demo  ## embed sentences with the real MiniLM, pruned and compiled
	$(BIN)/python examples/minilm.py

test: $(VENV)/.installed-dev  ## the whole suite but the long runs
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-slow: $(VENV)/.installed-dev  ## the long runs
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow $(WORKERS)

test-torch:  ## the suite on other versions, such as TORCH=2.11.0 TRITON=3.6.0 TRANSFORMERS=5.17.0
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	printf '%s\n' torch==$(TORCH) triton==$(TRITON) transformers==$(TRANSFORMERS) > $(OTHER)/constraints.txt
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check --constraint $(OTHER)/constraints.txt --editable ".[test]"
	$(OTHER)/bin/python -m pytest -m "not slow" $(WORKERS)

lint: $(VENV)/.installed-dev  ## what CI checks besides the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev  ## HTML in docs/_build
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build

golden: $(VENV)/.installed-dev  ## rewrite the golden files; review the diff
	-OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" --update-golden -q

clean:
	rm -rf $(VENV) .venv-* docs/_build build *.egg-info

$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[$*]"
	touch $@
