"""Folders as tools leave them: what they are recognised as, and which pictures train and test."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_data import write_coco, write_picture, write_voc

from final_train import load_data
from lib import UserError
from lib.config import Config, DataConfig
from lib.datasets import load_annotations, split_indices
from lib.images import Tree
from lib.plan import same_pictures

TRAIN = {f"p{i}": [("cat", 5, 5, 30, 25), ("dog", 20, 4, 40, 28)][: i % 3] for i in range(6)}
TEST = {"q0": [("dog", 1, 2, 30, 20)], "q1": []}
IDS = {"cat": 4, "dog": 9}


def load(root, split="train", **options):
    return load_annotations(DataConfig(root=str(root), **options), split)


def ids(annotations):
    return [annotations.ids[i] for i in range(len(annotations))]


def xml_files(root, place):
    """TRAIN and TEST with an XML file for each picture, at (picture, XML) = place(split, stem)."""
    for split, objects in (("train", TRAIN), ("test", TEST)):
        write_voc(root / "voc", objects, split)
        for name in objects:
            for source, target in zip(("JPEGImages/{}.jpg", "Annotations/{}.xml"), place(split, name), strict=True):
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / "voc" / source.format(name), root / target)
    shutil.rmtree(root / "voc")


def yolo(root, place, objects, classes=("cat", "dog"), size=(48, 32)):
    """Pictures and text files of `objects`, at (picture, text) = place(stem); none where there are no objects."""
    for name, boxes in objects.items():
        picture, text = (root / path for path in place(name))
        write_picture(picture)
        lines = []
        for label, x1, y1, x2, y2 in boxes:
            w, h = size
            numbers = ((x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h)
            lines.append(" ".join(map(repr, (classes.index(label), *numbers))))
        text.parent.mkdir(parents=True, exist_ok=True)
        if lines:
            text.write_text("\n".join(lines))


def coco(root, files):
    for path, (folder, objects) in files.items():
        for name in objects:
            write_picture(root / folder / f"{name}.jpg")
        write_coco(root / path, objects, IDS)


def as_read(root, kind, train=TRAIN, test=TEST):
    """The data set in `root` is recognised, and holds `train` and `test`."""
    for split, objects in (("train", train), ("test", test)):
        found = load(root, split)
        assert ids(found) == sorted(objects) and found.classes == ("cat", "dog")
        assert kind in found.notes[0] and "training data:" in found.notes[0]
        for i, name in enumerate(sorted(objects)):
            boxes = torch.tensor([box[1:] for box in objects[name]], dtype=torch.float32).reshape(-1, 4)
            torch.testing.assert_close(found.objects.of(i)["boxes"], boxes)
            assert [found.classes[label - 1] for label in found.objects.of(i)["labels"]] == [
                box[0] for box in objects[name]
            ]


@pytest.mark.parametrize(
    "place",
    [
        lambda split, name: (f"{split}/{name}.jpg", f"{split}/{name}.xml"),  # labelImg, Roboflow
        lambda split, name: (f"images/{split}/{name}.jpg", f"annots/{split}/{name}.xml"),
        lambda split, name: (f"{split}/images/{name}.jpg", f"{split}/annotations/xmls/{name}.xml"),
        lambda split, name: (f"{split}_zip/{split}/{name}.jpg", f"{split}_zip/{split}/{name}.jpg.xml"),
        lambda split, name: (f"Pictures/{split.title()}Set/{name}.jpg", f"labels/{name}.XML"),
        lambda split, name: (f"Images/{split}/{name}.jpg", f"Annotation/{split}/{name}"),  # Stanford Dogs
        lambda split, name: (f"{split}set/{name}.jpg", f"{split}set/{name}.xml"),
        lambda split, name: (f"{split}data/default/{name}.jfif", f"{split}data/default/{name}.xml"),  # CVAT's default
    ],
)
def test_pictures_with_an_xml_file_each(tmp_path, place):
    xml_files(tmp_path, place)
    as_read(tmp_path, "VOC")


def test_lists_of_pictures_and_label_files_part_a_folder(tmp_path):
    """As PaddleDetection's label_list and the Oxford pets' lists, in which something follows the picture."""
    xml_files(tmp_path, lambda split, name: (f"images/{name}.jpg", f"annotations/{name}.xml"))
    for split, objects in (("train", TRAIN), ("valid", TEST)):
        lines = [f"./images/{name}.jpg ./annotations/{name}.xml" for name in objects]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    as_read(tmp_path, "VOC")
    some = dict(list(TRAIN.items())[1:])
    (tmp_path / "train.txt").write_text("".join(f"{name} 1 1 2\n" for name in some))
    as_read(tmp_path, "VOC", train=some)
    assert any("neither trains nor tests: annotations/p0.xml" in note for note in load(tmp_path).notes)


def test_darknet_lists_part_a_folder(tmp_path):
    yolo(tmp_path, lambda n: (f"data/obj/{n}.jpg", f"data/obj/{n}.txt"), {**TRAIN, **TEST})
    (tmp_path / "data" / "obj.names").write_text("cat\ndog\n")
    for split, objects in (("train", TRAIN), ("test", TEST)):
        (tmp_path / "data" / f"{split}.txt").write_text("".join(f"data/obj/{name}.jpg\n" for name in objects))
    as_read(tmp_path, "YOLO, data/obj.names")


def test_yolo_as_its_tools_write_it(tmp_path):
    for split, objects in (("train", TRAIN), ("val", TEST)):
        yolo(tmp_path, lambda n, split=split: (f"images/{split}/{n}.jpg", f"labels/{split}/{n}.txt"), objects)
    head = "names: {0: cat, 1: dog}\nnc: 2\n"
    (tmp_path / "data.yaml").write_text(head + "path: ../somewhere\ntrain: images/train\nval: [./images/val]\ntest:\n")
    as_read(tmp_path, "YOLO, data.yaml")
    # Lists of pictures, with paths of another machine.
    for split, objects in (("train", TRAIN), ("val", TEST)):
        lines = (f"C:\\data\\images\\{split}\\{n}.jpg" for n in objects)
        (tmp_path / f"{split}.txt").write_text("\r\n".join(lines))
    (tmp_path / "data.yaml").write_text(head + "train: train.txt\nval: val.txt\n")
    as_read(tmp_path, "YOLO, data.yaml")
    # Roboflow's: one folder too high, and a test set that was not exported.
    (tmp_path / "data.yaml").write_text(head + "train: ../images/train\nval: ../images/val\ntest: ../test/images\n")
    as_read(tmp_path, "YOLO, data.yaml")
    assert any("no folder or list '../test/images'" in note for note in load(tmp_path).notes)
    # One set for everything, as in COCO128.
    (tmp_path / "data.yaml").write_text(head + "train: images\nval: images\n")
    held = set(ids(load(tmp_path, "test")))
    assert held and held | set(ids(load(tmp_path))) == {*TRAIN, *TEST} and not held & set(ids(load(tmp_path)))
    assert any("val: not test data" in note for note in load(tmp_path).notes)
    # Without data.yaml.
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(UserError, match=r"add data.yaml or classes.txt, or data.classes"):
        load(tmp_path)
    (tmp_path / "labels" / "classes.txt").write_text("cat\ndog\n")
    as_read(tmp_path, "YOLO")
    (tmp_path / "labels" / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(UserError, match=r"classes\.txt: 2 classes have the same name 'cat'"):
        load(tmp_path)
    (tmp_path / "data.yaml").write_text(head + "train: images/nowhere/more\n")
    with pytest.raises(UserError, match=r"data\.yaml: train: no folder or list 'images/nowhere/more'"):
        load(tmp_path)


def test_yolo_text_files_beside_the_pictures(tmp_path):
    for split, objects in (("train", TRAIN), ("test", TEST)):
        yolo(tmp_path, lambda n, split=split: (f"{split}/{n}.jpg", f"{split}/{n}.txt"), objects)
    (tmp_path / "train" / "classes.txt").write_text("cat\ndog\n")
    as_read(tmp_path, "YOLO")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match=r"expected VOC .* found pictures: 2"):
        load(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"train/_annotations.coco.json": ("train", TRAIN), "test/_annotations.coco.json": ("test", TEST)},
        {
            "annotations/instances_train2017.json": ("train2017", TRAIN),
            "annotations/instances_val2017.json": ("val2017", TEST),
        },
        {"custom_train.json": ("images/train", TRAIN), "custom_test.json": ("images/test", TEST)},
        {"train.json": ("images", TRAIN), "val.json": ("images", TEST)},
    ],
)
def test_coco_files_by_their_usual_names(tmp_path, files):
    coco(tmp_path, files)
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "captions_train2017.json").write_text('{"images": [], "annotations": []}')
    as_read(tmp_path, "COCO")
    found = load(tmp_path, "test", dataset_type="coco")
    assert [found.image_id(i) for i in range(2)] == [10, 11] and found.category_ids == (4, 9)


@pytest.mark.parametrize("prefix", ["sub\\x\\", "C:\\Users\\me\\", "/home/me/a/", "./", "images/"])
def test_coco_file_names_with_folders(tmp_path, prefix):
    for name in TRAIN:
        write_picture(tmp_path / ("sub/x" if prefix.startswith("sub") else "images") / f"{name}.jpg")
    write_coco(tmp_path / "instances_default.json", TRAIN, IDS)
    content = json.loads((tmp_path / "instances_default.json").read_text())
    for image in content["images"]:
        image["file_name"] = prefix + image["file_name"]
        del image["width"]
    (tmp_path / "instances_default.json").write_text(json.dumps(content))
    found = load(tmp_path, test_portion=0)
    assert len(found) == 6 and len(found.objects.labels) == 6 and found.sizes.tolist() == [[48, 32]] * 6


def test_of_pictures_of_one_name_a_coco_file_means_those_of_its_split_and_no_masks(tmp_path):
    coco(tmp_path, {"labels/x_train.json": ("images/train", TRAIN), "labels/x_val.json": ("images/valid", TRAIN)})
    for name in TRAIN:
        write_picture(tmp_path / "masks" / "train" / f"{name}.jpg")
        write_picture(tmp_path / "copy" / "images" / "valid" / f"{name}.jpg")
    for split, folder in (("train", "train"), ("test", "valid")):
        found = load(tmp_path, split)
        assert [found.paths[i] for i in range(6)] == [str(tmp_path / f"images/{folder}/{name}.jpg") for name in TRAIN]
    write_picture(tmp_path / "images" / "train" / "more" / "p0.jpg")
    write_picture(tmp_path / "images" / "more" / "train" / "p0.jpg")
    (tmp_path / "images" / "train" / "p0.jpg").unlink()
    with pytest.raises(UserError, match=r"p0\.jpg: no such image"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["COCO", "VOC", "YOLO"])
@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("\u00c4pfel", "A\u0308pfel"),  # as macOS decomposes it
        ("IMG_a", "img_A"),  # Windows ignores case
        ("p%20a", "p a"),  # an address
        ("50%25", "50%25"),  # a name that only looks like one
        ("http%3A%2F%2Fhost%2Fp", "http%3A%2F%2Fhost%2Fp"),  # of a picture that was downloaded
    ],
)
def test_names_that_other_systems_spell_otherwise(tmp_path, kind, written, stored):
    """The label file says `written`, the picture is `stored`; exactly the same name comes first."""
    objects = {f"{stored} {i}": [("cat", 5, 5, 30, 25)] for i in range(6)}
    if kind == "YOLO":
        yolo(tmp_path, lambda n: (f"images/{n}.jpg", f"labels/{n.replace(stored, written)}.txt"), objects)
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
    else:
        for name in objects:
            write_picture(tmp_path / "pictures" / f"{name}.jpg")
        labels = {name.replace(stored, written): boxes for name, boxes in objects.items()}
        if kind == "COCO":
            write_coco(tmp_path / "train.json", labels, IDS)
        else:
            write_voc(tmp_path / "voc", labels)
            (tmp_path / "voc" / "Annotations").rename(tmp_path / "labels")
            shutil.rmtree(tmp_path / "voc")
    found = load(tmp_path, test_portion=0)
    assert len(found) == 6 and found.objects.boxes.tolist() == [[5, 5, 30, 25]] * 6
    if kind == "COCO" and written != stored:
        write_picture(tmp_path / "pictures" / f"{written} 0.jpg")
        assert Path(load(tmp_path, test_portion=0).paths[0]).name == f"{written} 0.jpg"


def test_folders_that_are_spelt_alike(tmp_path):
    for folder in ("pictures", "Pictures"):
        write_picture(tmp_path / folder / "a.jpg")
    tree = Tree(tmp_path)
    for name in ("pictures/a", "Pictures/a.jpg"):
        assert tree.find(name) == f"{name[:8]}/a.jpg" == tree.find(f"/elsewhere/{name}")


def test_yolo_pictures_that_validate_and_test_do_not_train(tmp_path):
    for split, objects in (("train", TRAIN), ("val", TEST)):
        yolo(tmp_path, lambda n, split=split: (f"images/{split}/{n}.jpg", f"labels/{split}/{n}.txt"), objects)
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\nval: images/val\ntest: images/val\n")
    as_read(tmp_path, "YOLO, data.yaml")


def test_what_is_ambiguous_or_missing_is_named_with_its_key(tmp_path):
    coco(tmp_path, {"a/one_train.json": ("a", TRAIN), "b/other_train.json": ("a", TRAIN)})
    with pytest.raises(UserError, match=r"one_train\.json, b/other_train\.json: data\.train_annotations names the one"):
        load(tmp_path)
    assert len(load(tmp_path, train_annotations="a/one_train.json", test_portion=0)) == 6
    with pytest.raises(UserError, match=r"train_annotations: 'a/one_trian.json' is not there \(did you mean 'a/one_tr"):
        load(tmp_path, train_annotations="a/one_trian.json")
    with pytest.raises(UserError, match="expected VOC"):
        load(tmp_path, dataset_type="voc")
    write_voc(tmp_path / "voc", TRAIN)
    with pytest.raises(UserError, match=r"data\.test_sets: 'trainvl' is not there \(did you mean 'trainval'"):
        load(tmp_path / "voc", "test", test_sets=["trainvl"])
    with pytest.raises(UserError, match=r"no such folder \(data\.root\)"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected VOC .*, COCO .*, YOLO .*; found nothing"):
        load(tmp_path / "empty")


def test_voc_folders_in_all_their_forms(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    for year in ("VOC2007", "VOC2012"):
        write_voc(devkit / year, {f"{year}_1": [("cat", 1, 1, 9, 9)]})
    write_voc(devkit / "VOC2007", {"t": []}, "test")
    (devkit / "VOC2007/ImageSets/Main/cat_trainval.txt").write_text("VOC2007_1  1\n")
    for root in (tmp_path, devkit):
        assert ids(load(root)) == ["VOC2007_1", "VOC2012_1"] and ids(load(root, "test")) == ["t"]
    (devkit / "VOC2012/ImageSets/test.txt").write_text("cat\n")  # a list beside Main is no image set
    assert ids(load(devkit, "test")) == ["t"]
    assert ids(load(devkit / "VOC2007")) == ["VOC2007_1"] and len(load(devkit / "VOC2007").notes) == 1
    assert ids(load(devkit, train_sets=["VOC2012/trainval"])) == ["VOC2012_1"]
    write_voc(tmp_path / "flat", {"a": [("cat", 1, 1, 9, 9)]})
    write_voc(tmp_path / "flat", {"b": []}, "test")
    for file in (tmp_path / "flat/ImageSets/Main").iterdir():
        file.rename(tmp_path / "flat/ImageSets" / file.name)
    assert ids(load(tmp_path / "flat")) == ["a"] and ids(load(tmp_path / "flat", "test")) == ["b"]


@pytest.mark.parametrize(
    ("sets", "named", "train", "test"),
    [
        (["trainval", "test"], {}, ["trainval"], ["test"]),
        (["train", "val", "test"], {}, ["train", "val"], ["test"]),
        (["train", "val", "trainval"], {}, ["train"], ["val"]),
        (["train", "valid"], {}, ["train"], ["valid"]),
        (["trainval", "val"], {"train_sets": ["trainval"]}, ["trainval"], []),
        (["train", "val", "trainval"], {"test_sets": ["val"]}, ["train"], ["val"]),
        (["default"], {}, ["default"], []),
        (["mine", "test"], {"train_sets": ["mine"]}, ["mine"], ["test"]),
    ],
)
def test_which_sets_train_and_test(tmp_path, sets, named, train, test):
    for name in sets:
        write_voc(tmp_path, {f"{name}1": [("cat", 1, 1, 9, 9)], f"{name}2": []}, name)
    found = load(tmp_path, classes=["cat"], test_portion=0.5 if not test else 0.2, **named)
    pictures = {f"{name}{i}" for name in train for i in (1, 2)}
    if test:
        assert set(ids(found)) == pictures
        assert set(ids(load(tmp_path, "test", classes=["cat"], **named))) == {f"{n}{i}" for n in test for i in (1, 2)}
    else:
        held = set(ids(load(tmp_path, "test", classes=["cat"], test_portion=0.5, **named)))
        assert len(held) == 1 and held | set(ids(found)) == pictures and not held & set(ids(found))


def test_a_folder_with_test_data_alone_serves_for_evaluation(tmp_path):
    write_voc(tmp_path, TEST, "test")
    assert ids(load(tmp_path, "test", classes=["cat", "dog"])) == ["q0", "q1"]
    with pytest.raises(UserError, match=r"which is the training data\? Found test \(data\.train_sets\)"):
        load(tmp_path)


def test_pictures_of_one_name_in_two_folders_keep_apart(tmp_path):
    for split in ("train", "valid", "test"):
        write_voc(tmp_path / "voc", {"a": [("cat", 1, 1, 9, 9)]})
        for source in ("JPEGImages/a.jpg", "Annotations/a.xml"):
            (tmp_path / split).mkdir(exist_ok=True)
            shutil.copy(tmp_path / "voc" / source, tmp_path / split)
    shutil.rmtree(tmp_path / "voc")
    found = load(tmp_path)
    assert ids(found) == ["train/a.jpg", "valid/a.jpg"] == [found.image_id(i) for i in range(2)]
    test = load(tmp_path, "test")
    assert ids(test) == ["a"] and Path(test.paths[0]).parent.name == "test"
    pairs = same_pictures([found.paths[i] for i in range(2)], [test.paths[0], str(tmp_path / "none.jpg")])
    assert len(pairs) == 2 and all(other == test.paths[0] for _, other in pairs)
    write_picture(Path(found.paths[0]), 40, 32)
    assert same_pictures([found.paths[0]], [test.paths[0]]) == []


def test_pictures_without_an_xml_file_and_masks_are_no_pictures_of_the_set(tmp_path):
    write_voc(tmp_path / "voc", {"a": [("cat", 1, 1, 9, 9)], "b": []})
    (tmp_path / "voc" / "JPEGImages").rename(tmp_path / "images")
    (tmp_path / "voc" / "Annotations").rename(tmp_path / "annotations")
    shutil.rmtree(tmp_path / "voc")
    write_picture(tmp_path / "images" / "new.jpg")
    write_picture(tmp_path / "masks" / "a.png")
    found = load(tmp_path, test_portion=0)
    assert [Path(found.paths[i]).name for i in range(2)] == ["a.jpg", "b.jpg"]
    assert any("1 pictures have no XML file" in note for note in found.notes)


def test_frames_of_the_same_names_in_several_folders(tmp_path):
    """The XML file beside a picture, or in the folder of the same name, is its own, however much others resemble it."""
    beside = [("day1", "day1"), ("day1_night", "day1_night")]
    parallel = [("images/cam1_seq1", "xml/cam1_seq1"), ("images/cam1", "xml/cam1")]
    for number, (pictures, xmls) in enumerate(beside + parallel):
        write_voc(tmp_path / "voc", {"f0": [("cat", 1, 1, 10 + number, 20)]})
        for source, target in (("JPEGImages/f0.jpg", pictures), ("Annotations/f0.xml", xmls)):
            (tmp_path / target).mkdir(parents=True, exist_ok=True)
            shutil.move(tmp_path / "voc" / source, tmp_path / target)
        shutil.rmtree(tmp_path / "voc")
    found = load(tmp_path, test_portion=0)
    rights = {found.paths[i].split("/")[-2]: found.truth.of(i)["boxes"][0, 2].item() for i in range(len(found))}
    assert rights == {"day1": 10, "day1_night": 11, "cam1_seq1": 12, "cam1": 13}


def lost_picture(root):
    """Only the test data has a picture of that name."""
    xml_files(root, lambda split, name: (f"{split}/{name}.jpg", f"{split}/{name}.xml"))
    shutil.copy(root / "train" / "p1.xml", root / "train" / "q0.xml")


def lost_picture_of_another_camera_or_split(root):
    """A picture of the test data that is not annotated has the name of the one that is lost."""
    xml_files(root, lambda split, name: (f"{split}/{name}.jpg", f"{split}/{name}.xml"))
    (root / "train" / "p1.jpg").rename(root / "test" / "p1.jpg")


def old_xml_file(root):
    write_voc(root, TRAIN)
    shutil.copytree(root / "Annotations", root / "Annotations_old")
    (root / "Annotations" / "p1.xml").unlink()


def classes_one_of_which_is_called_train(root):
    write_voc(root / "voc", TRAIN | {"p9": TRAIN["p0"]})
    for name, kind in {"p0": "train", "p1": "bus", "p9": "car"}.items():
        (root / kind).mkdir()
        (root / "voc" / "JPEGImages" / f"{name}.jpg").rename(root / kind / f"{name}.jpg")
        (root / "voc" / "Annotations" / f"{name}.xml").rename(root / kind / f"{name}.xml")
    shutil.rmtree(root / "voc")


def a_flat_label_file_of_two_splits(root):
    yolo(root, lambda name: (f"images/train/{name}.jpg", f"labels/{name}.txt"), {"a": TRAIN["p1"]})
    write_picture(root / "images" / "val" / "a.jpg")
    (root / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\nval: images/val\n")


def names_with_a_prefix(root):
    yolo(root, lambda name: (f"images/{name}.jpg", f"labels/{name}.txt"), dict.fromkeys("abc", TRAIN["p1"]))
    for name in "bc":
        (root / "labels" / f"{name}.txt").rename(root / "labels" / f"gt_{name}.txt")
    (root / "data.yaml").write_text("names: [cat, dog]\ntrain: images\n")


def lost_picture_whose_name_ends_in_a_number(root):
    """It is not the column of a class's set: the other line has none."""
    write_voc(root, TRAIN, "train")
    write_voc(root, {"img": TRAIN["p1"]}, "test")
    (root / "ImageSets" / "Main" / "train.txt").write_text("p1\nimg 1\n")


