# The two commands are `make demo` and `make test`; `make help` lists the rest. Everything runs in .venv.

PYTHON ?= python3
# Index that the CPU build of torch is taken from; empty means whatever pip is configured with.
# From PyPI alone torch comes with several GB of CUDA: say TORCH_INDEX=https://download.pytorch.org/whl/cpu there.
TORCH_INDEX ?=
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
GPU := $(shell if command -v nvidia-smi >/dev/null 2>&1 || test -e /dev/nvidia0; then echo yes; fi)

export RAY_USAGE_STATS_ENABLED := 0
# Waiting threads sleep instead of spinning: on a machine with other work that is 16 times faster (jobs/environment.py).
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint sanitize chaos harness bench constraints clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Distil the shipped tiny teacher into the shipped tiny student: every stage, minutes on a laptop
	@$(BIN)/stillhouse run demo --out runs/demo

# Test files side by side, each whole in one process: most wait for a process that they started. The slow ones come first.
JOBS ?= 3
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## Run all tests
	@$(PYTEST)

test-fast: $(STAMP)  ## Run the tests that take seconds
	@$(PYTEST) -m 'not slow'

lint: $(STAMP)  ## Check style, formatting, and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/packaging/test_import_arrows.py

SANITIZED := build/sanitized
sanitize: $(STAMP)  ## Run the tests of the C++ kernels under ASan and UBSan (gcc; minutes)
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)/source && git ls-files -z | xargs -0 cp --parents -t $(SANITIZED)/source
	@CXXFLAGS='-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined' \
	  $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w $(SANITIZED) $(SANITIZED)/source
	@$(BIN)/python -m zipfile -e $(SANITIZED)/*.whl $(SANITIZED)/site
	@LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/site \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/numerics/test_cpu_libraries.py

CHAOS := build/chaos
chaos: $(STAMP)  ## The long drills: 1,000 kills, 100,000 faulty calls, budgets, engines, a cluster, 10 M traces; two hours, 10 GB
	@rm -rf $(CHAOS) && mkdir -p $(CHAOS)
	@drill() { echo "$$*" >&2; $(BIN)/python -m tests.chaos."$$@" >$(CHAOS)/$$1.json; code=$$?; cat $(CHAOS)/$$1.json; return $$code; }; \
	  drill kills --object-store-kills 100 && drill bad_api && drill budget && drill engines && drill cluster_kills \
	  && drill scale --folder $(CHAOS)/scale && rm -rf $(CHAOS)/scale

harness: $(STAMP)  ## Verifiers, sandbox, decontamination against their targets, at modest sizes; about three minutes
	@status=0; harness() { echo "$$*" >&2; $(BIN)/python -m tests.harness."$$@" || { status=1; echo "$$1: target missed" >&2; }; }; \
	  harness conformance; harness perturbed --num 10000; harness hostile --deadline 1 --every 4; \
	  harness decontamination; harness sandbox_attacks; exit $$status

bench: $(STAMP)  ## Measure the kernels on this machine
	@$(BIN)/stillhouse bench kernels

setup: $(STAMP)  ## Create .venv and install everything; done by the others when needed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Stillhouse needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	       "Say which one to take: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt $(wildcard kernels/csrc/*) | $(BIN)/python
	@echo "Setting up $(VENV) (a few minutes, once) ..." >&2
ifeq ($(GPU),yes)
	@$(PIP) $(INDEX) 'torch==$(TORCH_VERSION)'
	@sed '/^triton==/d' constraints.txt > $(VENV)/constraints.txt  # torch for CUDA brings the triton that it is built for
else
	@$(PIP) $(INDEX) 'torch==$(TORCH_VERSION)+cpu' 2>$(VENV)/torch.log || { tail -n 1 $(VENV)/torch.log >&2; \
	  echo "No CPU build of torch there; taking the default build, which may be several GB." \
	       "Smaller: make TORCH_INDEX=https://download.pytorch.org/whl/cpu $(MAKECMDGOALS)" >&2; \
	  $(PIP) $(INDEX) 'torch==$(TORCH_VERSION)'; }
endif
	@$(PIP) -c $(if $(GPU),$(VENV)/constraints.txt,constraints.txt) -e '.[test,lint]'
	@touch $@

constraints:  ## Write constraints.txt from what is installed in .venv; run the tests before committing it
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip \
	  | sed -e 's/+cpu$$//' -e 's/ @ .*//' | LC_ALL=C sort -f; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove build outputs and caches; keeps .venv (set up again at the next use) and runs/
	@rm -rf $(STAMP) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -path ./runs -prune -o -path ./.git -prune -o \
	  \( -name __pycache__ -o -name '*.so' \) -print0 | xargs -0 rm -rf
