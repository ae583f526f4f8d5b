"""What a detector learns from: matching of priors to objects, classification, localisation, distillation.

Shapes: B images, P priors, M objects (padded: label 0), C classes; logits are (B, P, C + 1), column 0 the background.
A prior's label is its class 1..C, 0 for background, -1 for ignored. Losses are computed in float32, whatever comes in,
and on a batch without any object they are finite and have a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from lib.errors import UserError, did_you_mean
from lib.priors import VARIANCES, encode, pairwise_iou

TYPES = ("focal", "multibox")

SMOOTH_L1_BETA = 1 / 9


@torch.no_grad()
def match(
    boxes: Tensor,
    labels: Tensor,
    priors_cxcywh: Tensor,
    matched_threshold: float = 0.5,
    unmatched_threshold: float = 0.4,
) -> tuple[Tensor, Tensor]:
    """Labels (B, P) of the priors, and the object (B, P) that each positive prior stands for.

    `boxes` (B, M, 4) are xyxy, `labels` (B, M) int64, 0 where there is no object; M may be 0. A prior takes the class
    of its best object from IoU `matched_threshold` on, is background below `unmatched_threshold`, ignored between.
    Before that, each object gets a best prior of its own, see `_best_priors`.
    """
    if boxes.shape[1] == 0:
        background = labels.new_zeros(len(boxes), len(priors_cxcywh))
        return background, background.clone()
    iou = pairwise_iou(boxes, box_convert(priors_cxcywh, "cxcywh", "xyxy"))  # (B, M, P)
    iou.masked_fill_((labels == 0)[..., None], -1)
    prior_iou, object_index = iou.max(1)  # (B, P)
    prior_labels = labels.gather(1, object_index)
    prior_labels[prior_iou < matched_threshold] = -1
    prior_labels[prior_iou < unmatched_threshold] = 0
    best, found = _best_priors(iou)
    image, obj = found.nonzero(as_tuple=True)
    prior = best[image, obj]
    prior_labels[image, prior] = labels[image, obj]
    object_index[image, prior] = obj
    return prior_labels, object_index


def _best_priors(iou: Tensor) -> tuple[Tensor, Tensor]:
    """A prior (B, M) for each object, no two the same in an image, and whether there is one (B, M).

    `iou` (B, M, P), -1 where a pair is not allowed, is overwritten. The result is that of taking the pair with the
    highest IoU first, again and again. It is found for all images at once, by proposals (Gale and Shapley, 1962):
    objects that want the same prior leave it to the one that overlaps it most, and turn to their next best.
    """
    best_iou, best = iou.max(2)  # (B, M)
    objects = best.shape[1]
    earlier = torch.ones(objects, objects, dtype=torch.bool, device=iou.device).tril(-1)  # [i, j]: j comes before i
    while True:
        mine, theirs = best_iou[:, :, None], best_iou[:, None, :]
        outbid = (theirs > mine) | ((theirs == mine) & earlier)  # (B, M, M)
        lost = (outbid & (best[:, :, None] == best[:, None, :])).any(2) & (best_iou >= 0)
        image, obj = lost.nonzero(as_tuple=True)
        if len(image) == 0:
            return best, best_iou >= 0
        iou[image, obj, best[image, obj]] = -1
        best_iou[image, obj], best[image, obj] = iou[image, obj].max(1)


def at_least_one(counts: Tensor) -> Tensor:
    """What sums over as many priors are divided by."""
    return counts.float().clamp(min=1)


def focal_loss(
    logits: Tensor, prior_labels: Tensor, alpha: float = 0.25, gamma: float = 2.0, normalizer: Tensor | None = None
) -> Tensor:
    """Sigmoid focal loss over classes 1..C (Lin et al. 2017, equation 5), summed, per positive prior or `normalizer`.

    Column 0 plays no part: a background prior is one whose classes are all absent.
    """
    x = logits[..., 1:].float().contiguous()  # (B, P, C)
    absent = (1 - alpha) * _AbsentFocal.apply(x, gamma).sum(-1)  # (B, P)
    image, prior = (prior_labels > 0).nonzero(as_tuple=True)
    own = x[image, prior, prior_labels[image, prior] - 1]  # (N,), the logits of what is present
    corrected = alpha * _AbsentFocal.apply(-own, gamma) - (1 - alpha) * _AbsentFocal.apply(own, gamma)
    # All classes as if absent, then the few present ones put right: no one-hot target is ever built.
    total = (absent * (prior_labels >= 0)).sum() + corrected.sum()
    return total / (at_least_one((prior_labels > 0).sum()) if normalizer is None else normalizer)


class _AbsentFocal(torch.autograd.Function):
    """p^gamma * -log(1 - p), p = sigmoid(x), elementwise, with its derivative in closed form.

    Four times faster than autograd's, which goes through a slow softplus and keeps every intermediate result.
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


