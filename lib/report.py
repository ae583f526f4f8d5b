"""What a search leaves: best.json, pareto.json, front.png, report.html; on demand top.json; at its end report.png.

What a search's report counts: the best so far, what random search would have found, how busy the workers were.

The report of a search: one HTML page with its figures inside, drawn from the evaluations so far.

Pure: a search in, text out. The page loads nothing, runs no script, and follows the reader's light or dark mode.

One HTML page of text, tables and inline SVG that loads nothing, runs no script, and follows light or dark mode.

Charts as SVG text that stands in an HTML page: axes, lines, points, boxes. Colours are the page's, by CSS class.

Genotypes as SVG: one as a strip of blocks, many as the share of each choice. Colours are the page's, by class.

Pictures of a run: loss and AP by epoch for stages 1 and 3, AP against cost for stage 2.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import matplotlib
from matplotlib import pyplot as plt

from lib import checkpoint
from lib.config import Config
from lib.config_io import to_dict
from lib.controllers import pareto_front
from lib.genotype import Block, BlockChoices, Genotype, SearchSpace
from lib.log import _save, duration, finite, say
from lib.scoring import CONFIDENCE
from lib.search import BestOf, SearchRun


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


PAUSE_SECONDS = 60.0  # no worker is without a job for so long: such a gap lies between two runs of the script


@dataclass
class Worker:
    """One worker of a search: its `jobs` as (start, end) in seconds of the search, and how many of them failed."""

    name: str
    jobs: list[tuple[float, float]] = field(default_factory=list)
    failed: int = 0

    @property
    def busy(self) -> float:
        """Seconds spent on jobs."""
        return sum(end - start for start, end in self.jobs)


class Use(NamedTuple):
    """How a search used its workers over `seconds`, the `pauses` between runs of the script left out."""

    workers: list[Worker]
    seconds: float
    pauses: int


def worker_use(records: Sequence[Mapping]) -> Use:
    """The workers of a search by name, from the "worker", "time" (of the end) and "seconds" of its records."""
    workers: dict[str, Worker] = {}
    end = skipped = None
    pauses = 0
    for record in sorted(records, key=lambda r: r["time"] - r["seconds"]):
        start = record["time"] - record["seconds"]
        if end is None:
            end = skipped = start
        elif start - end > PAUSE_SECONDS:
            skipped += start - end
            pauses += 1
        end = max(end, record["time"])
        worker = workers.setdefault(record["worker"], Worker(record["worker"]))
        worker.jobs.append((start - skipped, record["time"] - skipped))
        worker.failed += record["status"] != "ok"
    return Use([workers[name] for name in sorted(workers)], end - skipped if workers else 0.0, pauses)


REFRESH_SECONDS = 60  # how often an open page is loaded anew while the search runs


class Quantity(NamedTuple):
    """How a metric is written: `value / scale` with `unit`."""

    name: str
    scale: float
    unit: str

    def __call__(self, metrics: dict, metric: str) -> str:
        return f"{metrics[metric] / self.scale:.4g} {self.unit}"


COSTS = {
    "flops": Quantity("multiply-adds", 1e6, "M"),
    "params": Quantity("parameters", 1e6, "M"),
    "latency_ms": Quantity("latency", 1.0, "ms"),
}


def search_report(run: SearchRun) -> str:
    """The whole page."""
    front = run.front()
    use = worker_use(run.own)
    sections = [
        _header(run, front, use),
        section(f"{run.settings.objective} against cost", *_against_costs(run, front)),
        section("History", *_history(run)),
        section("What the front has in common", *_in_common(run, front)),
        section(f"The front: {len(front)} sub-networks, cheapest first", *_members(run, front)),
        section("Workers", *_workers(use)),
        section("Failed evaluations", *_failures(run)),
    ]
    refresh = REFRESH_SECONDS if len(run.told) < run.total else None
    return page(f"{run.name}: search", sections, refresh)


# ------------------------------------------------------------------------------------------------------------- header


def _header(run: SearchRun, front: Sequence[dict], use: Use) -> str:
    settings = run.settings
    limits = [(n[:3], n[4:], value) for n, value in vars(settings).items() if n[:4] in ("min_", "max_") and value]
    budget = [f"{cost} {'≥' if end == 'min' else '≤'} {value:g}" for end, cost, value in limits]
    lines = [
        f"Supernet {run.supernet}, {run.space.size():.3g} sub-networks.",
        f"Controller {settings.controller}: {settings.objective} against {', '.join(settings.costs)}; "
        f"budget: {', '.join(budget) or 'none'}. Scores are those of inherited weights on the search split.",
    ]
    tiles = [_progress_tile(run), _tile("front", f"{len(front)}", "sub-networks")]
    if run.scored:
        best = run.best()["metrics"]
        costs = ", ".join(f"{COSTS[c](best, c)} {COSTS[c].name}" for c in _costs(run))
        tiles.insert(0, _tile(f"best {settings.objective}", f"{best[settings.objective]:.4f}", costs))
    if use.seconds > 0:
        rate, count = 60 * len(run.own) / use.seconds, len(use.workers)
        busy = sum(worker.busy for worker in use.workers) / (use.seconds * count)
        tiles.append(_tile("throughput", f"{rate:.1f} / min", f"{rate / count:.1f} / min for each of {count}"))
        tiles.append(_tile("workers busy", f"{busy:.0%}", f"of {duration(use.seconds)}"))
    paragraphs = [element("p", escape(line), class_="quiet") for line in lines]
    title = element("h1", escape(f"{run.name}: search"))
    return element("header", title, *paragraphs, element("div", *tiles, class_="tiles"))


def _progress_tile(run: SearchRun) -> str:
    failed, known = len(run.told) - len(run.compared), len(run.told) - len(run.own)
    stopped = len(run.compared) - len(run.scored)
    notes = [f"{failed} failed"] + ([f"{stopped} stopped early"] if stopped else [])
    notes += [f"{known} were in the ledger"] if known else []
    return _tile("evaluations", f"{len(run.told)} of {run.total}", ", ".join(notes))


def _tile(label: str, value: str, note: str) -> str:
    spans = (element("span", escape(words), class_=c) for c, words in (("label", label), ("value", value), ("", note)))
    return element("div", *spans, class_="tile")


def _costs(run: SearchRun) -> list[str]:
    """The costs of the search first, then the others that every evaluation has."""
    known = [c for c in COSTS if all(r["metrics"].get(c) is not None for r in run.scored)]
    return [*run.settings.costs, *(c for c in known if c not in run.settings.costs)]


# ------------------------------------------------------------------------------------------------------------ figures


def _against_costs(run: SearchRun, front: Sequence[dict]) -> Iterable[str]:
    if not run.scored:
        yield note("No evaluation has succeeded yet.")
        return
    yield legend(random="random proposal", bred="bred or given", best="best", front="front (index in pareto.json)")
    yield element("div", *(_cost_chart(run, front, cost) for cost in _costs(run)), class_="charts")
    extra = [COSTS[c].name for c in _costs(run) if c not in run.settings.costs]
    if extra:
        yield note(
            f"The search did not look at {' and '.join(extra)}: there the dashed line is the best of what it happened "
            "to evaluate, and members of the front may lie below it."
        )


def _cost_chart(run: SearchRun, front: Sequence[dict], cost: str) -> str:
    objective, quantity = run.settings.objective, COSTS[cost]

    def points(records: Iterable[dict]) -> list[tuple[float, float]]:
        return [(r["metrics"][cost] / quantity.scale, r["metrics"][objective]) for r in records]

    everything = points(run.scored)
    chart = Chart(*zip(*everything, strict=True), f"{quantity.name} ({quantity.unit})", objective)
    chart.points(points(r for r in run.scored if r.get("origin") != "random"), "bred")
    chart.points(points(r for r in run.scored if r.get("origin") == "random"), "random")
    here = pareto_front(run.scored, objective, [cost])
    chart.steps(points(here), "front" if cost in run.settings.costs else "front dashed")
    best = run.best()["key"]
    for k, (record, point) in enumerate(zip(front, points(front), strict=True)):
        title = f"front {k}: {objective} {point[1]:.4f}, {quantity(record['metrics'], cost)} {quantity.name}"
        chart.dot(point, "best" if record["key"] == best else "front", title, str(k))
    return chart.draw(f"{objective} against {quantity.name}")


def _history(run: SearchRun) -> Iterable[str]:
    history, control = run.history(), run.control()
    if not history:
        yield note("No evaluation has succeeded yet.")
        return
    objective = run.settings.objective
    found = [(i, r["metrics"][objective]) for i, r in enumerate(run.compared, 1) if r["status"] == "ok"]
    ranges = [value for best in control for value in (best.low, best.high)]
    chart = Chart(
        [0, len(history)], [*(value for _, value in found), *ranges], "evaluations", objective, width=860, height=330
    )
    bands = ([(best.draws, value) for best in control for value in (getattr(best, side),)] for side in ("low", "high"))
    if control:
        chart.band(*bands, "band")
    chart.points(found, "each", radius=1.6)
    chart.line([(best.draws, best.mean) for best in control], "control")
    chart.steps(list(enumerate(history, 1)), "history")
    yield legend(history="best so far", control="random search, expected", band="8 in 10", each="each evaluation")
    yield chart.draw(f"best {objective} so far against evaluations, beside random search")
    yield from _control_words(run, history, control)


def _control_words(run: SearchRun, history: Sequence[float], control: Sequence[BestOf]) -> Iterable[str]:
    """What the comparison with random search says, and what it cannot say."""
    objective, extend = run.settings.objective, _commands_for_control(run)
    if not control:
        yield note("The ledger holds no random evaluation to compare with. These two commands add them:")
        yield extend
        return
    last, count = control[-1], sum(r["status"] != "failed" for r in run.random)
    stopped = sum(r["status"] == "stopped" for r in run.random)
    yield element(
        "p",
        escape(f"After {last.draws} evaluations: best {objective} "),
        element("strong", f"{history[last.draws - 1]:.4f}"),
        escape(" here, "),
        element("strong", f"{last.mean:.4f}"),
        escape(f" expected of random search (8 in 10 between {last.low:.4f} and {last.high:.4f})."),
    )
    yield note(
        f"The control is the expected best of n evaluations drawn without replacement from the {count} random ones "
        "that the ledger holds for this supernet, split and budget; its range narrows as n nears their number. Failed "
        "evaluations are left out on both sides."
        + f" {stopped} were stopped early and count with their score on the images so far."
        * (stopped > 0)
    )
    if run.settings.controller == "random":
        yield note("This search is itself random.")
    elif all(record["search"] == run.search for record in run.random):
        yield note(
            f"All {count} are the proposals this search began with: up to there both are the same, and what random "
            "search would have found later is not known. These two commands evaluate a random search of the same "
            "length into the same ledger, then draw this page again:"
        )
        yield extend


def _commands_for_control(run: SearchRun) -> str:
    command = f"python async_search.py --load {run.supernet} --train-dir {run.folder} --resume --controller"
    return element("pre", escape(f"{command} random\n{command} {run.settings.controller}"))


# -------------------------------------------------------------------------------------------------------------- front


def _in_common(run: SearchRun, front: Sequence[dict]) -> Iterable[str]:
    if not front:
        yield note("The front is empty.")
        return
    genotypes = [Genotype.from_dict(record["genotype"]) for record in front]
    made = [choice for choice in choices_made(genotypes, run.space) if choice.is_open]
    agreed = [f"{c.name} {value:g}" for c in made for value, share in c.shares.items() if share == 1.0]
    yield element("div", shares(genotypes, run.space), class_="wide")
    yield note(
        "Per cent of the members that have the block; columns are blocks, input to the left. An empty frame is a "
        "choice without alternative, or a block that no member has."
    )
    if len(front) > 1:
        listed = f": {', '.join(agreed)}" if agreed else ""
        yield element("p", escape(f"All members agree on {len(agreed)} of the {len(made)} open choices{listed}."))
    for choice in made:
        if choice.name == "image size":
            yield element("p", escape(f"Image size: {', '.join(f'{v} in {s:.0%}' for v, s in choice.shares.items())}."))


def _members(run: SearchRun, front: Sequence[dict]) -> Iterable[str]:
    if not front:
        yield note("The front is empty.")
        return
    kernels = kernel_classes(run.space)
    yield legend(**{class_: f"kernel {kernel}" for kernel, class_ in kernels.items()})
    yield note("A bar is a block, input to the left: its height is the expand ratio. A dotted line: a block left out.")
    yield from _ties(run, front)
    best = run.best()["key"]
    for k, record in enumerate(front):
        genotype = Genotype.from_dict(record["genotype"])
        command = f"python final_train.py --genotype {run.folder / 'pareto.json'} --index {k}"
        yield element(
            "article",
            element("h3", escape(f"{k}" + (" · best" if record["key"] == best else ""))),
            element("p", *_metrics(run, record), f"<span>{genotype.image_size} px</span>", class_="metrics"),
            element("div", strip(genotype, run.space), class_="wide"),
            element("pre", escape(command)),
        )


def _ties(run: SearchRun, front: Sequence[dict]) -> Iterable[str]:
    """Which members cannot be told from the best, cheapest first."""
    ties = [str(k) for k, record in enumerate(front) if (noise := run.noise(record)) and noise.tie]
    if ties:
        yield element(
            "p", escape(f"Not to be told from the best on these pictures, cheapest first: {', '.join(ties)}.")
        )
        yield note(
            f"A tie is a member whose paired difference to the best has a {CONFIDENCE:.0%} interval that holds 0, over "
            f"{run.settings.resamples} resamples of the same {front[0]['images']} images. The best was chosen on these "
            "images, so its own score is likely a little too high."
        )


def _metrics(run: SearchRun, record: dict) -> Iterable[str]:
    objective, metrics, noise = run.settings.objective, record["metrics"], run.noise(record)
    scores = [objective, *(m for m in ("AP", "AP50", "mAP") if m != objective and metrics.get(m) is not None)]
    for score in scores:
        yield element("span", escape(f"{score} "), element("strong", f"{metrics[score]:.4f}"))
        if score == objective and noise:
            yield element("span", f"{noise.interval.low:.4f} to {noise.interval.high:.4f}")
            yield element("span", "tie with the best") if noise.tie and record is not run.best() else ""
    for cost in _costs(run):
        yield element("span", element("strong", COSTS[cost](metrics, cost)), f" {COSTS[cost].name}")


# ------------------------------------------------------------------------------------------------------------ workers


def _workers(use: Use) -> Iterable[str]:
    if not use.workers:
        yield note("No worker has ended an evaluation of this search yet.")
        return
    yield element("div", _timeline(use), class_="wide")
    head = ("worker", "evaluations", "failed", "median seconds", "busy")
    rows = [element("tr", *(element("th", name) for name in head))]
    for worker in use.workers:
        seconds = median(end - start for start, end in worker.jobs)
        share = worker.busy / use.seconds if use.seconds else 1.0
        cells = (worker.name, len(worker.jobs), worker.failed, f"{seconds:.2f}", f"{share:.0%}")
        rows.append(element("tr", *(element("td", escape(str(cell))) for cell in cells)))
    yield element("table", *rows)
    pauses = f" Time between runs of the script is left out ({use.pauses} times)." if use.pauses else ""
    yield note(f"From the start of the first evaluation to the end of the last one.{pauses}")


def _timeline(use: Use) -> str:
    """A row per worker, a bar wherever it was busy; jobs closer than half a pixel are drawn as one."""
    left, width, row = 90.0, 760.0, 20
    scale = width / (use.seconds or 1.0)
    marks = []
    for i, worker in enumerate(use.workers):
        y = i * row + 4
        marks.append(text(left - 8, y + 11, worker.name, class_="small", text_anchor="end"))
        marks.append(element("rect", x=left, y=y, width=width, height=row - 6, class_="cold"))
        bars: list[list[float]] = []
        for start, end in worker.jobs:
            if bars and (start - bars[-1][1]) * scale < 0.5:
                bars[-1][1] = end
            else:
                bars.append([start, end])
        for start, end in bars:
            x, wide = left + start * scale, max((end - start) * scale, 0.5)
            marks.append(element("rect", x=x, y=y, width=wide, height=row - 6, class_="heat"))
    below = len(use.workers) * row + 16
    marks.append(text(left, below, "0", class_="small"))
    marks.append(text(left + width, below, duration(use.seconds), class_="small", text_anchor="end"))
    return figure(left + width + 4, below + 6, *marks, label="when each worker was busy")


def _failures(run: SearchRun) -> Iterable[str]:
    failed = Counter(r.get("error", "no reason recorded").strip().splitlines()[-1] for r in run.told if "error" in r)
    if not failed:
        yield note("No evaluation has failed.")
        return
    items = (element("li", escape(f"{count} × "), element("code", escape(e))) for e, count in failed.most_common())
    yield element("ul", *items)


def page(title: str, sections: Sequence[str], refresh_seconds: int | None = None) -> str:
    """The whole page; an open one is loaded anew every `refresh_seconds`."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    return element("section", element("h2", escape(title)), "\n", *content)


