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
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lib import checkpoint, cli, plan
from lib.budget import Budget, counts_latency, limits_of
from lib.config import Config, to_dict
from lib.datasets import load_records, load_split
from lib.errors import UserError
from lib.evolution import Controller, RandomSearch, SpaceExhausted, best_record, make_controller
from lib.genotype import Genotype, SearchSpace
from lib.genotype_file import read_genotype_files
from lib.latency import Coster, measure_table, table_for
from lib.ledger import Ledger, evaluation_key
from lib.models import Supernet, load_supernet
from lib.pool import Result, WorkerPool
from lib.runlog import progress, say
from lib.runs import last_run, remember, supernet_checkpoint
from lib.runtime import StopRequest, pick_device, run
from lib.scoring import prepare_scoring_data, save_scoring_data, scoring_worker
from lib.search_files import write_results
from lib.search_report import SearchRun
from lib.time_limit import TimeLimit
from lib.workers import devices_of, pick_dispatcher


class Search:
    """One search: the ask, submit, tell loop over a ledger.

    What the ledger already holds is told at once and never evaluated again. Its records are told with the costs that
    `costs` gives: a predicted latency is the table's, not the evaluation's.
    """

    def __init__(
        self, controller: Controller, ledger: Ledger, config: Config, costs: Coster, identity: dict, first_epoch: int
    ):
        self.controller, self.ledger, self.config, self.costs = controller, ledger, config, costs
        self.identity, self.first_epoch = identity, first_epoch
        self.total = config.search.num_epochs * config.search.steps
        self.asked = 0
        self.told: list[dict] = []  # the records this search has learnt from
        self.running: dict[str, tuple[Genotype, str]] = {}  # and its origin

    @property
    def epoch(self) -> int:
        return self.first_epoch + len(self.told) // self.config.search.steps

    def replay(self) -> None:
        """Tell the controller what an interrupted run of this very search had found.

        Not random search, whose proposals depend on their number alone: it makes the same ones again, what was lost
        in flight among them, and `propose` finds the others in the ledger.
        """
        if isinstance(self.controller, RandomSearch):
            return
        for record in self.ledger.records(search=self.identity["search"]):
            genotype = Genotype.from_dict(record["genotype"])
            if record["key"] == self._key(genotype):
                self.asked += 1
                self._tell(record)

    def _key(self, genotype: Genotype) -> str:
        names = ("supernet_sha256", "split_sha256", "settings")
        return evaluation_key(genotype, *(self.identity[name] for name in names))

    def _tell(self, record: dict) -> None:
        genotype = Genotype.from_dict(record["genotype"])
        if record["status"] == "ok":
            record = {**record, "metrics": {**record["metrics"], **self.costs(genotype)}}
            self.controller.tell(genotype, record["metrics"])
        else:
            self.controller.tell_failure(genotype)
        self.told.append(record)

    def propose(self) -> tuple[str, Genotype] | None:
        """The next job; None where the search has asked for all it may. Known evaluations are told on the way."""
        while self.asked < self.total:
            try:
                genotype = self.controller.ask()
            except SpaceExhausted as end:
                say(f"search: {end}")
                self.total = self.asked
                return None
            self.asked += 1
            key = self._key(genotype)
            known = self.ledger.lookup(key)
            if known is None:
                self.running[key] = genotype, self.controller.origin
                return key, genotype
            self._tell(known)
        return None

    def learn(self, result: Result) -> None:
        """Record a result and tell the controller."""
        genotype, origin = self.running.pop(result.job_id)
        record = {
            "key": result.job_id,
            "search": self.identity["search"],
            "origin": origin,
            "budget": self.identity["budget"],
            "genotype": genotype.to_dict(),
            "metrics": result.value or {},
            "status": "failed" if result.error else "ok",
            "seconds": round(result.seconds, 3),
            "worker": result.worker,
            "epoch": self.epoch,
            "time": round(time.time(), 3),
            **({"error": result.error} if result.error else {}),
        }
        self.ledger.append(record)
        self._tell(record)

    def succeeded(self) -> list[dict]:
        return [record for record in self.told if record["status"] == "ok"]

    def random_evaluations(self) -> list[dict]:
        """Every random proposal in the ledger that this search could have made, whichever search made it."""
        found = self.ledger.records(origin="random", budget=self.identity["budget"])
        return [r for r in found if r["key"] == self._key(Genotype.from_dict(r["genotype"]))]

    def as_run(self, folder: Path, supernet: Path) -> SearchRun:
        """The search as it stands, for those who write about it."""
        return SearchRun(
            name=self.config.name,
            search=self.identity["search"],
            supernet=supernet,
            folder=folder,
            settings=self.config.search,
            space=self.controller.space,
            total=self.total,
            told=self.told,
            random=self.random_evaluations(),
        )


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
                dispatcher.submit(job[0], job[1].to_dict())
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
    add("--max-flops", type=float, help="budget: multiply-adds of the whole detector, e.g. 300e6")
    add("--max-params", type=float, help="budget: parameters of the whole detector")
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


