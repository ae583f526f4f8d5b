"""Genotypes and their space: canonical, hashable, the traps of mutation, JSON and aw_nas round trips, messages."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import UserError
from lib.genotype import (
    Block,
    BlockChoices,
    Genotype,
    SearchSpace,
    StageChoices,
    is_genotype_string,
    parse_genotype_string,
    read_genotype_file,
    read_genotype_files,
)


def make_space(**changes) -> SearchSpace:
    """Two fixed and two elastic dimensions of each kind: 2 * 1 * (4**2 + 4**3) * 2 = 320 genotypes."""
    fields = {
        "backbone_type": "mbv3_backbone",
        "image_size": (64, 96),
        "stages": (
            StageChoices((1,), BlockChoices((1,), (3,))),
            StageChoices((2, 3), BlockChoices((3, 6), (3, 5))),
        ),
        "head": (BlockChoices((0.5,), (3,)), BlockChoices((0.25, 0.5), (3,))),
    }
    return SearchSpace(**{**fields, **changes})


def brute_force(space: SearchSpace) -> set[Genotype]:
    """Every depth vector times every value of every block of the deepest net, inactive blocks cut off afterwards."""
    deepest = [max(s.depth) for s in space.stages]
    per_block = [
        itertools.product(s.block.expand, s.block.kernel)
        for s, depth in zip(space.stages, deepest, strict=True)
        for _ in range(depth)
    ]
    found = set()
    depth_vectors = list(itertools.product(*(s.depth for s in space.stages)))
    heads = list(itertools.product(*(itertools.product(h.expand, h.kernel) for h in space.head)))
    for values in itertools.product(*per_block):
        blocks = iter(values)
        full = [[Block(*next(blocks)) for _ in range(depth)] for depth in deepest]
        for depths, head, size in itertools.product(depth_vectors, heads, space.image_size):
            stages = tuple(tuple(stage[:d]) for stage, d in zip(full, depths, strict=True))
            found.add(Genotype(size, space.backbone_type, stages, tuple(Block(*b) for b in head)))
    return found


RNGS = st.integers(0, 10**6).map(random.Random)


def test_size_equals_the_number_of_different_genotypes():
    everything = brute_force(make_space())
    assert make_space().size() == len(everything) == 320
    for genotype in everything:
        make_space().check(genotype)


def test_sampling_reaches_every_genotype_and_nothing_else():
    space, rng = make_space(), random.Random(0)
    assert {space.sample(rng) for _ in range(6_000)} == brute_force(space)


def test_smallest_and_largest():
    smallest, largest = make_space().smallest(), make_space().largest()
    assert smallest.depths == (1, 2)
    assert largest.depths == (1, 3)
    assert smallest.stages[1] == (Block(3, 3),) * 2
    assert largest.stages[1] == (Block(6, 5),) * 3
    assert (smallest.image_size, largest.image_size) == (64, 96)
    assert (smallest.head[1].expand, largest.head[1].expand) == (0.25, 0.5)


@settings(max_examples=25)
@given(RNGS, st.sampled_from([0.0, 0.1, 1.0]))
def test_a_mutant_is_in_the_space_and_never_its_parent(rng, probability):
    space = make_space()
    parent = space.sample(rng)
    for _ in range(20):
        child = space.mutate(parent, rng, probability)
        space.check(child)
        assert child != parent
        parent = child


def test_mutation_from_every_parent_can_change_every_choice():
    space, rng = make_space(), random.Random(1)
    parent = space.smallest()
    children = [space.mutate(parent, rng, 0.0) for _ in range(500)]
    assert {c.image_size for c in children} == {64, 96}
    assert {c.depths for c in children} == {(1, 2), (1, 3)}
    assert {c.head[1].expand for c in children} == {0.25, 0.5}
    assert {c.stages[1][j] for c in children for j in range(2)} == {Block(3, 3), Block(6, 3), Block(3, 5)}


def test_mutation_never_picks_a_choice_with_a_single_value():
    """With one elastic choice in the space, every mutation must change that one."""
    only_head = make_space(image_size=(64,), stages=(StageChoices((2,), BlockChoices((3,), (3,))),))
    parent, rng = only_head.smallest(), random.Random(0)
    for _ in range(50):
        assert only_head.mutate(parent, rng, 0.0) == only_head.largest()


def test_mutation_of_a_space_with_a_single_genotype_is_an_error():
    fixed = make_space(image_size=(64,), stages=(), head=())
    with pytest.raises(ValueError, match="single genotype"):
        fixed.mutate(fixed.smallest(), random.Random(0))


def test_mutation_keeps_the_blocks_that_stay():
    space, rng = make_space(), random.Random(2)
    parent = space.largest()
    grown_or_shrunk = [c for c in (space.mutate(parent, rng, 0.0) for _ in range(300)) if c.depths != parent.depths]
    assert grown_or_shrunk
    assert all(c.stages[1] == parent.stages[1][:2] for c in grown_or_shrunk)


@settings(max_examples=25)
@given(RNGS)
def test_crossover_takes_each_choice_from_a_parent(rng):
    space = make_space()
    a, b = space.sample(rng), space.sample(rng)
    child = space.crossover(a, b, rng)
    space.check(child)
    assert child.image_size in (a.image_size, b.image_size)
    assert child.depths[1] in (a.depths[1], b.depths[1])
    for j, block in enumerate(child.stages[1]):
        donors = [p.stages[1][j] for p in (a, b) if j < p.depths[1]]
        assert block.expand in {d.expand for d in donors}
        assert block.kernel in {d.kernel for d in donors}
    assert space.crossover(a, a, rng) == a


def test_crossover_can_give_either_depth_to_either_parents_blocks():
    space, rng = make_space(), random.Random(3)
    children = {space.crossover(space.smallest(), space.largest(), rng) for _ in range(300)}
    assert {c.depths[1] for c in children} == {2, 3}
    assert {c.stages[1][0] for c in children} == {Block(e, k) for e in (3, 6) for k in (3, 5)}
    assert {c.stages[1][2] for c in children if c.depths[1] == 3} == {Block(6, 5)}


def test_equal_networks_are_equal_genotypes_whatever_their_inactive_blocks_were():
    text = "cell_0=1, cell_0_block_0=(6, 3), cell_0_block_1=({}, 5), cell_0_block_2=(0, 0)"
    one, other = (parse_genotype_string(text.format(expand), make_space()) for expand in (3, 6))
    assert one == other
    assert hash(one) == hash(other)
    assert one.stages == ((Block(6, 3),),)


def test_equal_genotypes_are_written_alike():
    """A ledger's key is made from the JSON form: 6 from YAML and 6.0 from elsewhere must not be two evaluations."""
    one = make_space().largest()
    other = replace(one, stages=(one.stages[0], tuple(Block(float(b.expand), b.kernel) for b in one.stages[1])))
    assert one == other
    assert json.dumps(one.to_dict()) == json.dumps(other.to_dict())
    assert str(one) == str(other)


