"""Genotypes and the space they come from: sample, mutate, crossover; as JSON, as aw_nas strings, in files.

A `Genotype` is a value: immutable, hashable and canonical. It lists active blocks only, so two genotypes are equal
exactly when their sub-networks are. A `SearchSpace` is the set of genotypes that some choices allow.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from lib import UserError, did_you_mean, naming
from lib.plain import Bounds, check, read_json, shown

FORMAT = "genotype/1"
FRONT = "pareto/1"
Expand = Annotated[float, Bounds(0.001, 64)]


class Block(NamedTuple):
    """One inverted residual: hidden channels are `expand` times the input's, the depthwise kernel is `kernel` wide."""

    expand: float
    kernel: int


@dataclass(frozen=True)
class Genotype:
    """One sub-network. `stages[i][j]` is block j of backbone stage i, `head[i]` is extra feature block i."""

    image_size: int
    backbone_type: str
    stages: tuple[tuple[Block, ...], ...]
    head: tuple[Block, ...]

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(stage) for stage in self.stages)

    def to_dict(self) -> dict:
        """The JSON form, without metrics; `from_dict` is its inverse. Equal genotypes have equal forms: 6.0 is 6."""
        rows = [[{"expand": _number(b.expand), "kernel": b.kernel} for b in row] for row in (*self.stages, self.head)]
        backbone = {"type": self.backbone_type, "stages": rows[:-1]}
        return {"format": FORMAT, "image_size": self.image_size, "backbone": backbone, "head": rows[-1]}

    @classmethod
    def from_dict(cls, data: object) -> Genotype:
        """Read the JSON form. Other top-level keys of a genotype file (metrics, supernet, config) are ignored."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = shown(data.get("format") if isinstance(data, dict) else data)
            raise UserError(f'not a genotype: expected a JSON object with "format": "{FORMAT}", found {found}')
        try:
            backbone = data["backbone"]
            return cls(
                image_size=check(data["image_size"], int, "genotype: image_size"),
                backbone_type=check(backbone["type"], str, "genotype: backbone.type"),
                stages=tuple(tuple(_block(b["expand"], b["kernel"]) for b in stage) for stage in backbone["stages"]),
                head=tuple(_block(b["expand"], b["kernel"]) for b in data["head"]),
            )
        except KeyError as error:
            raise UserError(f"genotype: the key {error} is missing") from None
        except TypeError as error:  # a list or an object where a number should be, or the other way round
            raise UserError(f"genotype: {error}; best.json shows its form") from None

    def __str__(self) -> str:
        """The aw_nas spelling, one line; `parse_genotype_string` reads it back."""
        items = [f"image_size={self.image_size}"]
        items += [f"cell_{i}={depth}" for i, depth in enumerate(self.depths)]
        for i, stage in enumerate(self.stages):
            items += [f"cell_{i}_block_{j}=({_number(b.expand)}, {b.kernel})" for j, b in enumerate(stage)]
        items += [f"head_{i}=({_number(b.expand)}, {b.kernel})" for i, b in enumerate(self.head)]
        return ", ".join(items)


def _number(value: str | float) -> float:
    """A number as short as it can be written: 6, not 6.0."""
    value = float(value)
    return int(value) if value.is_integer() else value


@functools.lru_cache(maxsize=1024, typed=True)  # a ledger holds the same few blocks hundreds of thousands of times
def _block(expand: object, kernel: object) -> Block:
    return Block(check(expand, Expand, "genotype: expand"), check(kernel, int, "genotype: kernel"))


class BlockChoices(NamedTuple):
    """What one block may be: expand ratios and kernels, both ascending."""

    expand: tuple[float, ...]
    kernel: tuple[int, ...]


def all_blocks(choices: BlockChoices) -> list[Block]:
    """Every pair of an expand ratio and a kernel."""
    return [Block(expand, kernel) for expand in choices.expand for kernel in choices.kernel]


@dataclass(frozen=True)
class StageChoices:
    """What one stage may be: its depths (ascending) and what each of its blocks may be."""

    depth: tuple[int, ...]
    block: BlockChoices


@dataclass(frozen=True)
class SearchSpace:
    """The genotypes that some choices allow. Every tuple of choices is ascending and without repeats."""

    backbone_type: str
    image_size: tuple[int, ...]
    stages: tuple[StageChoices, ...]
    head: tuple[BlockChoices, ...]

    def size(self) -> int:
        """The number of different genotypes."""
        count = len(self.image_size)
        for stage in self.stages:
            per_block = len(stage.block.expand) * len(stage.block.kernel)
            count *= sum(per_block**depth for depth in stage.depth)
        return count * math.prod(len(block.expand) * len(block.kernel) for block in self.head)

    def smallest(self) -> Genotype:
        return self._build(lambda options: options[0])

    def largest(self) -> Genotype:
        return self._build(lambda options: options[-1])

    def sample(self, rng: random.Random) -> Genotype:
        """Draw every choice uniformly and independently, depths first (Once-for-All, section 3.3)."""
        return self._build(rng.choice)

    def sample_spread(self, rng: random.Random) -> Genotype:
        """Like `sample`, but the blocks lean to one side together: costs spread, instead of most being average.

        With t uniform in [0, 1], option k of n is drawn from Binomial(n - 1, t), so each choice by itself is uniform.
        """
        t = rng.random()
        genotype = self._build(lambda options: options[sum(rng.random() < t for _ in options[1:])])
        return replace(genotype, image_size=rng.choice(self.image_size))

    def _build(self, pick: Callable) -> Genotype:
        return Genotype(
            image_size=pick(self.image_size),
            backbone_type=self.backbone_type,
            stages=tuple(tuple(_pick_block(s.block, pick) for _ in range(pick(s.depth))) for s in self.stages),
            head=tuple(_pick_block(block, pick) for block in self.head),
        )

    def mutate(self, parent: Genotype, rng: random.Random, probability: float = 0.1) -> Genotype:
        """Change each choice with `probability`, and at least one: the child always differs from its parent.

        A stage that grows gets random blocks at its end. Raises ValueError if the space holds one genotype only.
        """
        genes = self._genes(parent)
        if not genes:
            raise ValueError("mutate: the search space holds a single genotype")
        chosen = [gene for gene in genes if rng.random() < probability] or [rng.choice(genes)]
        image_size = parent.image_size
        rows = [*parent.stages, parent.head]
        for gene in chosen:
            match gene:
                case ("image_size",):
                    image_size = _another(self.image_size, image_size, rng)
                case ("depth", i):
                    depth = _another(self.stages[i].depth, len(rows[i]), rng)
                    added = [_pick_block(self.stages[i].block, rng.choice) for _ in range(depth - len(rows[i]))]
                    rows[i] = (*rows[i][:depth], *added)
                case (i, j, field):
                    value = _another(getattr(self._options(i, j), field), getattr(rows[i][j], field), rng)
                    rows[i] = (*rows[i][:j], rows[i][j]._replace(**{field: value}), *rows[i][j + 1 :])
        return replace(parent, image_size=image_size, stages=tuple(rows[:-1]), head=rows[-1])

    def _options(self, row: int, j: int) -> BlockChoices:
        """What block `j` of a row may be: a row is a stage or, after the last of these, the head."""
        return self.stages[row].block if row < len(self.stages) else self.head[j]

    def _genes(self, genotype: Genotype) -> list[tuple]:
        """The choices that have an alternative: the image size, fields of a row's blocks (row, j, field), depths."""
        genes: list[tuple] = [("image_size",)] if len(self.image_size) > 1 else []
        for i, row in enumerate((*genotype.stages, genotype.head)):
            for j in range(len(row)):
                genes += [(i, j, field) for field in Block._fields if len(getattr(self._options(i, j), field)) > 1]
        # Depths come last, so that a block still exists when its turn comes.
        return genes + [("depth", i) for i, stage in enumerate(self.stages) if len(stage.depth) > 1]

    def crossover(self, a: Genotype, b: Genotype, rng: random.Random) -> Genotype:
        """Take every choice from one parent or the other; a block that only one parent has comes from that one."""
        stages = []
        for pair in zip(a.stages, b.stages, strict=True):
            depth = len(rng.choice(pair))
            donors = [[stage[j] for stage in pair if j < len(stage)] for j in range(depth)]
            stages.append(tuple(_mix(blocks, rng) for blocks in donors))
        head = tuple(_mix(blocks, rng) for blocks in zip(a.head, b.head, strict=True))
        size = rng.choice((a.image_size, b.image_size))
        return Genotype(size, self.backbone_type, tuple(stages), head)

    def check(self, genotype: Genotype) -> None:
        """Raise UserError, naming the first choice that this space does not hold."""
        _expect("backbone type", genotype.backbone_type, (self.backbone_type,))
        _expect("image_size", genotype.image_size, self.image_size)
        _expect("number of stages", len(genotype.stages), (len(self.stages),))
        _expect("number of head blocks", len(genotype.head), (len(self.head),))
        for i, (stage, choices) in enumerate(zip(genotype.stages, self.stages, strict=True)):
            _expect(f"depth of stage {i}", len(stage), choices.depth)
        for i, row in enumerate((*genotype.stages, genotype.head)):
            where = f"stage {i}" if i < len(self.stages) else "head"
            for j, block in enumerate(row):
                for field, value, options in zip(Block._fields, block, self._options(i, j), strict=True):
                    _expect(f"{field} of {where} block {j}", value, options)


