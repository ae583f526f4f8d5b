"""From a detector's raw output to detections: scores, decoding and NMS of a whole batch; and NMS as an ONNX graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from lib.config import PostprocessConfig
from lib.priors import decode

if TYPE_CHECKING:
    from onnx import ModelProto

DETECTIONS = ("boxes", "scores", "labels")  # the outputs of an exported graph with NMS inside
PRIORS = ("prior_scores", "prior_boxes")  # the outputs of a graph without NMS
FIRST_CANDIDATES = 2  # times `top_k`: the best candidates of an image that are tried first
MORE_CANDIDATES = 4  # times as many at each further try
SMALL_CALL = 64  # boxes that NMS processes in less time than a call of it takes


class Detections(NamedTuple):
    """The detections of one picture, best first, on the CPU."""

    boxes: Tensor  # (K, 4) normalised xyxy
    scores: Tensor  # (K,)
    labels: Tensor  # (K,) from 1


def class_scores(logits: Tensor, loss_type: str) -> Tensor:
    """Scores (..., C) of the classes from logits (..., C + 1): sigmoid after focal loss, softmax after multibox."""
    logits = logits.float()
    return logits[..., 1:].sigmoid() if loss_type == "focal" else logits.softmax(-1)[..., 1:]


def postprocess(
    logits: Tensor,
    offsets: Tensor,
    priors_cxcywh: Tensor,
    config: PostprocessConfig,
    loss_type: str,
    variances: Sequence[float],
) -> list[Detections]:
    """Detections of each image from logits (B, P, C + 1) and offsets (B, P, 4) (SSD, section 3.1, "inference").

    Of each image and class the `pre_nms_top_k` best boxes above the confidence threshold enter NMS; of each image the
    `top_k` best survivors are kept. Boxes are clipped to the image.

    Whether a box survives NMS depends on better boxes only. So it is enough to process the best candidates if `top_k`
    of them survive: with many classes, NMS of all candidates takes longer than the network. The best ones are found on
    the tensors' device and copied to the CPU in one go, where NMS and the result are.
    """
    scores = class_scores(logits, loss_type)  # (B, P, C)
    size = scores.shape[1:]
    count = FIRST_CANDIDATES * config.top_k
    found, complete = _detect(_best_candidates(scores, offsets, priors_cxcywh, variances, count), size, config)
    crowded = (~complete).nonzero().flatten()
    if len(crowded):  # on the CPU, since a GPU would have to be waited for at each try
        scores, offsets, priors_cxcywh = scores[crowded].cpu(), offsets[crowded].cpu(), priors_cxcywh.cpu()
    # One by one, which bounds the memory: a few crowded images must not make the batch pay.
    for row, i in enumerate(crowded.tolist()):
        image = slice(row, row + 1)
        more = count
        while not complete[i]:
            more *= MORE_CANDIDATES
            candidates = _best_candidates(scores[image], offsets[image], priors_cxcywh, variances, more)
            (found[i],), complete[i : i + 1] = _detect(candidates, size, config)
    return found


def suppress(scores: Tensor, boxes: Tensor, config: PostprocessConfig) -> list[Detections]:
    """Detections of each image from the scores (B, P, C) and the boxes (B, P, 4), normalised xyxy, of all priors."""
    best, place = scores.flatten(1).sort(descending=True)
    prior, label = place // scores.shape[2], place % scores.shape[2]
    picked = boxes.gather(1, prior[..., None].expand(-1, -1, 4))
    return _detect(torch.cat((picked, best[..., None], label[..., None]), -1), scores.shape[1:], config)[0]


def _best_candidates(
    scores: Tensor, offsets: Tensor, priors_cxcywh: Tensor, variances: Sequence[float], count: int
) -> Tensor:
    """The `count` best pairs of a prior and a class of each image, or all: (B, K, 6) by falling score, on the CPU.

    A row is x1, y1, x2, y2, the score and the label from 0; scores are (B, P, C), offsets (B, P, 4).
    """
    num_classes = scores.shape[2]
    best, place = scores.flatten(1).topk(min(count, scores.shape[1:].numel()))  # (B, K)
    prior = place // num_classes
    picked = offsets.gather(1, prior[..., None].expand(-1, -1, 4)).float()  # (B, K, 4)
    boxes = decode(picked, priors_cxcywh[prior], variances).clamp(0, 1)
    candidates = torch.cat((boxes, best[..., None], (place % num_classes)[..., None]), -1).cpu()
    if bool(candidates[:, 0, 4].isnan().any()):  # topk counts NaN as the best
        return _best_candidates(scores.nan_to_num(0.0), offsets, priors_cxcywh, variances, count)
    return candidates


def _detect(candidates: Tensor, size: torch.Size, config: PostprocessConfig) -> tuple[list[Detections], Tensor]:
    """Detections of each image, and whether (B,) further candidates, of (P, C) = `size`, could not change them."""
    above = candidates[..., 4] > config.confidence_threshold
    survivors, entered = _nms_by_class(candidates, above, size[1], config)
    # More candidates are worse ones: below the threshold, beyond `top_k`, or not admitted to NMS.
    complete = ~above[:, -1] | (survivors.sum(1) >= config.top_k) | (entered >= config.pre_nms_top_k).all(1)
    complete |= above.shape[1] == size.numel()
    kept = survivors & (survivors.cumsum(1) <= config.top_k)
    rows = candidates[kept].split(kept.sum(1).tolist())
    # Copies: a view would keep the memory of the whole batch, and take it along to another process.
    return [Detections(row[:, :4].clone(), row[:, 4].clone(), row[:, 5].long() + 1) for row in rows], complete


def _nms_by_class(
    candidates: Tensor, above: Tensor, num_classes: int, config: PostprocessConfig
) -> tuple[Tensor, Tensor]:
    """Which of the candidates that are `above` (B, K) the threshold survive (B, K), and how many entered (B, C)."""
    # Images and classes with few boxes share a call, in which each group is shifted to a place of its own: boxes lie in
    # [0, 1], places are 2 apart. The shift is in float64 to lose no digit; torchvision's batched_nms uses float32.
    images = torch.arange(len(above))[:, None]
    index = above.flatten().nonzero().flatten()
    labels = candidates[..., 5].long()
    group = (num_classes * images + labels).flatten()[index]  # the classes of an image are neighbours
    counts = group.bincount(minlength=len(above) * num_classes)
    group, order = group.sort(stable=True)  # best first within a group
    rank = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group]
    enters = rank < config.pre_nms_top_k
    counts = counts.clamp(max=config.pre_nms_top_k)
    index = index[order[enters]]
    entering = candidates.flatten(0, 1)[index].double()
    shifted = entering[:, :4] + 2 * group[enters, None]
    # One call per group would cost more than the work in it: small neighbours share one.
    sizes = [0]
    for count in counts.tolist():
        if sizes[-1] and sizes[-1] + count > SMALL_CALL:
            sizes.append(0)
        sizes[-1] += count
    survivors = torch.zeros_like(above)
    calls = zip(index.split(sizes), shifted.split(sizes), entering[:, 4].split(sizes), strict=True)
    survivors.view(-1)[torch.cat([i[nms(b, s, config.nms_threshold)] for i, b, s in calls])] = True
    return survivors, counts.view(len(above), num_classes)


# The steps of `postprocess`. An image has n = C * k candidates, the k best of each class, ordered by class.
NMS = """
nms (float[batch, P, C] prior_scores, float[batch, P, 4] prior_boxes)
    => (float[batch, {top_k}, 4] boxes, float[batch, {top_k}] scores, int64[batch, {top_k}] labels)
