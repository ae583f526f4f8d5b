"""What the three commands have in common: flags, the folder of a run, and the one configuration of a command.

The configuration is put together once, in `CommandLine.resolve`. A higher layer wins:

    --set key=value
    flags that stand for a key (--data, --seed, --max-flops, ...)
    --cfg FILE; without it what the run in the folder began with (--resume), else what the command inherits (the
        configuration of the supernet, the genotype or the detector that it starts from), else configs/shapes.yaml, or
        configs/mine.yaml with --data
    the defaults of lib/config.py
"""

import argparse
import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import isdir, isfile

from lib import UserError, checkpoint, config_io, distributed, shapes
from lib.config import Config
from lib.plain import check, read_json, shown

RUNS = Path("runs")
POINTER = RUNS / "last.json"  # the last run of each stage, for commands that name none
# Keys of the configuration that name what is read, besides data.root.
READ_PATHS = [f"data.{split}_{what}" for split in ("train", "test") for what in ("annotations", "images")]
READ_PATHS += ["backbone.pretrained_path", "search.latency_table", "final.supernet_state_dict"]
RESUMABLE = ("last.pt", "evals.jsonl", "plan.json")  # what a training, a search and a comparison resume from
CONFIGS = Path(__file__).parent.parent / "configs"


def make_parser(description: str, load_help: str) -> argparse.ArgumentParser:
    """A parser with the flags that every stage has; `description` is the script's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cfg", metavar="FILE", help="YAML file of the experiment, read by all three stages (see configs/)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, e.g. supernet.epochs=10")
    add("--data", metavar="DIR", help="folder of the data set, VOC, COCO or YOLO (data.root)")
    add("--train-dir", metavar="DIR", type=Path, help="folder that this run writes to (default: runs/NAME/STAGE)")
    add("--load", metavar="DIR", type=Path, help=load_help)
    add("--resume", action="store_true", help="continue the run in --train-dir; start it where there is none")
    add("--save-every", metavar="N", type=int, help="keep a checkpoint (the search: write its front) every N epochs")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or N (default: auto)")
    add("--seed", type=int, help="seed of everything random (default: the configuration's)")
    add("--dry-run", action="store_true", help="check everything, print the plan and an estimate of the time, and stop")
    return parser


@dataclass(frozen=True)
class Run:
    """A command's run: the folder that it writes to, its configuration, and where that comes from."""

    folder: Path
    config: Config
    source: str
    notes: Sequence[str] = ()

    def describe(self) -> list[str]:
        """The first lines of a plan."""
        data = self.config.data.root
        return [f"configuration: {self.source}", f"data: {data}", f"writes to: {self.folder}", *self.notes]

    def save_config(self) -> None:
        checkpoint.write_text(self.folder / "config.yaml", config_io.dump(self.config))