def multibox_loss(
    logits: Tensor, prior_labels: Tensor, neg_pos_ratio: int = 3, normalizer: Tensor | None = None
) -> Tensor:
    """Softmax cross entropy of the positives and of each image's hardest negatives (SSD, Liu et al. 2016, section 2.2).

    An image has `neg_pos_ratio` negatives a positive; one without positives has as many as if it had one, so that it
    still teaches what background looks like. Summed, per positive prior or `normalizer`.
    """
    target = prior_labels.clamp(min=0)
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)  # (B, P)
    positive = prior_labels > 0
    count = neg_pos_ratio * positive.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    # A loss is never below 0: zeros in place of what is no negative are sorted last and add nothing.
    hardest = loss.masked_fill(prior_labels != 0, 0).sort(1, descending=True).values
    mined = hardest * (torch.arange(hardest.shape[1], device=hardest.device) < count)
    total = loss[positive].sum() + mined.sum()
    return total / (at_least_one(positive.sum()) if normalizer is None else normalizer)


class Targets(NamedTuple):
    """What a batch asks of any network with the same priors."""

    prior_labels: Tensor  # (B, P)
    offsets: Tensor  # (N, 4), of the positive priors, image by image
    positive_normalizer: Tensor  # scalar that sums over the positive priors are divided by
    counted_normalizer: Tensor  # the same for all priors but the ignored ones

    @property
    def positive(self) -> Tensor:
        """Which priors (B, P) stand for an object."""
        return self.prior_labels > 0


