# Everything that is done often. `make` alone lists the targets.
#
# PYTHON=python3.12 chooses the interpreter of a new .venv. ARGS="-k dpo" goes to pytest. WORKERS=4 runs the tests in four processes.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
CASE ?= dpo
KEY ?=
BUDGET ?= full

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_FLAGS := --quiet --disable-pip-version-check
PEERS := benchmarks/.venv-peers

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test test-all check lint format imports types docs docs-check bench-peers bench claims need-key tinylm freeze clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv and install Telos with its pinned dependencies (quick when done)

# Torch comes first and alone: a build that is already in .venv (another CUDA version, say) is kept as long as its version fits.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Telos needs Python 3.11 or newer: make setup PYTHON=python3.11" >&2; exit 2; }; \
	fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "installing telos and what it needs"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[mujoco,data,metrics,test,dev]'
	@touch $@

run: setup ## the whole path on bundled data: SFT, reward model, DPO, PPO, and a report (about 4 minutes on 2 cores)
	@$(BIN)/telos quickstart

test: check ## lint, types, docs, then every test but the long ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not long' $(ARGS)

test-all: check ## as test, with the long ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: lint imports types docs-check ## what can be seen without running a test

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

format: setup ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

imports: setup ## imports between the rooms run downwards only
	@$(BIN)/lint-imports --no-logo

types: setup ## pyright
	@$(BIN)/pyright

docs: setup ## write the generated tables of docs/ and README.md
	@$(BIN)/telos docs

docs-check: setup ## fail when a generated table is out of date
	@$(BIN)/telos docs --check

bench-peers: $(PEERS)/.installed ## the peers' own environment, for comparisons

$(PEERS)/.installed: benchmarks/peers.sh
	@echo "installing the peers (2.5 GB, several minutes)"
	@PYTHON=$(PYTHON) sh benchmarks/peers.sh
	@touch $@

bench: setup bench-peers ## ours and a peer in turn, and a record: make bench CASE=dpo
	@$(BIN)/python benchmarks/run.py $(CASE)

claims: need-key setup ## run a claim and write its record: make claims KEY=simpo BUDGET=smoke
	@$(BIN)/telos claims run $(KEY) --budget $(BUDGET)

# Before setup: a forgotten word must not cost an installation.
need-key:
	@test -n "$(KEY)" || { echo "say which: make claims KEY=simpo (the keys: telos list --status ready)" >&2; exit 2; }

tinylm: setup ## train the bundled model anew (about 40 minutes on 2 cores)
	@$(BIN)/python -m telos.models.tinylm --out src/telos/assets/tinylm

freeze: setup ## write constraints.txt from what .venv holds
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed -e '/^#/d' -e 's/+[a-z0-9.]*$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## remove caches and build leftovers; .venv and runs/ stay
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests benchmarks examples -name __pycache__ -type d -not -path '*/.venv-*' -prune -exec rm -rf {} +
