# Two commands do all the set-up: `make demo` and `make test`. Everything runs from .venv.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
READY := .venv/.ready
TRAIN ?= 0
RECORD ?= 0

.PHONY: setup demo test test-lowest test-slow quality style bench clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffusers-repr needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py --output_dir outputs/demo $(if $(filter 1,$(TRAIN)),--train)

# RECORD=1 writes tests/cpu_seconds.json, what each file of tests costs; `make quality` holds it against the budgets.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(if $(filter 1,$(RECORD)),--record-cost)

# An older set of libraries, in an environment of its own; what passes there: docs/results/lowest.md.
test-lowest:
	test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check -r constraints-lowest.txt
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(LOWEST)/python -m pytest -n 2 --dist worksteal -m "not slow" -o filterwarnings=

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	.ci/imports
	$(BIN)/interrogate diffusers_repr pipelines schedulers_ext
	$(BIN)/python -m tests.testers.cost

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-lowest outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