def note(words: str) -> str:
    return element("p", escape(words), class_="quiet")


def legend(**names: str) -> str:
    """What each class of marks stands for."""
    items = (element("span", element("i", class_=class_), escape(words)) for class_, words in names.items())
    return element("p", *items, class_="legend")


STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --quiet: #5d6875; --page: #fbfbfa; --card: #ffffff; --edge: #dfe3e8;
  --grid: #e9ecef; --blue: #2f6fb2; --red: #c8322b; --grey: #98a2ad; --gold: #d99000; --cold: #eef1f4;
  --k0: #6fb1e0; --k1: #f0a34a; --k2: #b5484d; --k3: #6a4c93; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --quiet: #98a3b0; --page: #14171b; --card: #1b1f25;
  --edge: #2f353d; --grid: #272d34; --blue: #6caae6; --red: #ff6f66; --grey: #77828e; --gold: #f2b632; --cold: #262c33;
  --k0: #5da3d6; --k1: #e3963d; --k2: #cf6067; --k3: #9a7bc7; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 6px; } h2 { font-size: 18px; margin: 0 0 10px; } h3 { font-size: 15px; margin: 0; }
p { margin: 6px 0; } .quiet { color: var(--quiet); font-size: 14px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 18px 20px;
  margin-top: 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px; }
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 16px; flex: 1 1 150px;
  color: var(--quiet); font-size: 13px; }
