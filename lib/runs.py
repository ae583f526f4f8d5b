"""Where runs live: the folder of each stage, and which run of a stage was the last one."""

from __future__ import annotations

import json
from pathlib import Path

from lib.checkpoint import write_text
from lib.errors import UserError

RUNS = Path("runs")
POINTER = RUNS / "last.json"


def stage_folder(name: str, stage: str) -> Path:
    return RUNS / name / stage


def remember(stage: str, folder: Path) -> None:
    """Note that `folder` is now the last run of `stage`, for commands that name none."""
    pointers = _pointers()
    pointers[stage] = str(folder)
    write_text(POINTER, json.dumps(pointers, indent=2) + "\n")


def last_run(stage: str) -> Path | None:
    path = _pointers().get(stage)
    return Path(path) if path and Path(path).is_dir() else None


def supernet_checkpoint(folder: Path) -> Path:
    """The checkpoint of a supernet run's folder (or of the run's parent folder), or the file itself."""
    candidates = [folder, folder / "last.pt", folder / "supernet" / "last.pt"]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"{folder}: no supernet checkpoint here; expected last.pt, which supernet_train.py writes")


def find_genotype(name: str) -> Path:
    """A genotype file: as named, or, for a bare file name that is not here, the last search's file of that name."""
    path = Path(name)
    if path.is_file():
        return path
    search = last_run("search")
    if path.parent == Path() and search is not None and (search / name).is_file():
        return search / name
    where = f" nor in {search}" if search is not None and path.parent == Path() else ""
    raise UserError(f"{name}: no such genotype file here{where}; async_search.py writes best.json and pareto.json")


def _pointers() -> dict[str, str]:
    try:
        return json.loads(POINTER.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
