"""Candidates are scored as by the plain steps, whatever was scored before; packed scores and their intervals."""

from __future__ import annotations

import functools
import math
import random
import re
from dataclasses import is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import read_voc, write_voc

from lib import UserError, checkpoint
from lib.config_io import KEYS, to_dict
from lib.datasets import load_annotations, split_indices
from lib.detector import ElasticSSD, detect, recalibrate
from lib.final_training import some_images
from lib.metrics import detection_metrics
from lib.scoring import (
    Scorer,
    calibration_rows,
    image_weights,
    interval,
    load_scoring_data,
    pack,
    prepare_scoring_data,
    rests_on,
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
    bn_images, images = data["bn_images"][64], data["images"][64]
    assert bn_images.shape == (8, 3, 64, 64) and images.shape == (len(search), 3, 64, 64)
    assert images.dtype == torch.uint8 and len(data["truth"]) == len(data["sizes"]) == len(search) == 12
    assert data["sizes"] == [annotations.sizes[i].tolist() for i in search]
    for row, truth in zip(search, data["truth"], strict=True):
        assert torch.equal(truth["boxes"], annotations.objects.of(row)["boxes"])
    seen = {image.numpy().tobytes() for image in images}
    assert len(seen) == len(search) and not seen & {image.numpy().tobytes() for image in bn_images}
    assert len(train) > len(bn_images)


def test_fewer_pictures_of_the_search_split_on_demand(tiny_config, config, split):
    fewer = tiny_config(data__root=config.data.root, search__images=2)
    assert len(prepare_scoring_data(*split, fewer)["images"][64]) == 2


def test_each_size_is_resized_from_the_picture_itself(tiny_config, config, split, data):
    """Not from the largest size, which no detector of a smaller size sees."""
    sizes = tiny_config(data__root=config.data.root, search_space__image_size_choice=[96, 64])
    images = prepare_scoring_data(*split, sizes)["images"]
    assert images[96].shape[-1] == 96 and torch.equal(images[64], data["images"][64])


def test_pictures_without_any_object_cannot_score(config, split):
    """A mean over nothing is not a number, and no search can tell such candidates apart."""
    annotations, train, _ = split
    empty = [i for i in range(len(annotations)) if len(annotations.objects.of(i)["labels"]) == 0]
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
    recalibrate(plain, data["bn_images"][64].split(4), CPU)
    found = detect(plain, data["images"][64].split(6), config, CPU)
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
    images = data["bn_images"][64]
    more = {**data, "bn_images": {64: torch.cat((images, torch.zeros_like(images[:1])))}}
    scores = [Scorer(d, config, CPU)(detector, detector.space.smallest()) for d in (data, more)]
    assert same(*scores)
    few = {**data, "bn_images": {64: images[:2]}}  # less than one batch is one batch
    assert math.isfinite(Scorer(few, config, CPU)(detector, detector.space.smallest())["metrics"]["AP"])


@pytest.mark.parametrize(("bn_images", "batch_size"), [(8, 1), (9, 4), (2, 32), (3, 2), (100, 5)])
def test_no_batch_of_one_reaches_batch_norm(tiny_config, config, split, monkeypatch, bn_images, batch_size):
    """In which nothing varies, where a feature map is one pixel."""
    sizes = []
    monkeypatch.setattr("lib.scoring.recalibrate", lambda _, batches, *__: sizes.extend(len(b) for b in batches))
    keys = {"search__bn_images": bn_images, "search__batch_size": batch_size, "search__images": 2}
    settings = tiny_config(data__root=config.data.root, **keys)
    detector = ElasticSSD(settings, 5)
    Scorer(prepare_scoring_data(*split, settings), settings, CPU)(detector, detector.space.smallest())
    final = [len(batch) for batch in some_images(split[0], 64, settings)]
    count = min(bn_images, len(split[1]))
    batch = min(max(batch_size, 2), count)
    assert sizes == [batch] * (count // batch) and set(final) == {min(max(batch_size, 2), bn_images)}


def test_a_single_picture_for_batch_norm_is_refused(tiny_config, config, split):
    annotations, train, search = split
    few = tiny_config(data__root=config.data.root, search__bn_images=1)
    for rows, keys in ((train, few), (train[:1], config)):
        with pytest.raises(UserError, match=r"search\.bn_images: BatchNorm needs at least 2 training images, found 1"):
            prepare_scoring_data(annotations, rows, search, keys)


def test_the_pictures_for_batch_norm_are_a_sample_by_the_seed(tiny_config):
    """The first ones by name may be alike: the brightest, one camera's."""
    rows = range(1000, 2000)
    chosen = {seed: calibration_rows(rows, tiny_config(seed=seed, search__bn_images=200)) for seed in (0, 1)}
    assert chosen[0] == calibration_rows(rows, tiny_config(search__bn_images=200)) != chosen[1]
    for found in chosen.values():
        assert len(set(found)) == 200 and set(found) <= set(rows) and found != sorted(found)
        assert 1450 < sum(found) / 200 < 1550
    assert sorted(calibration_rows(rows[:5], tiny_config())) == [*rows[:5]]


def test_statistics_that_are_not_finite_are_an_error(tiny_detector, config, data):
    detector = tiny_detector(5)
    with torch.no_grad():
        next(detector.backbone.parameters()).fill_(math.inf)
    with pytest.raises(ArithmeticError, match="statistics are not finite"):
        Scorer(data, config, CPU)(detector, detector.space.smallest())


class Spy:
    """A part of a configuration that notes which keys are read."""

    def __init__(self, part: object, read: set[str], prefix: str = ""):
        self._about = part, read, prefix

    def __getattr__(self, name: str) -> object:
        part, read, prefix = self._about
        value = getattr(part, name)
        if is_dataclass(value):
            return Spy(value, read, f"{prefix}{name}.")
        read.add(prefix + name)
        return value


def test_what_a_score_rests_on_changes_with_every_key_that_can_change_a_score(tiny_detector, tiny_config, split, data):
    annotations, train, search = split
    read: set[str] = set()
    spied = Spy(tiny_config(data__workers=0), read)  # pictures are read in this process
    prepare_scoring_data(annotations, train, search, spied)
    detector = tiny_detector(5)
    Scorer(data, spied, CPU)(detector, detector.space.smallest())
    assert {"search.bn_images", "search.images", "seed", "postprocess.top_k", "head.variances", "loss.type"} <= read
    # Who reads the pictures, and what is worked out beside the score.
    read -= {"data.workers", "data.max_skipped", "search.objective", "search.resamples"}
    read.add("data.on_error")  # only read where a picture cannot be: then it decides whether there is a score
    # What the network is like; its weights are hashed, but not whence they came.
    network = {key for key in KEYS if key.partition(".")[0] in ("search_space", "backbone", "head")}
    network -= {key for key in network if "schedule_cfg" in key or "pretrained" in key}

    def basis_with(key: str) -> dict:
        config = tiny_config(search__bn_images=2)
        *sections, name = key.split(".")
        numbers = {"search.images": 5, "search.bn_images": 5, "seed": 5}
        setattr(functools.reduce(getattr, sections, config), name, numbers.get(key, "another"))
        return rests_on("weights", annotations, train, search[:2], config)

    plain = rests_on("weights", annotations, train, search[:2], tiny_config(search__bn_images=2))
    assert {key for key in KEYS if basis_with(key) != plain} == read | network


def test_what_a_score_rests_on_knows_the_scored_pictures_and_labels(tiny_config, tmp_path):
    config = tiny_config(search__bn_images=3)
    objects = {name: [("cat", 4, 4, 20, 20)] for name in "abcdefgh"}
    write_voc(tmp_path, objects)
    train, search = [0, 1, 2, 3, 4], [5, 6]  # f and g score, h does neither
    used = [*"fg", *("abcde"[row] for row in calibration_rows(train, config))]

    def found() -> dict[str, str]:
        return rests_on("weights", read_voc(tmp_path, ["trainval"]), train, search, config)

    plain = found()
    for name in objects:
        xml, picture = tmp_path / f"Annotations/{name}.xml", tmp_path / f"JPEGImages/{name}.jpg"
        labels, pixels = xml.read_text(), picture.read_bytes()
        xml.write_text(labels.replace("<xmin>5<", "<xmin>6<"))
        assert (found()["annotations"] != plain["annotations"]) == (name in "fg")
        xml.write_text(labels)
        picture.write_bytes(pixels + b"\0")
        assert (found()["pictures"] != plain["pictures"]) == (name in used)
        picture.write_bytes(pixels)
    assert found() == plain
    # Beyond the edge too: training cuts a box off there, and scoring does not.
    xml, keys = tmp_path / "Annotations/f.xml", set()
    for xmax in (9000, 9001):
        xml.write_text(re.sub("<xmax>.*?<", f"<xmax>{xmax}<", xml.read_text()))
        keys.add(found()["annotations"])
    assert len(keys) == 2
    mine = found()
    other = rests_on("others", read_voc(tmp_path, ["trainval"]), train, search, config)
    assert {name for name in mine if other[name] != mine[name]} == {"weights"}


def test_the_file_that_workers_share_holds_the_same(tmp_path, data):
    save_scoring_data(data, tmp_path / "images.pt")
    loaded = load_scoring_data(tmp_path / "images.pt")
    for name in ("bn_images", "images"):
        assert torch.equal(loaded[name][64], data[name][64])
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
    """In detection and in the re-estimation of BatchNorm, for each candidate anew."""
    detector, sizes = tiny_detector(5), []

    def with_little_memory(work):
        def limited(model, batches, *rest):
            batches = list(batches)
            sizes.append(max(map(len, batches)))
            if sizes[-1] > 2:
                raise torch.cuda.OutOfMemoryError
            return work(model, batches, *rest)

        return limited

    scorer = Scorer(data, config, CPU)
    expected = scorer(detector, detector.space.smallest())
    monkeypatch.setattr("lib.scoring.detect", with_little_memory(detect))
    found = scorer(detector, detector.space.smallest())
    assert sizes == [4, 2] and found["metrics"]["AP"] == pytest.approx(expected["metrics"]["AP"], abs=1e-6)
    monkeypatch.setattr("lib.scoring.recalibrate", with_little_memory(recalibrate))
    assert math.isfinite(scorer(detector, detector.space.smallest())["metrics"]["AP"]) and sizes[2:] == [4, 2, 4, 2]
    monkeypatch.setattr("lib.scoring.detect", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
        scorer(detector, detector.space.smallest())


def test_a_worker_scores_as_the_scorer_does(tiny_detector, tiny_config, config, data, tmp_path):
    detector = tiny_detector(5)
    supernet, images = tmp_path / "last.pt", tmp_path / "images.pt"
    state = Trainer(detector, config.supernet, CPU, 4).state_dict()
    checkpoint.save(supernet, {**state, "config": to_dict(config), "classes": data["classes"]})
    save_scoring_data(data, images)
    with pytest.raises(UserError, match=r"last\.pt: has changed since the search began"):
        scoring_worker("cpu", str(supernet), "another", str(images), to_dict(config))
    score = scoring_worker("cpu", str(supernet), checkpoint.sha256(supernet), str(images), to_dict(config))
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
    assert interval(hard + 0.01 - hard)[0] > 0 and interval(hard - hard) == (0, 0)
    low, high = interval(np.random.default_rng(1).permutation(hard) + 0.01 - hard)
    assert low < 0 < high


@settings(max_examples=25)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan")))))
def test_packed_scores_are_kept(scores):
    np.testing.assert_allclose(unpack(pack(np.array(scores, float))), scores, atol=1e-5)
