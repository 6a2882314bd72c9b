# make plan    answers in one command, without torch:
#                  make plan ARGS='max-seq --model qwen3-8b --gpu h100-80gb'
# make help    lists the rest.
# When a command fails, make says its exit code and itself exits with 2; .venv-plan/bin/mstplan exits with the code itself.

PYTHON ?= python3
ARGS ?= max-seq --model llama3.1-8b --gpu-mem 80GB
PYTEST_ARGS ?=

.DEFAULT_GOAL := plan
.PHONY: plan test surveys lint format types check clean help

# $(call environment,FOLDER,WHAT TO INSTALL,IN WORDS): a fresh virtual environment with the pinned versions.
# What it says goes to stderr, so that `make -s plan ARGS='... --json'` leaves nothing but JSON on stdout.
define environment
@command -v $(firstword $(PYTHON)) >/dev/null || { \
	echo "$(firstword $(PYTHON)) is not there. Install Python 3.10 or newer, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "mstplan needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=/path/to/python3" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
@test ! -L $(1) || { echo "$(1) is a link to another folder, which would be emptied: remove it." >&2; exit 1; }
@echo "Setting up $(1), once: $(3)" >&2
@$(PYTHON) -m venv --clear $(1)
@PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(1)/bin/python -m pip install -qq -c constraints.txt -e '$(2)' >&2
@touch $@
endef

plan: .venv-plan/.ready  ## answer: make plan ARGS='max-seq --model NAME --gpu NAME'
	@.venv-plan/bin/mstplan $(ARGS)

test: .venv-test/.ready  ## run the tests: make test PYTEST_ARGS='tests/plan -x'
	.venv-test/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not survey" $(PYTEST_ARGS)

surveys: .venv-test/.ready  ## run the tests that try every class of transformers and every family
	.venv-test/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m survey tests/tracing/test_survey.py tests/train/test_survey.py tests/spec/test_survey.py tests/step/test_frozen.py tests/checking/test_measured_lengths.py

lint: .venv-test/.ready  ## ruff: likely mistakes, and code that is laid out otherwise than its formatter does
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --diff --quiet .

format: .venv-test/.ready  ## lay code out
	.venv-test/bin/ruff format .

types: .venv-test/.ready  ## mypy
	.venv-test/bin/mypy

check: lint types test surveys  ## lint, types, tests and surveys

clean:  ## remove what these commands made
	rm -rf .venv-plan .venv-test build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find mstplan tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  */  make \1	/p' Makefile

.venv-plan/.ready: pyproject.toml constraints.txt
	$(call environment,.venv-plan,.,mstplan and what it needs; no torch)

# On Linux the default torch brings CUDA libraries of several GB; pip settings that name an index of CPU builds spare them.
.venv-test/.ready: pyproject.toml constraints.txt
	$(call environment,.venv-test,.[test],mstplan with torch and the tools that check it)