def lost_coco_picture(root):
    coco(root, {"annotations/instances_train.json": ("train", TRAIN), "annotations/instances_val.json": ("val", TRAIN)})
    (root / "train" / "p1.jpg").unlink()


def lost_picture_with_a_mask(root):
    write_voc(root, TRAIN)
    for name in TRAIN:
        write_picture(root / "SegmentationClass" / f"{name}.png")
    (root / "JPEGImages" / "p1.jpg").unlink()


def two_xml_files(root):
    write_voc(root / "voc", TRAIN)
    for name in ("annotations", "annotations_old"):
        shutil.copytree(root / "voc" / "Annotations", root / name)
    (root / "voc" / "JPEGImages").rename(root / "images")
    shutil.rmtree(root / "voc")
    xml = root / "annotations_old" / "p1.xml"
    xml.write_text(xml.read_text().replace("<xmin>6<", "<xmin>7<"))


def two_lists_of_classes(root):
    for split, names in (("train", "cat\ndog\n"), ("test", "dog\ncat\n")):
        yolo(root, lambda name, split=split: (f"{split}/{name}.jpg", f"{split}/{name}.txt"), TRAIN)
        (root / split / "classes.txt").write_text(names)


def two_descriptions(root):
    for part in ("A", "B"):
        yolo(root / part, lambda name: (f"images/{name}.jpg", f"labels/{name}.txt"), TRAIN)
        (root / part / "data.yaml").write_text("names: [cat, dog]\ntrain: images\n")


