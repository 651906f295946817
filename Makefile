# Everything a developer does, each target on its own in a fresh clone:
#
#   make demo     four gunicorn workers, real requests, one right answer   (SERVE=1: stay up)
#   make test     linters, types, floors and all tests; what CI runs, with make newest
#   make check    linters, types and floors alone
#   make pythons  the tests of the core on every Python on the machine, CPython 3.11 to 3.15 and PyPy
#   make newest   those tests, and those of forks, exits and joining, on CPython 3.14 and 3.15, from Debian if need be
#   make fuzz     a million odd messages to what decodes them, in about ten minutes
#   make soak     one service under load for ten minutes, with kills   (SOAK_ARGS="--seconds N --seed N")
#   make bench    speed and memory beside prometheus_client and others; writes docs/benchmarks.md
#   make scale    what one aggregator sustains, in time and memory; writes docs/scale.md
#   make docs     the documentation, in docs/_build/html
#   make suites   the test suites of Flask, Werkzeug, Starlette and Tornado, bare and with the adapters

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STAMP := $(VENV)/.demo-installed
DEV_STAMP := $(VENV)/.dev-installed
BENCH_STAMP := $(VENV)/.bench-installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check pythons newest fuzz soak bench scale docs suites clean
.DELETE_ON_ERROR:

demo: $(DEMO_STAMP)
	@cd examples && exec ../$(BIN)/python demo.py

# Most tests wait for real servers most of the time, so three run side by side; then those that measure time.
# A half of which PYTEST_ARGS select nothing, for which pytest ends with 5, has not failed.
OR_NONE = $(if $(PYTEST_ARGS),|| test $$? -eq 5)

test: check
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m 'not alone' $(PYTEST_ARGS) $(OR_NONE)
	$(BIN)/python -m pytest -m alone $(PYTEST_ARGS) --numprocesses 0 $(OR_NONE)

check: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

pythons:
	@$(PYTHON) -m tests.interpreters $(PYTEST_ARGS)

newest:
	@$(PYTHON) -m tests.interpreters --newest --numprocesses 2 --dist worksteal \
		tests/distributed/test_forks.py tests/distributed/test_exits.py tests/distributed/test_joining.py $(PYTEST_ARGS)

fuzz: $(DEV_STAMP)
	$(BIN)/python -m tests.fuzz --messages 1000000

soak: $(DEV_STAMP)
	$(BIN)/python -m tests.soak $(SOAK_ARGS)

bench: $(BENCH_STAMP)
	$(BIN)/python benchmarks/run.py

scale: $(BENCH_STAMP)
	$(BIN)/python benchmarks/scale.py

docs: $(DEV_STAMP)
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html

suites: $(DEV_STAMP)
	$(BIN)/python -m tests.contrib.suites

clean:
	rm -rf $(VENV) .interpreters .parts .pytest_tmp docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[flask]' gunicorn
	@touch $@

$(BENCH_STAMP): pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[bench]'
	@touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(DEMO_STAMP)