.tile span { display: block; }
.tile .value { color: var(--ink); font-size: 23px; font-weight: 600; white-space: nowrap; }
.charts { display: flex; flex-wrap: wrap; gap: 8px; } .charts svg { flex: 1 1 420px; } .wide { overflow-x: auto; }
.wide svg { min-width: 560px; }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; } svg text { fill: var(--ink); }
svg .tick, svg .small { font-size: 11px; fill: var(--quiet); } svg text.on { fill: #fff; font-weight: 600; }
.grid { stroke: var(--grid); } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.front { stroke: var(--red); } .line.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
.line.history { stroke: var(--blue); stroke-width: 2.5; } .line.control { stroke: var(--gold); }
svg .band { fill: var(--gold); opacity: .18; } svg .each { fill: var(--grey); opacity: .7; }
svg .bred { fill: var(--blue); opacity: .45; } svg .random { fill: none; stroke: var(--grey); }
g.front circle { fill: var(--red); } g.best circle { fill: var(--gold); stroke: var(--red); stroke-width: 2; }
.heat { fill: var(--blue); } .cold { fill: var(--cold); } .closed { fill: none; stroke: var(--edge); }
.absent { stroke: var(--grey); stroke-width: 1.5; stroke-dasharray: 2 3; }
.k0 { fill: var(--k0); } .k1 { fill: var(--k1); } .k2 { fill: var(--k2); } .k3 { fill: var(--k3); }
.legend span { margin-right: 18px; font-size: 13px; white-space: nowrap; }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 6px;
  background: var(--blue); }