def a_label_file_of_two(root):
    yolo(root, lambda name: (f"images/{name}.jpg", f"labels/{name}.txt"), TRAIN)
    (root / "classes.txt").write_text("cat\ndog\n")
    write_picture(root / "images" / "p1.png")


def a_list_of_lost_pictures(root):
    xml_files(root, lambda split, name: (f"images/{name}.jpg", f"xml/{name}.xml"))
    (root / "train.txt").write_text("p0.jpg\np1.jpg\np9.jpg\n")


def shares_for_pixels(root):
    write_voc(root, {"a": [("cat", -0.8, -0.9, 0.7, 0.6)]})


def two_boxes_of_one_object(root):
    write_voc(root, {"a": [("cat", 1, 1, 9, 9)]})
    xml = root / "Annotations" / "a.xml"
    box = xml.read_text().partition("<bndbox>")[2].partition("</bndbox>")[0]
    xml.write_text(xml.read_text().replace("</object>", f"<bndbox>{box}</bndbox></object>"))


def nothing_to_find(root):
    write_voc(root, {"a": [], "b": []})


REFUSED = {
    lost_picture: r"train/q0\.xml: the picture that it belongs to is not there",
    lost_picture_of_another_camera_or_split: r"train/p1\.xml: the picture that it belongs to is not there",
    lost_picture_whose_name_ends_in_a_number: r"img 1\.jpg: no such image, but train\.txt lists it",
    old_xml_file: r"Annotations/p1\.xml: cannot be read",
    classes_one_of_which_is_called_train: r"2 of 3 files lie in folders that tell no split.*bus/p1\.xml",
    a_flat_label_file_of_two_splits: r"labels/a\.txt: belongs to two pictures, .*train/a\.jpg and .*val/a\.jpg",
    names_with_a_prefix: r"2 of 3 pictures have no label file, such as .*images/b\.jpg, and 2 label files no picture",
    lost_coco_picture: r"p1\.jpg: no such image, or several, which is listed in .*instances_train\.json",
    lost_picture_with_a_mask: r"JPEGImages/p1\.jpg: no such image, but trainval\.txt lists it",
    two_xml_files: r"annotations_old/p1\.xml: images/p1\.jpg has another XML file, annotations/p1\.xml",
    two_lists_of_classes: r"test/classes\.txt and train/classes\.txt list other classes",
    two_descriptions: r"A/data\.yaml and B/data\.yaml describe two data sets",
    a_label_file_of_two: r"labels/p1\.txt: belongs to two pictures, .*p1\.jpg and .*p1\.png",
    a_list_of_lost_pictures: r"train\.txt: no such image, or several: 'p9\.jpg'",
    shares_for_pixels: "none of the 1 boxes is wider and higher than a pixel; they look like shares of the picture",
    two_boxes_of_one_object: r"a\.xml: malformed object: expected .* in one <bndbox>",
    nothing_to_find: "none of the 2 train images has an object to find",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_would_train_on_wrong_boxes_or_classes_is_refused(tmp_path, make):
    make(tmp_path)
    with pytest.raises(UserError, match=REFUSED[make]):
        load(tmp_path, test_portion=0)


def test_folders_of_classes_one_of_which_is_a_word_for_a_split(tmp_path):
    """As OIDv4 downloads them: train/Bus, train/Train, validation/Bus, validation/Train."""
    folder = {"train": "train", "test": "validation"}
    kind = dict(zip([*TRAIN, *TEST], ["Bus", "Train"] * 4, strict=True))
    place = lambda split, name: (f"{folder[split]}/{kind[name]}/{name}.jpg", f"{folder[split]}/{kind[name]}/{name}.xml")  # noqa: E731
    xml_files(tmp_path, place)
    as_read(tmp_path, "VOC")
    for xml in tmp_path.rglob("*.xml"):
        xml.unlink()
    for objects, split in ((TRAIN, "train"), (TEST, "test")):
        yolo(tmp_path, lambda name, split=split: (place(split, name)[0], place(split, name)[0][:-3] + "txt"), objects)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    as_read(tmp_path, "YOLO")


def test_a_key_says_which_of_two_kinds_is_meant(tmp_path):
    yolo(tmp_path, lambda name: (f"images/{name}.jpg", f"labels/{name}.txt"), dict.fromkeys(TRAIN, TRAIN["p1"]))
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images\n")
    assert "YOLO" in load(tmp_path).notes[0]
    with pytest.raises(UserError, match=r"expected VOC .*found pictures: 6"):
        load(tmp_path, train_sets=["trainval"])
    write_coco(tmp_path / "new.json", TRAIN, IDS)
    found = load(tmp_path, train_annotations="new.json", test_portion=0)
    assert "COCO" in found.notes[0] and len(found.objects.labels) == sum(map(len, TRAIN.values()))


def test_classes_that_differ_in_case_alone_are_said(tmp_path):
    write_voc(tmp_path, {"a": [("Cat", 5, 5, 30, 25)], "b": [("cat", 5, 5, 30, 25)]})
    found = load(tmp_path, test_portion=0)
    assert found.classes == ("Cat", "cat") and "'Cat' and 'cat' are two classes" in " ".join(found.notes)


def test_test_pictures_that_train_are_said_by_stage_3(tmp_path, capsys):
    write_voc(tmp_path, TRAIN, "train")
    write_voc(tmp_path, TEST, "test")
    config = Config(data=DataConfig(root=str(tmp_path), dataset_type="voc"))
    load_data(config)
    assert "warning" not in capsys.readouterr().out
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "test.txt").write_text("q0\nq1\np1\n")
    load_data(config)
    assert "warning: 1 of 3 test pictures train as well, such as " in capsys.readouterr().out


