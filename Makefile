# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow check clean

demo: .venv/installed
	$(BIN)/python samples/digits/train.py
	$(BIN)/compress samples/digits/model.pt --target host-cpu --speedup 2

test: .venv/installed
	$(BIN)/python -m pytest

# The tests that take minutes each.
slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# Style and types.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11+ is needed, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e '.[samples,test,tensorrt-check]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info samples/*/model.pt samples/digits/data.npz
