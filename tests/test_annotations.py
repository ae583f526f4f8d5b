import contextlib
import io
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from tiny_data import write_coco, write_picture, write_voc

from lib.annotations import PackedStrings, read_coco, read_voc
from lib.errors import UserError

OBJECTS = {
    "b_02": [("dog", 0, 0, 20, 10), ("cat", 5, 6, 30, 32, 1), ("dog", 40, 20, 48, 32)],
    "a_01": [],
    "c_03": [("cat", 1, 2, 3, 4)],
}
CATEGORIES = {"dog": 18, "cat": 3}


@pytest.fixture
def folder(tmp_path):
    write_voc(tmp_path, OBJECTS)
    write_coco(tmp_path / "instances.json", OBJECTS, CATEGORIES)
    return tmp_path


def read_json(folder, **options):
    return read_coco(folder / "instances.json", folder / "JPEGImages", **options)


def test_voc_corners_are_one_based_and_inclusive(folder):
    text = (folder / "Annotations" / "b_02.xml").read_text()
    assert "<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>10</ymax>" in text
    annotations = read_voc(folder, ["trainval"])
    assert [annotations.ids[i] for i in range(3)] == ["a_01", "b_02", "c_03"]
    assert annotations.classes == ("cat", "dog") and annotations.category_ids == (1, 2)
    target = annotations.target(1)
    assert target["boxes"].tolist() == [[0, 0, 20, 10], [5, 6, 30, 32], [40, 20, 48, 32]]
    assert target["labels"].tolist() == [2, 1, 2]
    assert target["ignore"].tolist() == [False, True, False]
    assert target["area"].tolist() == [200, 650, 96]
    assert annotations.sizes.tolist() == [[48, 32]] * 3
    assert Path(annotations.paths[1]) == folder / "JPEGImages" / "b_02.jpg"
    assert len(annotations.target(0)["boxes"]) == 0 and annotations.target(0)["boxes"].shape == (0, 4)


