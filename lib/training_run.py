"""The epochs of a training: save, log, score, stop when asked to or when it diverges; and what --resume goes on from.

What is there is read and compared before anything is written. A change of the keys below is carried through exactly, or
changes nothing about the training; any other change is refused, with the key and both values.
"""

import contextlib
import itertools
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib import UserError, checkpoint, config_io, distributed
from lib.annotations import Annotations
from lib.config import Config, TrainConfig
from lib.datasets import Batch
from lib.detector import training_file
from lib.log import RunLog, progress, read_log, say
from lib.losses import DetectionLoss, Targets
from lib.plain import check, shown
from lib.runtime import Stopped, StopRequest
from lib.training import Diverged, Losses, Trainer

LAST = "last.pt"
LAST_GOOD = "last_good.pt"  # last.pt as it was at the last evaluation that found something
COLLAPSED = 3  # evaluations in a row that find nothing, after one that found SOMETHING
SOMETHING = 0.01
# Of the stage's own section, that is of `supernet` or of `final`. A section, such as lr_schedule, stands for its keys.
TRAINING_MAY_CHANGE = {
    *("epochs", "learning_rate", "backbone_learning_rate", "base_net_lr", "lr_schedule", "momentum", "weight_decay"),
    *("clip_grad_norm", "batch_size", "accumulate", "sync_batch_norm", "eval_every", "save_every", "save_minutes"),
    *("max_steps", "interference_tolerance", "cuda_graph"),
    *("genotypes", "supernet_state_dict"),  # the genotype itself is compared
}
# The pictures may have moved: the split and their fingerprint are compared. So are the classes that were found.
ANY_STAGE_MAY_CHANGE = {
    *("name", "data.root", "data.train_annotations", "data.train_images", "data.test_annotations", "data.test_images"),
    *("data.dataset_type", "data.classes", "data.num_classes", "data.on_error", "data.max_skipped", "data.max_pixels"),
    *("data.workers", "data.cache"),
    *("backbone.pretrained_path", "backbone.pretrained_head"),  # where the weights started once
}
REMEDY = "--train-dir DIR starts another run (what may change: docs/flags.md, Interruptions)"


def read_previous(folder: Path, config: Config, stage: str) -> dict | None:
    """The checkpoint that the run in `folder` goes on from, in every process of the job; None if there is none yet.

    Raises UserError for the first key of `config` whose change since then cannot be carried through.
    """
    last, payload = folder / LAST, None
    if distributed.world().main and (last.exists() or (folder / LAST_GOOD).exists()):
        try:
            payload = checkpoint.read(last)
        except UserError as error:
            raise UserError(f"{error}{_spare(folder)}") from None
    payload = distributed.from_main(payload)
    if payload is None:
        return None
    training_file(payload, last)
    if ("genotype" in payload) != (stage == "final"):
        raise UserError(f"{last}: is of the other training; --train-dir names the folder of this one")
    for key, value in config_io.RETIRED.items():
        if value and key.startswith(stage) and config_io.get_key(payload["config"], key) == value:
            raise UserError(
                f"{last}: began with {key} {value}, which was removed: it can be searched, not trained further"
            )
    for key, now, before in config_io.differences(config, config_io.from_dict(payload["config"], str(last))):
        if not _may_change(key, before, now, stage):
            raise UserError(f"{key}: expected {shown(before)}, with which {last} began, found {shown(now)}; {REMEDY}")
    return payload


def _spare(folder: Path) -> str:
    """How to go on where last.pt is of no use."""
    good = folder / LAST_GOOD
    remedy = f"; {good} is that of the last evaluation that found something: copy it to {folder / LAST}"
    return remedy if good.exists() else ""


def _may_change(key: str, before: object, now: object, stage: str) -> bool:
    section, _, rest = key.partition(".")
    if section == stage:
        # A rate of its own makes the backbone's parameters a group of their own in the optimizer.
        regrouped = rest == "backbone_learning_rate" and bool(before) != bool(now)
        return rest.partition(".")[0] in TRAINING_MAY_CHANGE and not regrouped
    if section in ("supernet", "search", "final"):
        return stage != "final" or key != "search.objective"  # by which the best epoch is chosen
    return key in ANY_STAGE_MAY_CHANGE


def due_epochs(settings: TrainConfig, phases: Sequence[int]) -> set[int]:
    """The epochs after which a training is scored: every `eval_every`, the last, and both sides of a phase's begin."""
    due = {*range(settings.eval_every, settings.epochs + 1, settings.eval_every), settings.epochs}
    for first in phases[1:]:
        due |= {first - 1, first}
    return due