@settings(max_examples=25)
@given(RNGS)
def test_json_round_trip(rng):
    genotype = make_space().sample(rng)
    data = json.loads(json.dumps({**genotype.to_dict(), "metrics": {"AP": 0.5}, "supernet": {}, "config": {}}))
    assert Genotype.from_dict(data) == genotype


AW_NAS = (
    "image_size=300, cell_0=1, cell_1=2, cell_0_block_0=(1, 3), cell_1_block_0=(6, 7), cell_1_block_1=(4, 5), "
    "head_0=(0.5, 3)"
)


def test_string_round_trip():
    odd = make_space(head=(BlockChoices((1 / 3, 1e-05), (3,)),))  # needs all of its digits, and an exponent
    for genotype in (*brute_force(make_space()), odd.smallest(), odd.largest()):
        assert parse_genotype_string(str(genotype), make_space()) == genotype
        assert is_genotype_string(str(genotype))


@pytest.mark.parametrize(
    "text",
    [
        AW_NAS,
        f"'{AW_NAS}'\n",
        AW_NAS.replace(" ", ""),
        f"MnasnetOFAGenotype({AW_NAS})",
        f"SomeName( {AW_NAS}, )",
        AW_NAS.replace("300", "np.int64(300)").replace("0.5", "np.float64(0.5)").replace("(6, 7)", "(6, np.int64(7))"),
        AW_NAS.replace("(1, 3)", "1").replace("(0.5, 3)", "0.5"),  # an expand ratio alone has aw_nas's kernel, 3
    ],
)
def test_string_spellings_of_aw_nas(text):
    genotype = parse_genotype_string(text, make_space())
    assert is_genotype_string(text)
    assert genotype == Genotype(300, "mbv3_backbone", ((Block(1, 3),), (Block(6, 7), Block(4, 5))), (Block(0.5, 3),))
    assert str(genotype) == AW_NAS


