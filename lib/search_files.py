"""What a search leaves in its folder: best.json, pareto.json, front.png, report.html, and report.png at its end."""

from __future__ import annotations

import json

from lib import checkpoint
from lib.config import Config, to_dict
from lib.report import plot_front, plot_search
from lib.runlog import say
from lib.search_report import SearchRun, search_report


def write_results(run: SearchRun, config: Config, supernet_sha256: str, final: bool = False) -> None:
    """Replace each file at once; some evaluation must have succeeded. report.png only when it is `final`."""
    settings, front = run.settings, run.front()
    shared = {"supernet": {"path": str(run.supernet), "sha256": supernet_sha256}, "config": to_dict(config)}
    best, *members = ({**r["genotype"], "metrics": r["metrics"], **shared} for r in (run.best(), *front))
    checkpoint.write_text(run.folder / "best.json", json.dumps(best, indent=1) + "\n")
    pareto = {"format": "pareto/1", "objective": settings.objective, "costs": settings.costs, "front": members}
    checkpoint.write_text(run.folder / "pareto.json", json.dumps(pareto, indent=1) + "\n")
    scored, of_front = ([r["metrics"] for r in records] for records in (run.scored, front))
    plot_front(scored, of_front, settings.costs[0], settings.objective, run.folder / "front.png")
    try:
        checkpoint.write_text(run.folder / "report.html", search_report(run))
        if final:
            curves = run.history(), run.control()
            plot_search(scored, of_front, *curves, settings.costs, settings.objective, run.folder / "report.png")
    except Exception as error:  # whatever it is, the evaluations are worth more than their picture
        say(f"{run.folder / 'report.html'}: not drawn: {type(error).__name__}: {error}")
