"""Genotypes as SVG: one as a strip of blocks, many as the share of each choice. Colours are the page's, by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lib.genotype import Block, BlockChoices, Genotype, SearchSpace
from lib.svg import element, figure, text

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
        for field in Block._fields:
            made = [getattr(block, field) for block in blocks]
            found.append(_choice(f"{slot.name} {field}", getattr(slot.choices, field), made))
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
    for field, cells in rows:
        for value in sorted({v for name, _, _ in cells for v in by_name[name].options}, reverse=True):
            label = f"{field} {value:g}"
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
