"""Postprocessing of a batch against a slow loop over images and classes."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou, nms

from lib.config import PostprocessConfig
from lib.postprocess import Detections, _best_candidates, class_scores, postprocess
from lib.priors import decode

VARIANCES = (0.1, 0.2)


def random_output(batch=3, priors=60, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(priors, 2, generator=generator)
    sizes = 0.1 + 0.4 * torch.rand(priors, 2, generator=generator)
    logits = 2 * torch.randn(batch, priors, classes + 1, generator=generator)
    offsets = torch.randn(batch, priors, 4, generator=generator)
    return logits, offsets, torch.cat((centres, sizes), 1)


def slow(logits, offsets, priors, config, loss_type):
    """One image and one class at a time."""
    results = []
    for image_logits, image_offsets in zip(logits, offsets, strict=True):
        found = []
        boxes = decode(image_offsets, priors, VARIANCES).clamp(0, 1)
        for label in range(1, image_logits.shape[1]):
            candidates = []
            for prior in range(len(priors)):
                row = image_logits[prior]
                if loss_type == "focal":
                    score = 1 / (1 + torch.exp(-row[label]))
                else:
                    score = torch.exp(row[label]) / torch.exp(row).sum()
                if score > config.confidence_threshold:
                    candidates.append((float(score), boxes[prior]))
            candidates.sort(key=lambda c: -c[0])
            candidates = candidates[: config.pre_nms_top_k]
            if candidates:
                scores = torch.tensor([score for score, _ in candidates])
                kept = nms(torch.stack([box for _, box in candidates]), scores, config.nms_threshold).tolist()
                found += [(candidates[k][0], label, candidates[k][1]) for k in kept]
        found.sort(key=lambda item: -item[0])
        results.append(found[: config.top_k])
    return results


@pytest.mark.parametrize("loss_type", ["focal", "multibox"])
@pytest.mark.parametrize(
    "config",
    [
        PostprocessConfig(),
        PostprocessConfig(confidence_threshold=0.3, nms_threshold=0.3, top_k=20),
        PostprocessConfig(pre_nms_top_k=7, top_k=10),
        PostprocessConfig(confidence_threshold=0.9),
        PostprocessConfig(nms_threshold=0.05, top_k=10),  # most are suppressed: more candidates needed
        PostprocessConfig(pre_nms_top_k=3, top_k=6, nms_threshold=0.1),
    ],
    ids=["defaults", "strict", "few", "nearly none", "deep", "few of each class"],
)
def test_against_a_slow_loop(config, loss_type):
    logits, offsets, priors = random_output()
    expected = slow(logits, offsets, priors, config, loss_type)
    found = postprocess(logits, offsets, priors, config, loss_type, VARIANCES)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.labels.tolist() == [label for _, label, _ in theirs]
        torch.testing.assert_close(mine.scores, torch.tensor([score for score, _, _ in theirs]))
        boxes = torch.stack([box for *_, box in theirs]) if theirs else torch.zeros(0, 4)
        torch.testing.assert_close(mine.boxes, boxes)


@pytest.mark.parametrize("top_k", [3, 100])
def test_many_classes_share_calls_and_suppress_none_of_each_other(top_k, monkeypatch):
    """All boxes at nearly the same place, of classes with many and with few of them."""
    calls = []
    monkeypatch.setattr("lib.postprocess.nms", lambda boxes, *rest: calls.append(len(boxes)) or nms(boxes, *rest))
    logits, offsets, priors = random_output(batch=2, priors=200, classes=30)
    logits[..., 2:] -= 2  # class 1 has most boxes
    config = PostprocessConfig(confidence_threshold=0.5, pre_nms_top_k=90, top_k=top_k)
    priors[:, :2] = 0.5
    expected = slow(logits, offsets, priors, config, "focal")
    found = postprocess(logits, offsets, priors, config, "focal", VARIANCES)
    assert len(calls) < 30 and max(calls) <= 90
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.labels.tolist() == [label for _, label, _ in theirs]
        torch.testing.assert_close(mine.boxes, torch.stack([box for *_, box in theirs]))


def test_only_the_images_that_need_more_candidates_get_them(monkeypatch):
    """Of four images the second and the last have all their best boxes at one place."""
    logits, offsets, priors = random_output(batch=4, priors=300, classes=2)
    offsets[1], offsets[3] = 0, 0
    priors[:120, :] = torch.tensor([0.5, 0.5, 0.4, 0.4])
    logits[[1, 3], :120, 1:] += 8
    counts = []

    def counted(*arguments):
        counts.append(arguments[-1])
        return _best_candidates(*arguments)

    monkeypatch.setattr("lib.postprocess._best_candidates", counted)
    config = PostprocessConfig(top_k=20)
    found = postprocess(logits, offsets, priors, config, "focal", VARIANCES)
    assert counts == [40, 160, 640, 160, 640]
    for mine, theirs in zip(found, slow(logits, offsets, priors, config, "focal"), strict=True):
        assert mine.labels.tolist() == [label for _, label, _ in theirs]
        torch.testing.assert_close(mine.boxes, torch.stack([box for *_, box in theirs]))


def test_the_detections_of_an_image_hold_no_memory_of_the_others():
    """They go to other processes, where a view would take the whole batch along."""
    for found in postprocess(*random_output(5), PostprocessConfig(), "focal", VARIANCES):
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in found)


def test_no_images_no_detections():
    logits, offsets, priors = random_output()
    assert postprocess(logits[:0], offsets[:0], priors, PostprocessConfig(), "focal", VARIANCES) == []


def test_scores_leave_the_background_out():
    logits = torch.tensor([[0.3, 1.0, -2.0]])
    assert torch.allclose(class_scores(logits, "focal"), torch.sigmoid(logits)[:, 1:])
    assert torch.allclose(class_scores(logits, "multibox"), torch.softmax(logits, -1)[:, 1:])
    assert class_scores(logits.bfloat16(), "multibox").dtype == torch.float32


def test_nothing_above_the_threshold_is_an_empty_result():
    logits, offsets, priors = random_output()
    found = postprocess(logits - 100, offsets, priors, PostprocessConfig(), "focal", VARIANCES)
    assert [tuple(map(len, d)) for d in found] == [(0, 0, 0)] * 3 and found[0].boxes.shape == (0, 4)


def test_one_empty_image_takes_nothing_from_its_neighbours():
    logits, offsets, priors = random_output()
    logits[1] -= 100
    config = PostprocessConfig()
    found = postprocess(logits, offsets, priors, config, "focal", VARIANCES)
    assert len(found[1].scores) == 0 and len(found[0].scores) and len(found[2].scores)


@pytest.mark.parametrize("loss_type", ["focal", "multibox"])
def test_a_batch_equals_its_images_one_by_one(loss_type):
    logits, offsets, priors = random_output(5)
    config = PostprocessConfig(top_k=30)
    together = postprocess(logits, offsets, priors, config, loss_type, VARIANCES)
    for i, mine in enumerate(together):
        (alone,) = postprocess(logits[i : i + 1], offsets[i : i + 1], priors, config, loss_type, VARIANCES)
        assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


def test_boxes_lie_in_the_image_best_first_and_top_k_of_them():
    logits, offsets, priors = random_output(priors=400)
    config = PostprocessConfig(top_k=25, nms_threshold=0.9)
    for found in postprocess(logits, 5 * offsets, priors, config, "focal", VARIANCES):
        assert isinstance(found, Detections) and len(found.scores) == 25
        assert found.boxes.min() == 0 and found.boxes.max() == 1
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert torch.equal(found.scores, found.scores.sort(descending=True).values)
        assert set(found.labels.tolist()) <= {1, 2, 3, 4}


def test_suppression_is_within_a_class_and_an_image():
    logits = torch.full((2, 2, 3), -9.0)
    logits[:, 0, 1], logits[:, 1, 1], logits[:, 1, 2] = 3.0, 2.0, 2.5  # the same box twice as class 1, once as class 2
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.39]])
    found = postprocess(logits, torch.zeros(2, 2, 4), priors, PostprocessConfig(), "focal", VARIANCES)
    assert [d.labels.tolist() for d in found] == [[1, 2], [1, 2]]
    assert box_iou(found[0].boxes, found[0].boxes).min() > 0.9


def test_a_score_that_is_nan_hides_no_other_detection():
    """It counts as none, in every place and number; topk would put it first."""
    logits, offsets, priors = random_output(batch=3)
    config = PostprocessConfig(top_k=5, confidence_threshold=0.3)
    broken = logits.clone()
    broken[0, ::2] = float("nan")
    broken[1] = float("nan")
    logits[0, ::2], logits[1] = -100.0, -100.0
    found = postprocess(broken, offsets, priors, config, "focal", (0.1, 0.2))
    expected = postprocess(logits, offsets, priors, config, "focal", (0.1, 0.2))
    assert [len(d.scores) for d in found] == [len(d.scores) for d in expected] == [5, 0, 5]
    for mine, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, mine, theirs))
