"""What a search leaves: best.json, pareto.json, front.png, report.html; on demand top.json; at its end report.png."""

from __future__ import annotations

import json

from lib import checkpoint
from lib.config import Config, to_dict
from lib.report import plot_front, plot_search
from lib.runlog import finite, say
from lib.search_report import search_report
from lib.search_run import SearchRun


def write_results(run: SearchRun, config: Config, supernet_sha256: str, final: bool = False, top: int = 0) -> None:
    """Replace each file at once; some evaluation must have succeeded. report.png only when it is `final`.

    With `top`, top.json lists so many of the best, whether on the front or not.
    """
    settings, front = run.settings, run.front()
    shared = {"supernet": {"path": str(run.supernet), "sha256": supernet_sha256}, "config": to_dict(config)}

    def write(name: str, content: dict) -> None:
        checkpoint.write_text(run.folder / name, json.dumps(content, indent=1) + "\n")

    def genotype_file(record: dict) -> dict:
        noise = run.noise(record)
        noise = {"noise": finite({**noise._asdict()})} if noise else {}
        return {**record["genotype"], "metrics": record["metrics"], **noise, **shared}

    def several(records: list[dict]) -> dict:
        members = [genotype_file(record) for record in records]
        return {"format": "pareto/1", "objective": settings.objective, "costs": settings.costs, "front": members}

    write("best.json", genotype_file(run.best()))
    write("pareto.json", several(front))
    if top:
        write("top.json", several(run.top(top)))
    scored, of_front = ([r["metrics"] for r in records] for records in (run.scored, front))
    plot_front(scored, of_front, settings.costs[0], settings.objective, run.folder / "front.png")
    try:
        checkpoint.write_text(run.folder / "report.html", search_report(run))
        if final:
            curves = run.history(), run.control()
            plot_search(scored, of_front, *curves, settings.costs, settings.objective, run.folder / "report.png")
    except Exception as error:  # whatever it is, the evaluations are worth more than their picture
        say(f"{run.folder / 'report.html'}: not drawn: {type(error).__name__}: {error}")
