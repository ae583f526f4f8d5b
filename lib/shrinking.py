"""Progressive shrinking (Once-for-All, Cai et al., ICLR 2020): which choices are open at an epoch of stage 1.

A phase opens smaller pictures or kernels, narrower blocks or shallower stages; the panel shows what that costs in AP.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from lib import distributed
from lib.config import ChoiceSchedule, Config, ScheduleConfig, SearchSpaceConfig, ValueSchedule
from lib.elastic import ElasticInvertedResidual
from lib.genotype import BlockChoices, Genotype, SearchSpace, StageChoices
from lib.log import RunLog, read_log, say

LARGEST = "largest"


def value_at(schedule: ChoiceSchedule | ValueSchedule, epoch: int):
    """The schedule's value at `epoch` (from 1): `value[i]` holds from epoch `boundary[i]` on."""
    passed = sum(epoch >= boundary for boundary in schedule.boundary)
    return schedule.value[max(passed, 1) - 1]


def choices_at(space: SearchSpaceConfig, epoch: int | None) -> tuple[Sequence[float], ...]:
    """The image sizes, kernels, expand ratios and depths that are open at `epoch`; None: all that ever open."""
    schedule = space.schedule_cfg
    sizes = schedule.image_size_choice
    size = value_at(sizes, epoch) if sizes.boundary and epoch is not None else space.image_size_choice
    others = (schedule.kernel_choice, schedule.width_choice, schedule.depth_choice)
    return size, *(list(chain(*c.value)) if epoch is None else value_at(c, epoch) for c in others)


def boundaries(schedule: ScheduleConfig, epochs: int) -> list[int]:
    """The epochs, up to `epochs`, at which a phase begins. Epoch 1 is always the first."""
    return sorted({1, *(b for choice in vars(schedule).values() for b in choice.boundary if b <= epochs)})


def first_narrower_epoch(schedule: ScheduleConfig) -> int | None:
    """The first epoch at which a width below the largest is open; None if there is none."""
    widest = max(w for value in schedule.width_choice.value for w in value)
    pairs = zip(schedule.width_choice.boundary, schedule.width_choice.value, strict=True)
    return next((boundary for boundary, value in pairs if min(value) < widest), None)


def full_space(config: Config) -> SearchSpace:
    """Every choice that the schedule ever opens: what the supernet's weights must hold."""
    return space_at(config, None)


def space_at(config: Config, epoch: int | None) -> SearchSpace:
    """The sub-networks that train at `epoch`: its open choices, each capped at the stage's own maximum."""
    # So a stage of expansion 1 and one block stays fixed, and one of 3 blocks reads depths 4, 3, 2 as 3, 2.
    c = config.search_space
    open_sizes, open_kernels, open_widths, open_depths = choices_at(c, epoch)
    kernels = config.backbone.kernels or [3 if e == 1 else max(open_kernels) for e in c.expansions]
    stages = []
    for blocks, expansion, kernel in zip(c.num_cell_groups, c.expansions, kernels, strict=True):
        block = BlockChoices(expand=_ascending(open_widths, expansion), kernel=_ascending(open_kernels, kernel))
        stages.append(StageChoices(depth=_ascending(open_depths, blocks), block=block))
    head = BlockChoices(expand=_ascending(c.head_width_choice), kernel=_ascending(c.head_kernel_choice))
    sizes = _ascending(open_sizes)
    return SearchSpace(config.backbone.backbone_type, sizes, stages=tuple(stages), head=(head,) * c.num_head)


def _ascending(values: Sequence[float], maximum: float = math.inf) -> tuple:
    return tuple(sorted({min(value, maximum) for value in values}))


def describe_openings(config: Config, epochs: int) -> list[str]:
    """One line per phase: its first epoch, the open choices, and the number of sub-networks."""
    lines = []
    for epoch in boundaries(config.search_space.schedule_cfg, epochs):
        choices = zip(("size", "kernel", "width", "depth"), choices_at(config.search_space, epoch), strict=True)
        sets = [f"{name} {{{', '.join(map('{:g}'.format, sorted(values)))}}}" for name, values in choices]
        lines.append(f"from epoch {epoch}: {', '.join(sets)}; {space_at(config, epoch).size():.3g} sub-networks")
    return lines


