"""Whatever a label file holds, its reader gives values or a UserError."""

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import read_coco, read_label, write_picture

from lib import UserError
from lib.config import DataConfig
from lib.datasets import load_annotations
from lib.images import split_of
from lib.labels import Faults, class_name, read_lines, read_voc_xml, read_yolo_txt, read_yolo_yaml
from lib.layouts import Pair


@pytest.fixture(scope="module", autouse=True)
def few_warnings():
    logger = logging.getLogger("lib.labels")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


ODD = st.sampled_from(
    [
        None,
        True,
        "",
        "x",
        "1",
        -1,
        0,
        1,
        2.5,
        2**53 + 1,
        10**30,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        [],
        {},
        "\ud800",
        "a\0b",
    ]
)
PLAIN = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5
)


def entries(**good):
    """Dicts with some keys missing and some values odd."""
    return st.fixed_dictionaries({}, optional={key: st.just(value) | PLAIN for key, value in good.items()}) | st.just(
        good
    )


DOCUMENT = st.fixed_dictionaries(
    {},
    optional={
        "images": st.lists(entries(id=1, file_name="a.jpg", width=48, height=32), max_size=3) | PLAIN,
        "annotations": st.lists(
            entries(id=1, image_id=1, category_id=1, bbox=[1, 2, 3, 4], area=12, iscrowd=0), max_size=3
        )
        | PLAIN,
        "categories": st.lists(entries(id=1, name="cat", supercategory="x"), max_size=3) | PLAIN,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    write_picture(folder / "images" / "a.jpg")
    return folder


def tried(read):
    """The result of `read`, or None where it raises UserError."""
    try:
        return read()
    except UserError as error:
        assert str(error)
        return None


@given(document=DOCUMENT | PLAIN, on_error=st.sampled_from(["raise", "skip"]))
@settings(max_examples=60)
def test_any_json_is_read_or_refused(folder, document, on_error):
    (folder / "x.json").write_text(json.dumps(document))
    found = tried(lambda: read_coco(folder / "x.json", folder / "images", (), on_error))
    if found is not None:
        assert found.truth.boxes.isfinite().all() and found.truth.area.isfinite().all() and found.fingerprint()


@given(data=st.binary(max_size=40), at=st.integers(0, 400), cut=st.integers(0, 400))
@settings(max_examples=50)
def test_damaged_files_are_read_or_refused(folder, data, at, cut):
    files = {
        "x.json": json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}),
        "x.xml": "<annotation><filename>a.jpg</filename><size><width>48</width></size><object><name>cat</name>"
        "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>",
        "x.txt": "0 .5 .5 .1 .1\n1 0.1 0.1 0.2 0.2 0.3 0.1\n",
        "x.yaml": "names: [cat, dog]\ntrain: images\nval: [images]\n",
    }
    for name, text in files.items():
        whole = text.encode()
        (folder / name).write_bytes(whole[: at % len(whole)] + data + whole[at % len(whole) + cut :])
    tried(lambda: read_coco(folder / "x.json", folder / "images", (), "skip"))
    picture = str(folder / "images" / "a.jpg")
    tried(lambda: read_label(folder, Pair("a", picture, folder / "x.xml")))
    tried(lambda: read_label(folder, Pair("a", picture, folder / "x.txt"), {0: "cat"}, "skip"))
    tried(lambda: read_yolo_yaml(folder / "x.yaml"))
    assert all(isinstance(line, str) for line in read_lines(folder / "x.txt"))


TEXTS = st.text(max_size=8) | st.sampled_from(
    ["1", "nan", "-inf", "1e999", "9" * 5000, "10", "20", " 7 ", "Unspecified"]
)


@given(values=st.lists(TEXTS, min_size=8, max_size=8))
@settings(max_examples=50)
def test_any_text_in_an_xml_is_read_or_refused(folder, values):
    texts = ["".join(c for c in value if c.isalnum() or c in " .-+") for value in values]
    tags = ("width", "height", "name", "difficult", "xmin", "ymin", "xmax", "ymax")
    w, h, n, d, *corners = (f"<{tag}>{text}</{tag}>" for tag, text in zip(tags, texts, strict=True))
    xml = f"<annotation><size>{w}{h}</size><object>{n}{d}<bndbox>{''.join(corners)}</bndbox></object></annotation>"
    (folder / "x.xml").write_text(xml, encoding="utf-8")
    found = tried(lambda: read_label(folder, Pair("a", str(folder / "images/a.jpg"), folder / "x.xml")))
    assert found is None or (found.truth.boxes.isfinite().all() and found.sizes.min() > 0)


