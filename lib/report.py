"""What a search leaves in its folder: best.json, pareto.json, report.html and, on demand, top.json.

report.html is one self-contained page. matplotlib is imported where it draws, so that --help starts quickly.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from lib import UserError, checkpoint, cli
from lib.config_io import to_dict
from lib.controllers import pareto_front
from lib.genotype import Genotype, read_genotype_files
from lib.log import duration, finite, say
from lib.scoring import CONFIDENCE
from lib.search import COSTS, FRONT_TABLE, Search, cost_text, front_table

MEASURED = "The front as files"
PAUSE_SECONDS = 60.0  # no worker is without a job for this long: a longer gap lies between two runs of the script
MANY_POINTS = 2000  # more points than this are embedded in a figure as pixels, which keeps the page small


def write_results(search: Search, folder: Path, top: int = 0) -> None:
    """Write every file anew, each atomically; nothing before an evaluation has succeeded.

    With `top`, top.json lists that many of the best, whether on the front or not. One that is there stays up to date.
    """
    if not search.scored:
        return
    settings = search.settings
    supernet = {"path": str(search.identity.supernet), "sha256": search.identity.supernet_sha256}
    provenance = {"supernet": supernet, "config": to_dict(search.config)}

    def genotype_file(record: dict) -> dict:
        noise, trained = search.noise(record), search.trained_score(record)
        extra = {"noise": finite(noise._asdict())} if noise else {}
        extra |= {} if trained is None else {"trained": trained}
        return {**record["genotype"], "metrics": record["metrics"], **extra, **provenance}

    with contextlib.suppress(UserError):  # of an earlier search in this folder: there is none, as a rule
        top = top or len(read_genotype_files(folder / "top.json"))
    head = {"format": "pareto/1", "objective": settings.objective, "costs": settings.costs}
    files = {"best.json": genotype_file(search.winner())}
    for name, records in (("pareto.json", search.front()), ("top.json", search.top(top))):
        if records:
            files[name] = {**head, "front": [genotype_file(record) for record in records]}
    for name, content in files.items():
        checkpoint.write_text(folder / name, json.dumps(content, indent=1) + "\n")
    try:
        checkpoint.write_text(folder / "report.html", search_page(search, folder))
    except Exception as error:  # a page that cannot be drawn must not end a search
        say(f"{folder / 'report.html'}: not drawn: {type(error).__name__}: {error}")


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { max-width: 70em; margin: 2em auto; padding: 0 1em; font: 15px/1.5 system-ui, sans-serif; color: #222; }
section, article { border-top: 1px solid #ddd; } thead { font-weight: bold; }
td { padding: 2px 14px 2px 0; text-align: right; }
pre, code { background: #f3f4f6; font-size: 12.5px; overflow-x: auto; } svg { max-width: 100%; height: auto; }
</style></head>
<body><h1>$title</h1>
$body</body></html>
""")


def search_page(search: Search, folder: Path) -> str:
    """The whole HTML page; `folder` is where pareto.json is."""
    costs = [cost for cost in COSTS if search.best()["metrics"].get(cost) is not None]
    own = [record for record in search.told if record["search"] == search.identity.search]  # paid for by this search
    errors = [record.get("error", "no reason recorded") for record in search.told if record["status"] == "failed"]
    reasons = Counter(error.strip().splitlines()[-1] for error in errors)
    failures = [f"{count} × {reason}" for reason, count in reasons.most_common()]
    front = [Genotype.from_dict(record["genotype"]) for record in search.front()]
    sections = {
        "Summary": [element("p", _summary(search, reused=len(search.told) - len(own)))],
        "Fronts": [svg(lambda axis, cost=cost: _draw_front(axis, search, cost), f"front by {cost}") for cost in costs],
        "Best so far, beside random search": _history(search, folder),
        "Finalists": [element("pre", "\n".join(search.describe_finalists()) or "none: see --finalists")],
        "The front, cheapest first": _members(search, folder, costs),
        MEASURED: [element("pre", front_table(folder, front, search.identity.supernet_sha256))],
        "Workers": _workers(own),
        "Failed evaluations": [element("pre", "\n".join(failures) or "none")],
    }
    return page(f"{search.config.name}: search", sections)


