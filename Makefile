# `make demo` and `make test` need nothing but python3 with venv: the set-up below is done once, and again when it changes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
# Two workers, four where there are cores for them
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$(( n < 2 ? 2 : n > 4 ? 4 : n )))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NB ?= $(sort $(wildcard nbs/[0-9]*.ipynb))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One thread: small networks gain nothing from more, and stored outputs stay the same from machine to machine.
test coverage faults claims execute: export OMP_NUM_THREADS := 1

.PHONY: help setup demo test coverage faults claims export execute book bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv and install the package with its development tools

$(READY): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing. On Debian or Ubuntu: sudo apt-get install python3 python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
		|| { echo "Python's venv is missing. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (PyTorch is large: a minute or a few) ..."
	@$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python -m pip install -q -e ".[dev]" -c constraints.txt
	@touch $@

demo: setup  ## train every strategy, backprop and references on bundled digits, print both read-outs, draw a figure
	@$(BIN)/ff-research compare

test: setup  ## run the tests, and the chapters but the ten longest (ARGS=--slow for all, ARGS="-k data" to choose)
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

coverage: setup  ## the same, with the lines of the package that nothing ran
	@$(BIN)/python -m pytest -n $(JOBS) --cov=ff_research --cov-report=term-missing $(ARGS)

RELIABILITY := ff_research/published/reliability
faults: setup  ## kill runs, stage mishaps, feed hostile files, soak for an hour: what the chapter on reliability shows
	@$(BIN)/python -m tests.faults.kills --count 200 --out $(RELIABILITY)/kills.jsonl
	@$(BIN)/python -m tests.faults.mishaps --out $(RELIABILITY)/mishaps.jsonl
	@$(BIN)/python -m tests.faults.fuzz --cases 10000 --out $(RELIABILITY)/fuzz.jsonl
	@$(BIN)/python -m tests.faults.soak --minutes 60 --out $(RELIABILITY)/soak.jsonl

claims: setup  ## derive every claim of README and key findings from its rows again, and fail where one does not hold
	@$(BIN)/python -c "import sys; from ff_research.claims import main; sys.exit(main())"

export: setup  ## write ff_research/ from the notebooks
	@$(BIN)/nbdev_export

execute: export  ## run the notebooks and store their outputs (NB=nbs/103_goodness.ipynb for one)
	@for nb in $(NB); do echo "$$nb"; $(BIN)/python scripts/execute.py "$$nb" && $(BIN)/nbdev_clean --fname "$$nb" || exit 1; done

# Quarto keeps filtered notebooks until they change, so a change in settings.ini or the filter has to touch them.
book: export  ## render the book into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo "Rendering the book needs Quarto 1.7 or newer on the PATH: https://quarto.org/docs/get-started" >&2; exit 1; }
	@if [ settings.ini -nt _docs/index.html -o scripts/book_filter.py -nt _docs/index.html ]; then touch nbs/*.ipynb; fi
	@$(BIN)/ff-research leaderboard --html nbs/leaderboard.html
	@PATH="$(abspath $(BIN)):$$PATH" QUARTO_PYTHON="$(abspath $(BIN))/python" quarto render

bench: setup  ## how much of a training step is its matrix products
	@$(BIN)/ff-research bench

clean:  ## remove what was built (not .venv, not results/)
	@rm -rf _docs .quarto build dist htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