@given(lines=st.lists(st.lists(TEXTS, max_size=10).map(" ".join), max_size=4))
@settings(max_examples=50)
def test_any_yolo_text_is_read_or_skipped(folder, lines):
    (folder / "y.txt").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    for _, box, _ in read_yolo_txt(folder / "y.txt", {}, (1, 1), Faults("skip")):
        assert all(-2 <= corner <= 3 for corner in box)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"images":' * 50_000,
        b"1" * 5000,
        b'{"images": [{"id": ' + b"9" * 5000 + b"}]}",
        b"\xff\xfe\x00",
        b"",
        b"null",
    ],
)
def test_json_that_python_cannot_take_is_refused(folder, content):
    (folder / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json"):
        read_coco(folder / "x.json", folder / "images")


LAUGHS = b"".join(b'<!ENTITY a%d "%s">' % (i, b"&a%d;" % (i - 1) * 20) for i in range(1, 9))
BOMB = b'<!DOCTYPE a [<!ENTITY a0 "ha">' + LAUGHS + b"]><annotation><filename>&a8;</filename></annotation>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "cannot be read"),
        (b"<a>" * 20_000 + b"</a>" * 20_000, "expected <annotation>"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "cannot be read"),
        (b"<annotation>\xe4<annotation>", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_xml_that_is_none_of_vocs_is_refused(folder, content, message):
    (folder / "x.xml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_voc_xml(folder / "x.xml", Faults())


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "names: {0: {1: 2}}\ntrain: x",
        "names: [cat]\ntrain: {a: b}",
        "[" * 5000,
        "[" * 500,
        "names: 3",
        "\t",
        "names:\n  x: cat",
    ],
)
def test_yaml_that_is_no_data_set_is_refused(folder, text):
    (folder / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        read_yolo_yaml(folder / "x.yaml")


def test_yaml_scalars_stay_text(folder):
    (folder / "x.yaml").write_text("names: [yes, 1, null, 'cat ']\ntrain: images\nvalid: [a, b]\n")
    names, splits, _ = read_yolo_yaml(folder / "x.yaml")
    assert list(names.values()) == ["yes", "1", "null", "cat"]
    assert splits == {"train": ["images"], "val": ["a", "b"], "test": []}


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "d").mkdir(exist_ok=True)
    for read in (
        lambda: read_coco(folder / "d", folder / "images"),
        lambda: read_voc_xml(folder / "d", Faults()),
        lambda: read_yolo_txt(folder / "d", {}, (1, 1), Faults()),
        lambda: read_yolo_yaml(folder / "d"),
        lambda: read_lines(folder / "d"),
    ):
        with pytest.raises(UserError, match="directory"):
            read()


def test_names_are_one_printable_line():
    assert [class_name(x) for x in (3, 2.5, " a\n\tb ", "\x1b[31m", "\ud800", None, True, [], "猫")] == [
        "3",
        "2.5",
        "a b",
        "[31m",
        "",
        "",
        "",
        "",
        "猫",
    ]


def test_polygons_become_their_boxes_and_wrong_lines_are_named(folder):
    (folder / "y.txt").write_text(
        "0 0.5 0.5 0.2 0.4\n\n2 0.1 0.2 0.3 0.2 0.2 0.6\n1 0.5 0.5\n1 200 10 30 30\nx 1 1 1 1\n-1 0 0 0 0\n"
    )
    faults = Faults("skip")
    found = read_yolo_txt(folder / "y.txt", {0: "cat", 2: "dog"}, (10, 100), faults)
    assert [label for label, _, _ in found] == ["cat", "dog"]
    assert found[0][1] == pytest.approx((4, 30, 6, 70)) and found[1][1] == pytest.approx((1, 20, 3, 60))
    assert ["line 4" in faults.named[0], "shares" in faults.named[1], faults.counts["object", "malformed line"]] == [
        True,
        True,
        4,
    ]


@pytest.mark.parametrize("shape, numbers", [("[2, 2]", "0.1 0.1 0.9 0.9"), ("[2, 3]", "0.1 0.1 2 0 0 0")])
def test_keypoints_behind_a_yolo_box_are_not_a_polygon(tmp_path, shape, numbers):
    """As of the public pose data sets, whose data.yaml says how many there are."""
    for split in ("train", "val"):
        write_picture(tmp_path / f"images/{split}/a.jpg")
        (tmp_path / f"labels/{split}").mkdir(parents=True)
        (tmp_path / f"labels/{split}/a.txt").write_text(f"0 0.5 0.5 0.25 0.5 {numbers}\n")
    text = f"names: [tiger]\ntrain: images/train\nval: images/val\nkpt_shape: {shape}\n"
    (tmp_path / "data.yaml").write_text(text)
    found = load_annotations(DataConfig(root=str(tmp_path)), "train")
    width, height = found.sizes[0].tolist()
    expected = [0.375 * width, 0.25 * height, 0.625 * width, 0.75 * height]
    assert found.truth.of(0)["boxes"].tolist() == [pytest.approx(expected)]


def test_all_faults_come_in_one_list(tmp_path):
    for i in range(30):
        write_picture(tmp_path / f"{i:02d}.jpg")
        (tmp_path / f"{i:02d}.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    with pytest.raises(UserError) as error:
        load_annotations(DataConfig(root=str(tmp_path)), "train")
    lines = str(error.value).splitlines()
    assert "30 faults (data.on_error=skip" in lines[0] and len(lines) == 21
    assert all(
        f"{i:02d}.xml: malformed object: expected <name> and the numbers <xmin>" in lines[1 + i] for i in range(20)
    )
    with pytest.raises(
        UserError, match=r"30 of 30 objects left out \(30 malformed object\), more than data.max_skipped=0.1"
    ):
        load_annotations(DataConfig(root=str(tmp_path), on_error="skip"), "train")


@pytest.mark.parametrize(
    ("paths", "split"),
    [
        (("trainset/a.jpg",), "train"),
        (("testdata/x",), "test"),
        (("dev/a.xml", "images"), "val"),
        (("train/default/a",), "train"),
        (("test/default/a",), "test"),
        (("default/a",), "train"),
        (("dataset/asset/a",), ""),
    ],
)
def test_words_of_a_split(paths, split):
    assert split_of(*paths) == split


def test_windows_writes_quotes_where_latin1_has_line_breaks(tmp_path):
    (tmp_path / "classes.txt").write_bytes("men’s shoe\nand…more\n".encode("cp1252"))
    assert read_lines(tmp_path / "classes.txt") == ["men’s shoe", "and…more"]


@pytest.mark.parametrize(
    ("head", "encoding"),
    [("", "cp1252"), ('\n<?xml version="1.0"?>\n', "utf-8"), ('<?xml version="1.0" encoding="gb2312"?>', "gb2312")],
)
def test_xml_of_an_encoding_that_the_parser_does_not_know(tmp_path, head, encoding):
    name = "猫" if encoding == "gb2312" else "Käfer"
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    text = f"{head}<annotation><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert read_voc_xml(tmp_path / "a.xml", Faults()).objects == [(name, (0, 0, 9, 9), False)]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_coco_json_that_is_not_utf8_and_has_numbers_as_text(tmp_path, encoding):
    """A box that was drawn from the right to the left is put right, and said."""
    annotation = {"image_id": 1, "category_id": 1, "bbox": ["30", "20.0", -20, "10"], "iscrowd": "0", "area": "200"}
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [annotation]}
    text = json.dumps({**content, "categories": [{"id": 1, "name": "Käfer"}]}, ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    write_picture(tmp_path / "a.jpg")
    found = load_annotations(DataConfig(root=str(tmp_path), test_portion=0), "train")
    assert found.classes == ("Käfer",) and found.truth.boxes.tolist() == [[10, 20, 30, 30]]
    assert any("1 boxes had their corners in the wrong order" in note for note in found.notes)


def yolo_line(folder, line, yaml=""):
    write_picture(folder / "images/a.jpg")
    (folder / "labels").mkdir()
    (folder / "labels/a.txt").write_text(line)
    (folder / "data.yaml").write_text(f"names: [face]\ntrain: images\n{yaml}")
    return load_annotations(DataConfig(root=str(folder), test_portion=0), "train")


def test_a_turned_box_may_reach_beyond_the_picture(tmp_path):
    assert yolo_line(tmp_path, "0 -.2 .5 .2 .2 .5 .6 .1 1.2").truth.boxes.shape == (1, 4)


def test_a_polygon_is_said_to_be_one(tmp_path):
    """A box with landmarks behind it, without kpt_shape, looks the same: whoever has that sees it in the note."""
    notes = yolo_line(tmp_path, "0 0.1 0.1 0.9 0.1 0.5 0.8").notes
    assert any("1 objects are polygons, whose bounding boxes are used" in note for note in notes)


@pytest.mark.parametrize(
    ("line", "yaml"),
    [
        ("0 0.5 0.5 0.2 0.3 -1 -1 -1 -1", ""),  # landmarks that are not there
        ("0 0.5 0.5 0.2 0.3 0.9 7", ""),  # a tracker's score and number
        ("0 0.5 0.5 0.2 0.3 0.1 0.1 0.9 0.9", "kpt_shape: [2, 3]"),
    ],
)
def test_numbers_that_are_neither_a_box_nor_a_polygon(tmp_path, line, yaml):
    with pytest.raises(UserError, match=r"a\.txt: line 1: expected a class, and shares of the picture"):
        yolo_line(tmp_path, line, yaml)


def test_pictures_without_a_label_file_are_counted(tmp_path):
    write_picture(tmp_path / "images/b.jpg")
    notes = yolo_line(tmp_path, "0 0.5 0.5 0.2 0.3").notes
    assert any("1 of 2 pictures have no label file, so they show no object" in note for note in notes)


def test_two_label_files_of_a_picture_that_differ(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.txt").write_text("0 0.5 0.5 0.2 0.4")
    with pytest.raises(UserError, match=r"a\.txt and .*images/a\.txt differ: which one is meant"):
        yolo_line(tmp_path, "0 0.5 0.5 0.2 0.3")