<
    int64[1] nms_k = {{{k}}}, int64[1] nms_kept = {{{kept}}}, int64[1] nms_one = {{1}}, int64[1] nms_two = {{2}},
    float nms_iou = {{{iou}}}, float nms_confidence = {{{confidence}}}, float nms_zero = {{0}}, int64 nms_none = {{0}},
    int64[2] nms_per_image = {{-1, {n}}}, int64[2] nms_per_class = {{-1, {k}}}, int64[2] nms_columns = {{0, 2}},
    int64[3] nms_scores_shape = {{-1, 1, {k}}}, int64[3] nms_boxes_shape = {{-1, {k}, 4}},
    int64[4] nms_padding = {{0, 0, 0, {padding}}}, int64[6] nms_box_padding = {{0, 0, 0, 0, {padding}, 0}}
>
{{
    nms_by_class = Transpose <perm = [0, 2, 1]> (prior_scores)
    nms_top, nms_prior = TopK <axis = -1> (nms_by_class, nms_k)
    nms_flat_prior = Reshape (nms_prior, nms_per_image)
    nms_prior_index = Unsqueeze (nms_flat_prior, nms_two)
    nms_candidates = GatherND <batch_dims = 1> (prior_boxes, nms_prior_index)
    nms_group_boxes = Reshape (nms_candidates, nms_boxes_shape)
    nms_group_scores = Reshape (nms_top, nms_scores_shape)
    nms_triples = NonMaxSuppression (nms_group_boxes, nms_group_scores, nms_k, nms_iou, nms_confidence)
    nms_survivors = Gather <axis = 1> (nms_triples, nms_columns)
    nms_table = Reshape (nms_top, nms_per_class)
    nms_survivor_scores = GatherND (nms_table, nms_survivors)
    nms_shape = Shape (nms_table)
    nms_empty = ConstantOfShape (nms_shape)
    nms_scattered = ScatterND (nms_empty, nms_survivors, nms_survivor_scores)
    nms_flat_scores = Reshape (nms_scattered, nms_per_image)
    nms_best, nms_place = TopK <axis = 1> (nms_flat_scores, nms_kept)
    nms_class = Div (nms_place, nms_k)
    nms_label = Add (nms_class, nms_one)
    nms_found = Greater (nms_best, nms_zero)
    nms_true_label = Where (nms_found, nms_label, nms_none)
    nms_place_index = Unsqueeze (nms_place, nms_two)
    nms_best_boxes = GatherND <batch_dims = 1> (nms_candidates, nms_place_index)
    nms_found_column = Unsqueeze (nms_found, nms_two)
    nms_true_boxes = Where (nms_found_column, nms_best_boxes, nms_zero)
    scores = Pad (nms_best, nms_padding)
    labels = Pad (nms_true_label, nms_padding)
    boxes = Pad (nms_true_boxes, nms_box_padding)
}}
"""


def add_nms(model: ModelProto, config: PostprocessConfig) -> ModelProto:
    """A copy of a graph without NMS, followed by NMS as in lib.postprocess."""
    from onnx import compose, parser  # which lib.export has found to be there

    shapes = {output.name: output.type.tensor_type.shape.dim for output in model.graph.output}
    priors, classes = (dim.dim_value for dim in shapes[PRIORS[0]][1:])
    # TopK cannot take more than there is: a short list is padded to `top_k` at the end.
    k = min(config.pre_nms_top_k, priors)
    kept = min(config.top_k, classes * k)
    text = NMS.format(
        k=k,
        n=classes * k,
        kept=kept,
        top_k=config.top_k,
        padding=config.top_k - kept,
        iou=float(config.nms_threshold),
        confidence=float(config.confidence_threshold),
    )
    joined = copy.deepcopy(model)
    graph = compose.merge_graphs(model.graph, parser.parse_graph(text), [(name, name) for name in PRIORS])
    joined.graph.CopyFrom(graph)
    return joined
