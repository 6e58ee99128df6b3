# `make demo` and `make test` set up their own environment first; the second call takes seconds.
# PYTHON=... chooses the interpreter the environment is made with (else the first one found that is new enough).

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
LINTERS := $(VENV)/.linters
OLDEST := .venv-oldest
# Type checkers outside the checkout find the package in this editable mode, not in the default one.
EDITABLE := --disable-pip-version-check --quiet --config-settings editable_mode=compat
INSTALL := $(BIN)/python -m pip install $(EDITABLE) --constraint constraints.txt
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
FIND_PYTHON = for python in $(or $(PYTHON),$(CANDIDATES)); do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; python=; done; \
	test -n "$$python" || { echo "Needs Python >= 3.10 with its venv module; tried: $(or $(PYTHON),$(CANDIDATES)). \
	Install one (on Debian and Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-oldest lint format api coverage clean

help:
	@echo "make demo       segment the bundled picture with the bundled checkpoint"
	@echo "make test       run the tests"
	@echo "make test-slow  run the slow tests too"
	@echo "make lint       check style, format and types"
	@echo "make format     mend style and format where that can be done automatically"
	@echo "make coverage   run the tests and print which lines they reach"
	@echo "make test-oldest  run the tests with the oldest versions that setup.py allows"
	@echo "make api        write the page of public names, san_hf/README.md"
	@echo "make clean      remove the environments and everything built"

setup: $(READY)

# A new setup.py or new pins install again into the same environment; one that no longer runs is replaced.
$(READY): setup.py pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(FIND_PYTHON); \
		echo "Making $(VENV) with $$("$$python" --version)"; "$$python" -m venv --clear $(VENV); }
	@echo "Installing the pinned packages. The first time this takes minutes: torch is large."
	@$(INSTALL) --editable ".[test]"
	@touch $@

demo: $(READY)
	$(BIN)/san-hf segment san_hf/checkpoints/picture-book/sample.png --output outputs/demo --overwrite \
		--classes "blue bird, orange house, sky, mountain, grass, water"

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(READY)
	RUN_SLOW=1 $(BIN)/python -m pytest -n 2 $(ARGS)

# Into the same environment, so that types of the packages in use are seen.
$(LINTERS): $(READY)
	@$(INSTALL) --editable ".[test,lint]"
	@touch $@

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

api: $(READY)
	$(BIN)/python scripts/make_api_page.py

# Of modeling/ and of child processes, too: see [tool.coverage] in pyproject.toml.
coverage: $(READY)
	@$(INSTALL) --editable ".[test,coverage]"
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# torch alone is the pinned one: its oldest version is checked elsewhere, as downloading it takes gigabytes.
test-oldest:
	@$(FIND_PYTHON); "$$python" -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python scripts/oldest_requirements.py > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install $(EDITABLE) --constraint $(OLDEST)/oldest.txt --editable ".[test]"
	$(OLDEST)/bin/python -m pytest -n 2 $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist outputs *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