def test_which_of_two_pictures_of_a_name_was_taken_is_said(tmp_path):
    coco(tmp_path, {"annotations.json": ("data/images", TRAIN)})
    shutil.copytree(tmp_path / "data" / "images", tmp_path / "small")
    notes = load(tmp_path).notes
    assert any("6 pictures have namesakes: those in small/ are used, not data/images/" in n for n in notes)


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_split_without_labels_is_left_out(tmp_path, pictures):
    for split, objects in (("train", TRAIN), ("valid", TEST)):
        yolo(tmp_path, lambda n, split=split: (f"{split}/images/{n}.jpg", f"{split}/labels/{n}.txt"), objects)
    (tmp_path / "test" / "images").mkdir(parents=True)
    for number in range(pictures):
        write_picture(tmp_path / "test" / "images" / f"{number}.jpg")
    places = "train: train/images\nval: valid/images\ntest: test/images\n"
    (tmp_path / "data.yaml").write_text(f"names: [cat, dog]\n{places}")
    as_read(tmp_path, "YOLO")
    assert "test: no picture with a label file, so left out: 'test/images'" in " ".join(load(tmp_path).notes)


def test_copies_of_one_photo_are_on_one_side_of_a_cut(tmp_path):
    """Roboflow augments before it divides, and appends a hash to the name of each copy."""
    names = [f"IMG_{photo}_jpg.rf.{copy}{photo}ab" for photo in range(9) for copy in range(3)]
    write_voc(tmp_path, dict.fromkeys(names, TRAIN["p1"]))
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    parts = [ids(test), *([ids(train)[i] for i in rows] for rows in split_indices(train, [0.7, 0.3], 0))]
    photos = [{name.partition(".rf.")[0] for name in part} for part in parts]
    assert sum(map(len, parts)) == 27 and len(photos[0] | photos[1] | photos[2]) == sum(map(len, photos)) == 9


