"""Genotypes, and the space they come from: sample, mutate, crossover, smallest, largest, JSON.

A `Genotype` is a value: immutable, hashable and canonical. It lists active blocks only, so two genotypes are equal
exactly when their sub-networks are. A `SearchSpace` is the set of genotypes that some choices allow.

Genotype files: one genotype with its provenance (best.json), a front (pareto.json), or an aw_nas string.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lib.errors import UserError, did_you_mean

FORMAT = "genotype/1"


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
        """The JSON form, without metrics; `from_dict` is its inverse."""
        return {
            "format": FORMAT,
            "image_size": self.image_size,
            "backbone": {"type": self.backbone_type, "stages": [[_plain(b) for b in s] for s in self.stages]},
            "head": [_plain(b) for b in self.head],
        }

    @classmethod
    def from_dict(cls, data: object) -> Genotype:
        """Read the JSON form. Unknown top-level keys (metrics, supernet, config) are the file's, not the genotype's."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise UserError(f'not a genotype: expected a JSON object with "format": "{FORMAT}", found {found!r}')
        try:
            backbone = data["backbone"]
            return cls(
                image_size=_integer(data["image_size"], "image_size"),
                backbone_type=str(backbone["type"]),
                stages=tuple(tuple(_block(b) for b in stage) for stage in backbone["stages"]),
                head=tuple(_block(b) for b in data["head"]),
            )
        except KeyError as error:
            raise UserError(f"genotype: the key {error} is missing") from None
        except TypeError as error:
            raise UserError(f"genotype: {error}") from None

    def __str__(self) -> str:
        """The aw_nas spelling, one line; `parse` reads it back."""
        cells = [f"cell_{i}={len(stage)}" for i, stage in enumerate(self.stages)]
        blocks = [
            f"cell_{i}_block_{j}=({_number(b.expand)}, {b.kernel})"
            for i, stage in enumerate(self.stages)
            for j, b in enumerate(stage)
        ]
        heads = [f"head_{i}=({_number(b.expand)}, {b.kernel})" for i, b in enumerate(self.head)]
        return ", ".join([f"image_size={self.image_size}", *cells, *blocks, *heads])


def _plain(block: Block) -> dict:
    """JSON form of a block. Equal blocks have equal forms: 6.0 is written as 6."""
    return {"expand": _number(block.expand), "kernel": block.kernel}


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"genotype: {name} must be an integer, found {value!r}")
    return value


def _block(data: dict) -> Block:
    expand, kernel = data["expand"], data["kernel"]
    try:
        return _checked_block(expand, kernel)
    except TypeError:  # not hashable, so not a number
        raise UserError(f"genotype: expand and kernel must be numbers, found {expand!r} and {kernel!r}") from None


@functools.lru_cache(maxsize=1024, typed=True)  # a ledger holds the same few blocks hundreds of thousands of times
def _checked_block(expand: object, kernel: object) -> Block:
    if isinstance(expand, bool) or not isinstance(expand, (int, float)) or not expand > 0:
        raise UserError(f"genotype: expand must be a positive number, found {expand!r}")
    return Block(expand, _integer(kernel, "kernel"))


_ITEM = re.compile(r"(\w+)\s*=\s*(\(\s*(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*,\s*(\d+)\s*\)|\d+)")