def _expect(what: str, value: object, options: Sequence) -> None:
    if value not in options:
        raise UserError(f"genotype: {what} is {shown(value)}, the search space has {', '.join(map(str, options))}")


def _pick_block(choices: BlockChoices, pick: Callable) -> Block:
    return Block(pick(choices.expand), pick(choices.kernel))


def _another(options: Sequence, current: float, rng: random.Random) -> float:
    return rng.choice([option for option in options if option != current])


def _mix(blocks: Sequence[Block], rng: random.Random) -> Block:
    return Block(rng.choice(blocks).expand, rng.choice(blocks).kernel)


# Lengths are bounded, and items are matched one after the other, so that no text takes more than linear time.
_DECIMAL = r"(?:\d{1,9}(?:\.\d*)?|\.\d+)(?:e-?\d{1,3})?"
_VALUE = rf"(?:({_DECIMAL})|\(\s*({_DECIMAL})\s*,\s*(\d{{1,9}})\s*\))"
_ITEM = re.compile(rf"(\w{{1,60}})\s*=\s*{_VALUE}(?:[\s,]+|$)|(.+)", re.DOTALL)  # or whatever is no item, up to the end
_WRAPPER = re.compile(r"\w{1,60}\((.*)\)", re.DOTALL)
_NUMPY_SCALAR = re.compile(r"\b(?:np|numpy)\.\w{1,20}\(([^()]*)\)")


