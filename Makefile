# Every target makes the virtual environment that it needs first; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With byte code: where PYTHONDONTWRITEBYTECODE is set, as in many images, every process would compile what it imports.
PIP_INSTALL := $(BIN)/pip install --quiet --compile --disable-pip-version-check --constraint requirements.lock

.PHONY: help install demo mlflow test test-services test-long check benchmark lock clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: $(VENV)/installed  ## Make .venv with the exact versions of requirements.lock
$(VENV)/installed: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP_INSTALL) --editable '.[test,check]'
	@touch $(VENV)/installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, see PYTHON=")'
	$(PYTHON) -m venv $(VENV)

demo: $(VENV)/installed  ## Digits -> shards -> two DDP workers -> registered model -> 1,000 images -> figures
	$(BIN)/python jobs/demo.py

mlflow: $(VENV)/installed  ## Open the MLflow UI over artifacts/mlflow.db on 127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///artifacts/mlflow.db --host 127.0.0.1 --port 5000

# What shares one Ray, or one MLflow server, runs in one process, one after the other; the rest runs beside it.
# A process that dies ends the run and names its test: replaced, it leaves xdist's groups waiting for ever.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --max-worker-restart 0

test: $(VENV)/installed-dev  ## The tests that need nothing but the package index
	$(PYTEST)

test-services: $(VENV)/installed-dev  ## The tests with real servers, a cluster and jobs as processes (installs Debian packages as root)
	tests/debian_packages.sh
	$(PYTEST) --no-loadscope-reorder -m "services and not slow"

test-long: $(VENV)/installed-dev  ## The same with more seeds and larger sizes, for hours; write what came of it into tests/LONG.md
	tests/debian_packages.sh
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-dev  ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

benchmark: $(VENV)/installed  ## Training speed of the pipeline beside bare DDP processes
	$(BIN)/python jobs/benchmark.py train

lock: $(VENV)/installed-dev  ## Write requirements.lock from what is installed (after an upgrade by hand)
	$(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' > requirements.lock

clean:  ## Remove .venv and everything that the demo made
	rm -rf $(VENV) artifacts