def parse(text: str, backbone_type: str, image_size: int, head: Sequence[Block]) -> Genotype:
    """Read the aw_nas spelling `image_size=300, cell_0=1, ..., cell_0_block_0=(1, 3), ..., head_0=(0.5, 3)`.

    Blocks beyond a cell's depth are inactive and dropped. That spelling does not name the backbone, and older strings
    lack the image size and the head: `backbone_type`, `image_size` and `head` stand in for what is missing.
    """
    numbers: dict[str, int] = {}
    blocks: dict[str, Block] = {}
    rest = _ITEM.sub("", text).strip(" ,\n\t'\"")
    if rest:
        raise UserError(f"genotype string: cannot read {rest[:60]!r}; expected items such as cell_1_block_0=(6, 7)")
    for name, value, expand, kernel in _ITEM.findall(text):
        if expand:
            blocks[name] = Block(_number(expand), int(kernel))
        else:
            numbers[name] = int(value)
    stages = []
    while (depth := numbers.pop(f"cell_{len(stages)}", None)) is not None:
        i = len(stages)
        missing = [f"cell_{i}_block_{j}" for j in range(depth) if f"cell_{i}_block_{j}" not in blocks]
        if missing:
            raise UserError(f"genotype string: cell_{i}={depth}, but {missing[0]} is missing")
        stages.append(tuple(blocks.pop(f"cell_{i}_block_{j}") for j in range(depth)))
    if not stages:
        raise UserError("genotype string: no cell_0=... found")
    heads = []
    while (block := blocks.pop(f"head_{len(heads)}", None)) is not None:
        heads.append(block)
    image_size = numbers.pop("image_size", image_size)
    inactive = re.compile("|".join(f"cell_{i}_block_\\d+" for i in range(len(stages))))
    unknown = [*numbers, *(name for name in blocks if not inactive.fullmatch(name))]
    if unknown:
        valid = ["image_size", "cell_0", "cell_0_block_0", f"head_{len(heads)}"]
        raise UserError(f"genotype string: unknown item '{unknown[0]}'{did_you_mean(unknown[0], valid)}")
    return Genotype(image_size, backbone_type, tuple(stages), tuple(heads) or tuple(head))


def _number(text: str | float) -> float:
    """A number as short as it can be written: 6, not 6.0."""
    value = float(text)
    return int(value) if value.is_integer() else value


class BlockChoices(NamedTuple):
    """What one block may be: expand ratios and kernels, both ascending."""

    expand: tuple[float, ...]
    kernel: tuple[int, ...]


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
        """How many different genotypes there are."""
        stages = (sum(math.prod(map(len, s.block)) ** d for d in s.depth) for s in self.stages)
        heads = (math.prod(map(len, b)) for b in self.head)
        return len(self.image_size) * math.prod(stages) * math.prod(heads)

    def smallest(self) -> Genotype:
        return self._build(lambda options: options[0])

    def largest(self) -> Genotype:
        return self._build(lambda options: options[-1])

    def sample(self, rng: random.Random) -> Genotype:
        """Every choice drawn uniformly and on its own, depths first (Once-for-All, section 3.3)."""
        return self._build(rng.choice)

    def _build(self, pick) -> Genotype:
        return Genotype(
            image_size=pick(self.image_size),
            backbone_type=self.backbone_type,
            stages=tuple(tuple(_pick_block(s.block, pick) for _ in range(pick(s.depth))) for s in self.stages),
            head=tuple(_pick_block(b, pick) for b in self.head),
        )

    def mutate(self, parent: Genotype, rng: random.Random, probability: float = 0.1) -> Genotype:
        """Change each choice with `probability`, and one of them in any case: the child is never its parent.

        A stage that grows gets random blocks at its end. Raises ValueError if the space holds one genotype only.
        """
        genes = self._genes(parent)
        if not genes:
            raise ValueError("mutate: the search space holds a single genotype")
        chosen = [gene for gene in genes if rng.random() < probability] or [rng.choice(genes)]
        child = parent
        for gene in chosen:
            child = self._change(child, gene, rng)
        return child

    def _genes(self, genotype: Genotype) -> list[tuple]:
        """The choices of `genotype` that have an alternative, blocks before depths, so that each is still there."""
        genes: list[tuple] = [("image_size",)] if len(self.image_size) > 1 else []
        for i, stage in enumerate(self.stages):
            for j in range(len(genotype.stages[i])):
                genes += [("stage", i, j, f) for f in Block._fields if len(getattr(stage.block, f)) > 1]
        for i, choices in enumerate(self.head):
            genes += [("head", i, f) for f in Block._fields if len(getattr(choices, f)) > 1]
        genes += [("depth", i) for i, stage in enumerate(self.stages) if len(stage.depth) > 1]
        return genes

    def _change(self, genotype: Genotype, gene: tuple, rng: random.Random) -> Genotype:
        """`genotype` with another value for one gene."""
        kind, *where = gene
        if kind == "image_size":
            return replace(genotype, image_size=_another(self.image_size, genotype.image_size, rng))
        if kind == "head":
            i, field = where
            block = _change_block(genotype.head[i], self.head[i], field, rng)
            return replace(genotype, head=_put(genotype.head, i, block))
        i = where[0]
        stage, choices = genotype.stages[i], self.stages[i]
        if kind == "depth":
            depth = _another(choices.depth, len(stage), rng)
            fresh = (_pick_block(choices.block, rng.choice) for _ in range(depth - len(stage)))
            stage = (*stage[:depth], *fresh)
        else:
            j, field = where[1:]
            stage = _put(stage, j, _change_block(stage[j], choices.block, field, rng))
        return replace(genotype, stages=_put(genotype.stages, i, stage))

    def crossover(self, a: Genotype, b: Genotype, rng: random.Random) -> Genotype:
        """Every choice from one parent or the other; a block that only one parent has comes from that one."""
        stages = []
        for one, other in zip(a.stages, b.stages, strict=True):
            depth = len(rng.choice((one, other)))
            donors = [[p[j] for p in (one, other) if j < len(p)] for j in range(depth)]
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
            for j, block in enumerate(stage):
                _expect(f"expand of stage {i} block {j}", block.expand, choices.block.expand)
                _expect(f"kernel of stage {i} block {j}", block.kernel, choices.block.kernel)
        for i, (block, choices) in enumerate(zip(genotype.head, self.head, strict=True)):
            _expect(f"expand of head block {i}", block.expand, choices.expand)
            _expect(f"kernel of head block {i}", block.kernel, choices.kernel)

    def __contains__(self, genotype: Genotype) -> bool:
        try:
            self.check(genotype)
        except UserError:
            return False
        return True