def read_search_config(args: argparse.Namespace, supernet: Supernet) -> Config:
    """The supernet's configuration, or --cfg's, which must describe the same network."""
    keys = {"controller": args.controller, "max_flops": args.max_flops, "max_params": args.max_params}
    keys |= {"max_latency_ms": args.max_latency, "latency_table": args.latency_table}
    args.set += [f"search.{key}={value}" for key, value in keys.items() if value is not None]
    config = cli.read_config(args, "search", to_dict(supernet.config))
    for section in ("search_space", "backbone", "head", "loss"):
        if getattr(config, section) != getattr(supernet.config, section):
            raise UserError(f"{section}: differs from that of the supernet, which was trained with its own (--load)")
    return config


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    cli.refuse_torchrun("async_search.py")
    source = args.load or last_run("supernet")
    if source is None:
        raise UserError("no supernet run found: train one with supernet_train.py, or name its folder with --load")
    path = supernet_checkpoint(source)
    supernet = load_supernet(path)
    config = read_search_config(args, supernet)
    folder = cli.run_folder(args, config, "search")
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
    records = load_records(config.data, "train", config.seed)
    train, candidates = load_split(path.parent / "split.json", records)
    for line in (
        f"supernet: {path}, trained to epoch {supernet.epoch} of {supernet.config.supernet.epochs}",
        plan.describe_split(len(records), train, candidates),
        *plan.describe_space(supernet.detector, supernet.space),
        *([table.describe()] if table else []),
        f"budget: {budget}",
        f"search: {config.search.controller}, {config.search.num_epochs} epochs of {config.search.steps} evaluations "
        f"from epoch {supernet.epoch + 1}, workers on {', '.join(devices)}",
    ):
        print(line)
    if args.dry_run:
        return
    starts = start_genotypes(args.start_from, path.parent, supernet, budget)
    images = folder / "images.pt"
    with Ledger(folder / "evals.jsonl") as ledger, StopRequest() as stop:
        cli.save_config(config, folder)
        remember("search", folder)
        controller = configured_controller(config, supernet.space, budget, starts)
        identity = identify(path, config)
        search = Search(controller, ledger, config, costs, identity, supernet.epoch + 1)
        if args.resume:
            search.replay()
            found = len(ledger.records(search=identity["search"]))
            print(f"resumed {ledger.path}: {found} evaluations of this search")

        def write(final: bool = False) -> None:
            write_results(search.as_run(folder, path), config, identity["supernet_sha256"], final)

        try:
            save_scoring_data(prepare_scoring_data(records, train, candidates, config), images)
            setup = (str(path.resolve()), str(images.resolve()), to_dict(config))
            with make_dispatcher(scoring_worker, setup) as dispatcher:
                search_loop(search, dispatcher, stop, write, args.save_every or 1, TimeLimit(config.search.time_limit))
        finally:
            with contextlib.suppress(OSError):
                images.unlink()
    if stop.requested and not search.succeeded():
        print("stopped before an evaluation succeeded; the same command with --resume goes on")
        return
    if not search.succeeded():
        raise UserError(f"no evaluation succeeded; see {folder / 'evals.jsonl'}")
    write(final=True)
    if len(search.told) < search.total:
        print("stopped; the same command with --resume goes on")
    print(progress_line(search, search.epoch - 1))
    print(f"wrote {folder / 'best.json'}, {folder / 'pareto.json'}, {folder / 'report.html'}")
    print(f"next: python final_train.py --genotype {folder / 'best.json'}")


def configured_controller(config: Config, space: SearchSpace, budget: Budget, starts: Sequence[Genotype]) -> Controller:
    settings = config.search
    names = ("objective", "costs", "population_size", "tournament_size", "mutation_probability")
    options = {name: getattr(settings, name) for name in (*names, "crossover_probability")}
    return make_controller(settings.controller, space, config.seed, budget, seeds=starts, **options)


def identify(supernet: Path, config: Config) -> dict:
    """What tells this search, and what its evaluations rest on, from others in the same ledger."""
    settings = config.search
    shared = (config.seed, settings.controller, settings.objective, settings.costs, limits_of(settings))
    measured = checkpoint.sha256(Path(settings.latency_table)) if counts_latency(settings) else "no latency"
    limits = {name: value for name, value in vars(settings).items() if name[:4] in ("min_", "max_") and value}
    return {
        "search": f"{shared}-{measured}",
        "supernet_sha256": checkpoint.sha256(supernet),
        "split_sha256": checkpoint.sha256(supernet.parent / "split.json"),
        "budget": limits,
        "settings": {"bn_images": settings.bn_images, "images": settings.images, "batch_size": settings.batch_size},
    }


if __name__ == "__main__":
    run(main)
