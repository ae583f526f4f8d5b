"""Stage 2: find the best sub-networks of a supernet under a budget, on worker processes that never idle.

    python async_search.py                                    # the last supernet, every GPU or else the CPU
    python async_search.py --gpus 0,1,2,3 --max-flops 300e6
    python async_search.py --load runs/bccd/supernet --gpus cpu,cpu --controller pareto-evo
    python async_search.py --resume                           # go on after any interruption
    python async_search.py --resume --finalists 3             # short trainings decide which of three is best.json
    python async_search.py --front-table                      # what each member of the front is worth as an ONNX file
    python async_search.py --dispatcher ray --ray-address auto    # on the machines of a Ray cluster
    python async_search.py --measure-latency cpu              # writes latency_cpu.json, by which a search knows latency
    python async_search.py --latency-table runs/bccd/search/latency_cpu.json --max-latency 12

Writes best.json (the genotype to train), pareto.json (the front), evals.jsonl (every evaluation) and report.html
(what was found and how, beside random search) to runs/NAME/search. The next command is final_train.py.
"""

import argparse
import contextlib
import functools
import gc
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lib import UserError, checkpoint, cli, plan
from lib.cli import last_run, remember, supernet_checkpoint
from lib.config import Config, SearchConfig
from lib.config_io import to_dict, validate_network
from lib.controllers import Budget, RandomSearch, limits_of, make_controller
from lib.datasets import load_annotations, load_split
from lib.detector import Supernet, load_supernet
from lib.dispatcher import Result, TimeLimit, WorkerPool
from lib.final_training import final_loader, supernet_path
from lib.genotype import Genotype, read_genotype_files
from lib.latency import RUNTIMES, Coster, load_table, measure_table
from lib.ledger import Ledger
from lib.log import Throttle, duration, progress, say
from lib.plan import final_seconds, scoring_seconds
from lib.ray_dispatcher import pick_dispatcher
from lib.report import write_front_table, write_results
from lib.runtime import Stopped, StopRequest, pick_device, run
from lib.scoring import prepare_scoring_data, save_scoring_data, scoring_worker
from lib.search import Identity, Job, Search, cost_text
from lib.trials import measure_front, recall_finalists, shortened, train_finalists

IMAGES = "images.pt"  # the pictures that the workers share while they run


def evaluate_jobs(pool: WorkerPool, stop: StopRequest, jobs: Iterator[Job], settings: SearchConfig) -> Iterator[Result]:
    """The results of `jobs` as they end. Every worker is kept supplied with jobs until a stop is requested.

    Nothing waits for a generation to end: each result makes room for the next job. After a request to stop, the jobs
    that have been submitted are finished.
    """
    limit = TimeLimit(settings.time_limit, first=settings.first_time_limit)
    while True:
        while not stop.requested and pool.free_slots() > 0 and (job := next(jobs, None)) is not None:
            pool.submit(*job)
        if not pool.pending:
            return
        for result in pool.results(timeout=1.0):
            if result.error:
                say(f"a candidate failed on {result.worker}: {result.error.splitlines()[-1]}")
            else:
                limit.add(result.seconds)
            yield result
        pool.time_limit = limit.seconds


def search_loop(
    search: Search, pool: WorkerPool, stop: StopRequest, write: Callable[[], None], save_every: int
) -> None:
    """Evaluate what the search proposes to its end; `write` the results so far every `save_every` epochs."""
    epoch = search.epoch
    with progress(None, "search", total=search.total, initial=len(search.told)) as bar:
        for result in evaluate_jobs(pool, stop, iter(search.propose, None), search.settings):
            search.learn(result)
            bar.total = search.total
            # More than one if the ledger had results of other proposals.
            bar.update(len(search.told) - bar.n)
            if search.epoch > epoch and search.scored:
                epoch = search.epoch
                say(progress_line(search, epoch - 1))
                if (epoch - search.first_epoch) % save_every == 0:
                    write()