class CommandLine:
    """What the user gave: `--cfg`, `--set`, and `flags`, values by key (None: the flag was not given)."""

    def __init__(self, args: argparse.Namespace, stage: str, flags: Mapping[str, object] | None = None):
        self.args = args
        self.stage = stage
        by_flag = {"data.root": args.data, "seed": args.seed, **(flags or {})}
        if stage != "search":
            by_flag[f"{stage}.save_every"] = args.save_every
        self._file = config_io.read_yaml(Path(args.cfg)) if args.cfg else None
        self._changes = [(key, value) for key, value in by_flag.items() if value is not None]
        self._changes += [config_io.parse_override(text) for text in args.set]
        self._typed = [key for key, _ in self._changes]
        for key, value in config_io.RETIRED.items():
            # A config.yaml that this project wrote may have one at its default.
            if (found := self.given(key)) not in (None, False) and value in (None, found):
                raise UserError(f"{key}: {value or 'this key'} was removed, since it gained nothing (docs/)")

    def given(self, key: str) -> object | None:
        """The value that the user gave `key`; None where neither a flag nor --set nor --cfg does."""
        return config_io.get_key(config_io.with_changes(self._file or {}, self._changes), key)

    def resolve(
        self, inherited: dict | None = None, inherited_from: str = "", folder_name: str = "", reads_data: bool = True
    ) -> Run:
        """The run of this command. `inherited` is the configuration of what it starts from, read from `inherited_from`.

        `folder_name` is the name of the run's folder where it is not the stage's. Raises UserError, naming the key.
        """
        args = self.args
        settings, source = self._lowest_layer(inherited, inherited_from)
        # The folder comes before the rest: with --resume it may hold the configuration.
        folder = args.train_dir or RUNS / self._plain_name(settings, source) / (folder_name or self.stage)
        saved = _saved_config(folder) if args.resume else None
        goes_on = saved is not None and self._file is None
        if goes_on:
            settings, source = saved, f"{folder / 'config.yaml'}, with which this run began"
        if args.data and "data.dataset_type" not in self._typed:
            settings = _with_own_pictures(settings, Path(args.data))
        # Flags and --set override whichever layer was chosen.
        config = config_io.from_dict(config_io.with_changes(settings, self._changes), source, self._typed)
        config_io.validate(config)
        notes = []
        typed = config_io.with_changes({}, self._changes)
        for stage, phases in (("supernet", "search_space.schedule_cfg"), ("final", "final.lr_schedule")):
            keys = (f"{stage}.epochs", f"{stage}.lr_schedule", f"{stage}.distill", phases)
            explicit = any(config_io.get_key(typed, key) is not None for key in keys)
            if explicit and config_io.get_key(typed, f"{stage}.max_steps") is None:
                getattr(config, stage).max_steps = 0  # what the user asks for, however long it takes
        if self.stage != "search":
            config_io.validate_shares(config, self.stage, distributed.world().size)
            # The schedules of a run that goes on were fitted when it began.
            notes = [] if goes_on else self._fit_schedules(config, settings, saved, folder)
        # What is inherited may come from a stranger's file.
        if inherited is not None and self._file is None and not goes_on:
            notes += self._check_foreign_paths(config, source, reads_data)
        return Run(folder, config, source, notes)

    def _lowest_layer(self, inherited: dict | None, inherited_from: str) -> tuple[dict, str]:
        """What flags and --set override, and its source: --cfg, else what is inherited, else a file of configs/."""
        if self._file is not None:
            return self._file, str(self.args.cfg)
        if inherited is not None:
            return inherited, inherited_from
        path = CONFIGS / ("mine.yaml" if self.args.data else "shapes.yaml")
        settings = config_io.read_yaml(path)
        if self.args.data and (name := Path(self.args.data).resolve().name):
            settings["name"] = name  # every data set has a folder of its own below runs/
        return settings, f"configs/{path.name}"

    def _plain_name(self, settings: dict, source: str) -> str:
        """The name of the experiment, a folder below runs/. `settings`, read from `source`, may be a stranger's."""
        name = self.given("name") or settings.get("name")
        plain = isinstance(name, str) and re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", name)
        if not plain or name in (".", "..", POINTER.name):
            where = "" if self.given("name") else f"{source}: "
            raise UserError(f"{where}name: expected a plain name, which becomes a folder, found {shown(name)}")
        return name

    def _fit_schedules(self, config: Config, settings: dict, saved: dict | None, folder: Path) -> list[str]:
        """Fit the schedules to the number of epochs, and say so; what was derived when a run began stays as it is."""
        planned = config_io.get_key(settings, f"{self.stage}.epochs") or getattr(Config(), self.stage).epochs
        notes = config_io.fit_schedules(config, self.stage, planned, self._typed)
        if saved is None:
            return notes
        began = config_io.from_dict(saved, str(folder / "config.yaml"))
        now, before = getattr(config, self.stage), getattr(began, self.stage)
        if f"{self.stage}.max_steps" not in self._typed:
            now.max_steps = min(now.max_steps, before.max_steps)  # a file may have got a limit since
        given = any("schedule_cfg" in key or "distill" in key for key in self._typed)
        if not given and (notes or f"{self.stage}.epochs" in self._typed):
            config.search_space.schedule_cfg = began.search_space.schedule_cfg
            config.supernet.distill.weight = began.supernet.distill.weight
            notes = []
        if getattr(self.args, "fit_priors", False):
            config.head = began.head
        return notes

    def _check_foreign_paths(self, config: Config, source: str, reads_data: bool) -> list[str]:
        """Notes on paths of a stranger's file that lead elsewhere.

        Raises UserError if it has pictures drawn elsewhere, or read where none are.
        """
        root, where = Path(config.data.root), "here"
        found = root.is_dir()
        if config.data.dataset_type == "shapes":
            where = "below this folder"
            found = (root / shapes.MARKER).exists() or root.resolve().is_relative_to(Path.cwd())
        if not found and reads_data and self.given("data.root") is None:
            raise UserError(f"data.root: {source} has {root}, which is not {where}; --data DIR names the data's folder")
        settings, notes = config_io.to_dict(config), []
        for key in READ_PATHS:
            path = Path(config_io.get_key(settings, key))
            if path.is_absolute() or ".." in path.parts:
                notes.append(f"note: {key} is {path}, from {source}")
        return notes


