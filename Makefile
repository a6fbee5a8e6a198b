# make compare   set up, fetch MNIST, train eight norms side by side (the main job)
# make test      set up, run the tests; docs/development.md names the other ways to run them
# make docs      set up, build the site into docs/_build/html
# make report    set up, run every question's quick profile, write runs/report.html
# Options of the main job: make compare ARGS="--dataset cifar10 --steps 2000"
# Another interpreter: make test-newest PYTHON=python3.13

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
INSTALLED := $(VENV)/installed
# As many workers as threads of the processor; one that is done takes over half of what another has left.
PYTEST := -m pytest -n logical --dist worksteal

.PHONY: compare report test test-library test-experiments test-wheel test-newest test-oldest \
  test-ahead test-slow coverage lint docs docs-links registry bench bench-gpu bench-bytes dist lock clean

compare: $(INSTALLED)-experiments
	$(BIN)/normlab compare $(ARGS)

# More than an hour on two cores; what is finished is not run again.
report: $(INSTALLED)-experiments
	$(BIN)/normlab report $(ARGS)

test: $(INSTALLED)-dev
	$(BIN)/python $(PYTEST) $(ARGS)

# The library's tests need neither experiments/ nor its packages.
test-library: $(INSTALLED)-test
	$(BIN)/python $(PYTEST) --ignore tests/experiments $(ARGS)

test-experiments: $(INSTALLED)-dev
	$(BIN)/python $(PYTEST) tests/experiments $(ARGS)

# The library's tests on the built wheel, in an environment and a folder without this checkout.
WHEEL := .venv-wheel
test-wheel: dist
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  "$$(ls dist/*.whl)[test]"
	mkdir $(WHEEL)/away
	cp -R pyproject.toml README.md docs tests $(WHEEL)/away
	rm -r $(WHEEL)/away/tests/experiments
	cd $(WHEEL)/away && ../bin/python -c "import normlab, importlib.util as util; \
	  assert 'site-packages' in normlab.__file__ and not util.find_spec('experiments')"
	cd $(WHEEL)/away && ../bin/python $(PYTEST) $(ARGS)

# The sdist, and the wheel that is built from it.
dist: $(INSTALLED)-dev
	rm -rf dist build
	$(BIN)/python -m build

# In an environment of its own. The newest jax needs a newer Python than normlab does.
test-newest:
	rm -f .venv-newest/installed-*
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# The library with the oldest jax, numpy and flax that pyproject.toml declares.
test-oldest:
	rm -f .venv-oldest/installed-*
	mkdir -p .venv-oldest
	$(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*(d.replace('>=', '==') for d in p['dependencies'] + p['optional-dependencies']['flax']), \
	  sep='\n')" > .venv-oldest/oldest.txt
	$(MAKE) test-library VENV=.venv-oldest CONSTRAINTS=.venv-oldest/oldest.txt

# Minutes long, with real data; peers that are not installed are skipped.
test-slow: $(INSTALLED)-dev
	$(BIN)/python $(PYTEST) -m "slow or not slow" --timeout 1800 $(ARGS)

# Programs for a TPU and a GPU, compiled without the hardware: 5 GB of compilers.
test-ahead: $(INSTALLED)-dev $(INSTALLED)-tpu $(INSTALLED)-cuda
	$(BIN)/python $(PYTEST) -m "slow or not slow" --timeout 1800 tests/experiments/test_accelerators.py \
	  tests/experiments/test_kernels_ahead.py tests/experiments/test_kernels_ahead_columns.py $(ARGS)

# Which lines of normlab/ its own tests run; on GitHub in the job's summary too.
coverage: $(INSTALLED)-test
	$(BIN)/python $(PYTEST) --ignore tests/experiments --cov --cov-report= $(ARGS)
	$(BIN)/python -m coverage report --show-missing --skip-covered --format=markdown \
	  | tee -a "$${GITHUB_STEP_SUMMARY:-/dev/null}"

lint: $(INSTALLED)-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/mypy --strict --follow-imports=silent tests/typing_user.py

# The site, into docs/_build/html: a warning is an error. The notebooks run.
docs: $(INSTALLED)-docs
	$(BIN)/python -m sphinx -b html -W --keep-going docs docs/_build/html $(ARGS)

# Its links to other sites, which need a network and change without us.
docs-links: $(INSTALLED)-docs
	$(BIN)/python -m sphinx -b linkcheck docs docs/_build/links $(ARGS)

# Renews the registry at the end of docs/family.md.
registry: $(INSTALLED)-test
	$(BIN)/python -m tests.reference

# One batch norm training step beside an eager PyTorch loop, then every op beside its peers (ARGS).
bench: $(INSTALLED)-peers
	$(BIN)/normlab bench step
	$(BIN)/normlab bench ops $(ARGS)

# What programs move on a TPU v5e and an H100, compiled ahead of time; neither need be here. Tokamax
# wants Python 3.12 or later: make bench-bytes PYTHON=python3.13 VENV=.venv-bytes
bench-bytes: $(INSTALLED)-experiments $(INSTALLED)-tpu $(INSTALLED)-cuda $(INSTALLED)-tokamax
	$(BIN)/normlab bench bytes --markdown $(ARGS)

# On a machine with a GPU, in at most eight minutes: whoever is late is interrupted, and what was done
# is kept and printed. make bench-gpu PYTHON=python3.13 VENV=.venv-gpu
RUN = -timeout --foreground -s INT
OTHERS := jax.numpy tokamax torch torch.compile
bench-gpu: $(INSTALLED)-cuda $(INSTALLED)-peers $(INSTALLED)-tokamax
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  liger-kernel quack-kernels
	$(RUN) 150 $(BIN)/normlab bench ops --scale 8 --norms layer rms --shapes tokens \
	  --peers flax.linen $(OTHERS) liger quack
	$(RUN) 120 $(BIN)/normlab bench ops --scale 8 --norms batch group --shapes conv \
	  --peers flax.linen $(OTHERS)
	$(RUN) 210 $(BIN)/normlab bench bytes --targets here --dtypes bfloat16 \
	  --norms layer rms batch group --markdown

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
	rm -rf .venv .venv-* .coverage runs build dist docs/_build *.egg-info