def rescore_front(search: Search, pool: WorkerPool, stop: StopRequest, jobs: Sequence[Job]) -> bool:
    """Score the front again on all images of the search split. False, and the front as it was, after a stop."""
    waiting = iter(jobs)
    results = evaluate_jobs(pool, stop, waiting, search.settings)
    for result in progress(results, "front on all images", total=len(jobs)):
        search.learn(result)
    finished = next(waiting, None) is None
    if not finished:
        search.rescored.clear()
    return finished


def progress_line(search: Search, epoch: int) -> str:
    objective = search.settings.objective
    best = search.best()["metrics"]
    latency = f", {best['latency_ms']:.2f} ms" if "latency_ms" in best else ""
    return (
        f"search epoch {epoch}: {len(search.told)} evaluations, best {objective} {best[objective]:.4f} "
        f"at {best['flops'] / 1e6:.1f} M multiply-adds{latency}"
    )


def measure_latency(args: argparse.Namespace, supernet: Supernet, config: Config, folder: Path) -> None:
    """Write the latency table of a device and a runtime, and say how good it is."""
    runtime = args.measure_with or args.latency_runtime or "torch"
    name = args.measure_latency
    if args.measure_with:
        name = "external" if name == "auto" else name
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"--measure-latency {name}: expected a name of letters and digits for the device")
        if "{file}" not in runtime:
            raise UserError(f"--measure-with '{runtime}': expected {{file}} where the path of the exported file goes")
        device = torch.device("cpu")
    else:
        device = pick_device("cpu" if name == "auto" and runtime != "torch" else name, "--measure-latency")
        if device.type != "cpu" and runtime != "torch":
            raise UserError(f"--measure-latency {name}: --latency-runtime {runtime} runs on the CPU: expected cpu")
        name = str(device).replace(":", "_") + (f"_{runtime}" if runtime != "torch" else "")
    path = folder / f"latency_{name}.json"
    if args.dry_run:
        print(f"latency: times sub-networks by {runtime}, device {args.measure_latency}, and writes {path}")
        return
    table = measure_table(supernet.detector, config, device, runtime, name if args.measure_with else "")
    table.save(path)
    costs = Coster(supernet.detector, table)
    low = costs(supernet.space.smallest())["latency_ms"]
    high = costs(supernet.space.largest())["latency_ms"]
    print(table.describe())
    print(f"predicted: {low:.2f} ms for the smallest sub-network, {high:.2f} ms for the largest")
    given = {"load": args.load, "train_dir": args.train_dir}
    flags = {name: value for name, value in given.items() if value}
    print(f"wrote {path}")
    following = cli.command("async_search.py", **flags, latency_table=path, max_latency=f"{(low + high) / 2:.3g}")
    print(f"next: {following}{' --resume' if (folder / 'evals.jsonl').exists() else ''}")


def start_genotypes(
    files: Sequence[Path] | None, folder: Path, supernet: Supernet, feasible: Callable[[Genotype], bool]
) -> list[Genotype]:
    """What the search evaluates first: the genotypes of --start-from, or else the pretrained one, if there is one.

    Genotypes that the supernet does not contain or that are over the budget are left out, with a note.
    """
    pretrained = folder / "pretrained_genotype.json"
    files = files or ([pretrained] if pretrained.exists() else [])
    starts = []
    for path in files:
        for data in read_genotype_files(path):
            genotype = Genotype.from_dict(data)
            try:
                supernet.space.check(genotype)
                if not feasible(genotype):
                    raise UserError("over the budget")
            except UserError as error:
                say(f"{path}: left out: {error}")
            else:
                starts.append(genotype)
    return starts


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "folder of the supernet run (default: the last one)")
    add = parser.add_argument
    add("--gpus", metavar="LIST", help="workers: 0,1,2,3 or cpu,cpu or cuda:0,cuda:0 (default: each GPU)")
    add("--dispatcher", choices=["local", "ray"], default="local", help="workers: processes, or Ray actors")
    add("--ray-address", metavar="ADDRESS", help="the cluster: auto or HOST:PORT (default: one of this machine alone)")
    add("--start-from", metavar="FILE", nargs="+", type=Path, help="genotypes or fronts to evaluate first")
    add("--controller", choices=["random", "evo", "pareto-evo", "surrogate"], help="how candidates are proposed")
    add("--top", type=int, default=0, metavar="N", help="also write top.json, the N best")
    add("--finalists", type=int, default=0, metavar="K", help="best.json is the best of K after short trainings")
    add("--front-table", action="store_true", help="measure the last search's front as ONNX files, and stop")
    add("--max-flops", type=float, metavar="N", help="budget: multiply-adds of the whole detector, e.g. 300e6")
    add("--max-params", type=float, metavar="N", help="budget: parameters of the whole detector")
    add("--max-latency", type=float, metavar="MS", help="budget: predicted milliseconds, before NMS (--latency-table)")
    add("--latency-table", metavar="FILE", help="latency of blocks, as --measure-latency wrote it")
    add("--measure-latency", metavar="DEVICE", nargs="?", const="auto", help="write its table, and stop")
    measuring = parser.add_mutually_exclusive_group()
    measuring.add_argument("--latency-runtime", choices=RUNTIMES, help="what --measure-latency times (default: torch)")
    command_help = "command that runs {file}, an ONNX file, on --measure-latency NAME and prints milliseconds"
    measuring.add_argument("--measure-with", metavar="COMMAND", help=command_help)
    return parser


