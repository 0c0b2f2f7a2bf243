# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow lowest check docs clean

demo: .venv/installed
	$(BIN)/python samples/digits/train.py
	$(BIN)/compress samples/digits/model.pt --target host-cpu --speedup 2

# Two workers; a thread each, or those of torch would wait for one another.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The tests that take minutes each.
slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# The tests with the oldest versions that pyproject.toml allows, in an environment of their own.
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --upgrade uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct \
		-e '.[samples,test,tensorrt-check]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile

# What is generated under docs/ (pictures, the tables of peers), and the site, in site/.
docs: .venv/installed
	$(BIN)/python -m docs.build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
	rm -rf .venv .venv-lowest build dist site *.egg-info samples/*/model.pt samples/*/data.npz \
		samples/resnet18/compress.toml samples/cifar10/download