def _with_own_pictures(layer: dict, folder: Path) -> dict:
    """`layer`, for the built-in pictures or for others, with the pictures in the folder that --data names."""
    if folder.is_file():
        raise UserError(f"--data {folder}: is a file; expected the folder of a data set, such as {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder; the built-in pictures need no --data")
    if config_io.get_key(layer, "data.dataset_type") != "shapes" or (folder / shapes.MARKER).exists():
        return layer
    # What trains and what tests is found anew, and so are the classes.
    found = re.compile("num_classes|classes|(train|test)_(sets|annotations|images)")
    data = {key: value for key, value in layer["data"].items() if not found.fullmatch(key)}
    return {**layer, "data": {**data, "dataset_type": "auto"}}


def _saved_config(folder: Path) -> dict | None:
    """The configuration of the run in `folder`, if there is something to go on from. The main process reads it."""
    path = folder / "config.yaml"
    goes_on = path.is_file() and any((folder / product).exists() for product in RESUMABLE)
    saved = distributed.from_main(config_io.read_yaml(path) if distributed.world().main and goes_on else None)
    if saved is not None and not saved.keys() - {"name"}:
        raise UserError(f"{path}: holds no settings any more; --cfg names a file with those that this run began with")
    return saved


def command(script: str, **flags: object) -> str:
    """A command to be copied into a shell, quoted for it: `python script` and its flags."""
    words = ["python", script]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        # A value that begins with a dash would be taken for a flag.
        words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return shlex.join(words)


def refuse_torchrun(command: str) -> None:
    """Raise UserError if several processes run a command that is for one."""
    if distributed.world().size > 1:
        raise UserError(f"{command} runs in one process: start it without torchrun")


@contextlib.contextmanager
def claim(product: Path, args: argparse.Namespace) -> Iterator[None]:
    """Be the only process that writes to a run's folder.

    Raises UserError if it holds an earlier run's `product` that is not resumed; with --dry-run it only says so. Raises
    it for a folder with a run of another kind.
    """
    # Before the lock: a command that is refused leaves the folder as it was.
    goes_on = args.resume and product.exists()  # earlier versions allowed two kinds of runs in one folder
    others = [name for name in RESUMABLE if name != product.name and (product.parent / name).exists()]
    if others and not goes_on:
        raise UserError(
            f"{product.parent}: holds a run of another kind ({others[0]}); --train-dir names its own folder"
        )
    if args.resume and not goes_on and not getattr(args, "front_table", False):
        print(f"note: there is no {product} to resume: a new run begins")
    if product.exists() and not args.resume:
        text = f"{product} exists: --resume continues that run, --train-dir DIR starts one elsewhere"
        if not args.dry_run:
            raise UserError(text)
        print(f"note: {text}")
    with contextlib.nullcontext() if args.dry_run else checkpoint.lock_folder(product.parent):
        yield


def remember(stage: str, folder: Path) -> None:
    """Note that `folder` is now the last run of `stage`."""
    checkpoint.write_text(POINTER, json.dumps({**_pointers(), stage: str(folder)}, indent=2) + "\n")


def last_run(stage: str) -> Path | None:
    """The folder of the last run of `stage`, if it is still there."""
    path = _pointers().get(stage, "")
    return Path(path) if isdir(path) else None


def _pointers() -> dict[str, str]:
    """The folder of each stage's last run. A damaged file counts as none."""
    with contextlib.suppress(UserError):
        return check(read_json(POINTER), dict[str, str])
    return {}


def supernet_checkpoint(folder: Path) -> Path:
    """The checkpoint of a supernet run's folder (or of the run's parent folder), or the file itself."""
    for path in (folder, folder / "last.pt", folder / "supernet" / "last.pt"):
        if path.is_file():
            return path
    raise UserError(f"{folder}: no supernet checkpoint here; expected last.pt of supernet_train.py (--load)")


def find_genotype(name: str) -> Path:
    """The genotype file `name`. A bare file name that is not here is looked up in the last search's folder."""
    path = Path(name)
    search = last_run("search") if path.parent == Path() else None
    for candidate in (path, *([search / name] if search else [])):
        if isfile(candidate):
            return candidate
    where = f" nor in {search}" if search else ""
    raise UserError(f"{name}: no such genotype file here{where}; async_search.py writes best.json and pareto.json")
