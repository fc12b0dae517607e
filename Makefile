# Development. `make demo` shows the main job, `make test` checks everything that this machine can check.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo run test lint types unit system bench clean
SHELL := /bin/sh

help:           ## tell what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# need(package, what Python can do where it is installed): a Debian package that a minimal system lacks. Root gets it
# installed, everybody else is told.
define need
$(PYTHON) -c '$(2)' 2>/dev/null || { \
  echo "$(1) is missing on this machine"; \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo "installing it: apt-get install $(1)"; \
    export DEBIAN_FRONTEND=noninteractive; { apt-get install -y -qq $(1) || { apt-get update -qq && apt-get install -y -qq $(1); }; } >/dev/null 2>&1 || exit 1; \
  else echo "install it first; on Debian: sudo apt install $(1)" >&2; exit 1; fi; }
endef

# One stamp for what is installed: made again when the project's requirements change.
$(VENV)/stamp-run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(call need,python3-venv,import ensurepip)
	@$(call need,libgomp1,import ctypes; ctypes.CDLL("libgomp.so.1"))
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing llmstudiod with its embedded engine into $(VENV) (some 250 MB, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[engine,demo]'
	@touch $@

$(VENV)/stamp-dev: $(VENV)/stamp-run
	@echo "installing the tools for tests"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/stamp-run   ## serve a tiny model, chat with it, tell what happened
	@$(BIN)/python -m llmstudiod.demo

run: $(VENV)/stamp-run    ## leave the daemon in the foreground with the demo's model
	@exec $(BIN)/python -m llmstudiod.demo --serve

test: $(VENV)/stamp-dev   ## lint, types, and every test that this machine can run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: $(VENV)/stamp-dev   ## lint and format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/stamp-dev  ## check the types
	$(BIN)/mypy

unit: $(VENV)/stamp-dev   ## the fast tests
	$(BIN)/python -m pytest tests/unit tests/integration

system: $(VENV)/stamp-dev ## the tests in a booted host (root)
	$(BIN)/python -m pytest tests/system

bench: $(VENV)/stamp-dev  ## all benchmarks, side by side
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:          ## remove what was made here
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
