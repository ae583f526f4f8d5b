import pytest
import torch
from tiny_data import write_voc

from lib.annotations import read_voc
from lib.plan import preflight


@pytest.fixture
def annotations(tmp_path):
    objects = {f"{i}": [] for i in range(7)} | {
        "a": [("cat", 0, 0, 24, 16), ("cat", 20, 10, 44, 26), ("dog", 0, 0, 48, 32)],
        "b": [("cat", 24, 16, 48, 32, 1), ("eel", 3, 3, 4, 4)],
    }
    write_voc(tmp_path, objects)
    return read_voc(tmp_path, ["trainval"], ["cat", "dog", "eel"])


PRIORS = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1]])


def test_it_counts_and_names(annotations):
    lines = preflight(annotations, range(9), PRIORS, 0.5)
    text = "\n".join(lines)
    assert "9 images, 4 boxes (1 ignored: difficult or crowd), 3 classes" in text
    assert "boxes dropped: 1\n" in text and "b.jpg: box [3.0, 3.0, 4.0, 4.0] of 'eel' has no area" in text
    assert "images without objects: 7\n  0.jpg\n  1.jpg\n  2.jpg\n  3.jpg\n  4.jpg\n  and 2 more" in text
    assert [line.split() for line in lines[-3:]] == [["cat", "2", "50.0%"], ["dog", "1", "0.0%"], ["eel", "0", "-"]]


def test_it_is_about_the_images_asked_for(annotations):
    lines = preflight(annotations, [0, 8], PRIORS, 0.5)
    assert "2 images, 1 boxes (1 ignored" in lines[0]
    assert [line.split() for line in lines[-3:]] == [["cat", "0", "-"], ["dog", "0", "-"], ["eel", "0", "-"]]


@pytest.mark.parametrize(("threshold", "share"), [(0.24, "100.0%"), (0.26, "0.0%")])
def test_coverage_is_at_the_matching_threshold(annotations, threshold, share):
    """The first prior covers a quarter of the dog, whose box is the whole picture."""
    lines = preflight(annotations, range(9), PRIORS, threshold)
    assert lines[-2].split() == ["dog", "1", share]


def test_many_objects_are_sampled(annotations, monkeypatch):
    monkeypatch.setattr("lib.plan.COVERAGE_SAMPLE", 2)
    monkeypatch.setattr("lib.plan.CHUNK", 1)
    lines = preflight(annotations, range(9), PRIORS, 0.5)
    assert "measured on 2 of them" in lines[-4]
    assert [line.split()[1] for line in lines[-3:]] == ["2", "1", "0"]
