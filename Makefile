# Two commands: `make demo` shows it working, `make test` checks it. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: demo test test-slow lint pocket clean

demo: $(VENV)/ready
	$(PY) -m rvdist.launch experiment=demo

test: lint
	$(PY) -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/ready
	$(PY) -m pytest -m "slow"

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

pocket: $(VENV)/ready
	$(PY) -m rvdist.pocket.train outputs/pocket --seed 0

# vLLM's CPU build asks for torchvision, torchaudio and torchcodec, which may come built for another torch and
# then break `import vllm`; nothing here needs them.
$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rvdist needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable ".[$(EXTRA),dev]"
	@for module in torchvision torchaudio torchcodec; do \
	  $(PY) -c "import $$module" >/dev/null 2>&1 || $(PY) -m pip uninstall --quiet --yes $$module >/dev/null 2>&1 || true; \
	done
	@touch $@

clean:
	rm -rf $(VENV) build dist outputs multirun *.egg-info
