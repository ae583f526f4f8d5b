"""Candidates are scored as by the plain steps, whatever was scored before; packed scores and their intervals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import checkpoint
from lib.config_io import to_dict
from lib.datasets import load_annotations, split_indices
from lib.detector import detect, recalibrate
from lib.errors import UserError
from lib.metrics import detection_metrics
from lib.scoring import (
    Scorer,
    image_weights,
    interval,
    load_scoring_data,
    pack,
    prepare_scoring_data,
    save_scoring_data,
    scoring_worker,
    unpack,
)
from lib.training import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return tiny_config(data__root=root, postprocess__confidence_threshold=0.001)


@pytest.fixture(scope="module")
def split(config):
    annotations = load_annotations(config.data, "train")
    return annotations, *split_indices(annotations, config.data.data_portion, 0)


@pytest.fixture(scope="module")
def data(config, split):
    return prepare_scoring_data(*split, config)


def same(a, b):
    """Equal, where nan equals itself."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b or (math.isnan(a) and math.isnan(b))


def test_the_pictures_are_those_of_their_split(config, split, data):
    annotations, train, search = split
    search = search[:]
    random.Random(0).shuffle(search)
    assert data["bn_images"].shape == (8, 3, 64, 64) and data["images"].shape == (len(search), 3, 64, 64)
    assert data["images"].dtype == torch.uint8 and len(data["truth"]) == len(data["sizes"]) == len(search) == 12
    assert data["sizes"] == [annotations.sizes[i].tolist() for i in search]
    for row, truth in zip(search, data["truth"], strict=True):
        assert torch.equal(truth["boxes"], annotations.target(row)["boxes"])
    seen = {image.numpy().tobytes() for image in data["images"]}
    assert len(seen) == len(search) and not seen & {image.numpy().tobytes() for image in data["bn_images"]}
    assert len(train) > len(data["bn_images"])


def test_fewer_pictures_of_the_search_split_on_demand(tiny_config, config, split):
    fewer = tiny_config(data__root=config.data.root, search__images=2)
    assert len(prepare_scoring_data(*split, fewer)["images"]) == 2


def test_pictures_are_prepared_at_the_largest_size(tiny_config, config, split):
    sizes = tiny_config(data__root=config.data.root, search_space__image_size_choice=[96, 64], search__images=2)
    assert prepare_scoring_data(*split, sizes)["images"].shape[-1] == 96


def test_pictures_without_any_object_cannot_score(config, split):
    """A mean over nothing is not a number, and no search can tell such candidates apart."""
    annotations, train, _ = split
    empty = [i for i in range(len(annotations)) if len(annotations.target(i)["labels"]) == 0]
    with pytest.raises(UserError, match=r"data\.data_portion: none of the 1 images"):
        prepare_scoring_data(annotations, train, empty[:1], config)


