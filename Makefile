# Each target does all of its own set-up in .venv.
PYTHON ?= python3
TORCH ?= "torch>=2.6"
VENV := .venv
RUN := $(VENV)/bin

.PHONY: eval test style matrix

eval: $(VENV)/ready
	$(RUN)/vlm-prune eval --method zoo --budget 64

test: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/python -m pytest -q

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
