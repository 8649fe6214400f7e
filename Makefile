# make demo    what a teacher is worth, on real images, in a few minutes
# make serve   the server on http://127.0.0.1:8080, with an example task
# make test    the quick test suite
# make check   lint, types and the quick tests
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
SERVE ?= serve
PORT ?= 8080
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Compiling all modules takes longer than downloading them; Python compiles those that are imported, once.
INSTALL := install --no-compile --progress-bar off --quiet --constraint constraints.txt
export PYTHONUNBUFFERED := 1

.PHONY: help install install-dev demo serve test test-slow lint types check clean

help:
	@sed -n 's/^# make/make/p' Makefile

# An installed environment is kept until the project's own requirements change.
$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) scripts/check_machine.py $(VENV)
	@echo "making the environment $(VENV): about 3 minutes and 7 GB"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(INSTALL) --editable .
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	@echo "adding the test tools"
	@$(PIP) $(INSTALL) --editable '.[dev]'
	@touch $@

install: $(BIN)/.installed

install-dev: $(BIN)/.installed-dev

demo: $(BIN)/.installed
	@$(BIN)/cli demo --out $(OUT) $(if $(DATA),--data "$(DATA)") $(if $(TEACHER),--teacher-path "$(TEACHER)")

serve: $(BIN)/.installed
	@$(BIN)/python scripts/make_example_task.py $(SERVE)
	@$(BIN)/cli serve --port $(PORT) --datasets-root $(SERVE)/datasets --models-root $(SERVE)/models \
		--output-root $(SERVE)/output

test: $(BIN)/.installed-dev
	@$(BIN)/python -m pytest

test-slow: $(BIN)/.installed-dev
	@$(BIN)/python -m pytest -m slow --durations=30

lint: $(BIN)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(BIN)/.installed-dev
	@$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(OUT) $(SERVE) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
