PYTHON ?= python3
TOOLS := .venv-tools
DEMO := .venv-demo
BENCH := .venv-bench
TOX := $(TOOLS)/bin/tox run

.PHONY: help test test-all matrix lint fuzz openapi messages package demo kinds chaos bench clean

help:
	@echo "make test     the tests that are not slow, on SQLite and on PostgreSQL (ARGS= for pytest)"
	@echo "make test-all every test on both, including the slow ones"
	@echo "make matrix   every environment of tox.ini"
	@echo "make lint     formatting, static rules and types"
	@echo "make fuzz     property-based tests of the REST API along its OpenAPI document"
	@echo "make openapi  write that document from the code"
	@echo "make messages bring the message catalogues in step with the code"
	@echo "make package  build the distributions and look inside"
	@echo "make demo     the example project (ONCE=1: start it, try it, stop it)"
	@echo "make kinds    every kind of guarded view, under gunicorn and uvicorn"
	@echo "make chaos    300 jobs whose workers are killed at random (ARGS=--seed=7)"
	@echo "make bench    the benchmarks (ARGS=--quick: in two minutes)"
	@echo "make clean    remove what these commands left"

test: $(TOOLS)/.done
	$(TOX) -e py -- $(ARGS)

# The last -m wins, and an empty one selects every test.
test-all: $(TOOLS)/.done
	$(TOX) -e py -- -m "" $(ARGS)

matrix: $(TOOLS)/.done
	$(TOX)

lint: $(TOOLS)/.done
	$(TOX) -e lint,types

fuzz: $(TOOLS)/.done
	$(TOX) -e fuzz

openapi: $(TOOLS)/.done
	$(TOX) -e py --override "testenv.commands=python -m tests.openapi"

messages: $(TOOLS)/.done
	$(TOX) -e py --override "testenv.commands=python -m tests.translations"

package: $(TOOLS)/.done
	$(TOX) -e package

demo: $(DEMO)/.done
	$(DEMO)/bin/python example_project/demo.py $(if $(ONCE),--once)

kinds: $(DEMO)/.done
	$(DEMO)/bin/python example_project/kinds.py

chaos: $(TOOLS)/.done
	$(TOX) -e chaos -- $(ARGS)

bench: $(BENCH)/.done
	$(BENCH)/bin/python -m benchmarks $(ARGS)

$(TOOLS)/.done:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --no-compile "tox>=4.20"
	touch $@

$(DEMO)/.done: setup.cfg
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(BENCH)/.done: setup.cfg
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --editable ".[bench]"
	touch $@

clean:
	rm -rf $(TOOLS) $(DEMO) $(BENCH) .tox .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf build dist *.egg-info example_project/var benchmarks/var
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