class DetectionLoss:
    """The detector's loss: `targets = loss.match(boxes, labels, priors)` once a batch, then for each network
    `loss(logits, offsets, targets)`.

    `normalizers` makes of the batch's numbers of priors what sums over them are divided by. A batch that is a share of
    a larger one has its divisors from the whole.
    """

    def __init__(
        self,
        *,
        type: str = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
        neg_pos_ratio: int = 3,
        matched_threshold: float = 0.5,
        unmatched_threshold: float = 0.4,
        loc_coef: float = 1.0,
        variances: tuple[float, float] = VARIANCES,
        normalizers: Callable[[Tensor], Tensor] = at_least_one,
    ) -> None:
        if type not in TYPES:
            raise UserError(f"loss type is '{type}', expected one of {', '.join(TYPES)}{did_you_mean(type, TYPES)}")
        if unmatched_threshold > matched_threshold:
            raise UserError(
                f"unmatched_threshold is {unmatched_threshold}, expected at most matched_threshold {matched_threshold}"
            )
        self.type = type
        self.alpha = alpha
        self.gamma = gamma
        self.neg_pos_ratio = neg_pos_ratio
        self.matched_threshold = matched_threshold
        self.unmatched_threshold = unmatched_threshold
        self.loc_coef = loc_coef
        self.variances = variances
        self.normalizers = normalizers

    @torch.no_grad()
    def match(self, boxes: Tensor, labels: Tensor, priors_cxcywh: Tensor) -> Targets:
        """Targets of a batch: boxes (B, M, 4) xyxy, labels (B, M) with 0 as padding, priors (P, 4)."""
        thresholds = self.matched_threshold, self.unmatched_threshold
        prior_labels, object_index = match(boxes, labels, priors_cxcywh, *thresholds)
        image, prior = (prior_labels > 0).nonzero(as_tuple=True)
        offsets = encode(boxes[image, object_index[image, prior]], priors_cxcywh[prior], self.variances)
        counts = torch.stack([(prior_labels > 0).sum(), (prior_labels >= 0).sum()])
        return Targets(prior_labels, offsets, *self.normalizers(counts))

    def __call__(self, logits: Tensor, offsets: Tensor, targets: Targets) -> dict[str, Tensor]:
        """`cls` and `loc`, scalars to be added; logits (B, P, C + 1), offsets (B, P, 4). `loc` is smooth L1 of the
        positives, summed, per positive prior, times `loc_coef`."""
        normalizer = targets.positive_normalizer
        if self.type == "focal":
            cls = focal_loss(logits, targets.prior_labels, self.alpha, self.gamma, normalizer)
        else:
            cls = multibox_loss(logits, targets.prior_labels, self.neg_pos_ratio, normalizer)
        predicted = offsets[targets.positive].float()  # (N, 4)
        loc = F.smooth_l1_loss(predicted, targets.offsets.float(), reduction="sum", beta=SMOOTH_L1_BETA)
        return {"cls": cls, "loc": self.loc_coef * loc / normalizer}

    def distillation(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Targets,
        priors: str = "positive",
        **options: float,
    ) -> Tensor:
        """`adaptive_distillation` with its `options` on the "positive" priors, or on "all" but the ignored ones."""
        mask, normalizer = targets.positive, targets.positive_normalizer
        if priors == "all":
            mask, normalizer = targets.prior_labels >= 0, targets.counted_normalizer
        return adaptive_distillation(student_logits, teacher_logits, mask, self.type, normalizer=normalizer, **options)


def adaptive_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    kind: str = "focal",
    beta: float = 1.5,
    gamma: float = 1.0,
    temperature: float = 2.0,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Adaptive distillation over the priors in `mask` (B, P) (Tang et al. 2019, equations 3 to 5).

    Summed, per prior of the mask or `normalizer`.

    KL(teacher || student) times (1 - exp(-(KL + beta * entropy of the teacher)))^gamma: priors that the student gets
    wrong, or that the teacher finds hard, weigh more. `kind` "focal" takes each class 1..C on its own (sigmoid),
    "multibox" all C + 1 together (softmax). Soft targets and the factor temperature^2 are Hinton et al. 2015's.
    Neither the weight nor the teacher has a gradient.
    """
    student = student_logits[mask].float() / temperature  # (N, C + 1)
    teacher = teacher_logits.detach()[mask].float() / temperature
    if kind == "focal":
        # Absent and present, stacked, are a distribution of two for each class: (N, C, 2).
        log_p, log_q = (torch.stack([F.logsigmoid(-x), F.logsigmoid(x)], -1) for x in (student[:, 1:], teacher[:, 1:]))
    else:
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    q = log_q.exp()
    divergence = (q * (log_q - log_p)).sum(-1)
    entropy = -(q * log_q).sum(-1)
    # Rounding may leave a divergence just below 0, where a power is not a number.
    weight = -torch.expm1(-(divergence.detach() + beta * entropy).clamp(min=0))
    total = temperature**2 * (weight.pow(gamma) * divergence).sum()
    return total / (at_least_one(mask.sum()) if normalizer is None else normalizer)


def focal_prior_bias(probability: float = 0.01) -> float:
    """Bias of the class logits at which every class starts at `probability` (Lin et al. 2017, section 4.1)."""
    return -math.log((1 - probability) / probability)
