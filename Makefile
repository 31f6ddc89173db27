# Every target sets up what it needs from a clean clone, in .venv, and can be run again and in any order.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
VLLM := .venv-vllm
# Processes that share the tests, file by file.
WORKERS ?= 2

.PHONY: install demo test lint format vllm test-vllm clean

# chiasm and its engine. Without a GPU, PyTorch is the build for CPUs.
install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/chiasm demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# vLLM needs packages of its own, and so an environment of its own. Without a GPU it is vLLM's build for CPUs.
vllm: $(VLLM)/.installed

# In two runs: the instances that tests share leave too little memory for those that compare answers of other checkpoints.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/pytest tests/vllm -k "not qwen2_5_vl and not qwen3_vl"
	$(VLLM)/bin/pytest tests/vllm -k "qwen2_5_vl or qwen3_vl"

lint: $(VENV)/.installed-dev
	$(BIN)/pre-commit run --all-files

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.venv pyproject.toml constraints.txt scripts/cpu_index.sh
	$(PIP) install --constraint constraints.txt --no-deps $$(PYTHON=$(BIN)/python scripts/cpu_index.sh) torch
	$(PIP) install --constraint constraints.txt --editable '.[engine]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VLLM)/.installed: scripts/vllm/install.sh scripts/cpu_index.sh scripts/vllm/example_proxy.sh scripts/vllm/chiasm_torchvision_schemas.py pyproject.toml
	PYTHON="$(PYTHON)" scripts/vllm/install.sh $(VLLM)
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) bench-results .mypy_cache .ruff_cache .pytest_cache
