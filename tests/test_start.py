"""What a final training starts from, and who teaches it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib import checkpoint
from lib.detector import Supernet
from lib.errors import UserError
from lib.final_training import Start, find_teacher, supernet_path

WEIGHT = {"final__distill__weight": "{boundary: [1], value: [0.5]}"}


def started(tiny_detector, config, supernet=True):
    network = tiny_detector(search_space__image_size_choice=[64, 96])
    space = replace(network.space, image_size=(96,))
    return Start(network, supernet, Supernet(network, config, ("a",), 2, space) if supernet else None)


def test_the_teacher_is_the_largest_that_was_open_at_the_students_image_size(tiny_detector, tiny_config):
    config = tiny_config(**WEIGHT)
    start = started(tiny_detector, config)
    student = replace(start.network.space.smallest(), image_size=64)
    teacher = find_teacher(start, config, student, ["a", "b", "c"])
    images = torch.zeros(1, 3, 64, 64)
    expected = start.network(images, replace(start.network.space.largest(), image_size=64))
    assert torch.equal(teacher(images)[0], expected[0])
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_no_weight_is_no_teacher_and_no_supernet_an_error(tiny_detector, tiny_config):
    start = started(tiny_detector, tiny_config(), supernet=False)
    student = start.network.space.smallest()
    assert find_teacher(start, tiny_config(), student, ["a"]) is None
    with pytest.raises(UserError, match=r"final\.distill\.teacher: .* starts from none; name a detector's best\.pt"):
        find_teacher(start, tiny_config(**WEIGHT), student, ["a"])


def test_a_supernet_that_is_named_goes_before_that_of_the_search(tiny_config, tmp_path, capsys):
    """By --load before the configuration before the genotype file, whose supernet may have changed since."""
    for name in ("flag", "key", "file"):
        checkpoint.save(tmp_path / name / "last.pt", {"model": {}})
    source = {"supernet": {"path": str(tmp_path / "file" / "last.pt"), "sha256": "another"}}
    named = tiny_config(final__supernet_state_dict=tmp_path / "key")
    found = [supernet_path(*given) for given in ((named, source, tmp_path / "flag"), (named, source, None))]
    assert [path.parent.name for path in found] == ["flag", "key"] and not capsys.readouterr().out
    assert supernet_path(tiny_config(), source, None).parent.name == "file"
    assert "has changed since the search" in capsys.readouterr().out
    with pytest.raises(UserError, match="names no supernet: name its run with --load"):
        supernet_path(tiny_config(), {}, None)


def test_a_detector_that_is_named_teaches_whatever_the_start(tiny_detector, tiny_config, tiny_checkpoint):
    config = tiny_config(**WEIGHT, final__distill__teacher=tiny_checkpoint)
    start = Start(tiny_detector(), False, None)
    student = start.network.space.smallest()
    assert find_teacher(start, config, student, ["cat", "dog", "eel"]) is not None
    with pytest.raises(UserError, match=r"final\.distill\.teacher: .*best\.pt knows cat, dog, eel, not a"):
        find_teacher(start, config, student, ["a"])