def resolve_run(args: argparse.Namespace, supernet: Supernet, path: Path) -> cli.Run:
    """The search's run: the supernet's configuration, or that of --cfg, which must describe the same network."""
    flags = {
        "search.controller": args.controller,
        "search.max_flops": args.max_flops,
        "search.max_params": args.max_params,
        "search.max_latency_ms": args.max_latency,
        "search.latency_table": args.latency_table,
    }
    command = cli.CommandLine(args, "search", flags)
    run = command.resolve(to_dict(supernet.config), f"the supernet {path}", reads_data=not args.measure_latency)
    validate_network(run.config, supernet.config, ("search_space", "backbone", "head", "loss"), path)
    return run


class Task:
    """All that a search works on, read and checked before anything is written."""

    def __init__(self, args: argparse.Namespace, search_run: cli.Run, supernet: Supernet, path: Path):
        config = search_run.config
        self.run = search_run
        self.config = config
        self.path = path  # of the supernet
        self.supernet = supernet
        flag, gpus = ("--device", args.device) if args.gpus is None else ("--gpus", args.gpus)
        self.devices, self.make_pool = pick_dispatcher(args.dispatcher, args.ray_address, gpus, config, flag)
        limits = limits_of(config.search)
        file = config.search.latency_table
        table = load_table(Path(file), supernet.detector) if file else None
        if table is None and "latency_ms" in (*config.search.costs, *limits):
            raise UserError(
                "search: a latency limit or cost needs --latency-table FILE, which --measure-latency writes"
            )
        self.costs = Coster(supernet.detector, table)
        self.budget = Budget(self.costs, supernet.space, limits)
        # One random proposal shows at once whether anything fits all limits together.
        RandomSearch(config.search, supernet.space, config.seed, self.budget).ask()
        config.data.classes = list(supernet.classes)
        self.annotations = load_annotations(config.data, "train")
        # The images that train the supernet, and those that score candidates.
        self.split = load_split(path.parent / "split.json", self.annotations, supernet.split)
        self.starts = start_genotypes(args.start_from, path.parent, supernet, self.budget)


def print_plan(task: Task) -> None:
    supernet, settings = task.supernet, task.config.search
    train, search = task.split
    for line in (
        *task.run.describe(),
        f"supernet: {task.path}, trained to epoch {supernet.epoch} of {supernet.config.supernet.epochs}",
        f"split: {len(train)} images train the supernet, {len(search)} score candidates",
        *plan.describe_space(supernet.detector, supernet.space),
        *([task.costs.table.describe()] if task.costs.table else []),
        f"budget: {task.budget}",
        f"search: {settings.controller}, {settings.num_epochs} epochs of {settings.steps} evaluations "
        f"from epoch {supernet.epoch + 1}, workers on {', '.join(task.devices)}",
    ):
        print(line)


