# `make help` lists the targets. Everything runs in .venv, which `make install` keeps up to date.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/shapes
MINUTES := 30
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow torture lint type bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with pinned dependencies (does nothing when up to date)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 install"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## train the built-in experiment from nothing, draw samples, measure obedience
	$(BIN)/python train.py experiment=shapes
	@if [ $(DEMO)/demo/grid.png -nt $(DEMO)/model/stage.json ]; then echo "samples      up to date: $(DEMO)/demo"; else \
	  $(BIN)/python sample.py ckpt=$(DEMO) prompt_file=conf/demo_prompts.txt seed=0 out=$(DEMO)/demo; fi
	@if [ $(DEMO)/evaluation.json -nt $(DEMO)/model/stage.json ]; then echo "evaluation   up to date: $(DEMO)/evaluation.json"; \
	  $(BIN)/python -m ldm.evaluation.table $(DEMO)/evaluation.json; else \
	  $(BIN)/python evaluate.py ckpt=$(DEMO); fi
	@echo "model        $(DEMO)/model (diffusers format)"
	@echo "samples      $(DEMO)/demo/grid.png"
	@echo "training     $(DEMO)/samples, $(DEMO)/metrics.csv, tensorboard --logdir $(DEMO)/tensorboard"
	@echo 'draw more    $(BIN)/python sample.py ckpt=$(DEMO) prompt="a small green heart at the top of a white background"'

test: install  ## run the tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-slow: install  ## run the slow tests (CI does); DEMO_RESULT=outputs/shapes looks at the demo's result
	LDM_DEMO=$(DEMO_RESULT) $(BIN)/python -m pytest -m slow

torture: install  ## interrupt training at random moments for MINUTES=30, and count what was kept
	$(BIN)/python tests/torture.py --minutes $(MINUTES)

lint: install  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install  ## check types
	$(BIN)/mypy

bench: install  ## compare speed with diffusers; results go to benchmarks/results and docs/performance.md
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/program.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/render.py

clean:  ## remove what tools left behind (not .venv, not outputs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
