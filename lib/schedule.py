"""Epoch to open choices: which kernels, widths and depths a supernet trains at an epoch, and the space they span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lib.config import ChoiceSchedule, Config, ScheduleConfig, ValueSchedule
from lib.genotype import BlockChoices, SearchSpace, StageChoices


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
