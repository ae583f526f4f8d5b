import contextlib
import io
import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from tiny_data import read_coco, read_voc, write_coco, write_picture, write_voc

from lib import UserError
from lib.annotations import PackedStrings
from lib.config import DataConfig
from lib.datasets import load_annotations

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


def read_json(folder, *options):
    return read_coco(folder / "instances.json", folder / "JPEGImages", *options)


def test_voc_corners_are_one_based_and_inclusive(folder):
    text = (folder / "Annotations" / "b_02.xml").read_text()
    assert "<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>10</ymax>" in text
    annotations = read_voc(folder, ["trainval"])
    assert [annotations.ids[i] for i in range(3)] == ["a_01", "b_02", "c_03"]
    assert annotations.classes == ("cat", "dog") and annotations.category_ids == (1, 2)
    target = annotations.objects.of(1)
    assert target["boxes"].tolist() == [[0, 0, 20, 10], [5, 6, 30, 32], [40, 20, 48, 32]]
    assert target["labels"].tolist() == [2, 1, 2]
    assert target["ignore"].tolist() == [False, True, False]
    assert target["area"].tolist() == [200, 650, 96]
    assert annotations.sizes.tolist() == [[48, 32]] * 3
    assert Path(annotations.paths[1]) == folder / "JPEGImages" / "b_02.jpg"
    assert len(annotations.objects.of(0)["boxes"]) == 0 and annotations.objects.of(0)["boxes"].shape == (0, 4)


