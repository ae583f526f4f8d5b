"""Pictures of a run: loss and AP by epoch for stages 1 and 3, AP against cost for stage 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from lib.checkpoint import replacing
from lib.runlog import read_log
from lib.search_stats import BestOf

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COST_LABELS = {"flops": "multiply-adds", "params": "parameters", "latency_ms": "predicted latency [ms]"}


def plot_training(log: Path, picture: Path, metric: str, phases: Sequence[int] = ()) -> None:
    """Losses above, AP below, from a JSONL log; a dotted line where a phase begins."""
    records = read_log(log)
    train = {r["step"]: r for r in records if r["kind"] == "train"}  # a resumed epoch replaces the one cut short
    scores = {r["step"]: r for r in records if r["kind"] == "eval"}
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    for name in _names(train, "losses"):  # distillation may begin later than the others
        top.plot(list(train), [r["losses"].get(name) for r in train.values()], label=name)
    for name in _names(scores, "networks"):
        bottom.plot(list(scores), [_value(r, name, metric) for r in scores.values()], marker=".", label=name)
    top.set_ylabel("loss")
    bottom.set_ylabel(metric)
    bottom.set_xlabel("epoch")
    for axis in (top, bottom):
        for epoch in phases:
            axis.axvline(epoch, linestyle=":", color="grey")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    _save(figure, picture)


def _names(records: dict[int, dict], field: str) -> list[str]:
    """What any of the records has in `field`, in order of appearance."""
    return list(dict.fromkeys(name for record in records.values() for name in record[field]))


def _value(record: dict, network: str, metric: str) -> float:
    value = record["networks"].get(network, {}).get(metric)
    return float("nan") if value is None else value


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


def plot_comparison(rows: Sequence[dict], starts: dict[str, str], picture: Path) -> None:
    """AP of each contestant of --compare against multiply-adds and latency, a marker for each of its starts."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), sharey=True)
    costs = ("flops", "multiply-adds"), ("latency_ms", "measured latency before NMS [ms]")
    for axis, (cost, label) in zip(axes, costs, strict=True):
        for (start, words), marker in zip(starts.items(), "o^x", strict=True):
            axis.plot([r[cost] for r in rows], [r[start]["AP"] for r in rows], marker, label=words)
        for row in rows:
            highest = max(row[start]["AP"] for start in starts)
            axis.annotate(
                row["name"], (row[cost], highest), (0, 8), textcoords="offset points", ha="center", fontsize=8
            )
        axis.set_xlabel(label)
        axis.margins(0.12)
    axes[0].set_ylabel("AP on the test set")
    axes[0].legend(fontsize=8)
    _save(figure, picture)


def _save(figure: plt.Figure, picture: Path) -> None:
    figure.tight_layout()
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
