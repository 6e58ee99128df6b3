# `make demo` and `make test` set up their own environment first; the second call takes seconds.
# PYTHON=... chooses the interpreter the environment is made with (else the first one found that is new enough).

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
FIND_PYTHON = for python in $(or $(PYTHON),$(CANDIDATES)); do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; python=; done; \
	test -n "$$python" || { echo "Needs Python >= 3.10 with its venv module; tried: $(or $(PYTHON),$(CANDIDATES)). \
	Install one (on Debian and Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint clean

help:
	@echo "make demo       segment the bundled picture with the bundled checkpoint"
	@echo "make test       run the tests"
	@echo "make test-slow  run the slow tests too"
	@echo "make lint       check the code's style"
	@echo "make clean      remove the environment and everything built"

setup: $(READY)

# A new setup.py or new pins install again into the same environment; one that no longer runs is made anew.
$(READY): setup.py pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(FIND_PYTHON); \
		echo "Making $(VENV) with $$("$$python" --version)"; "$$python" -m venv --clear $(VENV); }
	@echo "Installing the pinned packages. The first time this takes minutes: torch is large."
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

demo: $(READY)
	$(BIN)/san-hf segment san_hf/checkpoints/picture-book/sample.png --output outputs/demo --overwrite \
		--classes "blue bird, orange house, sky, mountain, grass, water"

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(READY)
	RUN_SLOW=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)
	@$(BIN)/ruff --version >/dev/null 2>&1 || $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt ".[lint]"
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist outputs *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
