"""What a search leaves: genotype files that the next stage reads, and a page that is well formed, self-contained and
honest about what it compares with."""

from __future__ import annotations

import json
import re
import shlex
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from search_records import make_records, make_search, with_resamples

from lib import report
from lib.controllers import pareto_front
from lib.genotype import Genotype, read_genotype_file
from lib.report import search_page, worker_use, write_front_table, write_results

FOLDER = Path("runs/a/search")
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
    page = re.sub(r' xmlns(:xlink)?="[^"]*"', "", page)  # names, not addresses
    assert not re.search(r"https?://|src=|@import|url\((?!#)|<script|nan\b|None", page)
    assert not re.search(r'href="(?!#|data:image/png;base64,)', page)
    return " ".join(Balance(page).words)


@pytest.fixture(scope="module")
def told():
    return make_records(80)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their figures, for the tests that only read the text."""
    monkeypatch.setattr(report, "svg", lambda *_: report.Html("<svg></svg>"))


def test_every_member_of_the_front_is_on_the_page_with_its_command(told):
    search = make_search(told, budget={"max_flops": 3e8})
    page = search_page(search, Path("my runs/search"))
    words, front = read(page), search.front()
    assert len(front) > 3 and page.count("<article>") == len(front)
    commands = [line for line in words.splitlines() if line.strip().startswith("python final_train.py")]
    for k, (record, command) in enumerate(zip(front, commands, strict=True)):
        assert shlex.split(command)[2:] == ["--genotype", "my runs/search/pareto.json", "--index", f"{k}"]
        assert f"{record['metrics']['AP']:.4f}" in words
        assert str(Genotype.from_dict(record["genotype"])) in words
    assert "80 of 100" in words and "max_flops 3e+08" in words and "a <b>: search" in words


def test_the_page_says_how_busy_the_workers_were(undrawn):
    words = read(search_page(make_search(make_records(60)), FOLDER))
    # 60 evaluations of 2 s end 1 s apart on two workers: 61 s, of which each worked 60
    assert "59.0 evaluations per minute" in words and words.count("98%") == 2


def test_a_random_search_of_the_same_ledger_is_the_control(told, undrawn):
    search = make_search(told, make_records(100, "random", "other", seed=1))
    words, last = read(search_page(search, FOLDER)), search.control()[-1]
    assert last.draws == 80
    assert f"After 80 evaluations: best AP {search.history()[-1]:.4f} here, {last.mean:.4f} expected of random" in words
    assert "from the 120 random ones" in words and "--controller random" not in words


def test_a_control_of_the_first_proposals_says_how_little_it_knows(told, undrawn):
    search = make_search(told)
    words = read(search_page(search, FOLDER))
    assert search.control()[-1].draws == 20  # the population
    assert "After 20 evaluations" in words and "what random search would have found later is not known" in words
    command = "python async_search.py --load runs/a/supernet/last.pt --train-dir runs/a/search --resume --controller"
    assert f"{command} random\n{command} evo" in words


def test_a_ledger_from_before_origins_has_no_control(undrawn):
    told = [{name: value for name, value in r.items() if name != "origin"} for r in make_records(20)]
    search = make_search(told)
    words = read(search_page(search, FOLDER))
    assert search.control() == [] and "holds 0 random evaluations" in words and "--controller random" in words


def test_failures_are_counted_and_shown(undrawn):
    words = read(search_page(make_search(make_records(30, failed=lambda i: i % 10 == 3)), FOLDER))
    assert "3 failed" in words and "3 × RuntimeError: <out of memory> & more" in words


def test_ties_are_on_the_page(undrawn):
    search = make_search(with_resamples(make_records(40)))
    words = read(search_page(search, FOLDER))
    ties = [k for k, record in enumerate(search.front()) if search.noise(record).tie]
    assert 1 <= len(ties) < len(search.front())
    assert f"Ties with the best: {', '.join(map(str, ties))}." in words
    assert "over 200 resamples of the same 40 images" in words
    low, high = search.noise(search.front()[0]).interval
    assert f"{low:.4f} to {high:.4f}" in words


@pytest.mark.parametrize("told", [make_records(1), make_records(2, failed=lambda i: i == 0)], ids=["one", "one of two"])
def test_a_search_that_has_hardly_begun(told):
    assert f"{len(told)} of 100" in read(search_page(make_search(told), FOLDER))


def test_what_was_in_the_ledger_already_costs_no_time(undrawn):
    told = make_records(30)
    for record in told[:10]:
        record |= {"search": "other", "time": record["time"] - 1e6}
    words = read(search_page(make_search(told), FOLDER))
    assert "10 were in the ledger" in words and "over 21 s" in words


def test_each_cost_has_a_figure():
    told = make_records(30)
    plain = read(search_page(make_search(told), FOLDER))
    assert "multiply-adds (M)" in plain and "parameters (M)" in plain and "latency" not in plain
    for i, record in enumerate(told):
        record["metrics"]["latency_ms"] = 10.0 + i
    assert "latency (ms)" in read(search_page(make_search(told), FOLDER))


def test_the_front_is_drawn_as_steps_in_millions(told):
    search, axis = make_search(told), Figure().subplots()
    report._draw_front(axis, search, "flops")
    (steps,) = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
    expected = [(r["metrics"]["flops"] / 1e6, r["metrics"]["AP"]) for r in search.front()]
    *drawn, last = zip(*steps.get_data(), strict=True)
    assert drawn == expected
    assert last == (max(r["metrics"]["flops"] for r in told) / 1e6, expected[-1][1])  # to the dearest evaluation


def test_a_large_search_is_drawn_at_once_and_stays_small():
    search = make_search(make_records(2100, "random"))
    start = time.process_time()
    page = search_page(search, FOLDER)
    assert time.process_time() - start < 6.0  # about 1 s where it was measured
    assert len(page) < 1e6 and "data:image/png;base64," in page
    read(page)


def test_the_best_and_the_front_are_genotype_files(tmp_path, told, capsys):
    write_results(make_search(told), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"best.json", "pareto.json", "report.html"}
    best = read_genotype_file(tmp_path / "best.json")
    front = json.loads((tmp_path / "pareto.json").read_text())["front"]
    assert best["metrics"]["AP"] == max(r["metrics"]["AP"] for r in told)
    expected = [Genotype.from_dict(r["genotype"]) for r in pareto_front(told, "AP", ["flops"])]
    assert [Genotype.from_dict(member) for member in front] == expected and len(front) > 2
    for content in (best, *front):
        assert content["supernet"] == {"path": "runs/a/supernet/last.pt", "sha256": "abc"}
        assert content["config"]["name"] == "a <b>"
    read((tmp_path / "report.html").read_text())
    assert capsys.readouterr().out == ""


def test_the_noise_and_the_next_best_are_written(tmp_path):
    search = make_search(with_resamples(make_records(30)))
    write_results(search, tmp_path, top=7)
    front = json.loads((tmp_path / "pareto.json").read_text())["front"]
    for member, record in zip(front, search.front(), strict=True):
        noise = search.noise(record)
        assert member["noise"] == {"interval": list(noise.interval), "behind": list(noise.behind), "tie": noise.tie}
    write_results(search, tmp_path)  # it is not left behind by a search that goes on
    scores = [read_genotype_file(tmp_path / "top.json", k)["metrics"]["AP"] for k in range(7)]
    assert scores == sorted((r["metrics"]["AP"] for r in search.told), reverse=True)[:7]


def test_a_page_that_cannot_be_drawn_ends_no_search(tmp_path, capsys):
    (tmp_path / "report.html").write_text("the last one")
    records = make_records(5)
    del records[0]["seconds"]  # as a ledger from elsewhere may have it
    write_results(make_search(records), tmp_path)
    assert "report.html: not drawn: KeyError: 'seconds'" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == "the last one"


def test_the_table_of_the_front_stays_on_the_page(tmp_path, undrawn, told):
    search = make_search(told)
    front = [Genotype.from_dict(record["genotype"]) for record in search.front()]
    rows = {str(genotype): {"pixels": genotype.image_size, "AP int8": 0.25 + k} for k, genotype in enumerate(front)}
    write_results(search, tmp_path)
    first = (tmp_path / "report.html").read_text()
    assert "none: see --front-table" in read(first)
    measured = {"about": "<AP> and ms", "supernet": "abc"}
    write_front_table(tmp_path, front, {**measured, "rows": {"a member that has gone": {"pixels": 9, "AP int8": 9}}})
    text = write_front_table(tmp_path, front, {**measured, "rows": rows})
    assert text.splitlines()[0] == "<AP> and ms" and text.splitlines()[1].split() == ["index", "pixels", "AP", "int8"]
    assert [line.split()[::2] for line in text.splitlines()[2:]] == [[f"{k}", f"{0.25 + k}"] for k in range(len(front))]
    page = (tmp_path / "report.html").read_text()
    assert text in read(page)
    # The search that goes on has it in the same place, one by another supernet has not.
    write_results(search, tmp_path)
    assert (tmp_path / "report.html").read_text() == page
    content = json.loads((tmp_path / "front_table.json").read_text())
    (tmp_path / "front_table.json").write_text(json.dumps({**content, "supernet": "other"}))
    assert search_page(search, tmp_path) == first


def job(worker: str, start: float, end: float, status: str = "ok") -> dict:
    return {"worker": worker, "time": end, "seconds": end - start, "status": status}


def test_the_time_of_the_workers():
    records = [job("cpu#1", 100, 110, "failed"), job("cpu#0", 106, 111), job("cpu#0", 100, 104)]
    by_worker, seconds = worker_use(records)
    assert by_worker == {"cpu#0": [records[2], records[1]], "cpu#1": [records[0]]} and seconds == 11
    assert worker_use([]) == ({}, 0.0)


def test_the_time_between_two_runs_is_nobodys():
    _, seconds = worker_use([job("cpu#0", 5000, 5010), job("cpu#1", 100, 110), job("cpu#1", 5005, 5015)])
    assert seconds == 25
    _, seconds = worker_use([job("cpu#0", 0, 500), job("cpu#1", 400, 500)])  # one worker waits while another is busy
    assert seconds == 500
    _, seconds = worker_use([job("cpu#0", 0, 10), job("cpu#0", 40, 50)])  # a short gap counts
    assert seconds == 50


def test_matplotlib_is_imported_only_to_draw():
    """It takes half of the time that --help takes."""
    assert not re.search(r"^(import|from) matplotlib", Path(report.__file__).read_text(), re.MULTILINE)
