# Longwatch: everything a newcomer or CI runs. Every target makes the environment first, if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-long search powercuts chaos soak mutants simulate check format clean bench-checkpoint bench-data bench-diagnosis bench-prevention bench-replay-diagnosis bench-restart bench-watch docs-metrics dashboards tools

help:
	@echo "make setup   make the environment in $(VENV), with longwatch in it"
	@echo "make demo    train on this machine's own text, with three planted faults, in a few minutes"
	@echo "make test    run all tests but the longest, in under ten minutes on two cores"
	@echo "make test-long  run those: 200 simulated runs, 30 cycles of chaos, whole runs in every variant"
	@echo "make search  look for new counterexamples to what the tests state as rules"
	@echo "make chaos   disturb a run on real processes 500 times (CYCLES=n SEED=s)"
	@echo "make powercuts  cut the power 10,000 times under the journal (CUTS=n SEED=s)"
	@echo "make mutants  plant known bugs, one after the other, and see the tests catch each"
	@echo "make soak HOURS=n  simulate, powercuts and chaos with fresh seeds, round after round"
	@echo "make simulate RUNS=n SEED=s  eight weeks of a run and its faults, n times over, each in about a second"
	@echo "make check   format, lint, strict types and the rule of who may import whom"
	@echo "make bench-checkpoint  how long a save holds up training, beside memcpy, torch.save and DCP"
	@echo "make bench-data  tokens a second, beside a plain loop and a plain DataLoader"
	@echo "make bench-diagnosis  incidents named, beside published rules, and a page with every curve"
	@echo "make bench-prevention  what each rung of the prevention ladder costs an update"
	@echo "make bench-replay-diagnosis  causes named by replays of real runs with seeded faults"
	@echo "make bench-restart  from a kill to the first new step, beside torchrun"
	@echo "make bench-watch  what a supervisor takes of processor and memory at 1 to 1,000 records a second"
	@echo "make docs-metrics  write docs/metrics.md anew from the table of metrics"
	@echo "make dashboards  write Grafana's dashboards anew from their table"
	@echo "make tools   install the servers that some tests want (Prometheus, Slurm, Chromium) from Debian's packages"
	@echo "make format  put the sources in order"
	@echo "make clean   remove the environment, caches and the demo's runs"

setup: $(VENV)/.ready

# Exact versions from constraints.txt. uv and poetry do not see the CPU build of torch; pip does.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/demo/demo.py

test: setup  # all but the longest
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

test-long: setup  # whole runs in every variant; CI runs them too
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long

search: setup  # new counterexamples for the property tests, at random
	HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -n 2 --dist worksteal tests/contract tests/keeping tests/monitors tests/orchestrator

powercuts: setup  # CUTS=n SEED=s: power cuts under the real journal; nothing acknowledged may be lost
	$(BIN)/python -m tests.powercut --cuts $(or $(CUTS),10000) --seed $(or $(SEED),1)

chaos: setup  # CYCLES=n SEED=s: kill, stop and starve every process of a real run, over and over
	$(BIN)/python -m tests.chaos --cycles $(or $(CYCLES),500) --seed $(or $(SEED),1)

mutants: setup  # seeded bugs; each must be caught by the tests that are named for it
	$(BIN)/python -m tests.mutants

soak: setup  # HOURS=n: the three above with fresh seeds, round after round
	$(BIN)/python -m tests.soak --hours $(or $(HOURS),1)

simulate: setup  # the real policy, journal, fences and retention in a simulated world (docs/simulation.md)
	$(BIN)/python -m tests.simulation --runs $(or $(RUNS),10000) --seed $(or $(SEED),0) --jobs 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-checkpoint: setup
	$(BIN)/python -m benchmarks.checkpoint

bench-data: setup
	$(BIN)/python -m benchmarks.data

bench-diagnosis: setup
	$(BIN)/python -m benchmarks.diagnosis

bench-prevention: setup
	$(BIN)/python -m benchmarks.prevention

bench-replay-diagnosis: setup
	$(BIN)/python -m benchmarks.replay_diagnosis

docs-metrics: setup
	$(BIN)/python -m monitors.describe > docs/metrics.md

dashboards: setup
	$(BIN)/python -m deploy.grafana.build

tools:  # as root; tests that find one missing say so and are skipped
	apt-get install --yes --no-install-recommends prometheus prometheus-alertmanager chromium slurmctld slurmd slurm-client \
		slurm-wlm-basic-plugins munge

bench-watch: setup
	$(BIN)/python -m benchmarks.watch

bench-restart: setup
	$(BIN)/python -m benchmarks.restart

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info demo-run-*