@pytest.mark.parametrize("suffix", [".txt", "_list.txt"])
@pytest.mark.parametrize("splits", [("train", "test"), ("test",)])
def test_lists_name_what_trains_or_only_what_tests(tmp_path, suffix, splits):
    xml_files(tmp_path, lambda split, name: (f"images/{name}.jpg", f"xml/{name}.xml"))
    for split in splits:
        names = TRAIN if split == "train" else TEST
        (tmp_path / f"{split}{suffix}").write_text("".join(f"images/{name}.jpg\n" for name in names))
    as_read(tmp_path, "VOC")


@pytest.mark.parametrize(
    ("pictures", "texts"),
    [
        ("Images/{}.jpg", "Labels/{}.txt"),
        ("images/train/{}.jpg", "labels/{}.txt"),
        ("images/{}.jpg", "labels/{}.jpg.txt"),
        ("images/{}.jfif", "labels/{}.txt"),
    ],
)
def test_yolo_labels_in_other_places(tmp_path, pictures, texts, monkeypatch):
    yolo(tmp_path, lambda name: (pictures.format(name), texts.format(name)), TRAIN)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    found = load(tmp_path, test_portion=0)
    counts = [len(found.truth.of(i)["boxes"]) for i in range(len(found))]
    assert ids(found) == sorted(TRAIN) and counts == [len(TRAIN[name]) for name in sorted(TRAIN)]
    monkeypatch.chdir(tmp_path)
    assert ids(load(".", test_portion=0)) == ids(found)
    (tmp_path / texts.format("p9")).write_text("0 0.5 0.5 0.2 0.2\n")
    assert any("1 label files belong to no picture" in note for note in load(tmp_path, test_portion=0).notes)