def print_estimate(task: Task, finalists: int) -> None:
    """How long the search will take: a few candidates are scored for some seconds, as one of the workers would."""
    torch.set_num_threads(task.make_pool.keywords["threads_per_worker"])
    space, config = task.supernet.space, task.config
    genotypes = [space.smallest(), space.sample(random.Random(config.seed)), space.largest()]
    device = pick_device(task.devices[0])
    score = scoring_seconds(task.supernet.detector, genotypes, task.annotations, *task.split, config, device)
    evaluations = config.search.num_epochs * config.search.steps
    print(
        f"estimated time: about {duration(evaluations * score / len(task.devices))} for {evaluations} candidates of "
        f"{score:.2f} s each, workers: {len(task.devices)}; results already in the ledger take no time"
    )
    if finalists:
        images = task.annotations.subset(task.split[0])
        short, model = shortened(config, None, len(images)), task.supernet.detector.extract(genotypes[1])
        seconds = final_seconds(model, short, device, final_loader(images, genotypes[1].image_size, short, device))
        print(f"  and {duration(finalists * seconds)} for the finalists' trainings, evaluations apart")


def open_search(task: Task, ledger: Ledger, resume: bool) -> Search:
    """The search at its start, or where an interrupted run of it ended."""
    config = task.config
    controller = make_controller(config.search, task.supernet.space, config.seed, task.budget, task.starts, task.costs)
    identity = Identity.of(task.path, config, task.annotations, *task.split)
    search = Search(controller, ledger, config, task.costs, identity, task.supernet.epoch + 1)
    if resume:
        search.replay()
        gc.freeze()  # a long ledger's records stay, and going through them again takes most of a second
        found = len(ledger.records(search=identity.search, basis=identity.basis))
        print(f"resumed {ledger.path}: {found} evaluations of this search")
        if unused := search.describe_unused():
            print(f"note: {unused}")
    return search


@contextlib.contextmanager
def scoring_workers(task: Task, config: Config, sha256: str) -> Iterator[WorkerPool]:
    """Workers that score candidates; the file of pictures that they share exists as long as they do."""
    images = task.run.folder / IMAGES
    try:
        save_scoring_data(prepare_scoring_data(task.annotations, *task.split, config), images)
        # Absolute paths, since an actor of Ray has another working folder.
        setup = (str(task.path.resolve()), sha256, str(images.resolve()), to_dict(config))
        with task.make_pool(scoring_worker, setup) as pool:
            yield pool
    finally:
        with contextlib.suppress(OSError):
            images.unlink()


def run_search(task: Task, args: argparse.Namespace) -> None:
    """Search, score the front again on all images if a part was used, write the results."""
    folder = task.run.folder
    with Ledger(folder / "evals.jsonl") as ledger, StopRequest() as stop:
        checkpoint.remove_leftovers(folder)
        task.run.save_config()
        remember("search", folder)
        search = open_search(task, ledger, args.resume)
        recall_finalists(search, folder / "finalists")
        save = functools.partial(write_results, search, folder, args.top)
        try:
            finished = evaluate(task, search, stop, Throttle(save), args.save_every or 1)
        except UserError:
            # What has been found so far is still of use, whatever ended the search.
            with contextlib.suppress(UserError):
                save()
            raise
        save()
        if not finished:
            raise Stopped("the same command with --resume goes on", stop.number)
        if not search.scored:
            raise UserError(f"no evaluation succeeded; see {folder / 'evals.jsonl'}")
    if args.finalists:
        # A Ray cluster's devices need not be this machine's.
        device = pick_device("auto" if args.dispatcher == "ray" else task.devices[0])
        options = task.split, device, folder / "finalists", args.finalists
        train_finalists(search, task.supernet, task.path, task.annotations, *options)
        save()
    report_end(search, folder, args.top)


def evaluate(task: Task, search: Search, stop: StopRequest, write: Callable[[], None], save_every: int) -> bool:
    """Evaluate what the search proposes, then its front on all images. False if a stop was requested before the end."""
    config, sha256 = task.config, search.identity.supernet_sha256
    if len(search.told) < search.total:
        with scoring_workers(task, config, sha256) as pool:
            search_loop(search, pool, stop, write, save_every)
        if len(search.told) < search.total:
            return False
    if jobs := search.rescoring_jobs():
        all_images = replace(config, search=replace(config.search, images=0))
        with scoring_workers(task, all_images, sha256) as pool:
            return rescore_front(search, pool, stop, jobs)
    return True


