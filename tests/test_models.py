from __future__ import annotations

import pytest
import torch

from lib import checkpoint
from lib.config import DistillConfig, ValueSchedule
from lib.config_io import to_dict
from lib.detector import detector_checkpoint, load_detector, load_supernet, load_teacher, load_weights
from lib.errors import UserError
from lib.training import Trainer

CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "eel"]


@pytest.fixture
def supernet(tiny_detector, tiny_config, tmp_path):
    """A detector and its checkpoint, written as supernet_train.py writes it, two epochs done."""
    config, detector = tiny_config(), tiny_detector()
    trainer = Trainer(detector, config.supernet, CPU, 4)
    trainer.epoch, trainer.step = 3, 8
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**trainer.state_dict(), "config": to_dict(config), "classes": CLASSES})
    return detector, path


def change(path, **values):
    payload = checkpoint.read(path)
    checkpoint.save(path, {**payload, **values})


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("mmap", [False, True])
def test_a_supernet_comes_back(supernet, tiny_config, mmap):
    detector, path = supernet
    loaded = load_supernet(path, mmap)
    assert loaded.classes == tuple(CLASSES) and loaded.epoch == 2 and loaded.config == tiny_config()
    state = loaded.detector.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in detector.state_dict().items())


@pytest.mark.parametrize(("epoch", "batch", "trained", "widths"), [(2, 0, 1, (6,)), (2, 3, 2, (3, 6)), (1, 2, 1, (6,))])
def test_a_supernets_space_is_that_of_the_last_epoch_it_trained(supernet, epoch, batch, trained, widths):
    """Narrow blocks open at epoch 2: before, no search may use them."""
    _, path = supernet
    change(path, epoch=epoch, batch=batch)
    loaded = load_supernet(path)
    assert loaded.epoch == trained and loaded.space.stages[1].block.expand == widths
    assert loaded.detector.space.stages[1].block.expand == (3, 6)


def test_the_moving_average_is_what_is_loaded(tiny_detector, tiny_config, tmp_path):
    config, detector = tiny_config(supernet__ema_decay=0.9), tiny_detector()
    trainer = Trainer(detector, config.supernet, CPU, 4)
    with torch.no_grad():
        trainer.averaged.predictors.boxes[0][-1].bias.fill_(42.0)
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**trainer.state_dict(), "config": to_dict(config), "classes": CLASSES})
    assert (load_supernet(path).detector.predictors.boxes[0][-1].bias == 42).all()


def test_a_detector_comes_back_in_evaluation_mode(tiny_detector, tiny_config, tmp_path):
    detector = tiny_detector()
    genotype = detector.space.smallest()
    model, path = detector.extract(genotype).eval(), tmp_path / "best.pt"
    payload = {
        "model": model.state_dict(),
        "config": to_dict(tiny_config()),
        "genotype": genotype.to_dict(),
        "classes": CLASSES,
        "category_ids": [1, 7, 9],
        "epoch": 5,
    }
    checkpoint.save(path, payload)
    loaded = load_detector(path)
    assert (loaded.genotype, loaded.classes, loaded.category_ids) == (genotype, tuple(CLASSES), (1, 7, 9))
    assert loaded.epoch == 5 and not any(m.training for m in loaded.model.modules())
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert all(map(torch.equal, loaded.model(x), model(x)))
    with pytest.raises(UserError, match=r"best\.pt: not a supernet's checkpoint; expected last\.pt of supernet_train"):
        load_supernet(path)


def test_what_is_a_detectors_checkpoint(supernet, tiny_checkpoint, tmp_path):
    assert detector_checkpoint(tiny_checkpoint) == detector_checkpoint(tiny_checkpoint.parent) == tiny_checkpoint
    assert [detector_checkpoint(path) for path in (supernet[1], tmp_path, tmp_path / "nowhere")] == [None] * 3


def test_a_supernet_is_no_detector(supernet):
    with pytest.raises(UserError, match=r"last\.pt: not a detector's checkpoint; expected best\.pt of final_train"):
        load_detector(supernet[1])


def test_a_teacher_with_other_classes_or_priors_is_refused(tiny_checkpoint, tiny_detector):
    """Of a run's folder its best.pt is taken. Without a weight the file is not even looked for."""
    detector = tiny_detector()
    priors = {64: detector.priors(64)}

    def teacher(classes=CLASSES, priors=priors, name=tiny_checkpoint.parent, weight=0.5):
        distill = DistillConfig(ValueSchedule([1, 3], [0.0, weight]), str(name))
        return load_teacher(distill, "final.distill.teacher", classes, priors)

    found, images = teacher(), torch.zeros(1, 3, 64, 64)
    assert not any(p.requires_grad for p in found.parameters()) and not found.training
    assert torch.equal(found(images)[0], load_detector(tiny_checkpoint).model(images)[0])
    with pytest.raises(UserError, match=r"final\.distill\.teacher: .* knows cat, dog, eel, not cat, dog, emu"):
        teacher([*CLASSES[:2], "emu"])
    with pytest.raises(UserError, match=r"has other prior boxes than its student at 64 px"):
        teacher(priors={64: tiny_detector(head__scales="[0.1, 0.4, 0.6, 0.9]").priors(64)})
    assert teacher(name="nowhere", weight=0.0) is None and teacher(name="") is None


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"], ids=["missing", "empty", "text"])
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "odd.pt"
    if content is not None:
        path.write_bytes(content)
    for load in (load_supernet, load_detector):
        with pytest.raises(UserError, match=r"odd\.pt: ") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused_in_one_line(supernet, tiny_detector):
    _, path = supernet
    other = tiny_detector(backbone__mult_ratio=0.25)
    with pytest.raises(UserError, match=r"last\.pt: does not fit the configured network: .*size mismatch") as caught:
        load_weights(other, checkpoint.read(path), path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