def make_panel(space: SearchSpace, size: int, seed: int, pretrained: Genotype | None = None) -> dict[str, Genotype]:
    """The sub-networks to follow, the same at every epoch: both ends, `size` random ones and the pretrained one."""
    rng = random.Random(seed)
    sampled = {f"random {i + 1}": space.sample(rng) for i in range(size)}
    panel = {"smallest": space.smallest(), **sampled, "pretrained": pretrained, LARGEST: space.largest()}
    return {name: genotype for name, genotype in panel.items() if genotype}


@dataclass
class Panel:
    """A few sub-networks whose scores are logged, with a warning where an opening phase hurts the largest."""

    networks: Mapping[str, Genotype]
    scorer: Callable[[nn.Module, Genotype], dict]  # a lib.scoring.Scorer on the search split
    config: Config

    def score(self, detector: nn.Module, epoch: int, log: RunLog) -> None:
        """Score every network and log the metrics. The processes of a job share the work; the main one logs."""
        mine = distributed.deal(list(self.networks.values()))
        scores = distributed.collect([self.scorer(detector, genotype)["metrics"] for genotype in mine])
        if not distributed.world().main:
            return
        networks = dict(zip(self.networks, scores, strict=True))
        log.write("eval", epoch, networks=networks)
        metric = self.config.search.objective
        words = ", ".join(f"{name} {metrics[metric]:.3f}" for name, metrics in networks.items())
        say(f"epoch {epoch}: {metric} on the search split: {words}")
        self._warn(epoch, log)

    def _warn(self, epoch: int, log: RunLog) -> None:
        """Warn, once a phase, if the largest sub-network lost more than the tolerance since the phase opened."""
        schedule, metric = self.config.search_space.schedule_cfg, self.config.search.objective
        records = read_log(log.path)
        # A log has None in place of NaN.
        largest = {r["step"]: r["networks"][LARGEST][metric] or 0.0 for r in records if r["kind"] == "eval"}
        warned = {r["phase"] for r in records if r["kind"] == "interference"}
        opened = boundaries(schedule, epoch)[-1]
        if opened in warned or opened - 1 not in largest:
            return
        before, now = largest[opened - 1], largest[epoch]
        if before - now > self.config.supernet.interference_tolerance:
            log.write("interference", epoch, phase=opened, before=before, now=now)
            # What the phase opened, in the configuration's words: width_choice [6, 4].
            opening = [f"{name} {value_at(c, opened)}" for name, c in vars(schedule).items() if opened in c.boundary]
            say(
                f"warning: the largest sub-network fell from {metric} {before:.3f} to {now:.3f} since the phase "
                f"of epoch {opened} opened ({', '.join(opening)}); a longer phase before it, or distillation "
                "(supernet.distill.weight), may help"
            )


@torch.no_grad()
def sort_hidden_channels(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, average: nn.Module | None = None
) -> int:
    """Sort the hidden channels of each elastic block, most important first, so that narrow slices keep the best ones.

    Importance is the L1 norm of the projection's weights (Once-for-All, section 3.3). The largest sub-network's output
    does not change. The optimizer's per-parameter state and `average`, a module of the same structure (a moving average
    of the weights), are permuted along. Returns the number of blocks sorted.
    """
    blocks, orders = {}, []
    for path, block in model.named_modules():
        if isinstance(block, ElasticInvertedResidual) and block.expand is not None and not block.is_tapped:
            blocks[path] = block
            orders.append(block.project.weight.abs().sum((0, 2, 3)).argsort(descending=True, stable=True).cpu())
    # Two GPUs of a job may round a norm differently; another order in one of them would mix up channels for good.
    for (path, block), order in zip(blocks.items(), distributed.from_main(orders), strict=True):
        order = order.to(block.project.weight.device)
        axes = list(block.hidden_axes())
        if average is not None:
            # By the model's order, not by its own: an averaged channel must stay the average of that channel.
            axes += average.get_submodule(path).hidden_axes()
        for module, name, dim in axes:
            tensor = getattr(module, name)
            # The optimizer's state of the weight's shape (momentum, second moments) belongs to the same channels.
            state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
            per_weight = [t for t in state.values() if isinstance(t, Tensor) and t.shape == tensor.shape]
            for t in (tensor, *per_weight):
                t.copy_(t.index_select(dim, order))
    return len(blocks)
