"""What a search leaves: genotypes that the next stage reads, and pictures that may fail without ending it."""

from __future__ import annotations

import json
from dataclasses import replace

from search_records import ledger, make_run, with_resamples

from lib import report
from lib.config import Config
from lib.controllers import pareto_front
from lib.genotype import Genotype, read_genotype_file
from lib.report import write_results

FILES = {"best.json", "pareto.json", "front.png", "report.html"}


def test_the_best_and_the_front_are_genotype_files(tmp_path):
    told = ledger(30)
    write_results(replace(make_run(told), folder=tmp_path), Config(name="a"), "abc")
    assert {path.name for path in tmp_path.iterdir()} == FILES
    best, front = (
        read_genotype_file(tmp_path / "best.json"),
        json.loads((tmp_path / "pareto.json").read_text())["front"],
    )
    assert best["metrics"]["AP"] == max(r["metrics"]["AP"] for r in told)
    expected = [Genotype.from_dict(r["genotype"]) for r in pareto_front(told, "AP", ["flops"])]
    assert [Genotype.from_dict(member) for member in front] == expected and len(front) > 2
    for content in (best, *front):
        assert content["supernet"] == {"path": "runs/a/supernet/last.pt", "sha256": "abc"}
        assert content["config"]["name"] == "a"


def test_the_noise_and_the_next_best_are_written(tmp_path):
    run = replace(make_run(with_resamples(ledger(30))), folder=tmp_path)
    write_results(run, Config(), "abc", final=True, top=7)
    front = json.loads((tmp_path / "pareto.json").read_text())["front"]
    for member, record in zip(front, run.front(), strict=True):
        noise = run.noise(record)
        assert member["noise"] == {"interval": list(noise.interval), "behind": list(noise.behind), "tie": noise.tie}
    scores = [read_genotype_file(tmp_path / "top.json", k)["metrics"]["AP"] for k in range(7)]
    assert scores == sorted((r["metrics"]["AP"] for r in run.told), reverse=True)[:7]


def test_what_cannot_be_drawn_ends_no_search(tmp_path, monkeypatch, capsys):
    run = replace(make_run(ledger(5)), folder=tmp_path)
    write_results(run, Config(), "abc", final=True)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"report.png"} and capsys.readouterr().out == ""
    drawn = (tmp_path / "report.html").read_text()
    monkeypatch.setattr(report, "search_report", lambda run: run.nonsense)
    write_results(run, Config(), "abc", final=True)
    assert "report.html: not drawn: AttributeError: " in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == drawn
