"""The report of a search: one HTML page with its figures inside, drawn from the evaluations so far.

Pure: a search in, text out. The page loads nothing, runs no script, and follows the reader's light or dark mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple
from xml.sax.saxutils import escape

from lib import genotype_svg
from lib.bootstrap import CONFIDENCE
from lib.genotype import Genotype
from lib.html_page import legend, note, page, section
from lib.pareto import pareto_front
from lib.runlog import duration
from lib.search_run import SearchRun
from lib.search_stats import BestOf, Use, worker_use
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
    made = [choice for choice in genotype_svg.choices_made(genotypes, run.space) if choice.is_open]
    agreed = [f"{c.name} {value:g}" for c in made for value, share in c.shares.items() if share == 1.0]
    yield element("div", genotype_svg.shares(genotypes, run.space), class_="wide")
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
    kernels = genotype_svg.kernel_classes(run.space)
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
            element("div", genotype_svg.strip(genotype, run.space), class_="wide"),
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