def report_end(search: Search, folder: Path, top: int) -> None:
    """What was found, what it is worth, where it is, what to do next."""
    front = search.front()
    print(progress_line(search, search.epoch - 1))
    ties = [k for k, record in enumerate(front) if (noise := search.noise(record)) and noise.tie]
    if len(ties) > 1:
        cheapest = cost_text(front[ties[0]]["metrics"], search.settings.costs[0])
        train_it = cli.command("final_train.py", genotype=folder / "pareto.json", index=ties[0])
        print(
            f"{len(ties)} of the front's {len(front)} cannot be told from the best on {front[0]['images']} images; "
            f"the cheapest of them, {cheapest}: {train_it}"
        )
    for line in search.describe_finalists():
        print(line)
    files = ["best.json", "pareto.json", *(["top.json"] if top else []), "report.html"]
    print(f"wrote {', '.join(str(folder / name) for name in files)}")
    print(f"next: {cli.command('final_train.py', genotype=folder / 'best.json')}")


def measure(task: Task, dry_run: bool) -> None:
    """--front-table: measure the members of the front as ONNX files. Nothing is written before the end."""
    folder = task.run.folder
    front = [Genotype.from_dict(member) for member in read_genotype_files(folder / "pareto.json")]
    train, judge = (task.annotations.subset(rows) for rows in task.split)
    print(f"front table: {len(front)} members of {folder / 'pareto.json'}, each as a float and an int8 ONNX file")
    if not dry_run:
        measured = measure_front(front, task.supernet, task.config, train, judge)
        print(write_front_table(folder, front, {"supernet": checkpoint.sha256(task.path), **measured}))
        print(f"wrote {folder / 'front_table.json'}, {folder / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    cli.refuse_torchrun("async_search.py")
    if args.front_table:
        if args.finalists or args.top or args.start_from or args.measure_latency:
            raise UserError("--front-table: does not go with --finalists, --top, --start-from or --measure-latency")
        # Its configuration is that of the search which found the front.
        args.resume = True
        args.train_dir = args.train_dir or last_run("search")
        if args.train_dir is None:
            raise UserError("--front-table: no search found: run one, or name its folder with --train-dir")
        args.load = supernet_path(Config(), read_genotype_files(args.train_dir / "pareto.json")[0], args.load)
    source = args.load or last_run("supernet")
    if source is None:
        raise UserError("no supernet run found: train one with supernet_train.py, or name its folder with --load")
    path = supernet_checkpoint(source)
    supernet = load_supernet(path)
    search_run = resolve_run(args, supernet, path)
    counts = (("--top", args.top, 0), ("--finalists", args.finalists, 0), ("--save-every", args.save_every, 1))
    for flag, count, least in counts:
        if count is not None and count < least:
            raise UserError(f"{flag} {count}: expected a number, at least {least}")
    if (args.latency_runtime or args.measure_with) and not args.measure_latency:
        raise UserError("--latency-runtime and --measure-with say how to measure: add --measure-latency")
    if args.measure_latency and (args.finalists or args.top or args.start_from):
        raise UserError("--measure-latency: does not go with --finalists, --top or --start-from")
    if args.measure_latency:
        measure_latency(args, supernet, search_run.config, search_run.folder)
        return
    folder = search_run.folder
    task = Task(args, search_run, supernet, path)
    print_plan(task)
    if args.finalists:
        epochs = shortened(search_run.config, None, len(task.split[0])).final.epochs
        print(f"finalists: {args.finalists} are trained for {epochs} epochs each after the search")
    with cli.claim(folder / "evals.jsonl", args):
        if args.front_table:
            measure(task, args.dry_run)
        elif args.dry_run:
            print_estimate(task, args.finalists)
        else:
            run_search(task, args)


if __name__ == "__main__":
    run(main)
