from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from lib import checkpoint
from lib.config_io import to_dict
from lib.datasets import load_annotations, split_indices
from lib.detector import detect, recalibrate
from lib.errors import UserError
from lib.metrics import detection_metrics
from lib.scoring import Scorer, load_scoring_data, pack, prepare_scoring_data, save_scoring_data, scoring_worker, unpack
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
    assert first["flops"] < other["flops"] and first["params"] < other["params"]
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
    score = Scorer(data, config, CPU)(detector, genotype)
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
    assert math.isfinite(Scorer(few, config, CPU)(detector, detector.space.smallest())["AP"])


def test_the_file_that_workers_share_holds_the_same(tmp_path, data):
    save_scoring_data(data, tmp_path / "images.pt")
    loaded = load_scoring_data(tmp_path / "images.pt")
    for name in ("bn_images", "images"):
        assert torch.equal(loaded[name], data[name])
    assert loaded["sizes"].tolist() == data["sizes"] and loaded["classes"] == data["classes"]
    assert len(loaded["truth"][2:5]) == 3 and torch.equal(loaded["truth"][-1]["boxes"], data["truth"][-1]["boxes"])
    for mine, theirs in zip(loaded["truth"], data["truth"], strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def same_result(a, b):
    return {**a, "metrics": None} == {**b, "metrics": None} and same(a["metrics"], b["metrics"])


@pytest.fixture(scope="module")
def race(tiny_config, config, data):
    """A scorer of 48 images, so that there are rungs at 12 and 24."""
    more = {**data, "images": data["images"].repeat(6, 1, 1, 1)[:48]}
    more |= {name: (data[name] * 6)[:48] for name in ("truth", "sizes")}
    return Scorer(more, tiny_config(data__root=config.data.root, search__resamples=50), CPU)


def test_a_race_that_nobody_stops_gives_the_score(tiny_detector, race):
    detector = tiny_detector(5)
    genotype = detector.space.largest()
    result = race.race(detector, genotype)
    metrics = race(detector, genotype)
    assert result["images"] == 48 and not result["lost"] and result["objective"] == "AP"
    assert list(result["resampled"]) == ["12", "24", "48"]
    for name in ("AP", "AP50", "mAP", "flops"):
        assert result["metrics"][name] == pytest.approx(metrics[name], abs=1e-6)
    scores = unpack(result["resampled"]["48"])
    assert len(scores) == 50 and scores.min() <= metrics["AP"] <= scores.max()


def test_who_clearly_loses_to_all_rivals_is_stopped_at_the_first_rung(tiny_detector, race):
    detector = tiny_detector(5)
    genotype = detector.space.largest()
    whole = race.race(detector, genotype)
    better = {n: pack(np.minimum(unpack(packed) + 0.1, 1)) for n, packed in whole["resampled"].items()}
    lost = race.race(detector, genotype, [better, better])
    assert lost["lost"] and lost["images"] == 12 and lost["resampled"] == {"12": whole["resampled"]["12"]}
    assert lost["metrics"]["flops"] == whole["metrics"]["flops"] and lost["metrics"]["AP"] is not None
    for rivals in ([whole["resampled"]], [better, whole["resampled"]], [better, {}]):
        assert same_result(race.race(detector, genotype, rivals), whole)


def test_no_resamples_no_race(tiny_detector, tiny_config, config, data):
    detector = tiny_detector(5)
    off = Scorer(data, tiny_config(data__root=config.data.root, search__resamples=0), CPU)
    result = off.race(detector, detector.space.smallest(), [{"12": "AAAA"}])
    assert result.keys() == {"metrics", "images", "lost"} and not result["lost"]


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
    assert sizes == [4, 2] and found["AP"] == pytest.approx(expected["AP"], abs=1e-6)
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
    expected = Scorer(data, config, CPU)(detector, genotype)
    found = score({"genotype": genotype.to_dict(), "rivals": []})["metrics"]
    assert "per_class" not in found and found["AP"] == expected["AP"] and found["flops"] == expected["flops"]
    assert all(value is None or math.isfinite(value) for value in found.values())