def test_a_score_does_not_depend_on_what_was_scored_before(tiny_detector, config, data):
    detector = tiny_detector(5)
    space = detector.space
    before = {name: t.clone() for name, t in detector.state_dict().items()}
    scorer = Scorer(data, config, CPU)
    first = scorer(detector, space.smallest())
    other = scorer(detector, space.largest())
    assert same(first, scorer(detector, space.smallest()))
    assert same(first, Scorer(data, config, CPU)(tiny_detector(5), space.smallest()))
    for cost in ("flops", "params"):
        assert first["metrics"][cost] < other["metrics"][cost]
    assert all(torch.equal(t, before[name]) for name, t in detector.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_a_score_does_not_depend_on_the_supernets_statistics_or_mode(tiny_detector, config, data, training):
    """Its running statistics are those of other sub-networks."""
    scores = []
    for shift in (0.0, 3.0):
        detector = tiny_detector(5).train(training)
        for name, buffer in detector.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(shift)
        scores.append(Scorer(data, config, CPU)(detector, detector.space.smallest()))
    assert same(*scores)


def test_a_score_is_that_of_the_recalibrated_extract(tiny_detector, config, data):
    detector = tiny_detector(5)
    genotype = detector.space.largest()
    plain = detector.extract(genotype)
    recalibrate(plain, data["bn_images"].split(4), CPU)
    found = detect(plain, data["images"].split(6), config, CPU)
    expected = detection_metrics(found, data["truth"], data["sizes"], data["classes"])
    score = Scorer(data, config, CPU)(detector, genotype)["metrics"]
    assert {"AP", "AP50", "mAP", "flops", "params", "per_class"} <= score.keys()
    cost = detector.cost(genotype)
    assert (score["flops"], score["params"]) == cost
    for name in ("AP", "AP50", "mAP"):
        assert score[name] == pytest.approx(expected[name], abs=1e-6)


def test_statistics_come_from_whole_batches_only(tiny_detector, config, data):
    """A last batch of one picture would count as much as one of four."""
    detector = tiny_detector(5)
    more = {**data, "bn_images": torch.cat((data["bn_images"], torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))}
    scores = [Scorer(d, config, CPU)(detector, detector.space.smallest()) for d in (data, more)]
    assert same(*scores)
    few = {**data, "bn_images": data["bn_images"][:2]}  # less than one batch is one batch
    assert math.isfinite(Scorer(few, config, CPU)(detector, detector.space.smallest())["metrics"]["AP"])


def test_the_file_that_workers_share_holds_the_same(tmp_path, data):
    save_scoring_data(data, tmp_path / "images.pt")
    loaded = load_scoring_data(tmp_path / "images.pt")
    for name in ("bn_images", "images"):
        assert torch.equal(loaded[name], data[name])
    assert loaded["sizes"].tolist() == data["sizes"] and loaded["classes"] == data["classes"]
    assert len(loaded["truth"]) == len(data["truth"])
    for mine, theirs in zip(loaded["truth"], data["truth"], strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_score_comes_with_those_on_resamples_of_the_images(tiny_detector, tiny_config, config, data):
    detector = tiny_detector(5)
    genotype = detector.space.largest()
    resampling = Scorer(data, tiny_config(data__root=config.data.root, search__resamples=50), CPU)
    result = resampling(detector, genotype)
    assert result["images"] == 12 and result["objective"] == "AP" and list(result["resampled"]) == ["12"]
    scores = unpack(result["resampled"]["12"])
    assert len(scores) == 50 and scores.min() <= result["metrics"]["AP"] <= scores.max()
    plain = Scorer(data, tiny_config(data__root=config.data.root, search__resamples=0), CPU)(detector, genotype)
    assert plain.keys() == {"metrics", "images"} and same(plain["metrics"], result["metrics"])


def test_the_batch_is_halved_until_it_fits(tiny_detector, config, data, monkeypatch):
    detector, sizes = tiny_detector(5), []

    def detect_with_little_memory(model, batches, *rest):
        sizes.append(max(map(len, batches)))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError
        return detect(model, batches, *rest)

    scorer = Scorer(data, config, CPU)
    expected = scorer(detector, detector.space.smallest())
    monkeypatch.setattr("lib.scoring.detect", detect_with_little_memory)
    found = scorer(detector, detector.space.smallest())
    assert sizes == [4, 2] and found["metrics"]["AP"] == pytest.approx(expected["metrics"]["AP"], abs=1e-6)
    monkeypatch.setattr("lib.scoring.detect", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
        scorer(detector, detector.space.smallest())


def test_a_worker_scores_as_the_scorer_does(tiny_detector, tiny_config, config, data, tmp_path):
    detector = tiny_detector(5)
    supernet, images = tmp_path / "last.pt", tmp_path / "images.pt"
    state = Trainer(detector, config.supernet, CPU, 4).state_dict()
    checkpoint.save(supernet, {**state, "config": to_dict(config), "classes": data["classes"]})
    save_scoring_data(data, images)
    score = scoring_worker("cpu", str(supernet), str(images), to_dict(config))
    genotype = detector.space.smallest()
    expected = Scorer(data, config, CPU)(detector, genotype)["metrics"]
    found = score({"genotype": genotype.to_dict()})["metrics"]
    assert "per_class" not in found and found["AP"] == expected["AP"] and found["flops"] == expected["flops"]
    assert all(value is None or math.isfinite(value) for value in found.values())


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


def test_the_interval_of_a_difference_is_about_the_same_resamples():
    hard = np.random.default_rng(0).uniform(0.2, 0.8, 1000)  # what makes a resample hard is common to both
    assert interval(hard + 0.01 - hard).low > 0 and interval(hard - hard) == (0, 0)
    low, high = interval(np.random.default_rng(1).permutation(hard) + 0.01 - hard)
    assert low < 0 < high
    assert np.isnan(interval(np.full(3, np.nan))).all()


@settings(max_examples=25)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan")))))
def test_packed_scores_are_kept(scores):
    np.testing.assert_allclose(unpack(pack(np.array(scores, float))), scores, atol=1e-5)