def test_a_copy_of_a_data_set_is_read_and_not_its_original(tmp_path):
    for folder, objects in (("train", TRAIN), ("copy/train", {"new": TRAIN["p1"]})):
        yolo(tmp_path / folder, lambda name: (f"images/{name}.jpg", f"labels/{name}.txt"), objects)
    for train in ("../train/images", str(tmp_path / "train" / "images")):
        (tmp_path / "copy" / "data.yaml").write_text(f"names: [cat, dog]\ntrain: {train}\n")
        found = load(tmp_path / "copy", test_portion=0)
        assert ids(found) == ["new"] and any("is" in note and "copy/train/images" in note for note in found.notes)


def test_what_would_be_counted_twice_or_not_at_all_is_said(tmp_path):
    write_voc(tmp_path, {"a": [("cat", 1, 1, 9, 9), ("cat", 1, 1, 9, 9), ("dog", 1, 1, 9, 9)]})
    write_voc(tmp_path, {"b": []}, "test")
    assert any("1 objects stand in the files twice" in note for note in load(tmp_path).notes)
    assert any("none of the 1 test images has an object" in note for note in load(tmp_path, "test").notes)


def test_a_large_coco_file_whose_keys_stand_in_its_middle(tmp_path):
    coco(tmp_path, {"a.json": ("images", TRAIN)})
    content = json.loads((tmp_path / "a.json").read_text())
    filler = ["x" * 70_000]
    (tmp_path / "a.json").write_text(json.dumps({"info": filler, **content, "licenses": filler}))
    with pytest.raises(UserError, match="expected VOC"):
        load(tmp_path)  # nothing at its ends is COCO's
    first = {"images": content["images"], "info": filler}
    (tmp_path / "a.json").write_text(json.dumps({**first, **content, "licenses": filler}))
    assert len(load(tmp_path, test_portion=0)) == len(TRAIN)