def _expect(what: str, value: object, options: Sequence) -> None:
    if value not in options:
        raise UserError(f"genotype: {what} is {value}, the search space has {', '.join(map(str, options))}")


def _pick_block(choices: BlockChoices, pick) -> Block:
    return Block(pick(choices.expand), pick(choices.kernel))


def _another(options: Sequence, current, rng: random.Random):
    return rng.choice([option for option in options if option != current])


def _change_block(block: Block, choices: BlockChoices, field: str, rng: random.Random) -> Block:
    return block._replace(**{field: _another(getattr(choices, field), getattr(block, field), rng)})


def _mix(blocks: Sequence[Block], rng: random.Random) -> Block:
    return Block(rng.choice(blocks).expand, rng.choice(blocks).kernel)


def _put(items: tuple, index: int, item) -> tuple:
    return (*items[:index], item, *items[index + 1 :])


def read_genotype_file(path: Path, index: int | None = None) -> dict:
    """The content of a genotype file; of a front the member number `index`, cheapest first."""
    data = _read(path)
    if _is_front(data):
        members = data["front"]
        if index is None or not 0 <= index < len(members):
            raise UserError(
                f"{path}: a front of {len(members)} genotypes; pick one with --index 0 to {len(members) - 1}"
            )
        return members[index]
    if index is not None:
        raise UserError(f"{path}: --index is for a front (pareto.json), and this is a single genotype")
    return data


def read_genotype_files(path: Path) -> list[dict]:
    """The genotype of a file, or every member of its front."""
    data = _read(path)
    return data["front"] if _is_front(data) else [data]


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _is_front(data: object) -> bool:
    return isinstance(data, dict) and data.get("format") == "pareto/1"


def is_genotype_string(text: str) -> bool:
    """Whether `text` is the aw_nas spelling itself, not the name of a file."""
    return "cell_0" in text and "=" in text


def parse_genotype_string(text: str, space: SearchSpace) -> Genotype:
    """The aw_nas spelling as a genotype of `space`; what it leaves out is taken from the largest one."""
    largest = space.largest()
    return parse(text, space.backbone_type, largest.image_size, largest.head)
