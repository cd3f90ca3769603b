# nanochat: the commands of the course. `make speedrun` trains everything, `make test` tests everything.
PYTHON  ?= python3
PROFILE ?= kindergarten
RUN     ?= $(PROFILE)
NPROC   ?= 0
OPTIONS ?=
BIN     := .venv/bin
export NANOCHAT_HOME ?= $(HOME)/.cache/nanochat
SHELL   := /bin/bash

.PHONY: setup speedrun test lab chat docs bench prepare
setup: .venv/ready

# Everything into .venv: its own uv if there is none, pinned and hashed packages, the library, the Rust crate.
.venv/ready: requirements.txt pyproject.toml settings.ini $(wildcard rustbpe/Cargo.toml rustbpe/pyproject.toml rustbpe/src/*.rs)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "nanochat needs Python 3.11 or newer; install it, then: make setup PYTHON=python3.12"; exit 1; }
	@command -v uv >/dev/null || test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/pip install -q uv; } || \
	  { echo "nanochat needs Python's venv module; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	@UV=$$(command -v uv || echo .uv/bin/uv); set -e; \
	test -x $(BIN)/python || $$UV venv -q --python $(PYTHON) .venv; \
	echo "installing packages (PyTorch is large: a few minutes the first time)"; \
	$$UV pip install -q --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.txt; \
	if ! cargo --version >/dev/null 2>&1; then echo "Rust is missing: the slow Python tokenizer trainer is used; to change that install Rust (https://rustup.rs), then: make -B setup"; \
	elif ! command -v cc >/dev/null; then echo "a C compiler is missing: the slow Python tokenizer trainer is used; to change that, on Debian or Ubuntu: sudo apt-get install build-essential, then: make -B setup"; \
	else $$UV pip install -q --python $(BIN)/python --no-deps --reinstall-package nanochat-rustbpe ./rustbpe; fi; \
	$$UV pip install -q --python $(BIN)/python --no-deps -e .; \
	touch .venv/ready

# The whole pipeline. The same command again goes on where it stopped. Other sizes: make speedrun PROFILE=tiny
speedrun: setup
	@mkdir -p "$(NANOCHAT_HOME)/runs/$(RUN)"
	@$(BIN)/papermill speedrun.ipynb "$(NANOCHAT_HOME)/runs/$(RUN)/speedrun.ipynb" -p profile "$(PROFILE)" -p run "$(RUN)" -p nproc $(NPROC) $(OPTIONS) \
	  --log-output --no-progress-bar --kernel python3
	@echo "report card: $(NANOCHAT_HOME)/runs/$(RUN)/report.md and report.html; chat with the model: make chat RUN=$(RUN)"

# Two at a time, each on one core: notebooks, then test files
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/nbdev_test --n_workers 2 --skip_file_re '^[_.]|^speedrun'
	$(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadgroup

lab: setup
	$(BIN)/jupyter lab

# In the terminal; in the browser with: make chat WEB=1
chat: setup
	@$(BIN)/python -m nanochat.$(if $(WEB),serve,chat) $(if $(filter command line environment,$(origin RUN)),--run $(RUN)) $(OPTIONS)

docs: setup
	@command -v quarto >/dev/null || { echo "quarto is missing: install it from https://quarto.org/docs/get-started, then: make docs"; exit 1; }
	quarto render

# Ratios against named peers; on your own text with: make bench TEXT="a.jsonl b.txt"
bench: setup
	$(BIN)/python benchmarks/tokenizer.py $(if $(TEXT),--text $(TEXT) --megabytes 50)
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/training.py --rounds 1
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/serving.py

# Before a commit: export the modules, clean the notebooks, write README.md, and the quick tests
prepare: setup
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/jupyter nbconvert --to markdown --no-input --log-level ERROR --stdout nbs/index.ipynb | sed 's#](\.\./#](#g' > README.md
	$(BIN)/ruff check
	$(BIN)/python -m pytest -q tests/test_repository.py
