.PHONY: quickstart check lint unit ranks e2e core012 torch271 format clean

quickstart:  ## train and compare a small model on the CPU
	bash scripts/quickstart.sh

check:  ## everything that continuous integration runs
	bash scripts/test.sh

lint unit ranks e2e core012 torch271:  ## one part of the checks
	bash scripts/test.sh $@

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .venv-* outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