def is_genotype_string(text: str) -> bool:
    """Whether `text` is a genotype in the aw_nas spelling, and not the path of a file."""
    if text.endswith(".json") or "/" in text or "\\" in text:
        return False
    names_a_file = len(text) < 256 and Path(text).exists()  # a longer name is an error of most file systems
    return "cell_0" in text and "=" in text and not names_a_file


def parse_genotype_string(text: str, space: SearchSpace) -> Genotype:
    """Read the aw_nas spelling `image_size=300, cell_0=1, ..., cell_0_block_0=(1, 3), ..., head_0=(0.5, 3)`.

    The items may stand in `MnasnetOFAGenotype(...)`, a number may be written `np.int64(300)`, and a block as its expand
    ratio alone, which means kernel 3. Blocks beyond a stage's depth are inactive and dropped. The backbone type, and an
    image size or a head that is left out, are those of `space.largest()`. The result is not checked against `space`.
    """
    items = _read_items(text)
    largest = space.largest()
    # Every item that is used is taken out of `items`; what remains is a mistake.
    stages = []
    for i, depth in enumerate(_take(items, "cell_")):
        blocks = _take(items, f"cell_{i}_block_")
        if len(blocks) < check(depth, int, f"genotype string: cell_{i}"):
            raise UserError(f"genotype string: cell_{i}={depth}, but cell_{i}_block_{len(blocks)} is missing")
        stages.append(tuple(blocks[:depth]))
    if not stages:
        raise UserError("genotype string: no cell_0=... found")
    head = tuple(_take(items, "head_"))
    image_size = check(items.pop("image_size", largest.image_size), int, "genotype string: image_size")
    for name in items:
        valid = ["image_size", "cell_0", "cell_0_block_0", f"head_{len(head)}"]
        raise UserError(f"genotype string: unknown item '{name}'{did_you_mean(name, valid)}")
    return Genotype(image_size, space.backbone_type, tuple(stages), head or largest.head)


def _take(items: dict[str, float | Block], prefix: str) -> list:
    """Take `prefix` 0, 1, ... out of `items`, as far as these go."""
    taken = []
    while (name := f"{prefix}{len(taken)}") in items:
        taken.append(items.pop(name))
    return taken


def _read_items(text: str) -> dict[str, float | Block]:
    """The items `name=number` and `name=(expand, kernel)` of a genotype string."""
    text = text.strip(" ,\n\t'\"")
    if wrapped := _WRAPPER.fullmatch(text):
        text = wrapped[1].strip(" ,\n\t")
    text = _NUMPY_SCALAR.sub(r"\1", text)
    items: dict[str, float | Block] = {}
    for name, number, expand, kernel, rest in _ITEM.findall(text):
        if rest:
            raise UserError(f"genotype string: cannot read {rest[:60]!r}; expected items such as cell_1_block_0=(6, 7)")
        if name in items:
            raise UserError(f"genotype string: {name} is given twice")
        # A block that is written as its expand ratio alone has aw_nas's kernel, 3.
        is_block = expand or "_block_" in name or name.startswith("head_")
        items[name] = Block(_number(expand or number), int(kernel or 3)) if is_block else _number(number)
    return items


def read_genotype_file(path: Path, index: int | None = None) -> dict:
    """The content of a genotype file (best.json), or member `index` of a front (pareto.json), cheapest first."""
    members = read_genotype_files(path)
    if index is None and len(members) == 1:
        return members[0]
    if index is None or not 0 <= index < len(members):
        raise UserError(f"{path}: holds genotypes 0 to {len(members) - 1}; pick one of these with --index")
    return members[index]


def read_genotype_files(path: Path) -> list[dict]:
    """The checked content of a genotype file, or of every member of a front."""
    data = read_json(path)
    is_front = isinstance(data, dict) and data.get("format") == FRONT
    members = check(data.get("front"), list[dict], f"{path}: front") if is_front else [data]
    if not members:
        raise UserError(f"{path}: a front without a genotype")
    for i, member in enumerate(members):
        where = f"{path}: front[{i}]" if is_front else str(path)
        with naming(where):
            Genotype.from_dict(member)
        check(member.get("supernet", {}), dict[str, str], f"{where}: supernet")
        check(member.get("config", {}), dict, f"{where}: config")
    return members
