# make test | test-gpu | test-capped | train | lint | format | docs | bench | gpu-report | gpu-table | gpu-choices | clean
# beyond CI: make fuzz | sanitize | mutations | kill-cycles
#
# The first target that needs it makes .venv: torch first (kept if it is there already), then this package with its
# extras. It is made again only when pyproject.toml, setup.py or a C++ or CUDA source changes. Variables:
#   PYTHON     the interpreter to make .venv from          (python3)
#   VENV       where to make it                            (.venv)
#   TORCH      what pip installs where torch is missing    (torch torchvision); for example
#              TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu" is smaller, without CUDA
#   ARGS       passed to pytest, or to the trainer
#   WORKERS    processes that run tests, each with one thread   (one per core, 8 at most)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
ARGS ?=
WORKERS ?= auto --maxprocesses 8
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard _build/*.py) $(shell find csrc -type f)
STYLED := $(shell find csrc tests/gpu tools -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

# Threads of several processes would wait for each other on the same cores; tests that need more than one ask for them.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: test test-gpu test-capped sanitize train kill-cycles fuzz mutations lint format docs bench gpu-check gpu-report gpu-table gpu-choices clean

test: $(VENV)/.installed
	$(PYTEST) --dist loadfile $(ARGS)

# every GPU kernel, compiled for every architecture and emulated, and the emulator's own tests: no GPU is needed
test-gpu: $(VENV)/.installed
	$(PYTEST) --dist loadgroup -m 'not compiles_nothing and not gpu and not slow' tests/gpu tools/ptx_emulator $(ARGS)

# operators and models with the instruction sets of an older processor, in PyTorch too: make test-capped CAPABILITY=avx2
CAPABILITY ?= baseline
CAPS_baseline := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
CAPS_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
OPERATORS_AND_MODELS := tests/promises tests/merging tests/spectral tests/contrastive tests/losses tests/models

test-capped: $(VENV)/.installed
	@test -n '$(CAPS_$(CAPABILITY))' || { echo 'make: CAPABILITY: expected avx2 or baseline, got $(CAPABILITY)'; exit 1; }
	MLIP_KERNELS_CPU_CAPABILITY=$(CAPABILITY) $(CAPS_$(CAPABILITY)) $(PYTEST) --dist loadfile $(OPERATORS_AND_MODELS) $(ARGS)

train: $(VENV)/.installed
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/python -m mlip_kernels.train --data openmoji $(ARGS)

# KILLS training runs that are killed, and resumed, and compared with one that was not
KILLS ?= 200
kill-cycles: $(VENV)/.installed
	KILL_CYCLES=$(KILLS) $(BIN)/python -m pytest tests/robustness/test_killed_runs.py $(ARGS)

# the CPU kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer (a build of its own, in build/sanitized)
# under the tests of the operators; the first access out of bounds ends them. ARGS="..." chooses other tests
SANITIZED_TESTS := tests/promises tests/merging tests/spectral tests/contrastive $(wildcard tests/robustness/test_fuzz.py) -k "not compile and not export and not thread"
sanitize: $(VENV)/.installed
	DEBUG=1 FORCE_CUDA=0 MLIP_KERNELS_STRICT=1 CXXFLAGS="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined \
	    -fno-sanitize-recover=undefined" $(BIN)/python setup.py --quiet build --build-lib build/sanitized \
	    --build-temp build/sanitized-objects
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(CURDIR)/build/sanitized \
	    $(BIN)/pytest -q --capture=sys $(or $(ARGS),$(SANITIZED_TESTS))

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# on a machine with a GPU: correctness, capture, times and models, in minutes; results in gpu-check/. ARGS="--only dct"
gpu-check: $(VENV)/.installed
	PYTHONPATH=tools/gpu_check:tests $(BIN)/python -m gpu_check $(ARGS)

# what the GPU kernels take, execute and move; gpu-table measures it again and writes tests/gpu/kernels.json, KERNELS.md
# and mlip_kernels/cuda_choices.json on MAX_JOBS cores (all), make gpu-table ONLY="name ..." only the rows of operators
# of these names, or of those with kernels of these names; gpu-choices writes the last file from the first
GATES := tests/gpu:tools/ptx_emulator
gpu-report: $(VENV)/.installed
	@PYTHONPATH=$(GATES) $(BIN)/python -m gates --markdown

gpu-table: $(VENV)/.installed
	PYTHONPATH=$(GATES) $(BIN)/python -m gates --update $(if $(ONLY),--only $(ONLY))

gpu-choices: $(VENV)/.installed
	PYTHONPATH=$(GATES) $(BIN)/python -m gates --choices

# 50,000 generated inputs; ARGS="--seed 1" for others, ARGS="--keep-going" to see all that fail
fuzz: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m robustness.fuzz --inputs 50000 $(ARGS)

# one line of the CPU kernels broken at a time: is it noticed? ARGS="--count 60 --seed 0"
mutations: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m robustness.cpu_mutations $(ARGS)

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(STYLED)

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(STYLED)

# the pages of docs/ and an API reference from the docstrings, in site/; it needs neither torch nor a compiler
docs: $(VENV)/.documentation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf build dist site *.egg-info mlip_kernels/_*.so mlip_kernels/_build.json .pytest_cache .mypy_cache .ruff_cache
	cd tools/ptx_emulator && rm -rf build *.egg-info .pytest_cache
	rm -f $(VENV)/.installed $(VENV)/.linters $(VENV)/.documentation

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "make: the venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@command -v $(firstword $(or $(CXX),c++)) > /dev/null || \
	    echo "make: no C++ compiler, so the slower PyTorch reference will run; on Debian and Ubuntu: apt install g++"
	@$(BIN)/python -c 'import torch, torchvision' 2> /dev/null || { \
	    echo "make: installing PyTorch in $(VENV), a download of up to 3 GB: 2 to 10 minutes, once"; \
	    $(BIN)/python -m pip install $(TORCH); }
	@echo "make: installing this package with its extras and compiling its kernels: 2 to 5 minutes, once"
	$(BIN)/python -m pip install --quiet --editable '.[train,integrations,test]'
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet ruff mypy clang-format pre-commit
	@touch $@

$(VENV)/.documentation: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@
