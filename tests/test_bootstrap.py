"""Paired bootstrap: resampled scores are those of data sets with the images repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_coco_eval import random_case

from lib.metrics import Evaluation, coco_metrics, voc_metrics
from lib.scoring import clearly_below, image_weights, interval, pack, unpack

CLASSES = 4


def resampled(truth, found, objective, weights):
    evaluation = Evaluation(CLASSES)
    evaluation.add(truth, found)
    return evaluation.resampled(objective, weights)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("objective", ["AP", "AP50", "mAP"])
@pytest.mark.parametrize("seed", range(4))
def test_a_resample_scores_as_the_repeated_images_do(objective, noise, seed):
    """pycocotools on a data set that holds each image as often as its weight says; VOC's by our own tested metric."""
    truth, found = random_case(seed, images=7, objects=5, detections=6, classes=CLASSES, noise=noise)
    for i, image in enumerate(found):  # ties between images stay, those within an image go
        image["scores"] = image["scores"] + (np.random.default_rng(i).permutation(len(image["scores"])) * 1e-4)
    weights = image_weights(7, 12)
    scores = resampled(truth, found, objective, weights)
    for weight, score in zip(weights, scores, strict=True):
        chosen = np.repeat(np.arange(7), weight)
        repeated = [truth[i] for i in chosen], [found[i] for i in chosen]
        metrics = voc_metrics(*repeated, CLASSES) if objective == "mAP" else coco_metrics(*repeated, CLASSES, True)
        np.testing.assert_allclose(score, metrics[objective], atol=1e-9)


def test_many_resamples_are_done_in_turns(monkeypatch):
    truth, found = random_case(0, images=7, objects=5, detections=6, classes=CLASSES)
    weights = image_weights(7, 12)
    expected = resampled(truth, found, "AP", weights)
    monkeypatch.setattr("lib.coco_eval.POINTS_AT_ONCE", 10_000)
    np.testing.assert_array_equal(resampled(truth, found, "AP", weights), expected)


def test_a_resample_without_objects_has_no_score():
    truth, found = random_case(1, images=2, objects=5, detections=6, classes=CLASSES)
    for image in (truth[1], found[1]):
        for name in image:
            image[name] = image[name][:0]
    for objective in ("AP", "AP50", "mAP"):
        scores = resampled(truth, found, objective, np.array([[1, 1], [0, 2]]))
        assert np.isfinite(scores[0]) and np.isnan(scores[1])


def test_weights_are_resamples_and_always_the_same():
    weights = image_weights(9, 50)
    image_weights.cache_clear()
    assert weights.shape == (50, 9) and (weights.sum(1) == 9).all() and weights.std() > 0.5
    np.testing.assert_array_equal(weights, image_weights(9, 50))


def test_the_interval_of_a_mean_is_the_one_of_the_normal_distribution():
    """The bootstrap of a mean is known: its standard error is the sample's deviation over the root of its size."""
    sample = np.random.default_rng(0).normal(size=400)
    means = image_weights(400, 4000) @ sample / 400
    half = 1.96 * sample.std() / 20
    np.testing.assert_allclose(interval(means), (sample.mean() - half, sample.mean() + half), atol=0.01)


def test_clearly_below_is_about_the_difference_on_the_same_images():
    hard = np.random.default_rng(0).uniform(0.2, 0.8, 1000)  # what makes a resample hard is common to both
    assert clearly_below(hard, hard + 0.01) and not clearly_below(hard + 0.01, hard) and not clearly_below(hard, hard)
    shuffled = np.random.default_rng(1).permutation(hard)
    assert not clearly_below(hard, shuffled + 0.01)
    assert not clearly_below(np.full(3, np.nan), hard[:3])


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan")))))
def test_packed_scores_are_kept(scores):
    np.testing.assert_allclose(unpack(pack(np.array(scores, float))), scores, atol=1e-5)
