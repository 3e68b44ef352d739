# make demo   the main job on the shipped trace (no torch)
# make test   lint, types and tests (installs torch and transformers)
# make exhaustive  the slow checks against brute force
# make bench  speed, beside a plain SimPy model of the same system
# make bench-sweep  2,000 points of the sample on two processes: points/s and peak memory
# make policies TRACES="sample DIR ..." [QUALITY="FILE ..."]  docs/policies.md: every policy on these
#   traces; QUICK=1 rehearses into out/policies-quick
PYTHON ?= python3
JOBS ?= 2
DEMO ?= demo-out
TRACES ?= sample
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench bench-sweep lint clean install exhaustive policies

install: .venv/.light

.venv/.light: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moesim needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

# torch by its pinned version first: the constraint chooses the build that was tested.
.venv/.full: .venv/.light
	$(PIP) torch==2.13.0
	$(PIP) -e '.[gpu,report,dev]'
	touch $@

demo: .venv/.light
	rm -rf $(DEMO)
	$(BIN)/moesim sweep demo --out $(DEMO) --jobs $(JOBS)
	$(BIN)/moesim plot $(DEMO)

lint: .venv/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

# Brute force against the core on every access of long traces: minutes.
exhaustive: .venv/.full
	OMP_NUM_THREADS=1 $(BIN)/pytest -m exhaustive -n $(JOBS)

bench: .venv/.full
	$(BIN)/python -m tests.bench

bench-sweep: .venv/.full
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.sweep_scale

policies: .venv/.full
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.results_page $(addprefix --trace ,$(TRACES)) \
	  $(addprefix --quality ,$(QUALITY)) --jobs $(JOBS) $(if $(QUICK),--quick)

clean:
	rm -rf .venv $(DEMO) build *.egg-info