def test_voc_and_coco_give_the_same_annotations(folder):
    voc, coco = read_voc(folder, ["trainval"], ["cat", "dog"]), read_json(folder)
    assert voc.classes == coco.classes and coco.category_ids == (3, 18)
    assert voc.fingerprint() == coco.fingerprint()
    for one, other in zip(voc.ground_truth(range(3)), coco.ground_truth(range(3)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    given = read_json(folder, ["dog", "cat"])
    assert given.category_ids == (18, 3) and given.objects.of(1)["labels"].tolist() == [1, 2, 1]


def test_coco_agrees_with_pycocotools(folder):
    annotations = read_json(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
    for image in coco.dataset["images"]:
        row = [annotations.ids[i] for i in range(3)].index(image["file_name"].removesuffix(".jpg"))
        expected = coco.loadAnns(coco.getAnnIds([image["id"]]))
        target = annotations.objects.of(row)
        xywh = torch.cat((target["boxes"][:, :2], target["boxes"][:, 2:] - target["boxes"][:, :2]), 1)
        assert xywh.tolist() == [a["bbox"] for a in expected]
        assert target["area"].tolist() == [a["area"] for a in expected]
        assert target["ignore"].tolist() == [bool(a["iscrowd"]) for a in expected]
        ids = [annotations.category_ids[label - 1] for label in target["labels"]]
        assert ids == [a["category_id"] for a in expected]


def test_coco_keeps_its_own_area_and_does_without(folder):
    path = folder / "instances.json"
    path.write_text(path.read_text().replace('"area": 200', '"area": 77.5').replace('"area": 650,', ""))
    assert read_json(folder).objects.of(1)["area"].tolist() == [77.5, 650, 96]


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_training_sees_boxes_cut_off_and_without_empty_ones_and_scoring_all_as_they_are(tmp_path, kind):
    objects = {"one": [("cat", -5, 3, 60, 20), ("cat", 7, 7, 8, 8), ("cat", 50, 2, 70, 9), ("cat", 9, 4, 9, 20)]}
    write_voc(tmp_path, objects)
    write_coco(tmp_path / "instances.json", objects, CATEGORIES)
    annotations = read_voc(tmp_path, ["trainval"]) if kind == "voc" else read_json(tmp_path)
    assert annotations.objects.boxes.tolist() == [[0, 3, 48, 20]]
    assert "3 boxes without area do not train" in annotations.notes[0] and annotations.notes[0].endswith("one.jpg")
    assert annotations.truth.boxes.tolist() == [list(map(float, box[1:])) for box in objects["one"]]
    assert annotations.truth.area.tolist() == [65 * 17, 1, 20 * 7, 0]
    assert annotations.ground_truth([0])[0]["labels"].tolist() == [1] * 4
    assert "1 boxes reach beyond the edge" in annotations.notes[1]
    write_voc(tmp_path / "whole", {"one": [("cat", 5, 3, 40, 20)]})
    whole = read_voc(tmp_path / "whole", ["trainval"])
    assert whole.truth is whole.objects and not whole.notes


def edited(folder, edit):
    """`instances.json` with a change of its document."""
    document = json.loads((folder / "instances.json").read_text())
    edit(document)
    (folder / "instances.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "ids",
    [
        [2**53, 2**53 + 1, 2**53 + 2],
        [15241578753238836751, 9876543210987654321, 12345678901234567890],
        [1598887533000000001, 1598887533033333334, 1598887533066666667],
        ["b_02.jpg", "a/01", "007"],
        [1, "1", "1.0"],
    ],
)
def test_coco_image_ids_are_kept_exactly(folder, ids):
    def edit(document):
        ids_of = {image["id"]: new for image, new in zip(document["images"], ids, strict=True)}
        for image in document["images"]:
            image["id"] = ids_of[image["id"]]
        for annotation in document["annotations"]:
            annotation["image_id"] = ids_of[annotation["image_id"]]

    expected = read_json(folder)
    edited(folder, edit)
    found = read_json(folder)
    assert found.fingerprint() == expected.fingerprint()
    own = [found.image_id(i) for i in range(3)]  # sorted by file name: a_01, b_02, c_03
    assert own == [ids[1], ids[0], ids[2]] and [type(x) for x in own] == [type(ids[1]), type(ids[0]), type(ids[2])]


def test_voc_images_go_by_their_names(folder):
    found = read_voc(folder, ["trainval"])
    assert [found.image_id(i) for i in range(3)] == ["a_01", "b_02", "c_03"]


@pytest.mark.parametrize(
    ("categories", "names", "ids"),
    [
        ([{"id": 3, "name": 7}, {"id": 18, "name": 2.5}], ("7", "2.5"), (3, 18)),
        ([{"id": 3, "name": None}, {"id": 18, "name": ""}], ("category 3", "category 18"), (3, 18)),
        ([{"id": 3, "name": "cat\n"}, {"id": 18, "name": "cat\tdog"}], ("cat", "cat dog"), (3, 18)),
        (
            [
                {"id": 0, "name": "pets"},
                *({"id": i, "name": n, "supercategory": "pets"} for i, n in ((3, "c"), (18, "d"))),
            ],
            ("c", "d"),
            (3, 18),
        ),
        (
            [{"id": 0, "name": "c"}, *({"id": i, "name": n, "supercategory": "c"} for i, n in ((3, "c"), (18, "d")))],
            ("c", "d"),
            (3, 18),
        ),
        (
            [{"id": 0, "name": "bird"}, {"id": 3, "name": "cat"}, {"id": 18, "name": "dog"}],
            ("bird", "cat", "dog"),
            (0, 3, 18),
        ),
    ],
)
def test_categories_of_all_kinds(folder, categories, names, ids):
    edited(folder, lambda document: document.update(categories=categories))
    found = read_json(folder)
    assert (found.classes, found.category_ids) == (names, ids)
    assert [found.category_ids[label - 1] for label in found.truth.labels] == [18, 3, 18, 3]
    assert len(found.notes) == (names == ("c", "d")) and all("category 0" in note for note in found.notes)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 3, "name": "a"}, {"id": 18, "name": "a"}], "2 classes have the same name 'a'"),
        ([{"id": 3, "name": "a"}, {"id": 3, "name": "b"}], "2 classes have the same id 3"),
        ([{"id": "3", "name": "a"}], "malformed category"),
        ([{"id": True, "name": "a"}], "malformed category"),
        ([7], "malformed category 7"),
    ],
)
def test_categories_that_contradict_each_other_are_refused(folder, categories, message):
    edited(folder, lambda document: document.update(categories=categories))
    with pytest.raises(UserError, match=rf"instances\.json: {message}"):
        read_json(folder)


