# Two commands do all the set-up on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo
DEVICE ?= cpu

.PHONY: demo test test-slow check lint format bench bench-function bench-sphere bench-spectral clean

demo: .venv/ready  ## environment, install, compare on the embedded digits, report
	$(BIN)/groundstate compare --epochs 40 --label-noise 0.2 --seeds 5 --out $(OUT) $(if $(wildcard $(OUT)/compare.json),--resume $(OUT),)
	@echo "open $(OUT)/report.html"

test: .venv/ready  ## the default suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: .venv/ready  ## the rest: minutes long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

check: lint test  ## format, lint, types, tests

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-function bench-sphere bench-spectral  ## speed, side by side, into benchmarks/results
	$(BIN)/python benchmarks/loop_overhead.py

bench-function: .venv/ready  ## energies of the function; DEVICE=cuda for a GPU
	$(BIN)/python benchmarks/function.py --device $(DEVICE)

bench-sphere: .venv/ready  ## hyperspherical energies
	$(BIN)/python benchmarks/sphere.py --huge

bench-spectral: .venv/ready  ## spectral energies, exact and amortized; DEVICE=cuda for a GPU
	$(BIN)/python benchmarks/spectral.py --device $(DEVICE)
	for file in spectral_amortized spectral_prox spectral_conv graph_energy spectral_summary; do $(BIN)/python benchmarks/$$file.py || exit 1; done

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
