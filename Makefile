# Everything runs in a virtual environment that the targets make themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart demo study study-truth sudoku sudoku-study test test-slow torture lint format types docs constraints clean

quickstart: $(VENV)/.core  ## train, evaluate and sample a small model on the embedded corpus
	$(BIN)/python -m gidd_jax.quickstart --workdir=outputs/quickstart

# Most commands on the quickstart's model. The scorer of the texts is a small autoregressive run.
RUN := outputs/quickstart
DEMO := outputs/demo
demo: $(RUN)/summary.json  ## sample, correct, evaluate, exchange and check the quickstart's model
	$(BIN)/python -m gidd_jax.sample --checkpoint=$(RUN) --num_samples=8 --num_steps=64 \
	  --out=$(DEMO)/samples.npz --replay=$(DEMO)/replay.html
	$(BIN)/python -m gidd_jax.sample --checkpoint=$(RUN) --num_steps=64 --prompt="It was" \
	  --prompt="She did not" --method=psi --top_p=0.9
	$(BIN)/python -m gidd_jax.self_correct --checkpoint=$(RUN) --samples=$(DEMO)/samples.npz \
	  --out=$(DEMO)/corrected.npz --num_steps=64 --replay=$(DEMO)/corrections.html
	$(BIN)/python -m gidd_jax.evaluate --checkpoint=$(RUN) --out=$(DEMO)/evaluation.json
	$(BIN)/python -m gidd_jax.train --config=ar --workdir=$(DEMO)/scorer \
	  --config.model.hidden_size=128 --config.model.num_layers=2 --config.model.num_heads=4 \
	  --config.model.max_seq_len=128 --config.model.dtype=float32 --config.data.mode=packed \
	  --config.optimizer.name=muon --config.optimizer.learning_rate=1e-2 \
	  --config.optimizer.warmup_steps=20 --config.train.num_steps=200 --config.train.batch_size=8 \
	  --config.train.eval_batches=10
	$(BIN)/python -m gidd_jax.generative_ppl --samples=$(DEMO)/samples.npz --scorer=$(DEMO)/scorer \
	  --out=$(DEMO)/before.json
	$(BIN)/python -m gidd_jax.generative_ppl --samples=$(DEMO)/corrected.npz \
	  --scorer=$(DEMO)/scorer --out=$(DEMO)/after.json
	rm -rf $(DEMO)/exported
	$(BIN)/python -m gidd_jax.convert --checkpoint=$(RUN) --out=$(DEMO)/exported
	$(BIN)/python -m gidd_jax.sample --checkpoint=$(DEMO)/exported --num_samples=1 --num_steps=32
	$(BIN)/python -m gidd_jax.check --checkpoint=$(RUN)
	$(BIN)/python -m gidd_jax.highlight --checkpoint=$(RUN) --evaluate --corruption=0.1 --t=0.2 \
	  --max_documents=2 --out=$(DEMO)/detection.json
	$(BIN)/python -m gidd_jax.self_correct --checkpoint=$(RUN) --planted=0.05 --t=0.2 \
	  --score=proposal,suspicion --num_steps=16 --max_documents=2 --out=$(DEMO)/mended.json
	$(BIN)/python -m gidd_jax.plots --workdir=$(RUN) --evaluation=$(DEMO)/evaluation.json \
	  --frontier=$(DEMO)/before.json,$(DEMO)/after.json \
	  --calibration=$(DEMO)/detection.json --out=$(DEMO)/plots

# 9 runs of 600 steps, 3 to 4 minutes each on 2 cores. The same command goes on after a stop.
study: $(VENV)/.core  ## the paper's ablation at a small size: uniform noise, weighting, seed
	$(BIN)/python -m gidd_jax.sweep --config=configs/sweeps/ablation.py --workdir=outputs/study

# Two runs and their tables, hours on 2 busy cores. It goes on after a stop.
SUDOKU := outputs/sudoku/6
sudoku: $(SUDOKU)/test.npz  ## grids of 6 x 6 with and without uniform noise, self-corrected
	for p in 0.0 0.2; do \
	  $(BIN)/python -m gidd_jax.train --config=configs/sudoku.py:6 \
	    --workdir=$(SUDOKU)/p_uniform=$$p --config.process.p_uniform=$$p || exit; \
	  $(BIN)/python examples/sudoku/solve.py --checkpoint=$(SUDOKU)/p_uniform=$$p \
	    --puzzles=$(SUDOKU)/test.npz --methods=adaptive,ancestral --num_puzzles=64 \
	    --out=$(SUDOKU)/p_uniform=$$p.json --replay=$(SUDOKU)/p_uniform=$$p.html || exit; \
	done
	$(BIN)/python examples/sudoku/compare.py --out=$(SUDOKU)/table.txt \
	  --reports=$(SUDOKU)/p_uniform=0.0.json,$(SUDOKU)/p_uniform=0.2.json

# 15 runs and their table. What is done stays.
STUDY := outputs/sudoku/study
sudoku-study: $(SUDOKU)/test.npz  ## five processes on 6 x 6, three seeds each, in one table
	for part in hybrid uniform mdlm; do \
	  $(BIN)/python -m gidd_jax.sweep --config=configs/sweeps/sudoku_study.py:$$part \
	    --workdir=$(STUDY)/$$part || exit; \
	  for run in $(STUDY)/$$part/runs/*; do \
	    test -f $$run/solved.json || $(BIN)/python examples/sudoku/solve.py --checkpoint=$$run \
	      --puzzles=$(SUDOKU)/test.npz --out=$$run/solved.json || exit; \
	  done; \
	done
	$(BIN)/python examples/sudoku/compare.py --out=$(STUDY)/table.txt \
	  --reports='$(STUDY)/*/runs/*/solved.json'

$(SUDOKU)/test.npz: $(VENV)/.core
	$(BIN)/python examples/sudoku/make_data.py --size=6 --out=$(SUDOKU)

# 45 runs on each law; one to two hours each on 2 cores. The same command goes on after a stop.
study-truth: $(VENV)/.core  ## the same on a Markov chain and a hidden one, whose entropy is known
	$(BIN)/python -m gidd_jax.sweep --config=configs/sweeps/chain.py --workdir=outputs/chain
	$(BIN)/python -m gidd_jax.sweep --config=configs/sweeps/chain.py:hidden \
	  --workdir=outputs/hidden

$(RUN)/summary.json: $(VENV)/.core
	$(BIN)/python -m gidd_jax.quickstart --workdir=$(RUN)

test: $(VENV)/.dev  ## the tests on two cores; a file stays on one, which makes its models once
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.dev  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

torture: $(VENV)/.dev  ## kill -9 at random moments, again and again
	$(BIN)/python -m pytest -s -m slow tests/test_torture.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs  ## the documentation, built strictly into site/
	$(BIN)/python docs/write_commands.py --out=docs/commands.md
	$(BIN)/zensical build --strict --clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.core

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@ $(VENV)/.core

constraints: | $(BIN)/python  ## resolve the pins of constraints.txt again
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev \
	  --no-header --no-annotate --quiet -o constraints.txt

clean:
	rm -rf $(VENV)
