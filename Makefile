# Daily commands. `make demo` and `make test` need nothing but Python 3.11 or newer: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := $(VENV)/.docs

# More or fewer tries of `make storm`.
STORM_SCALE ?= 1

# Two processes: tests wait for files, servers and processes of their own, so that one leaves a processor idle.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help demo quick test test-docs docs storm lint bench gpu clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## Fetch, build, train and evaluate on the embedded data, without a network
	$(BIN)/mamldata fetch glyphs --root demo/data
	$(BIN)/mamldata build glyphs --root demo/data --out demo/glyphs-5w1s
	$(BIN)/mamldata verify demo/glyphs-5w1s
	$(BIN)/mamldata preview demo/glyphs-5w1s --out demo/episode.png
	$(BIN)/mamldata train demo/glyphs-5w1s --out demo/run --steps 150 --eval-every 75 --eval-episodes 50 --resume
	$(BIN)/mamldata eval demo/run demo/glyphs-5w1s --episodes 200

quick: $(READY)  ## Run the tests without those marked slow or real_data: at every edit
	$(PYTEST) -m "not slow and not real_data"

test: $(READY)  ## Run all tests; set MAMLDATA_TEST_DATA to a folder of real data to run those that need it
	$(PYTEST)

test-docs: $(READY)  ## Run the code blocks and commands of the documentation, small and without a network
	$(BIN)/python -m pytest -p tests.docs.blocks -W default README.md docs

docs: $(DOCS)  ## Build the site, with its notebooks run, into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

storm: $(READY)  ## Kill, damage and starve everything by the thousand, half an hour long; goes on where it stopped
	$(BIN)/python -m tests.storm --scale $(STORM_SCALE) --write docs/reliability.md

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## Run every benchmark on the embedded data; each prints JSON
	for name in preprocess build stream train memory; do $(BIN)/python benchmarks/$$name.py || exit 1; done

gpu: $(READY)  ## On a machine with a GPU: measure and prove what this project does there, in ten minutes, then its tests
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python -m pytest -m gpu

clean:  ## Remove what these commands made
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis storm

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"mamldata needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Choose one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable . --group test --group lint
	@touch $@

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@
