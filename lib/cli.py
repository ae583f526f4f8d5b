"""What the three commands have in common: their flags, and from flags to a configuration and a run folder.

Where runs live: the folder of each stage, and which run of a stage was the last one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib import checkpoint, config_io, distributed
from lib.checkpoint import write_text
from lib.config import Config
from lib.config_io import validate, validate_shares
from lib.errors import UserError

PRODUCTS = ("last.pt", "evals.jsonl", "plan.json")  # what training, search and comparison resume from
DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "shapes.yaml"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


SAVE_HELP = "keep a checkpoint every N epochs, beside the last one"


def make_parser(description: str, load_help: str, save_help: str = SAVE_HELP) -> argparse.ArgumentParser:
    """A parser with the flags that every stage has; `description` is the script's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    add = parser.add_argument
    add("--cfg", metavar="FILE", help="YAML file of the experiment, read by all three stages (see configs/)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, e.g. supernet.epochs=10")
    add("--data", metavar="DIR", help="folder of the data set, short for --set data.root=DIR")
    add("--train-dir", metavar="DIR", type=Path, help="where this run writes (default: runs/NAME/STAGE)")
    add("--load", metavar="DIR", type=Path, help=load_help)
    add("--resume", action="store_true", help="continue the run in --train-dir; start it where there is none")
    add("--save-every", metavar="N", type=int, help=save_help)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--seed", type=int, help="seed of everything random (default: the configuration's)")
    add("--dry-run", action="store_true", help="check everything, print the plan and the time it takes, and stop")
    return parser


def add_tensorboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard")


def overrides(args: argparse.Namespace, stage: str) -> list[str]:
    """`--set`, and the flags that stand for a key."""
    flags = {"data.root": args.data, "seed": args.seed}
    if stage != "search":
        flags[f"{stage}.save_every"] = args.save_every
    return [*args.set, *(f"{key}={value}" for key, value in flags.items() if value is not None)]


def said_config(args: argparse.Namespace, stage: str) -> Config:
    """What --cfg and --set say by themselves, before it is known what the command goes on from."""
    return config_io.read_config(args.cfg, overrides(args, stage))


def read_config(
    args: argparse.Namespace, stage: str, inherited: dict | None = None, folder: str | None = None
) -> Config:
    """The configuration of a command: --cfg, else that of the run it continues, else `inherited`, else shapes.yaml.

    `folder` is the name of the run's folder where it is not the stage's.
    """
    changes = overrides(args, stage)
    if inherited is not None and not args.cfg:
        settings = config_io.from_dict(config_io.with_overrides(inherited, changes))
    else:
        settings = config_io.read_config(args.cfg or DEFAULT_CONFIG, changes)
    if args.resume and not args.cfg and (saved := _saved(run_folder(args, settings, folder or stage))):
        settings = config_io.from_dict(config_io.with_overrides(saved, changes))
    if args.data and settings.data.dataset_type == "shapes" and not Path(args.data).is_dir():
        raise UserError(
            f"--data {args.data}: no such folder; pictures of your own also need --cfg, and the built-in ones no --data"
        )
    validate(settings)
    if stage != "search":
        validate_shares(stage, getattr(settings, stage), distributed.world().size)
    return settings


def _saved(folder: Path) -> dict | None:
    """The configuration of the run in `folder`, if there is something to go on from. The main process reads it."""
    path = folder / "config.yaml"
    goes_on = path.is_file() and any((folder / product).exists() for product in PRODUCTS)
    saved = distributed.from_main(config_io.read_yaml(path) if distributed.world().main and goes_on else None)
    if saved:
        print(f"configuration: {path}, with which this run began")
    return saved


def refuse_torchrun(command: str) -> None:
    """Raise UserError if several processes run a command that is for one."""
    if distributed.world().size > 1:
        raise UserError(f"{command} runs in one process: start it without torchrun")


def run_folder(args: argparse.Namespace, settings: Config, stage: str) -> Path:
    return args.train_dir or stage_folder(settings.name, stage)


def refuse_to_overwrite(product: Path, args: argparse.Namespace) -> None:
    """Raise UserError if an earlier run's `product` would be overwritten; with --dry-run only say so."""
    if not product.exists() or args.resume:
        return
    text = f"{product} exists: --resume continues that run, --train-dir DIR starts one elsewhere, or remove the folder"
    if not args.dry_run:
        raise UserError(text)
    print(f"note: {text}")


def save_config(settings: Config, folder: Path) -> None:
    checkpoint.write_text(folder / "config.yaml", config_io.dump(settings))


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