.legend .random { background: none; box-shadow: inset 0 0 0 1.5px var(--grey); }
.legend .best { background: var(--gold); box-shadow: inset 0 0 0 2px var(--red); }
.legend .front { background: var(--red); }
.legend .history, .legend .control { height: 3px; width: 18px; vertical-align: middle; }
.legend .control { background: var(--gold); }
.legend .band { background: var(--gold); opacity: .35; border-radius: 2px; }
.legend .each { background: var(--grey); } .legend .bred { opacity: .55; }
.legend .k0, .legend .k1, .legend .k2, .legend .k3 { border-radius: 2px; }
.legend .k0 { background: var(--k0); } .legend .k1 { background: var(--k1); } .legend .k2 { background: var(--k2); }
.legend .k3 { background: var(--k3); }
article { border-top: 1px solid var(--edge); padding: 14px 0 8px; }
.metrics span { display: inline-block; margin-right: 20px; color: var(--quiet); } .metrics strong { color: var(--ink); }
pre { background: var(--cold); border-radius: 6px; padding: 8px 12px; margin: 8px 0; font-size: 12.5px;
  overflow-x: auto; }
table { border-collapse: collapse; margin-top: 10px; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 14px; border-bottom: 1px solid var(--edge); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--quiet); font-weight: 500; }
"""

Point = tuple[float, float]


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element; `children` are markup. `class_` is class, `text_anchor` text-anchor; fractions keep two digits."""
    names = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    written = "".join(f" {name}={quoteattr(_plain(value))}" for name, value in names if value is not None)
    return f"<{tag}{written}>{''.join(children)}</{tag}>"