def page(title: str, sections: Mapping[str, Iterable[Html]]) -> str:
    """A self-contained page with a heading over each section."""
    body = "".join(element("section", element("h2", name), *parts) for name, parts in sections.items())
    return PAGE.substitute(title=escape(title), body=body)


class Html(str):
    """Markup, which is not escaped again."""


def element(tag: str, *children: object) -> Html:
    """One element; what is not markup already is escaped."""
    content = "".join(child if isinstance(child, Html) else escape(str(child), quote=False) for child in children)
    return Html(f"<{tag}>{content}</{tag}>\n")


def _summary(search: Search, reused: int) -> str:
    settings, best = search.settings, search.best()["metrics"]
    budget = ", ".join(f"{key} {value:g}" for key, value in search.identity.budget.items()) or "none"
    return (
        f"Supernet {search.identity.supernet}, {search.controller.space.size():.3g} sub-networks. Controller "
        f"{settings.controller}: {settings.objective} against {', '.join(settings.costs)}; budget: {budget}. "
        f"{len(search.told)} of {search.total} evaluations: {len(search.told) - len(search.scored)} failed, {reused} "
        f"were in the ledger already. Best {settings.objective} with inherited weights: {best[settings.objective]:.4f}."
    )


def svg(draw: Callable, label: str) -> Html:
    """The figure that `draw(axis)` fills, as an element of a page; `label` says in words what it shows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps every figure

    figure, file = Figure(figsize=(8, 5)), io.StringIO()
    draw(figure.subplots())
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        # No date, so that the same search gives the same page.
        figure.savefig(file, format="svg", dpi=110, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    return Html(f'<svg role="img" aria-label="{escape(label)}"{text[text.index("<svg") + 4 :]}')  # no XML header


def table(rows: Iterable[Sequence]) -> Html:
    """A table whose first row is its head."""
    head, *others = ([element("td", cell) for cell in row] for row in rows)
    return element("table", element("thead", *head), *(element("tr", *cells) for cells in others))


def _draw_front(axis, search: Search, cost: str) -> None:
    """Every evaluation against `cost`, the best for each cost as steps, and the members of pareto.json."""
    settings = search.settings
    name, scale, unit = COSTS[cost]

    def plot(records: Iterable[dict], marker: str, draw: Callable = axis.plot, **style: object) -> None:
        points = [(r["metrics"][cost] / scale, r["metrics"][settings.objective]) for r in records]
        if points:
            draw(*zip(*points, strict=True), marker, **style)

    style = {"alpha": 0.5, "rasterized": len(search.scored) > MANY_POINTS}
    plot((r for r in search.scored if r.get("origin") != "random"), "C0.", label="bred or given", **style)
    plot((r for r in search.scored if r.get("origin") == "random"), "C7.", label="random", **style)
    # A member is the best until the next one is affordable, so the front is a staircase, up to the dearest evaluation.
    steps = pareto_front(search.rescored or search.scored, settings.objective, [cost])
    steps.append({"metrics": {**steps[-1]["metrics"], cost: max(r["metrics"][cost] for r in search.scored)}})
    plot(steps, "C3-" if cost in settings.costs else "C3--", axis.step, where="post", label="front")
    plot(search.front(), "C3o", label="index in pareto.json")
    for k, member in enumerate(search.front()):
        point = member["metrics"][cost] / scale, member["metrics"][settings.objective]
        axis.annotate(str(k), point, xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8)
    axis.set(xlabel=f"{name} ({unit})", ylabel=f"{settings.objective} on the search split")
    axis.legend(fontsize=8)


def _draw_history(axis, search: Search) -> None:
    objective, numbers = search.settings.objective, range(1, len(search.scored) + 1)
    scores = [record["metrics"][objective] for record in search.scored]
    axis.plot(numbers, scores, "C7.", alpha=0.5, label="each evaluation", rasterized=len(scores) > MANY_POINTS)
    if control := search.control():
        draws, low, mean, high = zip(*control, strict=True)
        axis.fill_between(draws, low, high, color="C1", alpha=0.2, linewidth=0, label="8 in 10 random searches")
        axis.plot(draws, mean, "C1", label="random search, expected")
    axis.step(numbers, search.history(), "C0", where="post", label="best so far")
    axis.set(xlabel="evaluations", ylabel=objective)
    axis.legend(fontsize=8)


def _history(search: Search, folder: Path) -> Iterator[Html]:
    """The curve, and what the comparison with random search says and cannot say."""
    yield svg(lambda axis: _draw_history(axis, search), "best so far against evaluations")
    known, control = search.random_evaluations(), search.control()
    if control:
        last, best = control[-1], search.history()[control[-1].draws - 1]
        yield element(
            "p",
            f"After {last.draws} evaluations: best {search.settings.objective} {best:.4f} here, {last.mean:.4f} "
            f"expected of random search (8 in 10 between {last.low:.4f} and {last.high:.4f}): the best of as many "
            f"drawn from the {len(known)} random ones that the ledger holds for this supernet, split and budget.",
        )
    name = search.settings.controller
    # A control of the search's own first proposals says nothing about later ones.
    if not control or (name != "random" and all(r["search"] == search.identity.search for r in known)):
        run = cli.command("async_search.py", load=search.identity.supernet, train_dir=folder)
        yield element(
            "p",
            f"The ledger holds {len(known)} random evaluations, all of this search: what random search would have "
            "found later is not known. These two commands add a random search and draw this page again:",
        )
        yield element("pre", f"{run} --resume --controller random\n{run} --resume --controller {name}")


def _members(search: Search, folder: Path, costs: Sequence[str]) -> Iterator[Html]:
    front, winner = search.front(), search.winner()
    noises = [search.noise(record) for record in front]
    if any(noises):
        ties = ", ".join(str(k) for k, noise in enumerate(noises) if noise and noise.tie)
        yield element(
            "p",
            f"Ties with the best: {ties}. The paired difference of a tie to the best has a {CONFIDENCE:.0%} interval "
            f"that holds 0, over {search.settings.resamples} resamples of the same {front[0]['images']} images. "
            "The best was chosen on these images, so its own score is likely a little too high.",
        )
    for k, (record, noise) in enumerate(zip(front, noises, strict=True)):
        metrics = record["metrics"]
        facts = [f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "mAP") if metrics.get(name) is not None]
        facts += [cost_text(metrics, cost) for cost in costs]
        if noise:
            low, high = noise.interval
            facts.append(f"{search.settings.objective} from {low:.4f} to {high:.4f}")
        yield element(
            "article",
            element("h3", f"{k} (best)" if record["key"] == winner["key"] else k),
            element("p", ", ".join(facts)),
            element("code", Genotype.from_dict(record["genotype"])),
            element("pre", cli.command("final_train.py", genotype=folder / "pareto.json", index=k)),
        )


def write_front_table(folder: Path, front: Sequence[Genotype], measured: dict) -> str:
    """Write front_table.json, put it into report.html, whose rest stays as it is, and return it as text."""
    checkpoint.write_text(folder / "front_table.json", json.dumps({"format": FRONT_TABLE, **measured}, indent=1) + "\n")
    text, report = front_table(folder, front, measured["supernet"]), folder / "report.html"
    if report.is_file():
        section = element("section", element("h2", MEASURED), element("pre", text))
        old_section = f"<section><h2>{MEASURED}.*?</section>\n"
        checkpoint.write_text(report, re.sub(old_section, lambda _: section, report.read_text(), flags=re.DOTALL))
    return text


def worker_use(records: Sequence[Mapping]) -> tuple[dict[str, list[Mapping]], float]:
    """The records of each worker, and the seconds that the search took, without those between runs of the script."""
    by_worker, seconds, end = defaultdict(list), 0.0, -math.inf
    for record in sorted(records, key=lambda r: r["time"] - r["seconds"]):
        start = record["time"] - record["seconds"]
        # A short gap was spent waiting for a job, so it counts.
        begin = start if start - end > PAUSE_SECONDS else end
        seconds += max(record["time"] - begin, 0.0)
        end = max(record["time"], end)
        by_worker[record["worker"]].append(record)
    return dict(sorted(by_worker.items())), seconds


def _workers(own: Sequence[dict]) -> Iterator[Html]:
    by_worker, total = worker_use(own)
    minutes = (total or 1.0) / 60
    yield element("p", f"{len(own) / minutes:.1f} evaluations per minute over {duration(total)} of work.")
    rows = [("worker", "evaluations", "failed", "busy")]
    for name, records in by_worker.items():
        busy = sum(record["seconds"] for record in records) / 60 / minutes
        rows.append((name, len(records), sum(r["status"] == "failed" for r in records), f"{busy:.0%}"))
    yield table(rows)
