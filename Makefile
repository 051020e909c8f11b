# make quickstart   install, train a small xLSTM on two processes, evaluate, export to Hugging Face, sample
# make test         install if need be, check style, run the tests (no GPU needed)
# Each target does only what is not done yet.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS ?= test
RUN := runs/quickstart
EXPORT := exports/quickstart
PROCESSES ?= 2
# Threads of each process, so that all processes together use every core.
THREADS := $(shell cores=$$(nproc 2>/dev/null || echo $(PROCESSES)); n=$$((cores / $(PROCESSES))); [ $$n -ge 1 ] && echo $$n || echo 1)

.PHONY: install quickstart test test-slow test-gpu lint bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another, for instance: make install PYTHON=python3.12"; exit 1; }
	@echo "== installing into $(VENV) (one to two minutes; longer where torch comes with CUDA)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: cannot make a virtual environment; on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

quickstart: install
	@echo "== 1/5 training a 1.9M-parameter xLSTM on this Python's own library, $(PROCESSES) processes, a few minutes"
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --nproc-per-node $(PROCESSES) -m pretrain train configs/quickstart.yaml
	@echo "== 2/5 evaluating on held-out files, beside a bigram model"
	@$(BIN)/pretrain evaluate $(RUN)
	@echo "== 3/5 exporting to Hugging Face's xLSTMForCausalLM, comparing logits"
	@if [ -e $(EXPORT)/config.json ]; then echo "$(EXPORT) is there already"; \
	  else $(BIN)/pretrain export $(RUN) $(EXPORT); fi
	@echo "== 4/5 drawing the curves"
	@$(BIN)/pretrain report $(RUN)
	@echo "== 5/5 sampling"
	@$(BIN)/pretrain generate $(RUN) --prompt "import os" --prompt "def main(" --max-new-tokens 300
	@echo "== done: the run is in $(RUN), its curves in $(RUN).png and $(RUN).html, the exported model in $(EXPORT)"

lint: install
	@$(BIN)/ruff check .

test: lint
	@echo "== running the tests, $(PROCESSES) at a time"
	@$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

test-slow: lint
	@$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: lint
	@$(BIN)/python -m pytest -m gpu

bench: install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,bench]"
	@$(BIN)/pretrain bench train

clean:
	rm -rf $(VENV) $(RUN) $(RUN).png $(RUN).html $(EXPORT) build *.egg-info .pytest_cache .ruff_cache .hypothesis
