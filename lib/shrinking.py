"""Epoch to open choices: which kernels, widths and depths a supernet trains at an epoch, and the space they span.

The sub-networks whose AP is followed in stage 1, and a warning where opening a phase hurts the largest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lib import distributed
from lib.config import ChoiceSchedule, Config, ScheduleConfig, ValueSchedule
from lib.genotype import BlockChoices, Genotype, SearchSpace, StageChoices
from lib.log import RunLog, read_log, say


class Choices(NamedTuple):
    """Kernels, expand ratios and depths that are open, as the configuration lists them."""

    kernel: Sequence[int]
    width: Sequence[float]
    depth: Sequence[int]


def value_at(schedule: ChoiceSchedule | ValueSchedule, epoch: int):
    """The schedule's value at `epoch` (from 1): `value[i]` holds from epoch `boundary[i]` on."""
    passed = sum(epoch >= boundary for boundary in schedule.boundary)
    return schedule.value[max(passed, 1) - 1]


def choices_at(schedule: ScheduleConfig, epoch: int) -> Choices:
    return Choices(
        kernel=value_at(schedule.kernel_choice, epoch),
        width=value_at(schedule.width_choice, epoch),
        depth=value_at(schedule.depth_choice, epoch),
    )


def boundaries(schedule: ScheduleConfig, epochs: int) -> list[int]:
    """The epochs at which a phase begins, 1 among them, up to `epochs`."""
    schedules = (schedule.kernel_choice, schedule.width_choice, schedule.depth_choice)
    return sorted({1, *(b for s in schedules for b in s.boundary if b <= epochs)})


def first_narrower_epoch(schedule: ScheduleConfig) -> int | None:
    """The first epoch at which a width below the largest is open; None if there is none."""
    widest = max(w for value in schedule.width_choice.value for w in value)
    pairs = zip(schedule.width_choice.boundary, schedule.width_choice.value, strict=True)
    return next((boundary for boundary, value in pairs if min(value) < widest), None)


def full_space(config: Config) -> SearchSpace:
    """Every choice that the schedule ever opens: what the supernet's weights must hold."""
    s = config.search_space.schedule_cfg
    return space(config, Choices(*(_union(c.value) for c in (s.kernel_choice, s.width_choice, s.depth_choice))))


def space_at(config: Config, epoch: int) -> SearchSpace:
    """The sub-networks that train at `epoch`."""
    return space(config, choices_at(config.search_space.schedule_cfg, epoch))


def space(config: Config, choices: Choices) -> SearchSpace:
    """The search space of some open choices; each is capped at a stage's own maximum.

    So a stage of expansion 1 and one block stays fixed, and one of 3 blocks reads depths 4, 3, 2 as 3, 2.
    """
    c = config.search_space
    kernels = config.backbone.kernels or [3 if e == 1 else max(choices.kernel) for e in c.expansions]
    stages = tuple(
        StageChoices(
            depth=_capped(choices.depth, blocks),
            block=BlockChoices(expand=_capped(choices.width, expansion), kernel=_capped(choices.kernel, kernel)),
        )
        for blocks, expansion, kernel in zip(c.num_cell_groups, c.expansions, kernels, strict=True)
    )
    head = BlockChoices(expand=_ascending(c.head_width_choice), kernel=_ascending(c.head_kernel_choice))
    return SearchSpace(
        backbone_type=config.backbone.backbone_type,
        image_size=_ascending(c.image_size_choice),
        stages=stages,
        head=(head,) * c.num_head,
    )


def describe_openings(config: Config, epochs: int) -> list[str]:
    """One line per phase: from which epoch, which kernels, widths and depths."""
    lines = []
    for epoch in boundaries(config.search_space.schedule_cfg, epochs):
        choices = choices_at(config.search_space.schedule_cfg, epoch)
        sets = (
            f"{name} {{{', '.join(f'{v:g}' for v in sorted(values))}}}" for name, values in choices._asdict().items()
        )
        lines.append(f"from epoch {epoch}: {', '.join(sets)}; {space_at(config, epoch).size():.3g} sub-networks")
    return lines


def _union(values: Sequence[Sequence]) -> list:
    return sorted({v for value in values for v in value})


def _ascending(values: Sequence) -> tuple:
    return tuple(sorted(set(values)))


def _capped(values: Sequence, maximum) -> tuple:
    return _ascending([min(v, maximum) for v in values])


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
