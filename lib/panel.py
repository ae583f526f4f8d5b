"""The sub-networks whose AP is followed in stage 1, and a warning where opening a phase hurts the largest."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from lib import distributed
from lib.config import Config, ScheduleConfig
from lib.genotype import Genotype, SearchSpace
from lib.runlog import RunLog, read_log, say
from lib.schedule import boundaries

LARGEST = "largest"


def make_panel(space: SearchSpace, size: int, seed: int, pretrained: Genotype | None = None) -> dict[str, Genotype]:
    """Always the same ones, whether open yet or not: the ends, `size` random ones, the one that was pretrained."""
    rng = random.Random(seed)
    middle = {f"random {i + 1}": space.sample(rng) for i in range(size)}
    start = {"pretrained": pretrained} if pretrained else {}
    return {"smallest": space.smallest(), **middle, **start, LARGEST: space.largest()}


def due_epochs(config: Config) -> set[int]:
    """The epochs after which the panel is scored."""
    settings = config.supernet
    phases = [epoch for epoch in boundaries(config.search_space.schedule_cfg, settings.epochs) if epoch > 1]
    around = {epoch + side for epoch in phases for side in (-1, 0)}
    return {*range(settings.eval_every, settings.epochs + 1, settings.eval_every), *around, settings.epochs}


class PanelLog:
    """Scores the panel when it is due: every `eval_every` epochs, at the last, and before and after a phase opens."""

    def __init__(self, panel: Mapping[str, Genotype], score: Callable[[Genotype], dict], log: RunLog, config: Config):
        self.panel, self._score, self._log = panel, score, log
        self._schedule, settings = config.search_space.schedule_cfg, config.supernet
        self._metric, self._tolerance = config.search.objective, settings.interference_tolerance
        self._phases = [epoch for epoch in boundaries(self._schedule, settings.epochs) if epoch > 1]
        self._due = due_epochs(config)

    def due(self, epoch: int) -> bool:
        """Whether `epoch`, which has ended, is one to score and has not been scored."""
        return epoch in self._due and not distributed.from_main(epoch in self._scores())

    def score(self, epoch: int) -> None:
        """Score every network of the panel, log it, print one line, and a warning if there is cause for one.

        The networks are dealt out to the processes of the job, if it has several; the main one logs.
        """
        scored = distributed.collect([self._score(g) for g in distributed.deal(list(self.panel.values()))])
        if not distributed.world().main:
            return
        networks = dict(zip(self.panel, scored, strict=True))
        self._log.write("eval", epoch, networks=networks)
        scores = ", ".join(f"{name} {metrics[self._metric]:.3f}" for name, metrics in networks.items())
        say(f"epoch {epoch}: {self._metric} on the search split: {scores}")
        self._warn(epoch)

    def _scores(self) -> dict[int, dict]:
        return {r["step"]: r["networks"] for r in read_log(self._log.path) if r["kind"] == "eval"}

    def _warn(self, epoch: int) -> None:
        """Once a phase: the largest sub-network lost more than the tolerance since that phase opened."""
        opened = max((phase for phase in self._phases if phase <= epoch), default=None)
        warned = {r["phase"] for r in read_log(self._log.path) if r["kind"] == "interference"}
        scores = self._scores()
        if opened is None or opened in warned or opened - 1 not in scores:
            return
        before, now = (scores[e][LARGEST][self._metric] for e in (opened - 1, epoch))
        if before - now > self._tolerance:
            self._log.write("interference", epoch, phase=opened, before=before, now=now)
            opening = describe_opening(self._schedule, opened)
            say(
                f"warning: the largest sub-network fell from {self._metric} {before:.3f} to {now:.3f} since the phase "
                f"of epoch {opened} opened ({opening}); a longer phase before it, or distillation "
                "(supernet.distill.weight), may help"
            )


def describe_opening(schedule: ScheduleConfig, epoch: int) -> str:
    """What opens at an epoch, in the configuration's words: `width_choice [6, 4]`."""
    parts = []
    for name, choice in vars(schedule).items():
        if epoch in choice.boundary:
            parts.append(f"{name} {choice.value[choice.boundary.index(epoch)]}")
    return ", ".join(parts)
