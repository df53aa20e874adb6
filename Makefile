# Everything a fresh machine needs is Python 3.11 or newer and make:
#   make demo      installs into .venv, exports the demo network and proves it
#   make test      installs into .venv, runs the tests but the slow ones (at most 5 minutes on 2 cores)
#   make test-all  runs all tests
#   make lowest    installs the lowest versions that pyproject.toml promises into .venv-lowest
#   make test-lowest  runs tests with them
#   make runtimes  installs other runtimes and emulated processors into .runtimes (1 GB), without root rights
#   make test-runtimes  proves a network in each of them
#   make browser   installs Chromium, where apt may, and axe-core into .runtimes
#   make test-browser  tests the report page in Chromium
#   make wheel     builds a wheel, installs it into an empty environment and runs it there
#   make docs      installs into .venv, builds the documentation: site/index.html
#
# PYTHON   interpreter that makes .venv.
# TORCH    what pip installs as torch. It must be a CPU build: where pip's own sources offer only a CUDA build of this
#          version (Linux, without further configuration), point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL or
#          PIP_FIND_LINKS) or name a wheel: make demo TORCH=/path/to/torch-2.13.0+cpu-....whl
# RUNTIMES names of `intact runtimes` for the last two: all by default, make test-runtimes RUNTIMES="web avx2".
# WORKERS  processes of the test run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
RUNTIMES ?=
ROOT := $(if $(filter-out 0,$(shell id -u)),sudo -n)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) -qq install

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lowest test-lowest runtimes test-runtimes browser test-browser wheel docs check lint clean

help:
	@echo "make demo     export the demo network and prove it: out/demo/report.html"
	@echo "make test     run the tests, but not the slow ones"
	@echo "make test-all run all tests"
	@echo "make lowest   install the lowest versions that pyproject.toml promises"
	@echo "make test-lowest  run tests with the lowest versions that pyproject.toml promises"
	@echo "make runtimes install other runtimes and emulated processors into .runtimes"
	@echo "make test-runtimes  prove a network in each of them"
	@echo "make browser  install Chromium, where apt may, and axe-core into .runtimes"
	@echo "make test-browser  test the report page in Chromium"
	@echo "make wheel    build a wheel and run it in an empty environment"
	@echo "make docs     build the documentation: site/index.html"
	@echo "make check    format, lint, types, import rules, then the tests"
	@echo "make clean    remove .venv, .runtimes, out and caches"

demo: $(STAMP)
	$(BIN)/intact demo --out out/demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not runtimes and not browser"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

# The tests that use every requirement: the whole way from the command line, emission, bundles, signatures, pages.
# TORCH comes first, so that no CUDA build is drawn; it has to be the lowest version that is promised. Old versions call
# what the newest versions of their own requirements deprecate.
LOWEST := tests/end_to_end/test_pipeline.py tests/end_to_end/test_cli_export.py tests/exporter tests/calibrators/mixed_precision

lowest: .venv-lowest/.installed

test-lowest: lowest
	.venv-lowest/bin/python -m pytest -n $(WORKERS) -W ignore::DeprecationWarning -m "not slow and not runtimes and not browser" $(LOWEST)

.venv-lowest/.installed: pyproject.toml ci/lowest.py $(STAMP)
	@rm -rf .venv-lowest && $(PYTHON) -m venv .venv-lowest
	@$(PYTHON) ci/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip --disable-pip-version-check -qq install "$(TORCH)"
	.venv-lowest/bin/python -m pip --disable-pip-version-check -qq install -c .venv-lowest/constraints.txt -e ".[dev]"
	@touch $@

runtimes: $(STAMP)
	$(BIN)/intact runtimes --install $(RUNTIMES)

# One process: emulation keeps both cores busy.
test-runtimes: $(STAMP)
	INTACT_REQUIRED_RUNTIMES="$(or $(RUNTIMES),all)" $(BIN)/python -m pytest -m runtimes --durations=0 $(if $(RUNTIMES),-rs)

browser: $(STAMP)
	$(BIN)/python -c "import sys; from tests.support.browser import chromium; sys.exit(chromium() is None)" || \
	  { $(ROOT) apt-get -qq update && $(ROOT) apt-get -qq install --no-install-recommends chromium fonts-dejavu-core; }
	$(BIN)/python -c "from tests.support.browser import AXE; AXE.install()"

test-browser: $(STAMP)
	INTACT_REQUIRED_BROWSER=yes $(BIN)/python -m pytest -m browser

# The same torch as in .venv, so that nothing else is downloaded; run outside the checkout, so that only the wheel is seen.
wheel: $(STAMP)
	rm -rf dist out/wheel
	$(PIP) -q wheel --no-deps --wheel-dir dist .
	$(PYTHON) -m venv out/wheel
	out/wheel/bin/python -m pip --disable-pip-version-check -qq install "$(TORCH)" dist/*.whl
	cd out/wheel && bin/intact --version && bin/intact methods && bin/intact demo --out demo --quiet

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

check: lint test

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-lowest .runtimes out site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# A dry run tells what torch would bring before gigabytes are downloaded; the second look is at what is really there.
$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11 (or newer)."; exit 1; }
	@test -e $@ || rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu install python3-venv."; exit 1; }
	@echo "installing $(TORCH) and intact into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --dry-run --report $(VENV)/torch.json "$(TORCH)"
	@! grep -Eq '"name": "(nvidia-|cuda-|triton)' $(VENV)/torch.json || \
	  { echo "error: $(TORCH) would bring a CUDA stack from here; see TORCH at the top of the Makefile."; exit 1; }
	@$(INSTALL) "$(TORCH)"
	@$(INSTALL) -e ".[dev,docs]"
	@! $(PIP) list --format=freeze | grep -Ei '^(nvidia-|cuda-|triton)' || \
	  { echo "error: the packages above are a CUDA stack; remove $(VENV) and see TORCH at the top of the Makefile."; exit 1; }
	@touch $@
