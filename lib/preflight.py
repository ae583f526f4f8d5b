"""What the data holds, said before training: counts, dropped boxes, and objects that no prior box covers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from lib.records import Records

SHOWN = 5  # dropped boxes and images without objects, by name
SAMPLE = 20_000  # objects that the coverage is measured on, evenly spread
CHUNK = 1024  # objects whose IoU with every prior is in memory at a time


def preflight(records: Records, indices: Sequence[int], priors_cxcywh: Tensor, matched_threshold: float) -> list[str]:
    """Lines about some images of `records`, given the priors (P, 4), normalised, and the IoU that matches an object.

    Boxes that were dropped are those of all of `records`. Coverage leaves ignored objects out, as training does.
    """
    rows = torch.as_tensor(indices, dtype=torch.int64)
    counts = records.offsets.diff()  # (N,)
    chosen = torch.zeros(len(records), dtype=torch.bool)
    chosen[rows] = True
    objects = chosen.repeat_interleave(counts)  # (M,)
    ignored = int((objects & records.ignore).sum())
    empty = rows[counts[rows] == 0].tolist()
    return [
        f"data: {len(rows)} images, {int(objects.sum())} boxes ({ignored} ignored: difficult or crowd), "
        f"{len(records.classes)} classes",
        *_named("boxes dropped", records.dropped),
        *_named("images without objects", [Path(records.path(row)).name for row in empty]),
        *_coverage(records, (objects & ~records.ignore).nonzero().flatten(), priors_cxcywh, matched_threshold),
    ]


def _named(what: str, names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{what}: {len(names)}", *(f"  {name}" for name in names[:SHOWN]), *more]


def _coverage(records: Records, objects: Tensor, priors_cxcywh: Tensor, threshold: float) -> list[str]:
    """One line per class: its objects, and how many of them have a prior with an IoU of at least `threshold`."""
    counts = torch.bincount(records.labels[objects], minlength=len(records.classes) + 1)
    sample = objects[:: max(1, -(-len(objects) // SAMPLE))].contiguous()
    labels, covered = records.labels[sample], _best_iou(records, sample, priors_cxcywh) >= threshold
    measured = "" if len(sample) == len(objects) else f", measured on {len(sample)} of them"
    lines = [f"objects, and the share that a prior covers with an IoU of at least {threshold:g}{measured}:"]
    width = max(map(len, records.classes), default=0)
    for label, name in enumerate(records.classes, start=1):
        of_class = covered[labels == label]
        share = f"{of_class.float().mean():7.1%}" if len(of_class) else "      -"
        lines.append(f"  {name:{width}} {int(counts[label]):8d} {share}")
    return lines


def _best_iou(records: Records, objects: Tensor, priors_cxcywh: Tensor) -> Tensor:
    """Of each object (K,), its IoU with the nearest prior."""
    owner = torch.searchsorted(records.offsets, objects, right=True) - 1
    boxes = records.boxes[objects] / records.sizes[owner].repeat(1, 2)
    priors_xyxy = box_convert(priors_cxcywh.cpu(), "cxcywh", "xyxy")
    best = [box_iou(chunk, priors_xyxy).amax(1) for chunk in boxes.split(CHUNK)]
    return torch.cat(best) if best else boxes.new_zeros(0)
