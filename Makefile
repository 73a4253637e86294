# rsstudy. `make study` and `make test` work from a fresh clone: they set up the environment first and use it again afterwards.
#
#   make study                        all seven notebooks on the built-in world, then the final table
#   make study PROFILE=riscm-nano ARGS="--data ../riscm --set epochs=2"
#   make test                         lint, nbdev_test on every notebook, then pytest
#   make lint                         ruff's rules and layout; notebooks clean, package as they export it
#   make env                          only the environment, with all that the tests need
#   make docs                         the site, in docs/_build/html
#   make bench                        speed against the usual recipe and the usual explanations, this machine, PROFILE's model and images
#   make bench-gpu                    the same with PaliGemma-3B's architecture on a GPU; needs torch, transformers and peft, no environment
#
# `make study` installs what the study needs; the other targets but `make bench` add the rest to the same environment.
#
# PYTHON=python3.12   the interpreter that makes the environment (3.11, 3.12 or 3.13)
# VENV=$VIRTUAL_ENV   an environment of your own instead of .venv; what is missing in it is installed

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= nano
ARGS    ?=
WORKERS ?= 3

SHELL := /bin/bash
BIN   := $(VENV)/bin
INPUT := pyproject.toml constraints.txt
LINT  := nbs tests docs setup.py
# what is installed: the study's packages, all packages
STUDY := $(VENV)/.installed-study
ALL   := $(VENV)/.installed-all

.PHONY: study test lint env docs bench bench-gpu help
.DEFAULT_GOAL := help

help:
	@sed -n '3,13s/^# \{0,1\}//p' Makefile

study: $(STUDY)
	@$(BIN)/rsstudy run --profile $(PROFILE) $(ARGS)

# WORKERS at a time, one thread each: toy models lose more to waiting threads than they gain. One more than two cores have,
# since a worker often waits, for a kernel, a browser or a cluster.
test: lint
	@echo "== 2/3 nbdev_test: every notebook"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/nbdev_test --n-workers $(WORKERS) --do-print --timing
	@echo "== 3/3 pytest"
	@command -v chromium chromium-browser google-chrome >/dev/null || timeout 60 $(BIN)/python -m playwright install chromium >/dev/null 2>&1 || echo "Chromium could not be had: the tests that open a page in a browser are skipped"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore tests/test_drift.py tests

# Whether export and clean would change the tree is a test of its own, which runs here.
lint: $(ALL)
	@echo "== lint"
	@$(BIN)/ruff check --quiet $(LINT)
	@$(BIN)/ruff format --check --quiet $(LINT)
	@$(BIN)/python -m pytest tests/test_drift.py

env: $(ALL)

# A stamp holds a checksum of its inputs, so a checkout that only touches their dates installs nothing.
# $(1): what pip installs; $(2): the stamps that this is worth
define install
	@if [ "$$(cat $@ 2>/dev/null)" = "$$(cat $(INPUT) | cksum)" ]; then touch $@; exit 0; fi; \
	set -e; \
	python="$(BIN)/python"; "$$python" -m pip --version >/dev/null 2>&1 || python="$(PYTHON)"; \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "rsstudy needs Python 3.11, 3.12 or 3.13, and $$python is $$("$$python" --version 2>&1 | head -1): name another one with PYTHON=, as in make study PYTHON=python3.12" >&2; exit 1; }; \
	if [ "$$python" = "$(PYTHON)" ]; then \
	  echo "== environment: $(VENV), from $$("$$python" --version 2>&1)"; "$$python" -m venv $(if $(filter .venv,$(VENV)),--clear) "$(VENV)"; fi; \
	echo "== packages: a few minutes, once"; \
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '$(1)'; \
	"$(BIN)/python" -m rsstudy.metrics.meteor || echo "WordNet could not be set up: METEOR will match stems only, and each result will say so"; \
	cat $(INPUT) | cksum | tee $(2) >/dev/null
endef

$(STUDY): $(INPUT)
	$(call install,.,$(STUDY))

$(ALL): $(INPUT)
	$(call install,.[dev],$(STUDY) $(ALL))

docs: $(ALL)
	@$(BIN)/python docs/build.py

bench: $(STUDY)
	@$(BIN)/rsstudy bench train --profile $(PROFILE) $(ARGS)
	@$(BIN)/rsstudy bench generate --profile $(PROFILE) $(ARGS)
	@$(BIN)/rsstudy bench caption --profile $(PROFILE) $(ARGS)
	@$(BIN)/rsstudy bench xai --profile $(PROFILE) $(ARGS)

# Without an environment the interpreter that is there must do: setting one up takes longer than the benchmark.
bench-gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m rsstudy.bench.train gpu
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m rsstudy.bench.xai gpu
