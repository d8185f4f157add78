# Everything runs from .venv, which each target makes by itself.
PYTHON ?= python3
BIN := .venv/bin
# Compiled modules are kept, also where images switch that off: each of a thousand processes would compile Shoal anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-faults soak bench lint format proto chart clean

demo: .venv/.demo  ## start a local cluster and a real S3 origin, run the main job, print what happened
	$(BIN)/python -m benchmarks.demo

# A file's tests stay in one process, because they share servers. Half of the time they wait, so three on two cores; the
# folder of the quickest ones comes last, so that all three end together.
test: lint  ## everything CI runs
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-faults: .venv/.test  ## every fault test, the long ones too
	$(BIN)/python -m pytest tests/faults tests/cluster/test_csi.py tests/cluster/test_mount_command.py \
	  tests/cluster/test_mount_programs.py tests/cluster/test_mount_tier.py \
	  -m 'long or not long' --timeout 1200

soak: .venv/.test  ## faults of every kind at random under load: make soak MINUTES=30 SEED=1
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),30) --seed $(or $(SEED),1)

bench: .venv/.test  ## full-size benchmarks, half an hour; results go to benchmarks/results/ (PEERS: docs/streaming.md)
	$(BIN)/python -m benchmarks.placement
	$(BIN)/python -m benchmarks.snapshot
	$(BIN)/python -m benchmarks.retention --json benchmarks/results/retention.json
	$(BIN)/python -m benchmarks.membership --json benchmarks/results/membership.json
	$(BIN)/python -m benchmarks.epochs --json benchmarks/results/epochs.json
	$(BIN)/python -m benchmarks.mounted --json benchmarks/results/mounted.json
	$(BIN)/python -m benchmarks.tier --json benchmarks/results/tier.json
	$(BIN)/python -m benchmarks.loaders $(if $(PEERS),--peers $(PEERS)) --json benchmarks/results/loaders.json
	$(BIN)/python -m benchmarks

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: .venv/.test  ## make the gRPC stubs anew
	$(BIN)/python -m grpc_tools.protoc -I client --python_out=client --pyi_out=client --grpc_python_out=client client/shoal/wire/shoal.proto client/shoal_csi/csi.proto

chart: .venv/.test  ## make the schema and the table of the chart's values anew
	$(BIN)/python charts/values.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Shoal needs Python 3.11 or newer: run make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/.demo: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

.venv/.test: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@ .venv/.demo

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
