"""The training losses of a detector: matching priors to objects, classification, box regression, distillation.

Shapes: B images, P priors, M objects (padded with label 0), N positive priors, C classes. Logits are (B, P, C + 1),
column 0 is the background. The label of a prior is its class 1..C, 0 for background, or -1 for ignored. Every loss is
computed in float32 whatever its input, and is finite and has a gradient on a batch without any object.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from lib import distributed
from lib.config import DistillConfig, LossConfig
from lib.priors import VARIANCES, encode, pairwise_iou

SMOOTH_L1_BETA = 1 / 9
ROUNDS = 8  # in which objects that want the same prior find others, on a GPU


class Rows:
    """The N priors of a mask (B, P), of tensors (B, P, ...), and sums over them.

    On a CPU they are picked. To list them, a GPU would make the host wait: there, all priors are computed, and those
    outside of the mask have weight 0.
    """

    def __init__(self, mask: Tensor):
        self.mask = mask
        on_cpu = mask.device.type == "cpu"
        self.index = mask.nonzero(as_tuple=True) if on_cpu else None
        self._outside = None if on_cpu else ~mask

    def pick(self, x: Tensor) -> Tensor:
        """(B, P, ...) to (N, ...), or as it is."""
        return x if self.index is None else x[self.index]

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what was picked, (N, ...) or (B, P, ...)."""
        if self.index is None:
            x = x.masked_fill(self._outside.view(*self.mask.shape, *[1] * (x.ndim - 2)), 0)
        return x.sum()


class Targets(NamedTuple):
    """The targets of a batch; the same for every network with these priors."""

    prior_labels: Tensor  # (B, P)
    rows: Rows  # the priors that stand for an object: `rows.mask` (B, P)
    offsets: Tensor  # (N, 4) of these priors, image by image; on a GPU (B, P, 4)
    normalizer: Tensor  # scalar, divides sums over the positive priors


