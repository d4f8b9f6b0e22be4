# All targets run from a fresh clone; they build .venv first.

BIN := .venv/bin
WORKERS ?= 2
export PYTHON
# Linux: memory in huge pages makes a training step on CPU a fifth faster (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Parity goldens beside the checkout are used where they exist; the tests that need them are skipped otherwise.
ifndef MIMO_JAX_PARITY
ifneq ($(wildcard ../shared/parity/manifest.json),)
export MIMO_JAX_PARITY := $(abspath ../shared/parity)
endif
endif

.PHONY: help setup quickstart check test test-slow format lock clean
.DELETE_ON_ERROR:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: .venv/package.stamp ## build .venv from requirements.lock (PYTHON=... names the interpreter)

# A stamp is made last: after an interruption the environment is built anew.
.venv/lock.stamp: requirements.lock
	@python=$$(.ci/find-python) && echo "building .venv with $$python" && "$$python" -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

# pesq has no wheels: it is built with what the lock has installed, so that nothing else is fetched for it. Of resemblyzer
# and speechmos only files of weights are used; what they declare (torch among it) is left out.
.venv/eval.stamp: .venv/lock.stamp requirements-eval.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-build-isolation \
	  -r requirements-eval.lock
	@touch $@

.venv/package.stamp: .venv/eval.stamp pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

quickstart: setup ## the whole chain on CPU, about ten minutes (ARGS="--audio DIR" adds recordings)
	$(BIN)/mimo-jax quickstart $(ARGS)

check: setup ## formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check ## check, and every test that is not slow (ARGS are passed to pytest)
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

# Compiling for TPUs that are not here takes a package of 600 MB, which nothing else needs.
.venv/tpu.stamp: .venv/package.stamp requirements-tpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-tpu.lock
	@touch $@

test-slow: .venv/tpu.stamp ## the slow tests
	JAX_PLATFORMS=cpu $(BIN)/pytest -n $(WORKERS) -m slow $(ARGS)

format: setup ## format and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# requirements-eval.lock is kept by hand: the weights in those wheels are known by their hashes in the code too.
lock: ## write requirements.lock and requirements-tpu.lock anew (ARGS=--upgrade takes the newest versions)
	@python=$$(.ci/find-python) && "$$python" -m venv .cache/lock
	.cache/lock/bin/pip install --quiet --disable-pip-version-check pip-tools
	.cache/lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
	  --extra dev --extra synth --output-file requirements.lock $(ARGS) pyproject.toml
	.cache/lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options --constraint requirements.lock \
	  --extra tpu --output-file .cache/lock/tpu.txt pyproject.toml
	awk '/^[a-z]/ { on = /^libtpu==/ } on' .cache/lock/tpu.txt > requirements-tpu.lock

clean: ## remove .venv, caches and build products (not runs/)
	rm -rf .venv .cache build dist *.egg-info
