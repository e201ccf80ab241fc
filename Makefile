# Every target does its own set-up: .venv, or one of its own where it needs what the others must not see.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS)

.PHONY: demo test lint test-tpu parity fuzz bench bench-loading bench-kernels bench-extraction bench-reading bench-sweep bench-limits emotions studies clean

# The main job on a real model; writes report.html.
demo: $(VENV)/.base
	$(BIN)/jaxemo demo

test: $(VENV)/.test
	$(BIN)/python -m pytest tests --ignore=tests/parity --ignore=tests/tpu -n 2 --dist loadfile

# Style and types. mypy cannot follow the mapped packages, so it is shown the tree as it is installed.
lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/jaxemo
	ln -s $(CURDIR)/jaxemo/* $(CURDIR)/kernels $(CURDIR)/checkpoints build/types/jaxemo/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p jaxemo

# Compile whole programs for TPUs, on this machine's CPU.
test-tpu:
	$(MAKE) VENV=.venv-tpu .venv-tpu/.tpu
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 .venv-tpu/bin/python -m pytest tests/tpu

# Compare with transformers on the real model.
parity:
	$(MAKE) VENV=.venv-parity .venv-parity/.parity
	.venv-parity/bin/python -m pytest tests/parity -s

# Damaged files and configurations, 100,000 of each kind; the tests run some hundreds.
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz_safetensors.py
	$(BIN)/python tests/fuzz_gguf.py
	$(BIN)/python tests/fuzz_configs.py

# The same work done by PyTorch's libraries, in environments of their own (.venv-bench-*), for half an hour; what is left then is done by
# the next run. It takes a quiet machine. On a GPU: python bench/compare.py --device gpu
bench: $(VENV)/.base
	$(BIN)/python bench/compare.py --minutes 26 $(ARGS)

# Time and memory of loading, with transformers beside it; run it on a quiet machine.
bench-loading:
	$(MAKE) VENV=.venv-parity .venv-parity/.parity
	.venv-parity/bin/python bench/loading.py --peer

# Time a whole extraction, and compare one that is killed twenty times with it, byte for byte; run it on a quiet machine.
bench-extraction: $(VENV)/.base
	$(BIN)/python bench/extraction.py $(ARGS)

# Read 10,000 texts: time, memory, and the same after kills; run it on a quiet machine.
bench-reading: $(VENV)/.base
	$(BIN)/python bench/reading.py $(ARGS)

# Sweeps: speed, compilations, the cost of many conditions, and a store that is killed and resumed; run it on a quiet machine.
bench-sweep: $(VENV)/.base
	$(BIN)/python bench/sweep.py $(ARGS)

# Where the time of decoding and reading goes, beside what the machine could do at most; run it on a quiet machine.
bench-limits: $(VENV)/.base
	$(BIN)/python bench/limits.py $(ARGS)

# What the directions of the two real models are worth, each number beside its baselines (about 40 minutes on 2 cores).
emotions: $(VENV)/.base
	$(BIN)/python bench/emotions.py $(ARGS)

# What SmolLM2-135M does when a direction is turned up or down; the results and their page are kept in bench/results/studies.
STUDIED = build/studies/smollm2-135m
studies: $(VENV)/.base build/emotions/smollm2-135m.safetensors
	$(BIN)/jaxemo study forced-choice,preference,prediction,text smollm2-135m --vectors build/emotions/smollm2-135m.safetensors -o $(STUDIED)
	mkdir -p bench/results/studies
	cp $(STUDIED)/*.txt $(STUDIED)/*.json $(STUDIED)/report.html bench/results/studies

build/emotions/%.safetensors: | $(VENV)/.base
	mkdir -p $(@D)
	$(BIN)/jaxemo extract $* -o $@

# Check and time the kernels on the TPU or GPU at hand; with ARGS=--tune, choose by what was measured from then on.
bench-kernels: $(VENV)/.base
	$(BIN)/python bench/kernels.py $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