def test_what_no_list_names_keeps_the_split_of_its_folder(tmp_path):
    """A list of the validation alone does not make test pictures train, and the narrower of two lists decides."""
    xml_files(tmp_path, lambda split, name: (f"{split}/{name}.jpg", f"{split}/{name}.xml"))
    (tmp_path / "val.txt").write_text("p4.jpg\np5.jpg\n")
    assert ids(load(tmp_path, "test")) == ["q0", "q1"] and ids(load(tmp_path)) == sorted(TRAIN)
    (tmp_path / "trainval.txt").write_text("".join(f"{name}.jpg\n" for name in [*TRAIN, "q0", "q1"]))
    (tmp_path / "test.txt").write_text("# of the second day\nq0.jpg\nq1.jpg\n")
    as_read(tmp_path, "VOC")


@pytest.mark.parametrize(
    ("file", "path", "pictures"),
    [
        ("data.yaml", "/home/me/proj/datasets/coco8", "datasets/coco8"),
        ("data.yaml", "C:\\work\\sets\\coco8", "sets/coco8"),
        ("data/coco8.yaml", "datasets/coco8", "datasets/coco8"),
        ("data/coco8.yaml", "coco8", "coco8"),
        ("data.yaml", "/content/drive/mine", "."),
    ],
)
def test_the_path_of_a_description_is_found_where_it_is_now(tmp_path, file, path, pictures):
    yolo(tmp_path / pictures, lambda name: (f"images/train/{name}.jpg", f"labels/train/{name}.txt"), TRAIN)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"path: {path}\nnames: [cat, dog]\ntrain: images/train\n")
    assert ids(load(tmp_path, test_portion=0)) == sorted(TRAIN)


def test_a_listed_picture_that_is_missing_is_not_that_of_its_name_elsewhere(tmp_path):
    yolo(tmp_path, lambda name: (f"images/train/{name}.jpg", f"labels/train/{name}.txt"), TRAIN)
    yolo(tmp_path, lambda name: (f"images/val/{name}.jpg", f"labels/val/{name}.txt"), {"p9": TRAIN["p1"]})
    (tmp_path / "train.txt").write_text("".join(f"/content/d/images/train/{name}.jpg\n" for name in [*TRAIN, "p9"]))
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: train.txt\nval: images/val\n")
    with pytest.raises(UserError, match=r"p9\.jpg: cannot be read"):
        load(tmp_path)


def test_labels_beside_a_picture_come_before_those_of_another_folder(tmp_path):
    root = tmp_path / "images" / "shop"
    yolo(root, lambda name: (f"{name}.jpg", f"{name}.txt"), TRAIN)
    (root / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "labels").mkdir()
    for name in TRAIN:
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.9 0.9\n")
    found = load(root, test_portion=0)
    counts = [len(found.truth.of(i)["boxes"]) for i in range(len(found))]
    # Without a file of its own, a picture may have one in the other folder.
    assert counts == [max(1, len(TRAIN[name])) for name in sorted(TRAIN)]


def test_lists_of_classes_that_agree_and_files_that_are_none(tmp_path):
    for split, classes in (("train", "cat\ndog\n"), ("val", "cat\n")):
        yolo(tmp_path / split, lambda name: (f"{name}.jpg", f"{name}.txt"), TRAIN if split == "train" else TEST)
        (tmp_path / split / "classes.txt").write_text(classes)
    (tmp_path / "train" / "gone.txt").symlink_to("nowhere")
    (tmp_path / "train" / "folder.txt").mkdir()
    as_read(tmp_path, "YOLO")


@pytest.mark.parametrize(
    "made", ["annotations_vis", "AnnotationsVisualization", "depth", "mask", "drawn", "predict", "annotated", "results"]
)
def test_a_drawn_picture_does_not_stand_in_for_the_one_that_it_shows(tmp_path, made):
    xml_files(tmp_path, lambda split, name: (f"{split}/images/{name}.jpg", f"{split}/annotations/{name}.xml"))
    for name in TRAIN:
        write_picture(tmp_path / f"train/{made}/{name}.png")
    as_read(tmp_path, "VOC")
    (tmp_path / "train/images/p1.jpg").unlink()
    with pytest.raises(UserError, match=r"p1\.xml: the picture that it belongs to is not there"):
        load(tmp_path)