class Training:
    """The epochs of one stage: train, save last.pt, log, and score after each of the epochs in `due`.

    `stage` is the subclass's section of the configuration. Of `data`, the "training" and maybe the "test" set, the
    fingerprints are saved. `phases` are the epochs at which a phase begins. `previous` is what it goes on from
    (`read_previous`). Raises UserError, before anything is written, if it cannot.
    """

    stage: str

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        loader: DataLoader,
        data: Mapping[str, Annotations],
        *,
        folder: Path,
        device: torch.device,
        phases: Sequence[int] = (1,),
        backbone_lr: float | None = None,
        previous: dict | None = None,
        tensorboard: bool = False,
    ):
        self.config = config
        self.settings = getattr(config, self.stage)
        self.folder = folder
        self.last = folder / LAST
        self.loader = loader
        self.classes = data["training"].classes
        self.data = {name: annotations.fingerprint() for name, annotations in data.items()}
        self.due = due_epochs(self.settings, phases)
        self.loss = DetectionLoss(config.loss, config.head.variances)
        steps = loader.batch_sampler.batches_per_epoch
        self.trainer = Trainer(model, self.settings, device, steps, phases, backbone_lr)
        self.sums: dict[str, float] = Counter()  # of the losses of this epoch's batches, or of the epoch that ended
        self.counted = 0  # those batches
        if previous:
            self.restore(previous)
            over = self.trainer.epoch > self.settings.epochs
            done = f": nothing is left to train of {self.settings.epochs} epochs" if over else ""
            say(f"resumed {self.last} at epoch {self.trainer.epoch}, step {self.trainer.step}{done}")
        # restore() may refuse the folder, so nothing is written before this point
        checkpoint.remove_leftovers(folder)
        log = folder / "log.jsonl"
        # Each epoch before this one stays in the log, once; the others are trained, and logged, again.
        records = {(r["kind"], r["step"]): r for r in read_log(log) if r["step"] < self.trainer.epoch}
        if log.exists():
            checkpoint.write_text(log, "".join(json.dumps(record) + "\n" for record in records.values()))
        self.log = RunLog(log, tensorboard)

    def begin_epoch(self, epoch: int) -> None:
        """Prepare the model for `epoch`, or for the rest of it after an interruption."""
        self.trainer.model.train()

    def priors(self) -> Tensor:
        """The prior boxes (P, 4) cxcywh of the current step."""

    def losses(self, batch: Batch, targets: Targets) -> Iterator[Losses]:
        """The losses of one batch."""

    def score(self, epoch: int) -> None:
        """Score the model after `epoch` and log the result as "eval"."""

    def state(self) -> dict:
        """The content of last.pt."""
        identity = {"config": config_io.to_dict(self.config), "classes": list(self.classes), "data": self.data}
        return {**identity, **self.trainer.state_dict(), "losses": {"sums": dict(self.sums), "batches": self.counted}}

    def restore(self, payload: dict) -> None:
        """Go on from `payload`. Raises UserError if it is of other classes or another test set, or does not fit."""
        known, found = list(payload["classes"]), list(self.classes)
        if known != found:
            order = f"expected {', '.join(known)}, in this order, as in {self.last}"
            raise UserError(f"data.classes: {order}, found {', '.join(found)}; {REMEDY}")
        saved = check(payload.get("data", {}), dict, f"{self.last}: data")
        changed = {name for name, before in saved.items() if before != self.data.get(name)}
        if "test" in changed:
            raise UserError(f"data.root: the test data are not those that {self.last} was evaluated on; {REMEDY}")
        if changed:
            say(f"note: the training data are not those that {self.last} was trained on so far")
        try:
            self.trainer.load_state_dict(payload, payload["config"][self.stage].get("batch_size"))
            losses = payload.get("losses", {"sums": {}, "batches": 0})  # earlier versions have none
            self.sums, self.counted = Counter(losses["sums"]), losses["batches"]
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            # Such as groups of parameters that an earlier version made otherwise.
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.last}: does not fit this training: {reason}; {REMEDY}") from None
        if key := checkpoint.not_finite(payload["model"]):
            raise UserError(f"{self.last}: {key} is not finite{_spare(self.folder)}")

    def save(self) -> None:
        """Write last.pt. Raises Diverged, and leaves the file as it was, if a loss or a weight is not finite."""
        self._add(self.trainer.read_losses())
        state = self.state()
        if key := checkpoint.not_finite(state["model"]):
            raise Diverged(f"epoch {self.trainer.epoch}, step {self.trainer.step}: {key} is no longer finite")
        checkpoint.save(self.last, state)
        self._saved = time.monotonic()

    def run(self) -> None:
        """Train until the last epoch ends. Raises Stopped after a signal, when everything has been saved."""
        trainer = self.trainer
        self._saved = time.monotonic()
        try:
            with StopRequest() as stop:
                if trainer.batch == 0 and trainer.epoch > 1:
                    self._finish_epoch(trainer.epoch - 1)
                while trainer.epoch <= trainer.config.epochs and not stop.requested:
                    self._run_epoch(stop)
        except Diverged as error:
            saved = f"{self.last} is the last one that was saved, --resume goes on from it{_spare(self.folder)}"
            raise UserError(f"{error}; {saved if self.last.exists() else 'nothing had been saved yet'}") from None
        if trainer.epoch <= trainer.config.epochs:
            raise Stopped(f"everything is in {self.last}, the same command with --resume goes on", stop.number)

    def _finish_epoch(self, epoch: int) -> None:
        """Log, score and keep an epoch that has been saved, as far as an earlier run did not before it was killed."""
        logged = distributed.from_main({r["kind"] for r in read_log(self.log.path) if r["step"] == epoch})
        if "train" not in logged and self.counted:
            losses = {name: value / self.counted for name, value in self.sums.items()}
            self.log.write("train", epoch, losses=losses, lr=self.trainer.optimizer.param_groups[0]["lr"])
        if "eval" not in logged and epoch in self.due:
            self.score(epoch)
        if distributed.world().main:
            if epoch in self.due:
                self._keep_if_good(epoch)
            every = self.trainer.config.save_every
            if every and epoch % every == 0:
                checkpoint.copy(self.last, self.folder / f"epoch_{epoch:04d}.pt")

    def _run_epoch(self, stop: StopRequest) -> None:
        """Train the rest of an epoch; unless a request to stop ended it, log and score it."""
        trainer, epoch = self.trainer, self.trainer.epoch
        self.begin_epoch(epoch)
        self.loader.batch_sampler.set_epoch(epoch, trainer.batch)
        if trainer.batch == 0:
            self.sums, self.counted = Counter(), 0
        try:
            self._train_epoch(stop)
        except Exception as error:
            # A batch system may send its signal to the loader's processes as well: then this is a stop and no error.
            if isinstance(error, Diverged | distributed.PeerLost) or not trainer.rewind():
                raise
            if not (stop.requested and "DataLoader worker (pid" in str(error)):
                with contextlib.suppress(UserError):
                    self._add(trainer.read_losses(alone=True))
                    self.save()
                    say(f"saved {self.last} at epoch {trainer.epoch}, step {trainer.step}; --resume goes on from it")
                raise
        self.save()
        if trainer.batch == 0:  # not stopped within the epoch
            self._finish_epoch(epoch)

    def _train_epoch(self, stop: StopRequest) -> None:
        """Train on the batches that are left of this epoch, or until `stop` is requested."""
        trainer = self.trainer
        seconds = 60 * trainer.config.save_minutes
        batches = iter(self.loader)
        # torch's handler would raise for a loader process that has died wherever the training is at the moment. The
        # loader finds out by itself, when it waits for that process.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with progress(None, f"epoch {trainer.epoch}/{trainer.config.epochs}", total=len(self.loader)) as bar:
            while step := [batch.to(trainer.device) for batch in itertools.islice(batches, trainer.batches_in_step)]:
                # Several batches of one step count as one: their objects weigh the same, however they are spread.
                objects = [(batch.boxes, batch.labels) for batch in step]
                for batch, targets in zip(step, self.loss.match_together(objects, self.priors()), strict=True):
                    self._add(trainer.update(self.losses(batch, targets)))
                    bar.update()
                bar.set_postfix({n: f"{value / self.counted:.3f}" for n, value in self.sums.items()}, refresh=False)
                stop.agree()
                if stop.requested:
                    break
                # Each process has a clock of its own, so such a save must not have losses to share.
                if seconds and trainer.batch and not trainer.unread and time.monotonic() - self._saved > seconds:
                    self.save()

    def _add(self, losses: list[dict[str, float]]) -> None:
        self.counted += len(losses)
        for each in losses:
            self.sums.update(each)

    def _keep_if_good(self, epoch: int) -> None:
        """Keep last.pt as last_good.pt if it finds something. Raises Diverged if nothing was found lately."""
        objective = self.config.search.objective
        found = {}
        for record in read_log(self.log.path):
            if record["kind"] == "eval":
                scores = [metrics.get(objective) or 0.0 for metrics in record["networks"].values()]
                found[record["step"]] = max(scores, default=0.0)
        if found[epoch] > 0 or max(found.values()) < SOMETHING:
            checkpoint.copy(self.last, self.folder / LAST_GOOD)
        elif max(list(found.values())[-COLLAPSED:]) == 0:
            before = max(step for step, score in found.items() if score > 0)
            raise Diverged(
                f"epoch {epoch}: {objective} has been 0 for {COLLAPSED} evaluations, after {found[before]:.3f} at "
                f"epoch {before}; a lower learning_rate may help"
            )