class DetectionLoss:
    """The detector's loss. Call `targets = loss.match(boxes, labels, priors)` once a batch, then for each network
    `loss(logits, offsets, targets)`. Losses are divided by the number of positive priors of all processes of the job.
    """

    def __init__(self, config: LossConfig, variances: Sequence[float] = VARIANCES):
        self.config = config
        self.variances = variances

    def match(self, boxes: Tensor, labels: Tensor, priors_cxcywh: Tensor) -> Targets:
        """Targets of a batch: boxes (B, M, 4) normalised xyxy, labels (B, M) with 0 as padding, priors (P, 4)."""
        return self.match_together([(boxes, labels)], priors_cxcywh)[0]

    @torch.no_grad()
    def match_together(self, objects: Sequence[tuple[Tensor, Tensor]], priors_cxcywh: Tensor) -> list[Targets]:
        """Targets of batches, each with its (boxes, labels), such that the mean of their losses is that of one batch
        with all of their images."""
        matched = []
        for boxes, labels in objects:
            if not boxes.shape[1]:  # nothing cannot have a maximum, so a batch without objects gets one of padding
                boxes, labels = boxes.new_zeros(len(boxes), 1, 4), labels.new_zeros(len(boxes), 1)
            prior_labels, object_index = match(boxes, labels, priors_cxcywh, self.config)
            rows = Rows(prior_labels > 0)
            boxes = boxes.gather(1, object_index[..., None].expand(-1, -1, 4))  # (B, P, 4)
            priors = rows.pick(priors_cxcywh.expand(len(boxes), -1, -1))
            matched.append((prior_labels, rows, encode(rows.pick(boxes), priors, self.variances)))
        positives = functools.reduce(torch.add, (rows.mask.sum() for _, rows, _ in matched))
        normalizer = distributed.normalizer(positives) / len(matched)
        return [Targets(*each, normalizer) for each in matched]

    def __call__(self, logits: Tensor, offsets: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The scalars `cls` and `loc`, to be added; logits (B, P, C + 1), offsets (B, P, 4).

        `loc` is the smooth L1 distance of the positive priors' offsets, summed over all four, divided by the number of
        positive priors, times `loc_coef`.
        """
        prior_labels, rows, target_offsets, normalizer = targets
        if self.config.type == "focal":
            cls = focal_loss(logits, prior_labels, rows, self.config.alpha, self.config.gamma)
        else:
            cls = multibox_loss(logits, prior_labels, rows, self.config.neg_pos_ratio)
        predicted = rows.pick(offsets).float()
        distance = F.smooth_l1_loss(predicted, target_offsets.float(), reduction="none", beta=SMOOTH_L1_BETA)
        return {"cls": cls / normalizer, "loc": self.config.loc_coef * rows.sum(distance) / normalizer}

    def distillation(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Targets, config: DistillConfig
    ) -> Tensor:
        """`adaptive_distillation` on the positive priors. On all priors it is reported to hurt."""
        loss = adaptive_distillation(student_logits, teacher_logits, targets.rows, config, self.config.type)
        return loss / targets.normalizer


@torch.no_grad()
def match(boxes: Tensor, labels: Tensor, priors_cxcywh: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Labels (B, P) of the priors, and the index (B, P) of the object that each positive prior stands for.

    `boxes` (B, M, 4) are xyxy; `labels` (B, M) int64, 0 where there is no object. A prior takes the class of the object
    that it overlaps most if their IoU is at least `matched_threshold`. It is background below `unmatched_threshold`,
    and ignored in between. Whatever its IoU, each object also gets a best prior of its own.
    """
    iou = pairwise_iou(boxes, _corners(priors_cxcywh))  # (B, M, P)
    iou.masked_fill_((labels == 0)[..., None], -1)
    best_prior, best_iou = _best_priors(iou.clone())
    # An IoU of 2, so that no threshold and no other object takes an object's best prior away.
    iou.scatter_(2, best_prior[..., None], best_iou.masked_fill_(best_iou >= 0, 2)[..., None])
    prior_iou, object_index = iou.max(1)  # (B, P)
    prior_labels = labels.gather(1, object_index)
    prior_labels.masked_fill_(prior_iou < config.matched_threshold, -1)
    prior_labels.masked_fill_(prior_iou < config.unmatched_threshold, 0)
    return prior_labels, object_index


@functools.lru_cache(maxsize=16)  # nine operators less in each step; a detector has one tensor for each image size
def _corners(priors_cxcywh: Tensor) -> Tensor:
    return box_convert(priors_cxcywh, "cxcywh", "xyxy")


def _best_priors(iou: Tensor) -> tuple[Tensor, Tensor]:
    """The best prior (B, M) of each object, no two the same in an image, and its IoU (B, M), -1 if it has none.

    `iou` (B, M, P) is -1 where a pair is not allowed, and is overwritten. The result is that of taking the pair with
    the highest IoU again and again. Proposals find it for all images at once (Gale and Shapley, 1962): of the objects
    that want the same prior, the one that overlaps it most keeps it, and the others turn to their next best.

    To know whether all have found one, a GPU would make the host wait: there, an object that still has none after
    `ROUNDS` rounds stays without.
    """
    # Of equal IoUs the earlier object wins; [i, j] says that j comes before i.
    objects = torch.arange(iou.shape[1], device=iou.device)
    earlier = objects[:, None] > objects
    on_cpu = iou.device.type == "cpu"
    # n objects can lose n (n - 1) / 2 times.
    rounds = len(objects) * (len(objects) - 1) // 2
    for left in range(rounds if on_cpu else min(rounds, ROUNDS), -1, -1):
        best_iou, best = iou.max(2)  # (B, M)
        this_iou, other_iou = best_iou[:, :, None], best_iou[:, None, :]
        outbid = torch.where(earlier, other_iou >= this_iou, other_iou > this_iou)  # (B, M, M)
        lost = (outbid & (best[:, :, None] == best[:, None, :])).any(2)
        kept_iou = best_iou.masked_fill(lost, -1)
        if left == 0 or (on_cpu and torch.equal(kept_iou, best_iou)):
            break
        iou.scatter_(2, best[..., None], kept_iou[..., None])
    return best, kept_iou


def focal_loss(logits: Tensor, prior_labels: Tensor, positive: Rows, alpha: float, gamma: float) -> Tensor:
    """The sum of the sigmoid focal loss over classes 1..C (Lin et al. 2017, equation 5).

    Column 0 is not used: in a background prior every class is absent.
    """
    x = logits[..., 1:]  # (B, P, C)
    column = positive.pick(prior_labels).clamp(min=0)[..., None]
    present = positive.pick(logits).gather(-1, column)[..., 0]  # (N,) the logit of each positive prior's class
    every = torch.cat([each.float().flatten() for each in (x, -present, present)])
    losses = _AbsentFocal.apply(every, gamma).split([x.numel(), present.numel(), present.numel()])
    absent, of_present, of_absent = losses[0].view(x.shape), losses[1].view_as(present), losses[2].view_as(present)
    # Every class counts as absent first, then the few present ones are corrected: no one-hot target is ever built.
    total = ((1 - alpha) * absent.sum(-1) * (prior_labels >= 0)).sum()
    return total + positive.sum(alpha * of_present - (1 - alpha) * of_absent)


class _AbsentFocal(torch.autograd.Function):
    """Elementwise focal loss of an absent class, p^gamma * -log(1 - p) with p = sigmoid(x), and its derivative.

    Four times faster than autograd, which goes through a slow softplus and keeps every intermediate result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: float) -> Tensor:
        p = x.sigmoid()
        power = p.pow(gamma)
        softplus = x.clamp(min=0).sub_(x.abs().sigmoid_().log_())  # -log(1 - p), finite for every x
        ctx.save_for_backward(torch.addcmul(p, 1 - p, softplus, value=gamma).mul_(power))
        return softplus.mul_(power)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return derivative * gradient, None


def multibox_loss(logits: Tensor, prior_labels: Tensor, positive: Rows, neg_pos_ratio: float) -> Tensor:
    """The sum of the softmax cross entropy of the positive priors and of each image's hardest negatives (SSD, Liu et
    al. 2016, section 2.2).

    There are `neg_pos_ratio` negatives per positive. An image without positives counts as one with a single positive,
    so that it still teaches what background looks like.
    """
    target = prior_labels.clamp(min=0)
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)  # (B, P)
    count = neg_pos_ratio * positive.mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    # No loss is below 0, so the zeros that replace positive and ignored priors are sorted last and add nothing.
    hardest = loss.masked_fill(prior_labels != 0, 0).sort(1, descending=True).values
    mined = hardest * (torch.arange(hardest.shape[1], device=hardest.device) < count)
    return positive.sum(positive.pick(loss)) + mined.sum()


def adaptive_distillation(
    student_logits: Tensor, teacher_logits: Tensor, rows: Rows, config: DistillConfig, loss_type: str
) -> Tensor:
    """The sum of the adaptive distillation of these priors (Tang et al. 2019, equations 3 to 5).

    KL(teacher || student) is weighted by (1 - exp(-(KL + beta * entropy of the teacher)))^gamma: priors that the
    student gets wrong, or that the teacher finds hard, weigh more. With `loss_type` "focal" each class 1..C is a
    distribution of its own (sigmoid), with "multibox" all C + 1 are one (softmax). The temperature, and the factor
    temperature^2, are Hinton et al. 2015's. Neither the weight nor the teacher has a gradient.
    """
    student = rows.pick(student_logits).float() / config.temperature  # (N, C + 1)
    teacher = rows.pick(teacher_logits.detach()).float() / config.temperature
    if loss_type == "focal":
        log_p = torch.stack([F.logsigmoid(-student[..., 1:]), F.logsigmoid(student[..., 1:])], -1)  # (N, C, 2)
        log_q = torch.stack([F.logsigmoid(-teacher[..., 1:]), F.logsigmoid(teacher[..., 1:])], -1)
    else:
        log_p = student.log_softmax(-1)  # (N, C + 1)
        log_q = teacher.log_softmax(-1)
    q = log_q.exp()
    divergence = (q * (log_q - log_p)).sum(-1)
    entropy = -(q * log_q).sum(-1)
    # Rounding may leave a divergence just below 0, whose power would be NaN.
    weight = -torch.expm1(-(divergence.detach() + config.beta * entropy).clamp(min=0))
    return config.temperature**2 * rows.sum(weight.pow(config.gamma) * divergence)


def focal_prior_bias(probability: float = 0.01) -> float:
    """Bias of the class logits at which every class starts at `probability` (Lin et al. 2017, section 4.1)."""
    return -math.log((1 - probability) / probability)
