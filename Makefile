# make demo: environment, install, the three stages on the built-in data. make test: the tests. make lint: the linter.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEMO := runs/shapes

.PHONY: demo test lint clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(RUN) supernet_train.py --resume
	$(RUN) async_search.py --resume --load $(DEMO)/supernet
	$(RUN) final_train.py --resume --genotype $(DEMO)/search/best.json
	$(RUN) final_train.py --predict 'data/shapes/JPEGImages/test_0000*.jpg' --load $(DEMO)/final --out $(DEMO)/drawn
	@echo "the detector: $(DEMO)/final/best.pt; its detections: $(DEMO)/drawn"

test: $(VENV)/installed-dev
	$(RUN) -m pytest

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf runs data/shapes
