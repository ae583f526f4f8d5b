"""The page of a search: well formed, whole, self-contained, and honest about what it compares with."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from search_records import ledger, make_run, with_resamples

from lib.report import search_report
from lib.search import SearchRun

VOID = {"meta"}  # elements that HTML never closes


class Balance(HTMLParser):
    """Every element that is opened is closed, in order; gathers the text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(page: str) -> str:
    """The text of a page that is well formed and loads nothing."""
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    assert page.count("<svg") == page.count("</svg>")
    assert not re.search(r"https?://|src=|href=|@import|url\(|<script|nan\b|None", page)
    return "".join(Balance(page).words)


def test_every_member_of_the_front_is_on_the_page():
    run = make_run(ledger(80), max_flops=3e8)
    page = search_report(run)
    words, front = read(page), run.front()
    assert len(front) > 3 and page.count("<article>") == len(front)
    for k, record in enumerate(front):
        assert f"<pre>python final_train.py --genotype runs/a/search/pareto.json --index {k}</pre>" in page
        assert f"{record['metrics']['AP']:.4f}" in words
    assert "80 of 100" in words and "flops ≤ 3e+08" in words and "a <b>: search" in words
    assert f"{len(front)} sub-networks, cheapest first" in words


def test_the_page_says_how_busy_the_workers_were():
    words = read(search_report(make_run(ledger(60))))
    # 60 evaluations of 2 s end 1 s apart on two workers: 61 s, of which each worked 60
    assert "59.0 / min" in words and "29.5 / min for each of 2" in words and "98%" in words


def test_an_open_page_is_loaded_anew_only_while_the_search_runs():
    told = ledger(30)
    assert 'http-equiv="refresh"' in search_report(make_run(told, total=31))
    assert "refresh" not in search_report(make_run(told, total=30))


def test_a_random_search_of_the_same_ledger_is_the_control():
    others = ledger(100, "random", "other", seed=1)
    run = make_run(ledger(80), others)
    words, last = read(search_report(run)), run.control()[-1]
    assert last.draws == 80
    assert f"After 80 evaluations: best AP {run.history()[-1]:.4f} here, {last.mean:.4f} expected of random" in words
    assert "from the 120 random ones" in words and "--controller random" not in words


def test_a_control_of_the_first_proposals_says_how_little_it_knows():
    run = make_run(ledger(80))
    words = read(search_report(run))
    assert run.control()[-1].draws == 20  # the population
    assert "After 20 evaluations" in words and "what random search would have found later is not known" in words
    command = "python async_search.py --load runs/a/supernet/last.pt --train-dir runs/a/search --resume --controller"
    assert f"{command} random\n{command} evo" in words


def test_a_ledger_from_before_origins_has_no_control():
    told = [{name: value for name, value in r.items() if name != "origin"} for r in ledger(20)]
    run = make_run([])
    run = SearchRun(**{**vars(run), "told": told})
    words = read(search_report(run))
    assert run.control() == [] and "holds no random evaluation to compare with" in words


def test_failures_are_counted_and_shown():
    words = read(search_report(make_run(ledger(30, failed=lambda i: i % 10 == 3))))
    assert "3 failed" in words and "3 × RuntimeError: <out of memory> & more" in words


def test_ties_and_what_was_stopped_early_are_on_the_page():
    told = with_resamples(ledger(40))
    for record in told[30:35]:
        record |= {"status": "stopped", "images": 10}
    run = make_run(told)
    words = read(search_report(run))
    ties = [k for k, record in enumerate(run.front()) if run.noise(record).tie]
    assert 1 <= len(ties) < len(run.front())
    assert f"Not to be told from the best on these pictures, cheapest first: {', '.join(map(str, ties))}." in words
    assert "0 failed, 5 stopped early" in words and "over 200 resamples of the same 40 images" in words
    first = run.noise(run.front()[0]).interval
    assert f"{first.low:.4f} to {first.high:.4f}" in words


@pytest.mark.parametrize(
    "told",
    [[], ledger(1), ledger(3, failed=lambda i: True), ledger(2, failed=lambda i: i == 0)],
    ids=["empty", "one", "failures only", "one of two"],
)
def test_a_search_that_has_hardly_begun(told):
    words = read(search_report(make_run(told)))
    assert f"{len(told)} of 100" in words
    assert ("No evaluation has succeeded yet." in words) == all(r["status"] == "failed" for r in told)


def test_what_was_in_the_ledger_already_costs_no_time():
    told = ledger(30)
    for record in told[:10]:
        record |= {"search": "other", "time": record["time"] - 1e6}
    words = read(search_report(make_run(told)))
    assert "10 were in the ledger" in words and "of 21 s" in words


def test_a_cost_is_drawn_if_every_evaluation_has_it():
    told = ledger(30)
    assert "latency" not in read(search_report(make_run(told)))
    for i, record in enumerate(told):
        record["metrics"]["latency_ms"] = 10.0 + i
    assert "latency (ms)" in read(search_report(make_run(told)))


def test_a_large_search_is_drawn_at_once():
    told = ledger(1000, "random")
    start = time.process_time()
    search_report(make_run(told))
    assert time.process_time() - start < 2.0  # 0.1 s where it was measured
