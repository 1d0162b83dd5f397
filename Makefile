# Two commands: `make demo` shows it working, `make test` checks it. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# The parts of the tests, and the commands they start, compile no module that another has compiled.
export PYTHONDONTWRITEBYTECODE :=

FAST := fast-3 fast-1 fast-2
PARTS := heavy-1 heavy-2 shared $(FAST)

.PHONY: demo test $(PARTS:%=test-%) test-fast test-slow lint audit pocket real clean

demo: $(VENV)/ready
	$(PY) -m rvdist.launch experiment=demo

# The parts, the longest first, three at a time, since they wait now and then; each is shown when it ends. tests/conftest.py says which test is in which.
test: $(VENV)/ready
	@$(MAKE) --no-print-directory --keep-going --jobs=3 --output-sync=target $(PARTS:%=test-%) lint

$(PARTS:%=test-%): test-%: $(VENV)/ready
	$(PY) -m pytest -m "not slow and not gpu" --part $*

# Needs neither Ray nor vLLM.
test-fast: $(VENV)/ready
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target $(FAST:%=test-%)

test-slow: $(VENV)/ready
	$(PY) -m pytest -m "slow"

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Versions with known vulnerabilities fail it, where the advisory data can be reached.
audit:
	$(PYTHON) tests/audit.py

pocket: $(VENV)/ready
	$(PY) -m rvdist.pocket.train outputs/pocket --seed 0

# Real models beside other tools; ARGS are options of the script, such as --data DIR.
real: $(VENV)/ready
	$(PY) benchmarks/real.py $(ARGS)

# Without a GPU: exactly what constraints.txt lists, from wherever pip's own settings say. It is complete, and pip
# resolves nothing: packages ask for things that are large, or break vLLM, and that nothing here needs. So parts of the
# list are installed beside each other, and compiled thereafter. With one: the versions of constraints-gpu.txt.
# EXTRA=cpu or EXTRA=gpu says which, where several machines are to have one.
$(VENV)/ready: pyproject.toml constraints.txt constraints-gpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rvdist needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(EXTRA),gpu)
	$(PY) -m pip install --quiet --constraint constraints-gpu.txt --editable ".[gpu,dev]"
else
	grep -v '^#' constraints.txt | xargs -n 25 -P 2 $(PY) -m pip install --quiet --no-deps --no-compile || \
	  { echo "If pip found no torch+cpu: point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at PyTorch's CPU wheels"; exit 1; }
	$(PY) -m pip install --quiet --no-deps --editable .
	@$(PY) -m compileall -qq -j 2 -x '/tests/' $(VENV)/lib >/dev/null || true  # some files are of other Pythons
endif
	@touch $@

clean:
	rm -rf $(VENV) build dist outputs multirun *.egg-info
