# make compare   set up, fetch MNIST, train eight norms side by side (the main job)
# make test      set up, run the tests; test-newest: with the newest versions of everything
# make report    set up, run every question's quick profile, write runs/report.html
# Options of the main job: make compare ARGS="--dataset cifar10 --steps 2000"
# Another interpreter: make test-newest PYTHON=python3.13

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
INSTALLED := $(VENV)/installed

.PHONY: compare report test test-newest test-slow lint bench lock clean

compare: $(INSTALLED)-experiments
	$(BIN)/python -m experiments compare $(ARGS)

# Thirty-five minutes on two cores; what is finished is not run again.
report: $(INSTALLED)-experiments
	$(BIN)/python -m experiments report $(ARGS)

test: $(INSTALLED)-dev
	$(BIN)/python -m pytest -n auto $(ARGS)

# In an environment of its own. The newest jax needs a newer Python than normlab does.
test-newest:
	rm -f .venv-newest/installed-*
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# Minutes long, with real data; peers that are not installed are skipped.
test-slow: $(INSTALLED)-dev
	$(BIN)/python -m pytest -m "slow or not slow" -n auto --timeout 1800 $(ARGS)

lint: $(INSTALLED)-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

# One batch norm training step beside an eager PyTorch loop, then every op beside its peers (ARGS).
bench: $(INSTALLED)-peers
	$(BIN)/python -m experiments bench step
	$(BIN)/python -m experiments bench ops $(ARGS)

# Every extra installs the locked versions (torch, a peer, is not locked), or the newest.
$(INSTALLED)-%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade --upgrade-strategy eager) -e '.[$*]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "normlab needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	       "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Renews constraints.txt: names and versions only.
lock: $(INSTALLED)-dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --fork-strategy fewest \
	  --python-version 3.11 --upgrade --no-header --no-annotate --no-emit-index-url -o constraints.txt

clean:
	rm -rf $(VENV) .venv-newest runs build *.egg-info
