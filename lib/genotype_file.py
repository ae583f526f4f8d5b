"""Genotype files: one genotype with its provenance (best.json), a front (pareto.json), or an aw_nas string."""

from __future__ import annotations

import json
from pathlib import Path

from lib.errors import UserError
from lib.genotype import Genotype, SearchSpace, parse


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
