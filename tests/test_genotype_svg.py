"""Every block of a genotype is in its strip; shares against counting by hand."""

from __future__ import annotations

import random
from xml.etree import ElementTree

from lib.genotype import Block, BlockChoices, Genotype, SearchSpace, StageChoices
from lib.report import choices_made, kernel_classes, shares, slots, strip

SPACE = SearchSpace(
    "mbv3_backbone",
    (64, 96),
    (StageChoices((1,), BlockChoices((1,), (3,))), StageChoices((1, 2), BlockChoices((3, 6), (3, 5)))),
    (BlockChoices((0.25, 0.5), (5,)),),
)


def genotype(second: list[tuple[int, int]], size: int = 64) -> Genotype:
    return Genotype(size, "mbv3_backbone", ((Block(1, 3),), tuple(Block(*b) for b in second)), (Block(0.5, 5),))


def titles(svg: str) -> list[str]:
    return [title.text for title in ElementTree.fromstring(svg).iter("title")]


def test_a_strip_has_every_block_at_its_height_and_in_its_colour():
    svg = strip(genotype([(6, 5), (3, 3)]), SPACE)
    assert titles(svg) == [
        "stage 0 block 0: expand 1, kernel 3",
        "stage 1 block 0: expand 6, kernel 5",
        "stage 1 block 1: expand 3, kernel 3",
        "head block 0: expand 0.5, kernel 5",
    ]
    groups = list(ElementTree.fromstring(svg).iter("g"))
    heights = [float(g.find("rect").get("height")) for g in groups]
    assert heights[1] == 2 * heights[2] == heights[3]  # the head has a scale of its own
    assert [g.get("class") for g in groups] == ["k0", "k1", "k0", "k1"] and kernel_classes(SPACE) == {3: "k0", 5: "k1"}


def test_a_block_that_is_left_out_leaves_its_place():
    shallow, deep = (ElementTree.fromstring(strip(genotype(b), SPACE)) for b in ([(6, 5)], [(6, 5), (3, 3)]))
    assert [line.get("class") for line in shallow.iter("line")] == ["absent"] and not list(deep.iter("line"))
    last = [[rect.get("x") for rect in svg.iter("rect")][-1] for svg in (shallow, deep)]
    assert last[0] == last[1]  # the head stands in the same place


def test_shares_are_of_those_that_have_the_choice():
    front = [genotype([(6, 5), (3, 3)]), genotype([(6, 3)]), genotype([(3, 3)]), genotype([(6, 3), (6, 3)], 96)]
    made = {choice.name: choice for choice in choices_made(front, SPACE)}
    assert made["image size"].shares == {64: 0.75, 96: 0.25}
    assert made["stage 1 depth"].shares == {1: 0.5, 2: 0.5}
    assert made["stage 1 block 0 expand"].shares == {3: 0.25, 6: 0.75}
    assert made["stage 1 block 1 kernel"].shares == {3: 1.0, 5: 0.0} and made["stage 1 block 1 kernel"].count == 2
    assert not made["stage 0 block 0 kernel"].is_open and made["stage 1 block 0 kernel"].is_open
    svg = shares(front, SPACE)
    assert "stage 1 block 0 expand 6: 75% of 4" in titles(svg)
    assert "stage 0 depth 1: the only one" in titles(svg)
    assert "stage 1 block 1 kernel 5: no member of the front has this block" in titles(shares(front[1:3], SPACE))


def test_any_genotype_of_the_space_can_be_drawn():
    rng = random.Random(0)
    for _ in range(50):
        g = SPACE.sample(rng)
        blocks = sum(g.depths) + len(g.head)
        assert len(titles(strip(g, SPACE))) == blocks <= len(slots(SPACE)) == 4