def test_older_strings_take_size_and_head_from_the_space():
    genotype = parse_genotype_string("cell_0=1, cell_0_block_0=(1,3)", make_space())
    assert genotype == Genotype(96, "mbv3_backbone", ((Block(1, 3),),), make_space().largest().head)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no cell_0"),
        ("cell_0=2, cell_0_block_0=(1, 3)", "cell_0=2, but cell_0_block_1 is missing"),
        ("cell_0=99999999, cell_0_block_0=(1, 3)", "cell_0=99999999, but cell_0_block_1 is missing"),
        ("cell_0=1, cell_0=1, cell_0_block_0=(1, 3)", "cell_0 is given twice"),
        ("cell_0=1, cell_0_block_0=(1, 3), cell_0_block_0=(6, 3)", "cell_0_block_0 is given twice"),
        ("cell_0=(1, 3), cell_0_block_0=(1, 3)", "cell_0: expected an integer"),
        ("cell_0=1, cell_0_block_0=(1, 3), image_size=30.5", "image_size: expected an integer"),
        ("cell_0=1, cell_0_block_0=(1, 3), nonsense", "cannot read 'nonsense'"),
        ("cell_0=1, cell_0_block_0=(1.2.3, 3)", "cannot read"),
        ("cell_0=1, cell_0_block_0=(1, 3), image_sise=300", "unknown item 'image_sise' .did you mean 'image_size'"),
        ("cell_0=1, cell_0_block_0=(1, 3), cel_0_block_0=(6, 3)", "unknown item 'cel_0_block_0'"),
        ("cell_0=1, cell_0_block_0=(1, 3), head_1=(0.5, 3)", "unknown item 'head_1' .did you mean 'head_0'"),
        ("cell_0=1, cell_0_block_0=(1, 3), cell_2=1, cell_2_block_0=(1, 3)", "unknown item 'cell_2'"),
        ("cell_0=1, " + 60_000 * "a", "cannot read 'aaa"),
        ("cell_0=1, " + 60_000 * "a" + "=1", "cannot read 'aaa"),
        ("cell_0=" + 60_000 * "1", "cannot read 'cell_0=111"),
        ("cell_0=1, " + 60_000 * "(", "cannot read"),
        (20_000 * "np.int64(" + "cell_0=1", "cannot read"),
        (60_000 * " " + "cell_0" + 60_000 * " " + "x", "cannot read"),
    ],
)
def test_unreadable_strings_are_refused_at_once_in_one_short_line(text, message):
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as caught:
        parse_genotype_string(text, make_space())
    assert time.perf_counter() - start < 1
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_path_is_no_genotype_string(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cell_0=1").touch()
    paths = ["best.json", "runs/cell_0/lr=0.1/best.json", "runs/cell_0/lr=0.1", "lr=0.1,cell_0.json", "cell_0=1"]
    assert not any(is_genotype_string(path) for path in (*paths, "", "cell_0", str(tmp_path / "cell_0=1")))
    assert is_genotype_string("cell_0=2") and is_genotype_string(AW_NAS)
    assert is_genotype_string("cell_0:1, cell_1=2")  # a misspelt string, which `parse_genotype_string` then explains


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("format"), 'expected a JSON object with "format": "genotype/1"'),
        (lambda d: d.pop("image_size"), "'image_size' is missing"),
        (lambda d: d["backbone"].pop("stages"), "'stages' is missing"),
        (lambda d: d["head"][0].pop("kernel"), "'kernel' is missing"),
        (lambda d: d.update(image_size="300"), "image_size: expected an integer, found '300'"),
        (lambda d: d["head"][0].update(expand=-1), "expand: expected a number from .*64, found -1"),
        (lambda d: d["head"][0].update(kernel=3.5), "kernel: expected an integer, found 3.5"),
        (lambda d: d.update(head=None), "genotype: "),
        (lambda d: d.update(backbone=[]), "genotype: "),
        (lambda d: d["backbone"].update(stages=["ab"]), "genotype: "),
    ],
)
def test_unreadable_json_says_why(change, message):
    data = make_space().smallest().to_dict()
    change(data)
    with pytest.raises(UserError, match=message):
        Genotype.from_dict(data)


