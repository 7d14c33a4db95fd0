.PHONY: install demo test lint bench clean
PYTHON ?= python3
BIN := .venv/bin

# One stamp file: the environment is made anew only when what it is made of changes.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/.installed

demo: install
	$(BIN)/python demo/run.py $(if $(ONCE),--once)

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .eval_platform demo/.eval_platform demo/results demo/checkpoints
