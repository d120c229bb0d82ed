VENV ?= .venv
PYTHON ?= python3

train: $(VENV)/ready  ## a DenseNet-BC on handwritten digits, in minutes
	$(VENV)/bin/python train.py --config=configs/digits.py --workdir=runs/digits

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest

test-slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/ready: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: train test test-slow lint format
