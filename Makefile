# make test is the one command to trust: style, types, tests. The environment is made on first use.
# Another interpreter or another set of versions:
#   make test PYTHON=python3.12 CONSTRAINTS=constraints-torch2.11.txt VENV=.venv-torch2.11
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS     ?= 2

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
CHECKED := src tests $(wildcard benchmarks)

# One thread: test workers that each start a thread per core only slow each other down, and the demo's small network
# gains nothing from a second one.
test slow demo bench: export OMP_NUM_THREADS = 1

.PHONY: venv lint test slow demo bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and "EncoderGuard needs Python 3.11 or newer, $(PYTHON) is " + v + "; choose one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy --strict $(CHECKED)

test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow

demo: $(STAMP)
	$(BIN)/encoderguard demo

# Every table and figure in its smallest size: the machinery on real digits. Finished cells stay in runs/bench-tiny.
bench: $(STAMP)
	$(BIN)/encoderguard bench run all --size tiny --out runs/bench-tiny --workers $(WORKERS)
	$(BIN)/encoderguard bench verify runs/bench-tiny

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
