"""Stage 2: find the best sub-networks of a supernet under a budget, on worker processes that never idle.

    python async_search.py                                    # the last supernet, every GPU or else the CPU
    python async_search.py --gpus 0,1,2,3 --max-flops 300e6
    python async_search.py --load runs/bccd/supernet --gpus cpu,cpu --controller pareto-evo
    python async_search.py --resume                           # go on after any interruption
    python async_search.py --dispatcher ray --ray-address auto    # on the machines of a Ray cluster
    python async_search.py --measure-latency cpu              # writes latency_cpu.json, by which a search knows latency
    python async_search.py --latency-table runs/bccd/search/latency_cpu.json --max-latency 12

Writes best.json (the genotype to train), pareto.json (the front), evals.jsonl (every evaluation), front.png and
report.html (what was found and how, beside random search) to runs/NAME/search. The next command is final_train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lib import cli, plan
from lib.annotations import Annotations
from lib.budget import Budget, Coster, limits_of, table_for
from lib.cli import last_run, remember, supernet_checkpoint
from lib.config import Config
from lib.config_io import to_dict, validate_network
from lib.controllers import Controller, RandomSearch, best_record, make_controller
from lib.datasets import load_annotations, load_split
from lib.detector import Supernet, load_supernet
from lib.dispatcher import TimeLimit, WorkerPool
from lib.errors import UserError
from lib.genotype import Genotype, SearchSpace, read_genotype_files
from lib.latency import measure_table
from lib.ledger import Ledger
from lib.log import duration, progress, say
from lib.plan import scoring_seconds
from lib.ray_dispatcher import pick_dispatcher
from lib.report import COSTS, write_results
from lib.runtime import StopRequest, devices_of, pick_device, run
from lib.scoring import prepare_scoring_data, save_scoring_data, scoring_worker
from lib.search import Search, SearchRun, identify

IMAGES = "images.pt"  # the pictures that the workers share while they run


def search_loop(
    search: Search,
    dispatcher: WorkerPool,
    stop: StopRequest,
    write: Callable[[], None],
    save_every: int,
    limit: TimeLimit,
) -> None:
    """Keep every worker supplied; each result triggers the next proposal, nothing waits for a generation to end."""
    epoch = search.epoch
    with progress(None, "search", total=search.total, initial=len(search.told)) as bar:
        while True:
            while not stop.requested and dispatcher.free_slots() > 0 and (job := search.propose()) is not None:
                dispatcher.submit(*job)
            bar.total = search.total
            bar.update(len(search.told) - bar.n)
            if search.epoch > epoch and search.succeeded():
                say(progress_line(search, epoch))
                if (search.epoch - search.first_epoch) % save_every == 0:
                    write()
                epoch = search.epoch
            if not dispatcher.pending:
                return
            for result in dispatcher.results(timeout=1.0):
                search.learn(result)
                if result.error:
                    say(f"a candidate failed on {result.worker}: {result.error.splitlines()[-1]}")
                else:
                    limit.add(result.seconds)
            dispatcher.time_limit = limit.seconds


def progress_line(search: Search, epoch: int) -> str:
    objective = search.config.search.objective
    best = best_record(search.succeeded(), objective, search.config.search.costs[0])["metrics"]
    latency = f", {best['latency_ms']:.2f} ms" if "latency_ms" in best else ""
    return (
        f"search epoch {epoch}: {len(search.told)} evaluations, best {objective} {best[objective]:.4f} "
        f"at {best['flops'] / 1e6:.1f} M multiply-adds{latency}"
    )


def measure_latency(args: argparse.Namespace, supernet: Supernet, config: Config, folder: Path) -> None:
    """Write the latency table of a device and say how good it is."""
    device = pick_device(args.measure_latency, "--measure-latency")
    path = folder / f"latency_{str(device).replace(':', '_')}.json"
    if args.dry_run:
        print(f"latency: times sub-networks on {device} and writes {path}")
        return
    table = measure_table(supernet.detector, config, device, config.search.latency_threads, config.seed)
    table.save(path)
    costs = Coster(supernet.detector, table)
    low, high = (costs(g)["latency_ms"] for g in (supernet.space.smallest(), supernet.space.largest()))
    print(table.describe())
    print(f"predicted: {low:.2f} ms for the smallest sub-network, {high:.2f} ms for the largest")
    load = f" --load {args.load}" if args.load else ""
    print(f"wrote {path}")
    print(f"next: python async_search.py{load} --latency-table {path} --max-latency {(low + high) / 2:.3g}")


def start_genotypes(
    files: Sequence[Path] | None, folder: Path, supernet: Supernet, feasible: Callable[[Genotype], bool]
) -> list[Genotype]:
    """What the search evaluates first: the genotypes of --start-from, else the pretrained one if the supernet has one.

    Those that are not open in the supernet or over the budget are left out, with a note.
    """
    pretrained = folder / "pretrained_genotype.json"
    files = files or ([pretrained] if pretrained.exists() else [])
    starts = []
    for path in files:
        for data in read_genotype_files(path):
            genotype = Genotype.from_dict(data)
            try:
                supernet.space.check(genotype)
            except UserError as error:
                say(f"{path}: left out: {error}")
                continue
            if feasible(genotype):
                starts.append(genotype)
            else:
                say(f"{path}: left out: over the budget")
    return starts


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        __doc__, "folder of the supernet run (default: the last one)", "write best.json and the front every N epochs"
    )
    add = parser.add_argument
    add("--gpus", metavar="LIST", help="workers: 0,1,2,3 or cpu or cpu,cpu (default: what the machine has)")
    add(
        "--dispatcher", choices=["local", "ray"], default="local", help="workers: processes, or actors of a Ray cluster"
    )
    add("--ray-address", metavar="ADDRESS", help="the cluster: auto or HOST:PORT (default: one of this machine alone)")
    add("--start-from", metavar="FILE", nargs="+", type=Path, help="genotypes or fronts to evaluate first")
    add("--controller", choices=["random", "evo", "pareto-evo"], help="how candidates are proposed")
    add(
        "--top",
        type=int,
        default=0,
        metavar="N",
        help="also write top.json, the N best (--genotype top.json --index K)",
    )
    add("--max-flops", type=float, metavar="N", help="budget: multiply-adds of the whole detector, e.g. 300e6")
    add("--max-params", type=float, metavar="N", help="budget: parameters of the whole detector")
    add("--max-latency", type=float, metavar="MS", help="budget: predicted milliseconds, before NMS (--latency-table)")
    add("--latency-table", metavar="FILE", help="latency of blocks, as --measure-latency wrote it")
    add(
        "--measure-latency",
        metavar="DEVICE",
        nargs="?",
        const="auto",
        help="write such a table for this machine's cpu or cuda:0 to the run's folder, and stop",
    )
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
    run = cli.CommandLine(args, "search", flags).resolve(to_dict(supernet.config), f"the supernet {path}")
    validate_network(run.config, supernet.config, ("search_space", "backbone", "head", "loss"), path)
    return run


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    cli.refuse_torchrun("async_search.py")
    source = args.load or last_run("supernet")
    if source is None:
        raise UserError("no supernet run found: train one with supernet_train.py, or name its folder with --load")
    path = supernet_checkpoint(source)
    supernet = load_supernet(path)
    search_run = resolve_run(args, supernet, path)
    folder, config = search_run.folder, search_run.config
    if args.top < 0:
        raise UserError(f"--top {args.top}: expected how many of the best to list")
    if args.measure_latency:
        measure_latency(args, supernet, config, folder)
        return
    gpus = args.gpus or devices_of(args.device)
    devices, make_dispatcher = pick_dispatcher(args.dispatcher, args.ray_address, gpus, config)
    table = table_for(supernet.detector, config.search)
    costs = Coster(supernet.detector, table)
    budget = Budget(costs, supernet.space, limits_of(config.search))
    RandomSearch(supernet.space, config.seed, budget, budget=str(budget)).ask()  # raises where nothing fits
    config.data.classes = list(supernet.classes)
    annotations = load_annotations(config.data, "train")
    train, candidates = load_split(path.parent / "split.json", annotations)
    starts = start_genotypes(args.start_from, path.parent, supernet, budget)
    for line in (
        *search_run.describe(),
        f"supernet: {path}, trained to epoch {supernet.epoch} of {supernet.config.supernet.epochs}",
        plan.describe_split(len(annotations), train, candidates),
        *plan.describe_space(supernet.detector, supernet.space),
        *([table.describe()] if table else []),
        f"budget: {budget}",
        f"search: {config.search.controller}, {config.search.num_epochs} epochs of {config.search.steps} evaluations "
        f"from epoch {supernet.epoch + 1}, workers on {', '.join(devices)}",
    ):
        print(line)
    if args.dry_run:
        threads = make_dispatcher.keywords["threads_per_worker"]
        print_estimate(supernet, annotations, (train, candidates), config, devices, threads)
        return
    with Ledger(folder / "evals.jsonl") as ledger, StopRequest() as stop:
        search_run.save_config()
        remember("search", folder)
        controller = configured_controller(config, supernet.space, budget, starts)
        identity = identify(path, config)
        search = Search(controller, ledger, config, costs, identity, supernet.epoch + 1)
        if args.resume:
            search.replay()
            gc.freeze()  # a long ledger's records stay, and going through them again takes most of a second
            found = len(ledger.records(search=identity["search"], basis=identity["basis"]))
            print(f"resumed {ledger.path}: {found} evaluations of this search")

        def write(final: bool = False) -> None:
            write_results(search.as_run(folder, path), config, identity["supernet_sha256"], final, args.top)

        with contextlib.suppress(OSError):
            (folder / IMAGES).unlink()  # which a run that was killed leaves
        workers = functools.partial(scoring_workers, make_dispatcher, path, folder, annotations, (train, candidates))
        limit = TimeLimit(config.search.time_limit)
        if len(search.told) < search.total:
            with workers(config) as dispatcher:
                search_loop(search, dispatcher, stop, write, args.save_every or 1, limit)
        if stop.requested and not search.succeeded():
            print("stopped before an evaluation succeeded; the same command with --resume goes on")
            return
        if not search.succeeded():
            raise UserError(f"no evaluation succeeded; see {folder / 'evals.jsonl'}")
        finished = len(search.told) >= search.total
        if finished and (jobs := search.missing_finalists(search.as_run(folder, path))):
            everything = replace(config, search=replace(config.search, images=0))
            with workers(everything) as dispatcher:
                finished = score_finalists(search, dispatcher, stop, jobs)
        write(final=True)
        if not finished:
            print("stopped; the same command with --resume goes on")
        report_end(search, search.as_run(folder, path), args.top)


@contextlib.contextmanager
def scoring_workers(
    make_dispatcher: Callable[..., WorkerPool],
    supernet: Path,
    folder: Path,
    annotations: Annotations,
    split: tuple[Sequence[int], Sequence[int]],
    config: Config,
) -> Iterator[WorkerPool]:
    """Workers that score candidates; the file of pictures that they share lasts as long as they do."""
    images = folder / IMAGES
    try:
        save_scoring_data(prepare_scoring_data(annotations, *split, config), images)
        setup = (str(supernet.resolve()), str(images.resolve()), to_dict(config))
        with make_dispatcher(scoring_worker, setup) as dispatcher:
            yield dispatcher
    finally:
        with contextlib.suppress(OSError):
            images.unlink()


def print_estimate(
    supernet: Supernet,
    annotations: Annotations,
    split: tuple[Sequence[int], Sequence[int]],
    config: Config,
    devices: Sequence[str],
    threads: int | None,
) -> None:
    """How long the search will take: candidates scored for some seconds, as one of the workers would."""
    torch.set_num_threads(threads or torch.get_num_threads())
    space, settings = supernet.space, config.search
    genotypes = [space.smallest(), space.sample(random.Random(config.seed)), space.largest()]
    score = scoring_seconds(supernet.detector, genotypes, annotations, *split, config, torch.device(devices[0]))
    evaluations = settings.num_epochs * settings.steps
    print(
        f"time: about {duration(evaluations * score / len(devices))} for {evaluations} candidates of {score:.2f} s "
        f"each, workers: {len(devices)}; what the ledger holds, and what racing stops, takes less"
    )


def report_end(search: Search, run: SearchRun, top: int) -> None:
    """What was found, what it is worth, where it is, what to do next."""
    folder, front = run.folder, run.front()
    print(progress_line(search, search.epoch - 1))
    stopped = len(run.compared) - len(run.scored)
    if stopped:
        print(
            f"{stopped} of {len(run.compared)} candidates clearly lost on a part of the images and were stopped there"
        )
    ties = [k for k, record in enumerate(front) if (noise := run.noise(record)) and noise.tie]
    if len(ties) > 1:
        cheapest = COSTS[run.settings.costs[0]](front[ties[0]]["metrics"], run.settings.costs[0])
        print(
            f"{len(ties)} of the front's {len(front)} cannot be told from the best on {front[0]['images']} images; "
            f"the cheapest of them, {cheapest}: --genotype {folder / 'pareto.json'} --index {ties[0]}"
        )
    files = ["best.json", "pareto.json", *(["top.json"] if top else []), "report.html"]
    print(f"wrote {', '.join(str(folder / name) for name in files)}")
    print(f"next: python final_train.py --genotype {folder / 'best.json'}")


def score_finalists(
    search: Search, dispatcher: WorkerPool, stop: StopRequest, jobs: Sequence[tuple[str, dict]]
) -> bool:
    """Score the front anew, on all images of the search split; whether it came to that before a signal to stop.

    After the signal what runs is finished, and the front stays as it was.
    """
    waiting, limit = list(reversed(jobs)), TimeLimit(search.config.search.time_limit, least=3)
    with progress(None, "front on all images", total=len(jobs)) as bar:
        while True:
            while waiting and not stop.requested and dispatcher.free_slots() > 0:
                dispatcher.submit(*waiting.pop())
            if not dispatcher.pending:
                break
            for result in dispatcher.results(timeout=1.0):
                search.learn_finalist(result)
                bar.update()
                if result.error:
                    say(f"a member of the front failed on {result.worker}: {result.error.splitlines()[-1]}")
                else:
                    limit.add(result.seconds)
            dispatcher.time_limit = limit.seconds
    if waiting:
        search.finalists.clear()
    return not waiting


def configured_controller(config: Config, space: SearchSpace, budget: Budget, starts: Sequence[Genotype]) -> Controller:
    settings = config.search
    names = ("objective", "costs", "population_size", "tournament_size", "mutation_probability")
    options = {name: getattr(settings, name) for name in (*names, "crossover_probability")}
    return make_controller(settings.controller, space, config.seed, budget, seeds=starts, **options)


if __name__ == "__main__":
    run(main)
