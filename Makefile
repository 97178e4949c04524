PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h)
OTHER_CPP := $(wildcard tests/reference/*.cpp tests/reference/*.h benchmarks/*.cpp)
SOURCES := pyproject.toml setup.py constraints.txt $(CPP)
# On a machine with a CUDA build of torch: make demo FAISS=gpu
FAISS ?= cpu

.PHONY: demo test test-slow check format clean

demo: $(VENV)/.run
	$(BIN)/llfast demo --out $(DEMO)

test: $(VENV)/.dev
	$(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(OTHER_CPP)
	$(BIN)/clang-tidy --quiet $(filter %.cpp,$(CPP)) -- -std=c++17 \
		$$($(BIN)/python -m pybind11 --includes)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP) $(OTHER_CPP)

clean:
	rm -rf $(VENV) build *.egg-info llfast/*.so

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(SOURCES) | $(BIN)/pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(FAISS),map]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(FAISS),map,dev]'
	touch $@