def test_nothing_of_a_coco_file_is_lost_silently(folder):
    edited(folder, lambda document: document["annotations"].append(None))
    with pytest.raises(UserError, match=r"malformed annotation: .* found None"):
        read_json(folder)
    edited(
        folder,
        lambda document: document.update(annotations=document["annotations"][:-1], older=document["annotations"][:1]),
    )
    with pytest.raises(UserError, match="some stand outside of the list"):
        read_json(folder)


@pytest.mark.parametrize(
    ("listed", "encoding"),
    [
        ("a\r\n", "utf-16"),
        ("a\r\n", "utf-8-sig"),
        ("\r\na\r\n\r\n", "utf-8"),
        ("a.jpg\na.jpg\na\n", "utf-8"),
        ("a -1\n", "utf-8"),
        ("a  0\n", "utf-8"),
        ("JPEGImages/a.jpg", "utf-8"),
        ("C:\\data\\JPEGImages\\a.jpg\n", "utf-8"),
        ("/home/me/a\n", "utf-8"),
    ],
)
def test_image_sets_as_tools_write_them(tmp_path, listed, encoding):
    write_voc(tmp_path, {"a": [("cat", 1, 2, 30, 20)]})
    write_picture(tmp_path / "SegmentationClass" / "a.png")
    (tmp_path / "ImageSets/Main/trainval.txt").write_bytes(listed.encode(encoding))
    found = read_voc(tmp_path, ["trainval"])
    assert found.objects.boxes.tolist() == [[1, 2, 30, 20]] and found.paths[0].endswith("JPEGImages/a.jpg")


def test_image_sets_in_latin1_with_spaces_and_folders(tmp_path):
    names = ["\xe4 1", "a photo 1", "sub/a"]
    write_voc(tmp_path, {name: [("cat", 1, 2, 30, 20)] for name in names if "/" not in name})
    for path in ("JPEGImages/sub/a.jpg", "Annotations/sub/a.xml"):
        (tmp_path / path).parent.mkdir()
        suffix = Path(path).suffix
        shutil.copy(tmp_path / Path(path).parts[0] / f"a photo 1{suffix}", tmp_path / path)
    (tmp_path / "ImageSets/Main/trainval.txt").write_bytes("\n".join(names).encode("latin-1"))
    found = read_voc(tmp_path, ["trainval"])
    assert [found.ids[i] for i in range(3)] == sorted(names)
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("sub/b\nother/a\n")
    with pytest.raises(UserError, match="2 faults") as error:
        read_voc(tmp_path, ["trainval"])
    assert "sub/b.jpg: no such image" in str(error.value) and "other/a.jpg: no such image" in str(error.value)


SIZE = "<size><width>48</width><height>32</height></size>"
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def voc_object(box=(3, 3, 20, 20), inside="<difficult>0</difficult>"):
    return f"<object>{inside}<name>cat</name>{BOX.format(*box)}</object>"


