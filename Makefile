# Every target that has a "##" comment shows up in `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
SEED ?= 0
STUDY_JOBS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := runs/demo$(if $(filter-out 0,$(SEED)),_seed$(SEED))
DEMO_SINGLE_PATH := runs/demo_single_path$(if $(filter-out 0,$(SEED)),_seed$(SEED))

.PHONY: help install demo test test-slow test-oldest lint types checks format golden backbone icons configs docs wheel notebooks bench gpu studies faults app clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the package and its tools (every other target does this by itself)

$(INSTALLED): setup.cfg
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time this takes several minutes, PyTorch is large."
	@start=$$SECONDS; $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' \
	  && touch $@ && echo "Installed in $$((SECONDS - start)) s."

run_flags = --trainer.default_root_dir $(1) --seed_everything $(SEED) --model.seed $(SEED) --data.seed $(SEED)
# $(call fit,<config file>,<run folder>): a fresh fit
fit = rm -rf $(2) && $(BIN)/lightning fit --config $(1) $(call run_flags,$(2))
# $(call score,<config file>,<run folder>,<checkpoint>): its scores
score = $(BIN)/lightning test --config $(1) $(call run_flags,$(2)) --ckpt_path $(2)/checkpoints/$(3).ckpt
# $(call named,<name>,<commands>): puts the name before every line of their output
named = (($(2)) 2>&1 | while IFS= read -r line; do echo "$(1): $$line"; done)

train_single_path = $(call fit,lightning_configs/demo_single_path.yaml,$(DEMO_SINGLE_PATH)) \
  && $(call score,lightning_configs/demo_single_path.yaml,$(DEMO_SINGLE_PATH),last)
train_paths = $(call fit,lightning_configs/demo.yaml,$(DEMO)) \
  && $(BIN)/lightning compress $(DEMO) $(DEMO)/checkpoints/compressed.ckpt \
  && $(call score,lightning_configs/demo.yaml,$(DEMO),compressed) && $(BIN)/lightning paths $(DEMO)

demo: $(INSTALLED) ## train and score one path and N paths on the embedded benchmark, then compare (SEED=1 for another seed)
	$(BIN)/python -c 'from parallel_decoupling.world.benchmark import ensure_benchmark; print("benchmark:", ensure_benchmark())'
	@echo "Both models train and are scored side by side, each with half of the cores."
	@set -o pipefail; export OMP_NUM_THREADS=$$($(BIN)/python -c 'import os; print(max(1, os.cpu_count() // 2))'); \
	$(call named,one path,$(train_single_path)) & one_path=$$!; \
	$(call named,three paths,$(train_paths)); three_paths=$$?; \
	wait $$one_path && exit $$three_paths
	$(BIN)/lightning compare $(DEMO_SINGLE_PATH) $(DEMO) --output_dir $(DEMO)
	@echo "checkpoints: $(DEMO_SINGLE_PATH)/checkpoints/ $(DEMO)/checkpoints/"
	@echo "scores:      $(DEMO_SINGLE_PATH)/scores.json $(DEMO)/scores.json"
	@echo "comparison:  $(DEMO)/comparison.json $(DEMO)/comparison.png $(DEMO)/comparison.html"
	@echo "curves:      $(BIN)/tensorboard --logdir runs"

app: $(INSTALLED) ## search pictures of the embedded benchmark in a browser, with the demo's model (after make demo)
	@test -f $(DEMO)/checkpoints/compressed.ckpt || (echo "no $(DEMO)/checkpoints/compressed.ckpt: run make demo first" && exit 1)
	pictures=$$($(BIN)/python -c 'from parallel_decoupling.world.benchmark import ensure_benchmark; print(ensure_benchmark())')/MMEB-eval/Scene_t2i && \
	  $(BIN)/lightning predict --ckpt_path $(DEMO)/checkpoints/compressed.ckpt --data.predict_source $$pictures --output_dir $(DEMO)/embeddings && \
	  $(BIN)/lightning app $(DEMO)/embeddings --image_dir $$pictures --instruction 'Find a picture that matches the caption:'

test: $(INSTALLED) ## the test suite without the slow tests, in two processes of one thread
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

test-slow: $(INSTALLED) ## the slow tests: processes, notebooks, short trainings
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m slow -n 2 --dist loadfile

lint: $(INSTALLED) ## ruff (rules and format) and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED) ## mypy, strict
	$(BIN)/mypy

checks: lint types ## lint and types

format: $(INSTALLED) ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(INSTALLED) ## write the golden losses anew (say why in the commit)
	UPDATE_GOLDEN=1 $(BIN)/pytest -q -m "slow or not slow" tests/training/test_golden.py

backbone: $(INSTALLED) ## train the shipped tiny backbone anew
	$(BIN)/python -m recipes.tiny_backbone

icons: $(INSTALLED) ## a data set of 20,000 real icons in data/icons (needs npm; docs/icons.md)
	$(BIN)/python -m recipes.icons

configs: $(INSTALLED) ## write lightning_configs/reproduce/ anew from its layers
	$(BIN)/python -m recipes.ready_configs

notebooks: $(INSTALLED) ## execute every notebook in place
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

bench: $(INSTALLED) ## ratios to peers and floors: the demo's step, N paths, vCLUB, start-up, test, GradCache, evaluation, search, scale (an hour)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.paths
	$(BIN)/python -m benchmarks.vclub
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.search
	$(BIN)/python -m benchmarks.scale

gpu: $(INSTALLED) ## check this machine's CUDA device in 8 minutes: kernels, tests, steps and memory of a 2B model (no download)
	$(BIN)/python -m benchmarks.gpu

studies: $(INSTALLED) ## every study that needs no preparation (docs/studies.md): runs what is missing, then tables and pictures
	@failed=0; for study in help full_data paths prefix mutual_information little_data beyond own_adapters own_adapters_all_rows; do \
	  $(BIN)/python -m studies $$study --jobs $(STUDY_JOBS) || failed=1; done; \
	for study in estimators path_differences prefix_gradients; do $(BIN)/python -m studies $$study || failed=1; done; exit $$failed

docs: $(INSTALLED) ## an API reference from the docstrings, in build/docs/index.html
	$(BIN)/python -m recipes.api_reference

wheel: $(INSTALLED) ## build the wheel and try it in an empty environment outside the clone (installs PyTorch again)
	rm -rf dist && $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	bash recipes/try_wheel.sh "$(PYTHON)" dist/*.whl

faults: $(INSTALLED) ## the long campaigns of faults, and one table: kills, inputs, mutations, disks (root), threads, the server (hours)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check mfusepy
	@failed=0; for campaign in "kills fit --count 60" "kills export --count 30" "kills index --count 30" \
	    "kills predict --count 30" "kills test --count 30" inputs mutations reads disks threads serve; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m studies.faults.$$campaign || failed=1; done; \
	$(BIN)/python -m studies.faults; exit $$failed

test-oldest: ## the test suite on the oldest declared dependencies, in .venv-oldest
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' --constraint recipes/oldest.txt
	.venv-oldest/bin/pytest -q

clean: ## remove caches and build output (keeps runs/ and .venv/)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
