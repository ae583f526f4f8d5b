# make demo: environment, install, the three stages on the built-in data. make test: the tests.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEMO := runs/shapes

.PHONY: demo test lint clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(RUN) supernet_train.py --resume
	$(RUN) async_search.py --resume --load $(DEMO)/supernet
	$(RUN) final_train.py --resume --genotype $(DEMO)/search/best.json
	$(RUN) final_train.py --predict 'data/shapes/JPEGImages/test_0000*.jpg' --load $(DEMO)/final --out $(DEMO)/drawn
	@echo "the detector: $(DEMO)/final/best.pt; what it sees: $(DEMO)/drawn"

test: $(VENV)/installed
	$(RUN) -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf runs data/shapes
