.PHONY: install demo test test-s3-real test-postgres test-slurm test-ray soak lint lint-docker bench clean

# make demo           train a model here and watch its checkpoints being evaluated (ONCE=1: exit when all is published;
#                     STORE=s3: checkpoints and results in buckets of an S3 server on this machine; LAUNCHER=slurm
#                     or ray: workers are jobs of a cluster on this machine; LAUNCHER=subprocess: the same settings without)
# make test-s3-real   the tests of buckets on a real Ceph gateway, which it starts here and takes down again
# make test-postgres  a team's instance: PostgreSQL, a read-only web server, a proxy with passwords (docs/instances.md)
# make test-slurm     workers as jobs of a real Slurm, installed where it is missing (root, Debian), one node and fake GPUs
# make test-ray       workers as jobs of a real Ray, installed where it is missing, two nodes and fake GPUs
# make lint-docker    docker/: hadolint, compose files, Kubernetes' schemas
# make soak           500 kills -9 of workers on S3 and 20 under Dagster: is anything lost or doubled? (half an hour, alone)
# make test           every test;  make lint: ruff, pyright, import-linter;  make bench: the figures of
#                     docs/log.md and docs/performance.md (an hour on an idle machine)
PYTHON ?= python3
BIN := .venv/bin

# pip compiles nothing (a minute saved); each module is compiled when it is first imported, which some environments forbid.
# Without it every process compiles torch, transformers and Dagster anew: 34 s of CPU instead of 12.
unexport PYTHONDONTWRITEBYTECODE

# One stamp file: the environment is made anew only when what it is made of changes.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/.installed

# Not part of .[dev]: 300 MB, of which neither the platform nor its workers need anything.
INSTALL_RAY = $(BIN)/python -c 'import ray.dashboard.head' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt 'ray[default]'

demo: install
	$(if $(filter ray,$(LAUNCHER)),$(INSTALL_RAY))
	$(BIN)/python -m demo.run $(if $(ONCE),--once) $(if $(filter s3,$(STORE)),--s3) $(if $(LAUNCHER),--launcher $(LAUNCHER))

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-s3-real: install
	$(BIN)/python -m tests.ceph_gateway

test-postgres: install
	$(BIN)/python -m tests.postgres_server

test-slurm: install
	command -v slurmctld >/dev/null && command -v munged >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge; }
	$(BIN)/python -m tests.slurm_cluster

test-ray: install
	$(INSTALL_RAY)
	$(BIN)/python -m tests.ray_cluster

soak: install
	$(BIN)/python -m benchmarks.soak $(if $(SEED),--seed $(SEED))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

lint-docker: install
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[docker]'
	docker/lint.sh $(BIN)

bench: install
	$(BIN)/python -m benchmarks.leaderboard
	$(BIN)/python -m benchmarks.sensor_tick
	$(BIN)/python -m benchmarks.arrival_latency
	$(BIN)/python -m benchmarks.shards
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.engine --model llama120m
	$(BIN)/python -m benchmarks.engine --dtype bfloat16
	for model in gpt2 qwen3 pythia gemma2; do $(BIN)/python -m benchmarks.engine --model $$model || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .eval_platform demo/.eval_platform demo/results demo/checkpoints demo/s3 demo/slurm demo/ray demo/subprocess
