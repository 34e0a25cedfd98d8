# Each target does all of its own set-up in .venv.
PYTHON ?= python3
TORCH ?= "torch>=2.6"
GPU ?= runs/gpu
VENV := .venv
RUN := $(VENV)/bin

.PHONY: eval test gpu style matrix

eval: $(VENV)/ready
	$(RUN)/vlm-prune eval --method zoo --budget 64

test: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/python -m pytest -q

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

matrix: $(VENV)/ready
	$(RUN)/vlm-prune methods --families | sed -i -e '/<!-- matrix -->/,/<!-- end -->/{//!d}' -e '/<!-- matrix -->/r /dev/stdin' README.md

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV) || { apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv $(VENV); }
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/pip install --quiet $(TORCH) --editable ".[eval]" --group dev
	$(RUN)/pip install --quiet --no-deps lmms_eval==0.7.3 gradio==6.31.0
	touch $@
