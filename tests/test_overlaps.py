"""Which detections and objects overlap, and by how much."""

from __future__ import annotations

import numpy as np
import torch
from test_coco_eval import flat
from torchvision.ops import box_iou

from lib.coco_eval import GroundTruth, ScoredBoxes, overlapping


def test_overlapping_pairs_are_of_one_image_and_class_and_crowds_count_the_detection_only():
    box, half, inner = (0, 0, 40, 40), (0, 0, 40, 20), (0, 0, 10, 10)
    objects = GroundTruth(
        image=np.array([0, 0, 1, 1]),
        label=np.array([0, 1, 0, 1]),
        box_xywh=flat([box, box, box, box]),
        area=np.full(4, 1600.0),
        crowd=np.array([False, False, False, True]),
    )
    found = ScoredBoxes(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 0]), flat([half, inner, inner, box]), np.ones(4))
    pairs = overlapping(objects, found, 0.05)
    assert [list(column) for column in pairs] == [[0, 1, 2], [0, 2, 3], [0.5, 0.0625, 1.0]]
    assert list(overlapping(objects, found, 0.5).detection) == [0, 2]


def test_pairs_and_their_iou_are_those_of_a_loop_over_torchvisions_iou():
    rng = np.random.default_rng(0)

    def random_rows(count):
        corner = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(1, 60, (count, 2))], 1)
        return np.sort(rng.integers(0, 4, count)), rng.integers(0, 3, count), boxes

    (image, label, truth), (at, kind, boxes) = random_rows(30), random_rows(90)
    objects = GroundTruth(image, label, flat(truth), np.ones(30), np.zeros(30, bool))
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(truth)).numpy()
    expected = [
        (d, o) for d in range(90) for o in range(30) if at[d] == image[o] and kind[d] == label[o] and iou[d, o] >= 0.2
    ]
    pairs = overlapping(objects, ScoredBoxes(at, kind, flat(boxes), np.ones(90)), 0.2)
    assert list(zip(pairs.detection, pairs.object, strict=True)) == expected and len(expected) > 20
    np.testing.assert_allclose(pairs.iou, [iou[pair] for pair in expected], rtol=1e-12)
