# make demo: the main job on real weights.  make test: every test.  make check: lint, types, import contracts.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test check test-legacy notebooks benchmarks format clean

.venv/made: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	touch $@

.venv/installed: .venv/made pyproject.toml
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.venv/installed-figures: .venv/installed-dev
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,notebooks,figures]"
	touch $@

demo: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/lens-affect sweep smollm2-135m-instruct --quick --resume --out runs/demo
	HF_HUB_OFFLINE=1 $(BIN)/lens-affect regimes smollm2-135m-instruct --run runs/demo --emotions happy,afraid --strengths 0.2,0.8 --tokens 32 --resume

# One thread per worker: numpy's own would have each worker use both cores.
test: .venv/installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# HookedTransformer objects of TransformerLens 3.9 in an environment of their own.
.venv-legacy/installed: constraints.txt
	$(PYTHON) -m venv .venv-legacy
	.venv-legacy/bin/pip install -q torch==2.13.0
	grep -v -i transformer-lens constraints.txt > .venv-legacy/constraints.txt
	.venv-legacy/bin/pip install -q -c .venv-legacy/constraints.txt transformer-lens==3.9.0 -e . pytest
	touch $@

test-legacy: .venv-legacy/installed
	HF_HUB_OFFLINE=1 .venv-legacy/bin/python -m pytest -c tests/legacy/pytest.ini --rootdir . tests/legacy

# Also draws figures/. Static images need a Chromium: `apt-get install chromium`, or set BROWSER_PATH. LENS_AFFECT_DATA: see analyses/02. 05_*.py read what analyses/tune_arms.py has published into analyses/results; 05_modules.py reads its runs, weights included, and is left as it is where there are none.
notebooks: .venv/installed-figures
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 01_layer_sweep.py
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 02_shape_and_methods.py
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 03_gate.py
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 04_foreign_tokens.py
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 04_steering.py
	if [ -d runs/tuning ]; then cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 05_modules.py; fi
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 05_damage.py
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 05_rank_one.py
	cd analyses && PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 ../$(BIN)/jupytext --to notebook --execute 05_writing.py

benchmarks: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/extraction.py
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/memory.py
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/generation.py
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/permutations.py
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/shape_errors.py
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/depth_interval.py
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/patching.py
	HF_HUB_OFFLINE=1 $(BIN)/python analyses/benchmarks/steering.py

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-legacy build dist
