# Each target sets up .venv by itself; only Python >= 3.12, pip and make are needed.
# ARGS is passed on: `make demo ARGS="--steps 20"`, `make test ARGS="-k masks"`.

BIN := .venv/bin
ARGS :=
# Environments of what pockjax is timed beside.
PEERS := torch keras ort executorch
export PYTHON

.PHONY: help demo test test-slow test-oldest bench speed lint format lock clean

help:
	@echo "make demo         fine-tune MiniLM on BBC News twice, full and sparse; about 5 minutes"
	@echo "make test         the tests"
	@echo "make test-slow    the tests that take minutes"
	@echo "make test-oldest  the tests, with the oldest JAX that is supported"
	@echo "make bench        the figures of the core, into experiments/results"
	@echo "make speed        training steps beside other frameworks', into experiments/results/speed"
	@echo "make lint         ruff and pyright"
	@echo "make format       let ruff repair what it can"
	@echo "make lock         pin requirements/*.txt anew (needs uv)"

demo: .venv/.demo
	@$(BIN)/python -m pockjax demo $(ARGS)

test: .venv/.dev
	@$(BIN)/python -m pytest -n auto $(ARGS)

test-slow: .venv/.dev
	@$(BIN)/python -m pytest -m slow $(ARGS)

# The oldest JAX that is supported; the other targets use the newest.
test-oldest: .venv-oldest/.oldest
	@.venv-oldest/bin/python -m pytest -n auto $(ARGS)

bench: .venv/.dev
	@$(BIN)/python -m experiments.core $(ARGS)

# A peer whose environment cannot be made is reported in the table, so that is no reason to stop.
speed: .venv/.dev
	@for peer in $(PEERS); do $(MAKE) --no-print-directory .venv-$$peer/.$$peer || true; done
	@$(BIN)/python -m experiments.speed $(ARGS)

lint: .venv/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: .venv/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.venv/.%: requirements/%.txt pyproject.toml tools/venv.sh
	@tools/venv.sh .venv $*

define PEER
.venv-$(1)/.$(1): requirements/$(1).txt tools/venv.sh
	@tools/venv.sh .venv-$(1) $(1)
endef
$(foreach peer,$(PEERS),$(eval $(call PEER,$(peer))))

.venv-oldest/.%: requirements/%.txt pyproject.toml tools/venv.sh
	@tools/venv.sh .venv-oldest $*

# One set of versions: dev first, then demo constrained by it.
PIN = uv pip compile pyproject.toml --quiet --universal --python-version 3.12 --upgrade \
  --generate-hashes --no-annotate --no-header
lock:
	$(PIN) --extra dev -o requirements/dev.txt
	$(PIN) --extra cli --extra text -c requirements/dev.txt requirements/build.in \
	  -o requirements/demo.txt
	$(PIN) --extra dev requirements/oldest.in -o requirements/oldest.txt
	for peer in $(PEERS); do \
	  $(subst pyproject.toml,,$(PIN)) requirements/$$peer.in -o requirements/$$peer.txt; done

clean:
	rm -rf .venv .venv-oldest $(PEERS:%=.venv-%) build dist .pytest_cache .ruff_cache .hypothesis .benchmarks
