# make test | sanitize | train | lint | format | bench | gpu-report | gpu-table | clean
#
# The first target that needs it makes .venv: torch first (kept if it is there already), then this package with its
# extras. It is made again only when pyproject.toml, setup.py or a C++ or CUDA source changes. Variables:
#   PYTHON     the interpreter to make .venv from          (python3)
#   VENV       where to make it                            (.venv)
#   TORCH      what pip installs where torch is missing    (torch torchvision); for example
#              TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu" is smaller, without CUDA
#   ARGS       passed to pytest, or to the trainer

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
ARGS ?=
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard _build/*.py) $(shell find csrc -type f)
STYLED := $(shell find csrc tests/gpu -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: test sanitize train lint format bench gpu-report gpu-table clean

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

train: $(VENV)/.installed
	$(BIN)/python -m mlip_kernels.train --data openmoji $(ARGS)

# the CPU kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer (a build of its own, in build/sanitized)
# under the tests of the operators; the first access out of bounds ends them. ARGS="..." chooses other tests
SANITIZED_TESTS := tests/merging tests/spectral tests/contrastive $(wildcard tests/robustness/test_fuzz.py) -k "not compile and not export and not thread"
sanitize: $(VENV)/.installed
	DEBUG=1 FORCE_CUDA=0 MLIP_KERNELS_STRICT=1 CXXFLAGS="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined \
	    -fno-sanitize-recover=undefined" $(BIN)/python setup.py --quiet build --build-lib build/sanitized \
	    --build-temp build/sanitized-objects
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/sanitized \
	    $(BIN)/pytest -q --capture=sys $(or $(ARGS),$(SANITIZED_TESTS))

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# what the GPU kernels take and move; gpu-table measures it again and writes tests/gpu/kernels.json and KERNELS.md
gpu-report: $(VENV)/.installed
	@PYTHONPATH=tests/gpu $(BIN)/python -m gates --markdown

gpu-table: $(VENV)/.installed
	PYTHONPATH=tests/gpu $(BIN)/python -m gates --update

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(STYLED)

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(STYLED)

clean:
	rm -rf build dist *.egg-info mlip_kernels/_*.so mlip_kernels/_build.json .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.installed $(VENV)/.linters

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "make: the venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@command -v $(firstword $(or $(CXX),c++)) > /dev/null || \
	    echo "make: no C++ compiler, so the slower PyTorch reference will run; on Debian and Ubuntu: apt install g++"
	@$(BIN)/python -c 'import torch, torchvision' 2> /dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[train,test]'
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet ruff mypy clang-format pre-commit
	@touch $@
