# The commands a user types. `.ci/run` calls the same ones.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/ready
DEMO   := launch/experiments/demo.toml
BASELINE := launch/experiments/baseline_10m$(if $(VARIANT),_$(VARIANT)).toml

.DEFAULT_GOAL := help
.PHONY: help setup demo baseline test test-slow test-ranks test-all check format clean

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+: +##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## make .venv with everything, at the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: 3.11 or newer is needed; try make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,data,deepspeed,wandb,results,dev]'
	@touch $(READY)

demo: $(READY)   ## Tiny Shakespeare -> shards -> grid -> training -> fit -> report, on this machine
	@$(PY) -m data_prep prepare demo --dir data/demo
	@$(PY) -m launch submit $(DEMO) --cluster local
	@$(PY) -m results report $(DEMO)

baseline: $(READY) ## the video's 10M model, 5,000 steps; VARIANT=nanogpt for nanoGPT's settings. The same command goes on.
	@$(PY) -m data_prep prepare shakespeare-char --dir data/shakespeare-char
	@$(PY) -m harness bench $(BASELINE) --probe
	@$(PY) -m launch submit $(BASELINE) --cluster alone
	@$(PY) -m results baseline $(BASELINE)

test: $(READY)   ## the fast tests
	@$(PY) -m pytest -m "not slow and not ranks"

test-slow: $(READY) ## the tests that take minutes
	@$(PY) -m pytest -m slow

test-ranks: $(READY) ## engines compared and faults injected on real ranks, for many minutes
	@$(PY) -m pytest -m ranks

test-all: $(READY) ## every test
	@$(PY) -m pytest

check: $(READY)  ## format, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: $(READY) ## let ruff rewrite the format and what it can mend
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean:           ## remove .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
