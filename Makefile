# `make` lists the targets. Any GNU make since 3.81, any POSIX shell.

.DEFAULT_GOAL := help
.PHONY: help venv compare test check lint types imports format gpu tune clean

VENV ?= .venv
OUT ?= bench/out
BIN := $(VENV)/bin

# Read by tools/venv.sh, which makes $(VENV) when it is missing, unfinished or out of date. Without any of the three an
# existing $(VENV) keeps what it was made with.
export PYTHON TORCH TORCH_INDEX

help:
	@echo 'make compare   one network, three ways of running it, on the same photographs: checked and timed'
	@echo 'make test      the test suite             PYTEST_ARGS="-k lrn" adds to it, PYTEST_ARGS=--run-slow too'
	@echo 'make check     ruff, mypy, and who may import whom'
	@echo 'make format    let ruff format the code and repair what it safely can'
	@echo 'make gpu       on a machine with a GPU: its tests, timings and ceilings, as JSON and a log in OUT=$(OUT);'
	@echo '               PYTHON=python3 runs it with that Python as it is, and installs nothing;'
	@echo '               GPU_PROFILE=quick (4 minutes) or full (9), GPU_SECONDS=N, GPU_DRY_RUN=1 only lists the steps'
	@echo 'make tune      on a machine with a GPU: the fastest launch of each kernel, and where cuDNN is faster, as a table'
	@echo 'make venv      only make, or bring up to date, $(VENV), which the others do first when needed'
	@echo 'make clean     remove $(VENV) and the tools'"'"' caches'
	@echo
	@echo 'PYTHON=python3.12      build $(VENV) from this Python (3.10 to 3.14) and no other'
	@echo 'TORCH_INDEX=URL        take torch from another index, such as a CPU build:'
	@echo '                       TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	@echo 'TORCH=system           use the torch (2.10 or newer) that PYTHON has; TORCH=pypi goes back'
	@echo 'VENV=DIR  ARGS="..."   another folder; more arguments for compare, gpu and tune'

venv:
	@sh tools/venv.sh $(VENV)

compare: venv
	$(BIN)/python -m alexnet_kernels compare $(ARGS)

test: venv
	$(BIN)/python -m pytest -ra -n auto --maxprocesses 8 $(PYTEST_ARGS)

# `make -k check` goes on after the first complaint. Modules, not commands: with TORCH=system a tool may be the system's,
# and then $(BIN) has no command of its name.
check: lint types imports

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: venv
	$(BIN)/python -m mypy

imports: venv
	$(BIN)/python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo

format: venv
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

# With PYTHON: no network, no .venv, whatever torch and pytest that Python has.
gpu: $(if $(PYTHON),,venv)
	$(or $(PYTHON),$(BIN)/python) -m bench.gpu --out $(OUT) $(ARGS)

tune: $(if $(PYTHON),,venv)
	$(or $(PYTHON),$(BIN)/python) -m bench.tune --work $(OUT) $(ARGS)
	$(or $(PYTHON),$(BIN)/python) -m bench.choose --work $(OUT) $(ARGS)

clean:
	@sh tools/venv.sh --remove $(VENV)
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks build dist *.egg-info