def test_voc_and_coco_give_the_same_annotations(folder):
    voc, coco = read_voc(folder, ["trainval"], ["cat", "dog"]), read_json(folder)
    assert voc.classes == coco.classes and coco.category_ids == (3, 18)
    assert voc.fingerprint() == coco.fingerprint()
    for one, other in zip(voc.ground_truth(range(3)), coco.ground_truth(range(3)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    given = read_json(folder, classes=["dog", "cat"])
    assert given.category_ids == (18, 3) and given.target(1)["labels"].tolist() == [1, 2, 1]


def test_coco_agrees_with_pycocotools(folder):
    annotations = read_json(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
    for image in coco.dataset["images"]:
        row = [annotations.ids[i] for i in range(3)].index(image["file_name"].removesuffix(".jpg"))
        expected = coco.loadAnns(coco.getAnnIds([image["id"]]))
        target = annotations.target(row)
        xywh = torch.cat((target["boxes"][:, :2], target["boxes"][:, 2:] - target["boxes"][:, :2]), 1)
        assert xywh.tolist() == [a["bbox"] for a in expected]
        assert target["area"].tolist() == [a["area"] for a in expected]
        assert target["ignore"].tolist() == [bool(a["iscrowd"]) for a in expected]
        ids = [annotations.category_ids[label - 1] for label in target["labels"]]
        assert ids == [a["category_id"] for a in expected]


def test_coco_keeps_its_own_area_and_does_without(folder):
    path = folder / "instances.json"
    path.write_text(path.read_text().replace('"area": 200', '"area": 77.5').replace('"area": 650,', ""))
    assert read_json(folder).target(1)["area"].tolist() == [77.5, 650, 96]


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_boxes_are_clipped_and_empty_ones_named(tmp_path, kind):
    objects = {"one": [("cat", -5, 3, 60, 20), ("cat", 7, 7, 8, 8), ("cat", 50, 2, 70, 9), ("cat", 9, 4, 9, 20)]}
    write_voc(tmp_path, objects)
    write_coco(tmp_path / "instances.json", objects, CATEGORIES)
    annotations = read_voc(tmp_path, ["trainval"]) if kind == "voc" else read_json(tmp_path)
    assert annotations.boxes.tolist() == [[0, 3, 48, 20]]
    assert len(annotations.dropped) == 3 and all("one.jpg" in message for message in annotations.dropped)
    assert ["outside" in message for message in annotations.dropped] == [False, True, False]


def test_the_fingerprint_knows_the_contents_and_not_the_place(folder, tmp_path):
    before = read_voc(folder, ["trainval"]).fingerprint()
    write_voc(tmp_path / "copy", OBJECTS)
    assert read_voc(tmp_path / "copy", ["trainval"]).fingerprint() == before
    assert read_voc(folder, ["trainval"], ["dog", "cat"]).fingerprint() != before
    write_voc(tmp_path / "copy", OBJECTS | {"a_01": [("cat", 0, 0, 5, 5)]})
    assert read_voc(tmp_path / "copy", ["trainval"]).fingerprint() != before


def test_tensors_are_shared_and_pickle_whole(folder):
    annotations = read_voc(folder, ["trainval"])
    for name in ("boxes", "labels", "ignore", "area", "offsets", "sizes"):
        assert getattr(annotations, name).is_shared(), name
    assert annotations.ids.bytes.is_shared() and annotations.paths.offsets.is_shared()
    assert pickle.loads(pickle.dumps(annotations)).fingerprint() == annotations.fingerprint()


def test_packed_strings_keep_any_text():
    strings = ["", "a", "später/Übung 1", "x" * 300]
    packed = PackedStrings(strings)
    assert [packed[i] for i in range(4)] == strings


def broken_voc(folder, fault):
    xml, image = folder / "Annotations" / "b_02.xml", folder / "JPEGImages" / "b_02.jpg"
    if fault == "missing image":
        image.unlink()
    elif fault == "missing annotation":
        xml.unlink()
    elif fault == "malformed":
        xml.write_text(xml.read_text()[:100])
    else:
        old, new = {
            "no corner": ("<xmin>1</xmin>", ""),
            "no number": ("<xmin>1</xmin>", "<xmin>left</xmin>"),
            "no name": ("<name>dog</name>", ""),
        }[fault]
        xml.write_text(xml.read_text().replace(old, new, 1))


FAULTS = ["missing image", "missing annotation", "malformed", "no corner", "no number", "no name"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_voc_file_is_raised_or_skipped(folder, fault, caplog):
    broken_voc(folder, fault)
    with pytest.raises(UserError, match="b_02") as error:
        read_voc(folder, ["trainval"])
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        annotations = read_voc(folder, ["trainval"], on_error="skip")
    # A fault of an object costs the object, a fault of the file the picture.
    kept = ["b_02"] if fault.startswith("no ") else []
    assert [annotations.ids[i] for i in range(len(annotations))] == ["a_01", *kept, "c_03"]
    assert annotations.target(len(kept) + 1)["boxes"].tolist() == [[1, 2, 3, 4]]  # still with its own image
    assert all(len(annotations.target(1)["boxes"]) == 2 for _ in kept)
    lost = "1 of 4 objects" if kept else "1 of 3 pictures"
    assert "b_02" in caplog.messages[0] and lost in caplog.messages[1] and len(caplog.messages) == 2
    assert annotations.notes == caplog.messages[1:]
    with pytest.raises(UserError, match=r"data\.max_skipped=0\.2; the first: .*b_02"):
        read_voc(folder, ["trainval"], on_error="skip", max_skipped=0.2)


def test_an_unknown_voc_class_names_the_file_and_the_nearest_class(folder, caplog):
    with pytest.raises(UserError, match=r"b_02\.xml: unknown class 'dog' \(did you mean 'dogs'\?\)"):
        read_voc(folder, ["trainval"], ["cat", "dogs"])
    annotations = read_voc(folder, ["trainval"], ["cat", "dogs"], on_error="skip")
    assert len(annotations) == 3 and annotations.target(1)["labels"].tolist() == [1]


def test_an_empty_image_set_is_named(folder):
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("\n")
    with pytest.raises(UserError, match=r"trainval\.txt: the image set is empty"):
        read_voc(folder, ["trainval"])
    with pytest.raises(UserError, match="no readable image"):
        read_voc(folder, ["trainval"], on_error="skip")


def change(folder, old, new):
    path = folder / "instances.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"bbox": [0, 0, 20, 10]', '"bbox": [0, 0, 20]', "malformed annotation"),
        ('"bbox": [0, 0, 20, 10]', '"bbox": [0, 0, 20, "ten"]', "malformed annotation"),
        ('"bbox": [0, 0, 20, 10], ', "", "malformed annotation"),
        ('"category_id": 18', '"category_id": 19', "unknown class 19: no category"),
        ('"image_id": 10', '"image_id": 99', "image 99"),
    ],
)
def test_a_fault_of_a_coco_annotation_is_raised_or_skipped(folder, old, new, message):
    change(folder, old, new)
    with pytest.raises(UserError, match=message) as error:
        read_json(folder)
    assert "instances.json" in str(error.value) and "\n" not in str(error.value)
    assert read_json(folder, on_error="skip").target(1)["boxes"].tolist() == [[5, 6, 30, 32], [40, 20, 48, 32]]


def test_a_fault_of_a_coco_image_is_raised_or_skipped(folder):
    (folder / "JPEGImages" / "b_02.jpg").unlink()
    with pytest.raises(UserError, match=r"b_02\.jpg: no such image"):
        read_json(folder)
    annotations = read_json(folder, on_error="skip")
    assert len(annotations) == 2 and annotations.boxes.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"images"', '{"images', "malformed JSON"),
        ('"annotations": [', '"annotation": [', "no list 'annotations'"),
        ('"name": "cat"', '"name": "dog"', "same name"),
        ('"file_name": "a_01.jpg", ', "", "malformed image entry"),
        ('"id": 11, "file_name"', '"id": 10, "file_name"', "its id is there twice"),
    ],
)
def test_a_malformed_coco_file_is_named(folder, old, new, message):
    change(folder, old, new)
    with pytest.raises(UserError, match=message) as error:
        read_json(folder)
    assert "instances.json" in str(error.value) and "\n" not in str(error.value)


def test_coco_names_what_is_missing(folder):
    with pytest.raises(UserError, match="no such annotation file"):
        read_coco(folder / "nowhere.json", folder)
    with pytest.raises(UserError, match="no such folder"):
        read_coco(folder / "instances.json", folder / "nowhere")
    with pytest.raises(UserError, match="did you mean 'cat'"):
        read_json(folder, classes=["cats"])


def test_coco_images_in_subfolders_keep_apart(tmp_path):
    objects = {"x/1": [("cat", 1, 1, 9, 9)], "y/1": []}
    for stem in objects:
        write_picture(tmp_path / "JPEGImages" / f"{stem}.jpg")
    write_coco(tmp_path / "instances.json", objects, CATEGORIES)
    annotations = read_json(tmp_path)
    assert [annotations.ids[i] for i in range(2)] == ["x/1", "y/1"]
    assert np.diff(annotations.offsets.numpy()).tolist() == [1, 0]