def text(x: float, y: float, words: object, **attributes: object) -> str:
    return element("text", escape(str(words)), x=x, y=y, **attributes)


def figure(width: float, height: float, *children: str, label: str) -> str:
    """An SVG picture that shrinks with the page; `label` is what it shows, in words."""
    box = f"0 0 {_plain(width)} {_plain(height)}"
    style = f"max-width:{_plain(width)}px"
    return element("svg", *children, viewBox=box, style=style, role="img", aria_label=label)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most about `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not low < high:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class Chart:
    """A chart with axes. Everything given is in the units of the data; `draw` returns the picture.

    The ranges hold all of `xs` and `ys`, with some air around.
    """

    LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46

    def __init__(
        self, xs: Iterable[float], ys: Iterable[float], x_label: str, y_label: str, width: int = 560, height: int = 360
    ):
        self.width, self.height = width, height
        self.x_label, self.y_label = x_label, y_label
        self.x_range, self.y_range = _padded(xs), _padded(ys)
        self.marks: list[str] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.LEFT + (value - low) / (high - low) * (self.width - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.BOTTOM - (value - low) / (high - low) * (self.height - self.TOP - self.BOTTOM)

    def line(self, points: Sequence[Point], class_: str) -> None:
        self.marks.append(element("polyline", points=self._path(points), class_=f"line {class_}"))

    def steps(self, points: Sequence[Point], class_: str) -> None:
        """A line that keeps its height until the next point, and from the last one to the right edge."""
        corners = []
        for (x, y), (until, _) in zip(points, [*points[1:], (self.x_range[1], 0.0)], strict=True):
            corners += [(x, y), (until, y)]
        self.line(corners, class_)

    def band(self, lower: Sequence[Point], upper: Sequence[Point], class_: str) -> None:
        self.marks.append(element("polygon", points=self._path([*lower, *reversed(upper)]), class_=class_))

    def points(self, points: Iterable[Point], class_: str, radius: float = 3) -> None:
        dots = (element("circle", cx=self.x(x), cy=self.y(y), r=radius) for x, y in points)
        self.marks.append(element("g", *dots, class_=class_))

    def dot(self, point: Point, class_: str, title: str, words: str = "", radius: float = 4.5) -> None:
        """A point that says `title` under the mouse, with `words` beside it."""
        x, y = self.x(point[0]), self.y(point[1])
        marks = [element("title", escape(title)), element("circle", cx=x, cy=y, r=radius)]
        if words:
            marks.append(text(x - 7, y - 7, words, class_="small", text_anchor="end"))
        self.marks.append(element("g", *marks, class_=class_))

    def draw(self, label: str) -> str:
        return figure(self.width, self.height, *self._axes(), *self.marks, label=label)

    def _axes(self) -> Iterable[str]:
        left, right = self.LEFT, self.width - self.RIGHT
        top, bottom = self.TOP, self.height - self.BOTTOM
        for value in ticks(*self.x_range):
            x = self.x(value)
            yield element("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")
            yield text(x, bottom + 17, f"{value:g}", text_anchor="middle", class_="tick")
        for value in ticks(*self.y_range):
            y = self.y(value)
            yield element("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
            yield text(left - 7, y + 4, f"{value:g}", text_anchor="end", class_="tick")
        yield text((left + right) / 2, self.height - 8, self.x_label, text_anchor="middle")
        middle = (top + bottom) / 2
        yield text(14, middle, self.y_label, text_anchor="middle", transform=f"rotate(-90 14 {_plain(middle)})")

    def _path(self, points: Iterable[Point]) -> str:
        return " ".join(f"{_plain(self.x(x))},{_plain(self.y(y))}" for x, y in points)


def _padded(values: Iterable[float]) -> tuple[float, float]:
    """The range of `values` with 5% of air on either side; some range where they are one or none."""
    values = list(values)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    air = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def _plain(value: object) -> str:
    return f"{round(value, 2):.10g}" if isinstance(value, float) else str(value)


SLOT, GAP, LEFT = 30, 14, 74  # widths: of a block, between stages, of the labels
BAR = 34  # height of the widest block
ROW = 22  # height of a row of shares
COLOURS = 4  # kernels told apart, smallest first: classes k0 to k3


class Slot(NamedTuple):
    """Where block `block` of a stage, or of the head (`stage` None), is drawn. Shallow stages leave slots empty."""

    stage: int | None
    block: int
    x: float
    choices: BlockChoices

    def of(self, genotype: Genotype) -> Block | None:
        blocks = genotype.head if self.stage is None else genotype.stages[self.stage]
        return blocks[self.block] if self.block < len(blocks) else None

    @property
    def name(self) -> str:
        return f"head block {self.block}" if self.stage is None else f"stage {self.stage} block {self.block}"


class Choice(NamedTuple):
    """How those of the genotypes that have this choice, `count`, made it: `shares` by value, empty if none has it."""

    name: str
    options: tuple
    shares: dict
    count: int

    @property
    def is_open(self) -> bool:
        return len(self.options) > 1


def slots(space: SearchSpace) -> list[Slot]:
    """A place for each block that a genotype of `space` may have: the stages left to right, then the head."""
    parts = [(i, [stage.block] * max(stage.depth)) for i, stage in enumerate(space.stages)]
    parts += [(None, list(space.head))]
    found: list[Slot] = []
    x = float(LEFT)
    for stage, blocks in parts:
        for j, choices in enumerate(blocks):
            found.append(Slot(stage, j, x, choices))
            x += SLOT
        x += GAP
    return found


def kernel_classes(space: SearchSpace) -> dict[int, str]:
    """The CSS class of each kernel size of the space."""
    kernels = sorted({kernel for slot in slots(space) for kernel in slot.choices.kernel})
    return {kernel: f"k{min(i, COLOURS - 1)}" for i, kernel in enumerate(kernels)}


def strip(genotype: Genotype, space: SearchSpace) -> str:
    """One genotype, input to the left: a bar per block, its height the expand ratio, its colour the kernel."""
    places, colours = slots(space), kernel_classes(space)
    base = 36 + BAR
    marks = [*_stage_names(places, 12)]
    for y, label in ((12, "stage"), (base - BAR / 2 + 4, "expand"), (base + 14, "kernel")):
        marks.append(text(LEFT - 10, y, label, class_="small", text_anchor="end"))
    for slot in places:
        block, middle = slot.of(genotype), slot.x + SLOT / 2
        if block is None:
            marks.append(element("line", x1=slot.x + 8, x2=slot.x + SLOT - 8, y1=base, y2=base, class_="absent"))
            continue
        rivals = [s.choices.expand[-1] for s in places if (s.stage is None) == (slot.stage is None)]
        height = max(BAR * block.expand / max(rivals), 2.0)
        title = element("title", f"{slot.name}: expand {block.expand:g}, kernel {block.kernel}")
        bar = element("rect", x=slot.x + 2, y=base - height, width=SLOT - 4, height=height, rx=2)
        marks.append(element("g", title, bar, class_=colours[block.kernel]))
        marks.append(text(middle, base - height - 4, f"{block.expand:g}", class_="small", text_anchor="middle"))
        marks.append(text(middle, base + 14, block.kernel, class_="small", text_anchor="middle"))
    return figure(_width(places), base + 22, *marks, label=str(genotype))


def choices_made(genotypes: Sequence[Genotype], space: SearchSpace) -> list[Choice]:
    """Every choice of the space, fixed ones too, and how these genotypes made it: image size, depths, blocks."""
    found = [_choice("image size", space.image_size, [g.image_size for g in genotypes])]
    for i, stage in enumerate(space.stages):
        found.append(_choice(f"stage {i} depth", stage.depth, [g.depths[i] for g in genotypes]))
    for slot in slots(space):
        blocks = [block for g in genotypes if (block := slot.of(g)) is not None]
        for name in Block._fields:
            made = [getattr(block, name) for block in blocks]
            found.append(_choice(f"{slot.name} {name}", getattr(slot.choices, name), made))
    return found


def _choice(name: str, options: tuple, made: Sequence) -> Choice:
    counts = Counter(made)
    return Choice(name, options, {value: counts[value] / len(made) for value in options} if made else {}, len(made))


def shares(genotypes: Sequence[Genotype], space: SearchSpace) -> str:
    """A heat map: a column per block, a row per depth, kernel and expand ratio, each cell the share that chose it."""
    places = slots(space)
    by_name = {choice.name: choice for choice in choices_made(genotypes, space)}
    stages = {i: [s for s in places if s.stage == i] for i in range(len(space.stages))}
    spans = [(f"stage {i} depth", s[0].x, len(s) * SLOT) for i, s in stages.items()]
    rows = [("depth", spans)]
    rows += [(field, [(f"{s.name} {field}", s.x, SLOT) for s in places]) for field in ("kernel", "expand")]
    marks = [*_stage_names(places, 12), text(LEFT - 10, 12, "stage", class_="small", text_anchor="end")]
    y = 20.0
    for name_of_row, cells in rows:
        for value in sorted({v for name, _, _ in cells for v in by_name[name].options}, reverse=True):
            label = f"{name_of_row} {value:g}"
            marks.append(text(LEFT - 10, y + 15, label, class_="small", text_anchor="end"))
            for name, x, width in cells:
                if value in by_name[name].options:
                    marks.append(_cell(by_name[name], value, x, y, width))
            y += ROW
        y += 8
    return figure(_width(places), y, *marks, label="share of each choice among the members of the front")


def _cell(choice: Choice, value: float, x: float, y: float, width: float) -> str:
    frame = {"x": x + 1, "y": y + 1, "width": width - 2, "height": ROW - 2, "rx": 2}
    middle = {"x": x + width / 2, "y": y + 15, "text_anchor": "middle"}
    if not choice.is_open or not choice.shares:
        why = "the only one" if choice.shares else "no member of the front has this block"
        title = element("title", f"{choice.name} {value:g}: {why}")
        return element("g", title, element("rect", **frame, class_="closed"))
    share = choice.shares[value]
    title = element("title", f"{choice.name} {value:g}: {share:.0%} of {choice.count}")
    words = text(**middle, words=f"{100 * share:.0f}", class_="small on" if share > 0.5 else "small")
    back, heat = (element("rect", **frame, class_=c, fill_opacity=o) for c, o in (("cold", None), ("heat", share)))
    return element("g", title, back, heat, words)


def _stage_names(places: Sequence[Slot], y: float) -> Iterable[str]:
    for stage in dict.fromkeys(slot.stage for slot in places):
        xs = [slot.x for slot in places if slot.stage == stage]
        name = "head" if stage is None else str(stage)
        yield text((xs[0] + xs[-1] + SLOT) / 2, y, name, class_="small", text_anchor="middle")


def _width(places: Sequence[Slot]) -> float:
    return places[-1].x + SLOT + 4


matplotlib.use("Agg")

COST_LABELS = {"flops": "multiply-adds", "params": "parameters", "latency_ms": "predicted latency [ms]"}


def plot_front(evaluated: Sequence[dict], front: Sequence[dict], cost: str, metric: str, picture: Path) -> None:
    """Every evaluation's `metric` against its `cost`, the front as a line. Items are dicts of metrics."""
    figure, axis = plt.subplots(figsize=(8, 5))
    _front_axis(axis, evaluated, front, cost, metric)
    _save(figure, picture)


def _front_axis(axis: plt.Axes, evaluated: Sequence[dict], front: Sequence[dict], cost: str, metric: str) -> None:
    axis.scatter([m[cost] for m in evaluated], [m[metric] for m in evaluated], s=14, alpha=0.5, label="evaluated")
    ordered = sorted(front, key=lambda m: m[cost])
    axis.plot([m[cost] for m in ordered], [m[metric] for m in ordered], "o-", color="C3", label="Pareto front")
    axis.set_xlabel(COST_LABELS[cost])
    axis.set_ylabel(f"{metric} on the search split, inherited weights")
    axis.legend()


def plot_search(
    evaluated: Sequence[dict],
    front: Sequence[dict],
    history: Sequence[float],
    control: Sequence[BestOf],
    costs: Sequence[str],
    metric: str,
    picture: Path,
) -> None:
    """What report.html shows of `metric`: against each cost, and the best so far beside that of random search."""
    figure, axes = plt.subplots(1, len(costs) + 1, figsize=(7 * (len(costs) + 1), 5))
    for axis, cost in zip(axes, costs, strict=False):
        _front_axis(axis, evaluated, front, cost, metric)
    last = axes[-1]
    last.step(range(1, len(history) + 1), history, where="post", label="best so far")
    if control:
        draws, low, mean, high = zip(*control, strict=True)
        last.fill_between(draws, low, high, color="C1", alpha=0.2, linewidth=0)
        last.plot(draws, mean, color="C1", label="random search, expected, and 8 in 10")
    last.set_xlabel("evaluations")
    last.set_ylabel(f"best {metric} so far")
    last.legend()
    _save(figure, picture)