@pytest.mark.parametrize(
    ("content", "box", "note"),
    [
        (SIZE + voc_object(inside="<difficult>Unspecified</difficult>"), (2, 2, 20, 20), ""),
        (SIZE + voc_object(inside=""), (2, 2, 20, 20), ""),
        (voc_object(), (2, 2, 20, 20), ""),
        ("<size><width>0</width><height>0</height></size>" + voc_object(), (2, 2, 20, 20), ""),
        ("<size><width>99999999999</width><height>32</height></size>" + voc_object(), (2, 2, 20, 20), ""),
        ("<size><width>nan</width><height/></size>" + voc_object(), (2, 2, 20, 20), ""),
        (SIZE + voc_object((3.75, 3.25, 20.5, 20.125)), (2.75, 2.25, 20.5, 20.125), ""),
        (SIZE + voc_object((20, 20, 3, 3)), (2, 2, 20, 20), "1 boxes had their corners in the wrong order"),
        (SIZE + voc_object(inside=f"<part><name>head</name>{BOX.format(4, 4, 9, 9)}</part>"), (2, 2, 20, 20), ""),
        ("<filename>other.png</filename>" + SIZE + voc_object(), (2, 2, 20, 20), ""),
        ("<filename>C:\\x\\a.jpg</filename>" + SIZE + voc_object(), (2, 2, 20, 20), ""),
    ],
)
def test_voc_annotations_as_tools_write_them(tmp_path, content, box, note):
    write_voc(tmp_path, {"a": []})
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{content}</annotation>")
    found = read_voc(tmp_path, ["trainval"])
    assert (
        found.objects.boxes.tolist() == [list(box)] and found.sizes.tolist() == [[48, 32]] and found.classes == ("cat",)
    )
    assert (
        not found.objects.ignore.any() and all(note in line for line in found.notes) and len(found.notes) == bool(note)
    )


@pytest.mark.parametrize("said", ["a.jpg", "a.png", "c.jpg", ""])
def test_the_annotation_decides_between_pictures_of_one_stem(tmp_path, said):
    write_voc(tmp_path, {"a": []})
    write_picture(tmp_path / "JPEGImages" / "a.png")  # the mask of the other
    (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation><filename>{said}</filename>{SIZE}</annotation>")
    found = read_voc(tmp_path, ["trainval"])
    assert Path(found.paths[0]).name == (said if said.startswith("a") else "a.jpg")


def test_the_fingerprint_knows_the_contents_and_not_the_place(folder, tmp_path):
    before = read_voc(folder, ["trainval"]).fingerprint()
    write_voc(tmp_path / "copy", OBJECTS)
    assert read_voc(tmp_path / "copy", ["trainval"]).fingerprint() == before
    assert read_voc(folder, ["trainval"], ["dog", "cat"]).fingerprint() != before
    write_voc(tmp_path / "copy", OBJECTS | {"a_01": [("cat", 0, 0, 5, 5)]})
    assert read_voc(tmp_path / "copy", ["trainval"]).fingerprint() != before


def test_a_subset_is_what_its_rows_are(folder):
    whole, rows = read_voc(folder, ["trainval"]), [2, 0, 1, 1]
    part = whole.subset(rows)
    assert len(part) == 4 and part.classes == whole.classes and part.sizes.tolist() == whole.sizes[rows].tolist()
    for i, row in enumerate(rows):
        assert (part.ids[i], part.paths[i], part.image_id(i)) == (whole.ids[row], whole.paths[row], whole.image_id(row))
        for one, other in ((part.objects, whole.objects), (part.truth, whole.truth)):
            assert all(torch.equal(value, other.of(row)[name]) for name, value in one.of(i).items())
    assert whole.subset(range(3)).fingerprint() == whole.fingerprint()


def test_tensors_are_shared_and_pickle_whole(folder):
    annotations = read_voc(folder, ["trainval"])
    for tensor in (*annotations.objects, annotations.sizes):
        assert tensor.is_shared()
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
    assert annotations.objects.of(len(kept) + 1)["boxes"].tolist() == [[1, 2, 3, 4]]  # still with its own image
    assert all(len(annotations.objects.of(1)["boxes"]) == 2 for _ in kept)
    lost = "1 of 4 objects" if kept else "1 of 3 pictures"
    assert "b_02" in caplog.messages[0] and lost in caplog.messages[1] and len(caplog.messages) == 2
    assert annotations.notes == caplog.messages[1:]
    with pytest.raises(UserError, match=r"data\.max_skipped=0\.2; the first: .*b_02"):
        read_voc(folder, ["trainval"], on_error="skip", max_skipped=0.2)


def test_an_unknown_voc_class_names_the_file_and_the_nearest_class(folder, caplog):
    with pytest.raises(UserError, match=r"b_02\.xml: unknown class 'dog' \(did you mean 'dogs'\?\)"):
        read_voc(folder, ["trainval"], ["cat", "dogs"])
    annotations = read_voc(folder, ["trainval"], ["cat", "dogs"], on_error="skip")
    assert len(annotations) == 3 and annotations.objects.of(1)["labels"].tolist() == [1]


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
        ('"category_id": 18', '"category_id": 19', "not among its categories: 19"),
        ('"image_id": 10', '"image_id": 99', "not among its images: 99, which 1 annotations name"),
    ],
)
def test_a_fault_of_a_coco_annotation_is_raised_or_skipped(folder, old, new, message):
    change(folder, old, new)
    with pytest.raises(UserError, match=message) as error:
        read_json(folder)
    assert "instances.json" in str(error.value) and "\n" not in str(error.value)
    assert read_json(folder, (), "skip").objects.of(1)["boxes"].tolist() == [[5, 6, 30, 32], [40, 20, 48, 32]]


