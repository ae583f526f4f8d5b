"""The report of a search: one HTML page with its figures inside, drawn from the evaluations so far.

Pure: records in, text out. The page loads nothing, runs no script, and follows the reader's light or dark mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple
from xml.sax.saxutils import escape

from lib import genotype_svg
from lib.config import SearchConfig
from lib.evolution import best_record, pareto_front
from lib.genotype import Genotype, SearchSpace
from lib.search_stats import BestOf, Use, best_of_random, best_so_far, worker_use
from lib.svg import Chart, element, figure, text

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


@dataclass(frozen=True)
class SearchRun:
    """One search as it stands. `told` and `random` are records of the ledger, in the order they came.

    `told`: all that the search has learnt from, of `total` in the end. `random`: every evaluation of a uniform random
    proposal on this supernet, split, settings and budget, whichever search made it. `search`: the name that the
    records of this search have in the ledger. `folder` is where pareto.json is.
    """

    name: str
    search: str
    supernet: Path
    folder: Path
    settings: SearchConfig
    space: SearchSpace
    total: int
    told: Sequence[dict]
    random: Sequence[dict]

    @property
    def scored(self) -> list[dict]:
        return [record for record in self.told if record["status"] == "ok"]

    @property
    def own(self) -> list[dict]:
        """What this search paid for itself; the rest it found in the ledger."""
        return [record for record in self.told if record["search"] == self.search]

    def front(self) -> list[dict]:
        """The members of pareto.json, in its order."""
        return pareto_front(self.scored, self.settings.objective, self.settings.costs)

    def best(self) -> dict:
        return best_record(self.scored, self.settings.objective, self.settings.costs[0])

    def history(self) -> list[float]:
        """The best objective so far, after each evaluation that succeeded."""
        return best_so_far([record["metrics"][self.settings.objective] for record in self.scored])

    def control(self) -> list[BestOf]:
        """What random search would have found with as many evaluations, as far as the ledger can tell."""
        found = [r["metrics"][self.settings.objective] for r in self.random if r["status"] == "ok"]
        return best_of_random(found, most=len(self.scored)) if found and self.scored else []


def search_report(run: SearchRun) -> str:
    """The whole page."""
    front = run.front()
    use = worker_use(run.own)
    sections = [
        _header(run, front, use),
        _section(f"{run.settings.objective} against cost", *_against_costs(run, front)),
        _section("History", *_history(run)),
        _section("What the front has in common", *_in_common(run, front)),
        _section(f"The front: {len(front)} sub-networks, cheapest first", *_members(run, front)),
        _section("Workers", *_workers(use)),
        _section("Failed evaluations", *_failures(run)),
    ]
    running = len(run.told) < run.total
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if running else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}\n'
        f"<title>{escape(run.name)}: search</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


# ------------------------------------------------------------------------------------------------------------- header


def _header(run: SearchRun, front: Sequence[dict], use: Use) -> str:
    settings = run.settings
    budget = [f"{n.removeprefix('max_')} ≤ {v:g}" for n, v in vars(settings).items() if n.startswith("max_") and v]
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
        tiles.append(_tile("workers busy", f"{busy:.0%}", f"of {_duration(use.seconds)}"))
    paragraphs = [element("p", escape(line), class_="quiet") for line in lines]
    title = element("h1", escape(f"{run.name}: search"))
    return element("header", title, *paragraphs, element("div", *tiles, class_="tiles"))


def _progress_tile(run: SearchRun) -> str:
    failed, known = len(run.told) - len(run.scored), len(run.told) - len(run.own)
    notes = [f"{failed} failed"] + ([f"{known} were in the ledger"] if known else [])
    return _tile("evaluations", f"{len(run.told)} of {run.total}", ", ".join(notes))


def _tile(label: str, value: str, note: str) -> str:
    spans = (element("span", escape(words), class_=c) for c, words in (("label", label), ("value", value), ("", note)))
    return element("div", *spans, class_="tile")


def _costs(run: SearchRun) -> list[str]:
    """The costs of the search first, then the others that every evaluation has."""
    known = [c for c in COSTS if all(r["metrics"].get(c) is not None for r in run.scored)]
    return [*run.settings.costs, *(c for c in known if c not in run.settings.costs)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------------------------------------------ figures


def _against_costs(run: SearchRun, front: Sequence[dict]) -> Iterable[str]:
    if not run.scored:
        yield _note("No evaluation has succeeded yet.")
        return
    yield _legend(random="random proposal", bred="bred or given", best="best", front="front (index in pareto.json)")
    yield element("div", *(_cost_chart(run, front, cost) for cost in _costs(run)), class_="charts")
    extra = [COSTS[c].name for c in _costs(run) if c not in run.settings.costs]
    if extra:
        yield _note(
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
        yield _note("No evaluation has succeeded yet.")
        return
    objective = run.settings.objective
    found = [r["metrics"][objective] for r in run.scored]
    ranges = [value for best in control for value in (best.low, best.high)]
    chart = Chart([0, len(found)], [*found, *ranges], "evaluations", objective, width=860, height=330)
    bands = ([(best.draws, value) for best in control for value in (getattr(best, side),)] for side in ("low", "high"))
    if control:
        chart.band(*bands, "band")
    chart.points(enumerate(found, 1), "each", radius=1.6)
    chart.line([(best.draws, best.mean) for best in control], "control")
    chart.steps(list(enumerate(history, 1)), "history")
    yield _legend(history="best so far", control="random search, expected", band="8 in 10", each="each evaluation")
    yield chart.draw(f"best {objective} so far against evaluations, beside random search")
    yield from _control_words(run, history, control)


def _control_words(run: SearchRun, history: Sequence[float], control: Sequence[BestOf]) -> Iterable[str]:
    """What the comparison with random search says, and what it cannot say."""
    objective, extend = run.settings.objective, _commands_for_control(run)
    if not control:
        yield _note("The ledger holds no random evaluation to compare with. These two commands add them:")
        yield extend
        return
    last, count = control[-1], sum(r["status"] == "ok" for r in run.random)
    yield element(
        "p",
        escape(f"After {last.draws} evaluations: best {objective} "),
        element("strong", f"{history[last.draws - 1]:.4f}"),
        escape(" here, "),
        element("strong", f"{last.mean:.4f}"),
        escape(f" expected of random search (8 in 10 between {last.low:.4f} and {last.high:.4f})."),
    )
    yield _note(
        f"The control is the expected best of n evaluations drawn without replacement from the {count} random ones "
        "that the ledger holds for this supernet, split and budget; its range narrows as n nears their number. Failed "
        "evaluations are left out on both sides."
    )
    if run.settings.controller == "random":
        yield _note("This search is itself random.")
    elif all(record["search"] == run.search for record in run.random):
        yield _note(
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
        yield _note("The front is empty.")
        return
    genotypes = [Genotype.from_dict(record["genotype"]) for record in front]
    made = [choice for choice in genotype_svg.choices_made(genotypes, run.space) if choice.is_open]
    agreed = [f"{c.name} {value:g}" for c in made for value, share in c.shares.items() if share == 1.0]
    yield element("div", genotype_svg.shares(genotypes, run.space), class_="wide")
    yield _note(
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
        yield _note("The front is empty.")
        return
    kernels = genotype_svg.kernel_classes(run.space)
    yield _legend(**{class_: f"kernel {kernel}" for kernel, class_ in kernels.items()})
    yield _note("A bar is a block, input to the left: its height is the expand ratio. A dotted line: a block left out.")
    best = run.best()["key"]
    for k, record in enumerate(front):
        genotype = Genotype.from_dict(record["genotype"])
        command = f"python final_train.py --genotype {run.folder / 'pareto.json'} --index {k}"
        yield element(
            "article",
            element("h3", escape(f"{k}" + (" · best" if record["key"] == best else ""))),
            element("p", *_metrics(run, record["metrics"]), f"<span>{genotype.image_size} px</span>", class_="metrics"),
            element("div", genotype_svg.strip(genotype, run.space), class_="wide"),
            element("pre", escape(command)),
        )


def _metrics(run: SearchRun, metrics: dict) -> Iterable[str]:
    objective = run.settings.objective
    scores = [objective, *(m for m in ("AP", "AP50", "mAP") if m != objective and metrics.get(m) is not None)]
    for score in scores:
        yield element("span", escape(f"{score} "), element("strong", f"{metrics[score]:.4f}"))
    for cost in _costs(run):
        yield element("span", element("strong", COSTS[cost](metrics, cost)), f" {COSTS[cost].name}")


# ------------------------------------------------------------------------------------------------------------ workers


def _workers(use: Use) -> Iterable[str]:
    if not use.workers:
        yield _note("No worker has ended an evaluation of this search yet.")
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
    yield _note(f"From the start of the first evaluation to the end of the last one.{pauses}")


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
    marks.append(text(left + width, below, _duration(use.seconds), class_="small", text_anchor="end"))
    return figure(left + width + 4, below + 6, *marks, label="when each worker was busy")


def _failures(run: SearchRun) -> Iterable[str]:
    failed = Counter(r.get("error", "no reason recorded").strip().splitlines()[-1] for r in run.told if "error" in r)
    if not failed:
        yield _note("No evaluation has failed.")
        return
    items = (element("li", escape(f"{count} × "), element("code", escape(e))) for e, count in failed.most_common())
    yield element("ul", *items)


# --------------------------------------------------------------------------------------------------------------- page


def _section(title: str, *content: str) -> str:
    return element("section", element("h2", escape(title)), "\n", *content)


def _note(words: str) -> str:
    return element("p", escape(words), class_="quiet")


def _legend(**names: str) -> str:
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