@pytest.mark.parametrize("other", ["labels/classes.txt", "dataset.yaml"])
def test_two_orders_of_the_classes_are_an_error(tmp_path, other):
    yolo(tmp_path, lambda n: (f"images/{n}.jpg", f"labels/{n}.txt"), TRAIN)
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images\n")
    names = "dog\ncat\n" if other.endswith("txt") else "names: [dog, cat]\ntrain: images\n"
    (tmp_path / other).write_text(names)
    with pytest.raises(UserError, match=r"data\.yaml and .* list the classes in another order"):
        load(tmp_path)
    (tmp_path / other).write_text(
        "person\nbicycle\n" if other.endswith("txt") else "names: [cat, dog]\ntrain: images\n"
    )
    assert load(tmp_path).classes == ("cat", "dog")  # labelImg's own list says nothing


def test_what_cannot_be_read_or_is_foreign_is_said(tmp_path, monkeypatch):
    """A folder of another user, and XML that is none of VOC's."""
    xml_files(tmp_path, lambda split, name: (f"{split}/{name}.jpg", f"{split}/{name}.xml"))
    (tmp_path / "annotations.xml").write_text("<annotations><version>1.1</version></annotations>")
    walk = os.walk

    def refused(root, onerror, **options):
        onerror(PermissionError(13, "Permission denied", f"{root}/theirs"))
        return walk(root, **options)

    monkeypatch.setattr(os, "walk", refused)
    as_read(tmp_path, "VOC")
    notes = load(tmp_path).notes
    assert any(note.endswith("theirs: this folder cannot be read: left out") for note in notes)
    assert any("no VOC annotation: annotations.xml" in note for note in notes)


def test_a_list_of_test_pictures_may_be_empty(tmp_path):
    write_voc(tmp_path, TRAIN, "train_list")
    (tmp_path / "ImageSets/Main/test.txt").touch()
    found = load(tmp_path, test_portion=0)
    assert ids(found) == sorted(TRAIN) and any(
        "empty, so left out: ImageSets/Main/test.txt" in note for note in found.notes
    )


def test_a_coco_file_may_be_called_detections(tmp_path):
    coco(tmp_path, {"detections_train.json": ("images", TRAIN), "detections_test.json": ("images", TEST)})
    as_read(tmp_path, "COCO")
    (tmp_path / "detections_train.json").rename(tmp_path / "train.json")
    notes = load(tmp_path, test_portion=0).notes
    assert any("not read as annotations, by its name: detections_test.json" in note for note in notes)


def test_links_to_nothing(tmp_path):
    """Of a picture a fault, and of anything else nothing."""
    yolo(tmp_path, lambda n: (f"obj/{n}.jpg", f"obj/{n}.txt"), TRAIN)
    (tmp_path / "train" / "_darknet.labels").parent.mkdir()
    (tmp_path / "train" / "_darknet.labels").write_text("cat\ndog\n")  # Roboflow's YOLO Darknet
    (tmp_path / "zlatest").symlink_to("nowhere")
    assert ids(load(tmp_path, test_portion=0)) == sorted(TRAIN)
    (tmp_path / "obj" / "p9.jpg").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"obj/p9\.jpg: no such picture"):
        load(tmp_path, test_portion=0)


def test_masks_beside_the_pictures_of_a_yolo_folder_do_not_train(tmp_path):
    yolo(tmp_path, lambda n: (f"images/train/{n}.jpg", f"labels/train/{n}.txt"), TRAIN)
    for name in TRAIN:
        write_picture(tmp_path / f"images/train/masks/{name}.png")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\n")
    assert len(load(tmp_path, test_portion=0)) == len(TRAIN)


@pytest.mark.parametrize("name", ["mask", "vis", "previews"])
def test_a_class_may_have_the_name_of_what_is_made(tmp_path, name):
    """Folders of classes whose pictures are numbered alike, each with its label file."""
    for folder in (name, "other"):
        yolo(
            tmp_path,
            lambda n, folder=folder: (f"images/train/{folder}/{n}.jpg", f"labels/train/{folder}/{n}.txt"),
            TEST,
        )
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images/train\n")
    found = load(tmp_path, test_portion=0)
    assert sum(len(found.truth.of(i)["labels"]) for i in range(len(found))) == 2


def test_two_kinds_of_camera_are_told_apart_by_nobody(tmp_path):
    xml_files(tmp_path, lambda split, name: (f"Ir/{name}.jpg", f"Annotation/{name}.xml"))
    for name in (*TRAIN, *TEST):
        write_picture(tmp_path / f"Vis/{name}.jpg")
    with pytest.raises(UserError, match="expected VOC"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["predictions.json", "detections.json"])
def test_what_a_detector_found_does_not_train(tmp_path, name):
    """A COCO file of such a name counts where there is nothing else."""
    xml_files(tmp_path, lambda split, name: (f"{split}/{name}.jpg", f"{split}/{name}.xml"))
    write_coco(tmp_path / name, {"p1": [("cat", 1, 1, 9, 9)]}, IDS)
    as_read(tmp_path, "VOC")


def test_a_text_beside_a_picture_need_not_be_a_label_file(tmp_path):
    yolo(tmp_path, lambda n: (f"images/{n}.jpg", f"labels/{n}.txt"), TRAIN)
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images\n")
    (tmp_path / "images/p1.txt").write_text("a photo of a cat")
    assert ids(load(tmp_path, test_portion=0)) == sorted(TRAIN)