def test_a_fault_of_a_coco_image_is_raised_or_skipped(folder):
    (folder / "JPEGImages" / "b_02.jpg").unlink()
    with pytest.raises(UserError, match=r"b_02\.jpg: no such image"):
        read_json(folder)
    annotations = read_json(folder, (), "skip")
    assert len(annotations) == 2 and annotations.objects.boxes.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"images"', '{"images', "malformed JSON"),
        ('"annotations": [', '"annotation": [', "annotations: expected a list, found None"),
        ('"name": "cat"', '"name": "dog"', "same name"),
        ('"file_name": "a_01.jpg", ', "", "malformed image entry"),
        ('"id": 11, "file_name"', '"id": 10, "file_name"', "an .id. of its own"),
    ],
)
def test_a_malformed_coco_file_is_named(folder, old, new, message):
    change(folder, old, new)
    with pytest.raises(UserError, match=message) as error:
        read_json(folder)
    assert "instances.json" in str(error.value) and "\n" not in str(error.value)


def test_coco_names_what_is_missing(folder):
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read"):
        read_coco(folder / "nowhere.json", folder)
    with pytest.raises(UserError, match="no such folder"):
        read_coco(folder / "instances.json", folder / "nowhere")
    data = DataConfig(root=str(folder), dataset_type="coco", train_images="JPEGImages", classes=["cats"])
    with pytest.raises(UserError, match="did you mean 'cat'"):
        load_annotations(data, "train")


def test_lvis_names_its_pictures_by_their_address(tmp_path):
    write_coco(tmp_path / "lvis.json", {"b_02": OBJECTS["b_02"]}, CATEGORIES)
    content = json.loads((tmp_path / "lvis.json").read_text())
    (image,) = content["images"]
    image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    write_picture(tmp_path / "train2017" / "b_02.jpg")
    found = read_coco(tmp_path / "lvis.json", tmp_path)
    assert Path(found.paths[0]) == tmp_path / "train2017" / "b_02.jpg" and len(found.truth.labels) == 3


def test_coco_images_in_subfolders_keep_apart(tmp_path):
    objects = {"x/1": [("cat", 1, 1, 9, 9)], "y/1": []}
    for stem in objects:
        write_picture(tmp_path / "JPEGImages" / f"{stem}.jpg")
    write_coco(tmp_path / "instances.json", objects, CATEGORIES)
    annotations = read_json(tmp_path)
    assert [annotations.ids[i] for i in range(2)] == ["x/1", "y/1"]
    assert np.diff(annotations.objects.offsets.numpy()).tolist() == [1, 0]