def test_json_that_is_no_object():
    with pytest.raises(UserError, match=r"found \[\]"):
        Genotype.from_dict([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_type": "mbv2_backbone"}, "backbone type is 'mbv2_backbone', the search space has mbv3_backbone"),
        ({"image_size": 80}, "image_size is 80, the search space has 64, 96"),
        ({"stages": ((Block(1, 3),),)}, "number of stages is 1, the search space has 2"),
        ({"stages": ((Block(1, 3),), (Block(3, 3),))}, "depth of stage 1 is 1, the search space has 2, 3"),
        ({"stages": ((Block(1, 5),), (Block(3, 3),) * 2)}, "kernel of stage 0 block 0 is 5"),
        ({"stages": ((Block(1, 3),), (Block(3, 3), Block(4, 3)))}, "expand of stage 1 block 1 is 4"),
        ({"head": ()}, "number of head blocks is 0, the search space has 2"),
        ({"head": (Block(0.5, 3), Block(0.75, 3))}, "expand of head block 1 is 0.75, the search space has 0.25, 0.5"),
        ({"head": (Block(0.5, 5), Block(0.5, 3))}, "kernel of head block 0 is 5, the search space has 3"),
    ],
)
def test_check_names_the_first_choice_outside_the_space(changes, message):
    space = make_space()
    outside = replace(space.smallest(), **changes)
    with pytest.raises(UserError, match=message):
        space.check(outside)


def test_a_genotype_file_and_a_member_of_a_front(tmp_path):
    one, front = tmp_path / "best.json", tmp_path / "pareto.json"
    genotype = make_space().smallest()
    one.write_text(json.dumps({**genotype.to_dict(), "metrics": {"AP": 0.5}}))
    members = [{**genotype.to_dict(), "metrics": {"AP": ap}} for ap in (0.1, 0.2)]
    front.write_text(json.dumps({"format": "pareto/1", "front": members}))
    assert Genotype.from_dict(read_genotype_file(one)) == genotype
    assert read_genotype_file(front, 1) == members[1]
    assert read_genotype_files(front) == members
    assert read_genotype_files(one) == [read_genotype_file(one)]
    for index in (None, 2, -1):
        with pytest.raises(UserError, match=r"pareto\.json: holds genotypes 0 to 1; pick one of these with --index"):
            read_genotype_file(front, index)
    with pytest.raises(UserError, match=r"best\.json: holds genotypes 0 to 0"):
        read_genotype_file(one, 1)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"], ids=["missing", "cut short", "not text"])
def test_an_unreadable_genotype_file_is_named(tmp_path, content):
    path = tmp_path / "odd.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.json: cannot be read"):
        read_genotype_file(path)


def test_spread_samples_are_uniform_in_each_choice_and_cover_the_costs(tiny_detector):
    """Under `sample` the number of blocks has the variance of independent draws; here that of a uniform lean."""
    detector = tiny_detector(search_space__image_size_choice=[64, 96])
    space, rng = detector.space, random.Random(0)
    spread = [space.sample_spread(rng) for _ in range(2000)]
    uniform = [space.sample(rng) for _ in range(2000)]
    for genotype in spread[:50]:
        space.check(genotype)
    for choices, of in ((space.image_size, lambda g: g.image_size), (space.stages[1].depth, lambda g: g.depths[1])):
        for choice in choices:
            assert abs(sum(of(g) == choice for g in spread) / 2000 - 1 / len(choices)) < 0.04
    deviations = [statistics.pstdev(detector.cost(g).flops for g in drawn) for drawn in (spread, uniform)]
    assert deviations[0] > 1.2 * deviations[1]
