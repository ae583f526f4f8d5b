from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from matplotlib import font_manager
from PIL import Image
from pycocotools.coco import COCO
from tiny_data import write_coco, write_picture, write_voc
from torchvision.ops import box_iou

from lib import UserError, inference
from lib.config import DataConfig
from lib.detector import load_detector
from lib.images import UnreadableImage, read_picture
from lib.inference import (
    EMPTY_LIST,
    SMALLEST_TEXT,
    append,
    class_colours,
    coco_results,
    draw,
    draw_pictures,
    find_own_ids,
    font_of,
    load,
    plan_jobs,
)
from lib.metrics import to_pixels
from lib.postprocess import Detections, add_nms, postprocess
from lib.transforms import EvalTransform

FOUND = Detections(
    torch.tensor([[0.1, 0.1, 0.5, 0.9], [0.6, 0.1, 0.9, 0.4]]), torch.tensor([0.9, 0.3]), torch.tensor([2, 1])
)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.jpg"
    write_picture(path, 120, 90)
    return path


@pytest.fixture(scope="module")
def exported(tiny_trained, tiny_graph, tmp_path_factory):
    """A folder with an exported detector, with and without NMS."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    folder = tmp_path_factory.mktemp("exported")
    onnx.save(tiny_graph, folder / "detector_raw.onnx")
    onnx.save(add_nms(tiny_graph, tiny_trained().config.postprocess), folder / "detector.onnx")
    return folder


def test_a_picture_gives_boxes_in_its_pixels_scores_and_names(tiny_checkpoint, picture):
    boxes, scores, names = load(tiny_checkpoint)(picture)
    assert len(boxes) == len(scores) == len(names) > 5 and set(names) <= {"cat", "dog", "eel"}
    assert boxes[:, 0::2].max() <= 120 and boxes[:, 1::2].max() <= 90 and boxes[:, 2].max() > 90
    # step by step, from the parts
    detector = load_detector(tiny_checkpoint)
    image = read_picture(str(picture))
    small, *_ = EvalTransform(64)(image, torch.zeros(0, 4), torch.zeros(0))
    with torch.no_grad():
        logits, offsets = detector.model(small[None])
    arguments = (detector.config.postprocess, detector.config.loss.type, detector.config.head.variances)
    (found,) = postprocess(logits, offsets, detector.model.priors, *arguments)
    torch.testing.assert_close(boxes, found.boxes * torch.tensor([120.0, 90.0, 120.0, 90.0]))
    torch.testing.assert_close(scores, found.scores)
    assert names == [detector.classes[k - 1] for k in found.labels]


def test_a_folder_a_string_and_a_tensor_do_as_well(tiny_checkpoint, picture):
    detector = load(str(tiny_checkpoint.parent), device="cpu")
    image = read_picture(str(picture))
    for one, other in zip(detector(str(picture)), detector(image), strict=True):
        assert one == other if isinstance(one, list) else torch.equal(one, other)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 8, 8),  # values in [0, 1] would find nothing, without a word
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8).numpy(),
        None,
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(tiny_checkpoint, wrong):
    with pytest.raises(UserError, match=r"^expected a picture.*, found "):
        load(tiny_checkpoint)(wrong)


def test_an_exported_file_gives_the_same(tiny_checkpoint, exported, picture):
    theirs, mine = load(tiny_checkpoint)(picture), load(exported / "detector.onnx")(picture)
    assert len(mine.scores) == len(theirs.scores)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=1e-5)
    same = (mine.boxes - theirs.boxes).abs().amax(1) < 1e-2  # equal scores may change places
    assert same.float().mean() > 0.95
    assert [a for a, s in zip(mine.names, same, strict=True) if s] == [
        b for b, s in zip(theirs.names, same, strict=True) if s
    ]
    onnx = load(exported / "detector.onnx")
    assert onnx.category_ids == (1, 7, 9) and onnx.threshold == 0.5
    assert load(tiny_checkpoint).threshold is None  # as in files of before there were any


def test_a_file_without_nms_finds_the_same(exported, picture):
    raw, whole = (load(exported / name)(picture) for name in ("detector_raw.onnx", "detector.onnx"))
    torch.testing.assert_close(raw.scores, whole.scores, rtol=0, atol=1e-6)
    assert sorted(raw.names) == sorted(whole.names)


def test_what_cannot_be_read_is_named(tiny_checkpoint, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match=r"bad\.jpg"):
        load(tiny_checkpoint)(bad)
    with pytest.raises(UserError, match=r"none\.pt: no such checkpoint"):
        load(tmp_path / "none.pt")


def test_pictures_are_drawn_and_their_detections_written(tiny_checkpoint, picture, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.open(picture).rotate(90, expand=True).save(turned, exif=exif)
    detector, out = load(tiny_checkpoint), tmp_path / "out"
    draw_pictures(detector, plan_jobs([bad, picture, turned], {}), out, 0.1)
    printed = capsys.readouterr().out
    assert "skipped: " in printed and "bad.jpg" in printed
    assert f"wrote 2 pictures and detections.json to {out}, skipped 1 that cannot be read" in printed
    boxes = sum(len(inference.visible(detector.detect_picture(read_picture(str(p))), 0.1)) for p in (picture, turned))
    best = max(detector(p).scores[0].item() for p in (picture, turned))
    assert f"drew {boxes} boxes; the highest score is {best:.3f}" in printed and boxes and "note" not in printed
    # An output, an id and a line in the list for each.
    listed = {Path(e["file_name"]): e for e in json.loads((out / "pictures.json").read_text())["images"]}
    assert set(listed) == {bad, picture, turned}
    results = json.loads((out / "detections.json").read_text())
    assert {r["category_id"] for r in results} <= {1, 7, 9}
    for path in (picture, turned):
        drawn = read_picture(str(out / listed[path]["drawn"]))
        assert drawn.shape == (3, 90, 120) and not Image.open(out / listed[path]["drawn"]).getexif().get(0x112)
        mine = [r for r in results if r["image_id"] == listed[path]["id"]]
        assert len(mine) == len(detector(path).scores) and mine[0]["score"] == detector(path).scores[0].item()
    # Once more: what it wrote itself it may write again. Nothing is above this threshold.
    draw_pictures(detector, plan_jobs([bad, picture, turned], {}), out, 1.0)
    assert "no detection reached --threshold 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 1 pictures could be read"):
        draw_pictures(detector, plan_jobs([bad], {}), tmp_path / "nothing", 0.1)


# Tiles


@pytest.mark.parametrize("tiles", ["1x1", "2x2", "3x1", "100", "64", "999"])
@pytest.mark.parametrize(("width", "height"), [(120, 90), (333, 101), (64, 640)])
def test_tiles_cover_the_picture_and_overlap(tiles, width, height):
    places = inference.tile_places(tiles, width, height)
    columns, rows = ({place[axis::2] for place in places} for axis in (0, 1))
    assert len(places) == len(set(places)) == len(columns) * len(rows)
    for spans, length in ((columns, width), (rows, height)):
        ordered = sorted(spans)
        assert ordered[0][0] == 0 and ordered[-1][1] == length
        sides = {end - start for start, end in ordered}
        assert len(sides) == 1
        for (_, end), (start, _) in itertools.pairwise(ordered):
            assert end - start >= 0.2 * max(sides) - 1
    if "x" in tiles:
        assert f"{len(columns)}x{len(rows)}" == tiles


@pytest.mark.parametrize("seed", range(5))
def test_what_is_found_in_tiles_has_the_pictures_coordinates_and_stands_once(seed):
    """Each object has a colour and is found wherever all of it is seen, which where tiles overlap is twice or more."""

    def detect(images):
        found = []
        for colour in images[0, 0].unique().tolist()[:-1]:  # the last one is white
            rows, columns = (images[0, 0] == colour).nonzero(as_tuple=True)
            box = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            if len(rows) == 12 * 9:
                found.append((box / 100, torch.tensor(colour / 255), torch.tensor(1 + colour % 3)))
        boxes, scores, labels = zip(*found, strict=True) if found else ([], [], [])
        nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        return [Detections(*map(torch.stack, (boxes, scores, labels))) if found else Detections(*nothing)]

    detector = inference.PictureDetector(("a", "b", "c"), (1, 2, 3), 100, detect, nms_threshold=0.5, tiles="100")
    generator = torch.Generator().manual_seed(seed)
    picture, expected = torch.full((3, 310, 270), 255, dtype=torch.uint8), []
    for colour, cell in enumerate(torch.randperm(18 * 20, generator=generator)[:60].tolist(), start=100):
        x, y = cell % 18 * 15, cell // 18 * 15 + int(torch.randint(0, 6, (), generator=generator))
        picture[:, y : y + 9, x : x + 12] = colour
        expected.append([x, y, x + 12, y + 9, colour / 255])
    found = detector(picture)
    assert sorted(found.scores.tolist(), reverse=True) == found.scores.tolist()
    rows = torch.cat((found.boxes, found.scores[:, None]), 1)
    torch.testing.assert_close(rows, torch.tensor(expected[::-1]), rtol=0, atol=1e-3)


def test_tiles_of_a_detector_equal_a_slow_loop_and_one_tile_is_the_picture(tiny_checkpoint, exported):
    image = torch.randint(0, 256, (3, 150, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in (tiny_checkpoint, exported / "detector.onnx"):
        detector = load(name)
        whole = detector(image)
        tiled = dataclasses.replace(detector, tiles="2x1")
        found = []
        for left, top, right, bottom in inference.tile_places("2x1", 200, 150):
            boxes, scores, names = detector(image[:, top:bottom, left:right])
            found += zip(scores.tolist(), names, (boxes + torch.tensor([left, top, left, top])).tolist(), strict=True)
        kept = []
        for score, label, box in sorted(found, reverse=True):
            same = torch.tensor([other for _, name, other in kept if name == label]).reshape(-1, 4)
            if not (box_iou(torch.tensor([box]), same) > 0.5).any():
                kept.append((score, label, box))
        boxes, scores, names = tiled(image)
        assert scores.tolist() == [score for score, _, _ in kept] and names == [label for _, label, _ in kept]
        torch.testing.assert_close(boxes, torch.tensor([box for _, _, box in kept]), rtol=0, atol=1e-3)
        assert 0 < len(kept) < len(found)
        for one, other in zip(dataclasses.replace(detector, tiles="200")(image), whole, strict=True):
            assert one == other if isinstance(one, list) else torch.equal(one, other)


@pytest.mark.parametrize("text", ["0x2", "2x", "x2", "2x2x2", "5", "-64", "100x1", "a"])
def test_tiles_that_are_none_are_named(text):
    with pytest.raises(UserError, match=f"--tiles {text}: expected columns x rows"):
        inference.tile_places(text, 100, 100)


def content(folder: Path) -> dict:
    """Every file and link below a folder."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {p: (p.is_dir() or p.read_bytes(), p.lstat().st_ino, p.lstat().st_mtime_ns) for p in files}


def test_a_picture_that_is_too_long_for_a_jpeg_is_skipped(tiny_checkpoint, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "LONGEST_JPEG", 200)
    Image.new("RGB", (201, 20)).save(tmp_path / "long.png")
    draw_pictures(load(tiny_checkpoint), plan_jobs([tmp_path / "long.png", picture], {}), tmp_path / "out", 0.1)
    printed = capsys.readouterr().out
    assert "long.png: has a side of more than 200 pixels" in printed and "wrote 1 pictures" in printed
    assert [path.name for path in (tmp_path / "out").rglob("*.jpg")] == ["photo.jpg"]


@pytest.mark.parametrize(
    "case",
    [
        "same",
        "link to it",
        "inner link",
        "link",
        "hard link",
        "foreign picture",
        "foreign results",
        "a file",
        "a file within",
    ],
)
def test_nothing_is_written_where_it_reads_through_links_or_over_foreign_files(tiny_checkpoint, tmp_path, case):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name in ("a/x.jpg", "b/x.jpg", "y.jpg"):
        write_picture(photos / name, 60, 40)
    paths = sorted(photos.rglob("*.jpg"))
    if case == "same":
        out = photos
    elif case == "link to it":
        out.symlink_to(photos)
    elif case == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        if case == "inner link":
            (out / "a").symlink_to(photos / "a")
        elif case == "a file within":
            (out / "a").write_text("mine")
        elif case == "link":
            (out / "y.jpg").symlink_to(photos / "y.jpg")
        elif case == "hard link":
            os.link(photos / "y.jpg", out / "y.jpg")
        elif case == "foreign picture":
            write_picture(out / "b" / "x.jpg")
        else:
            (out / "detections.json").write_text("[]")
    before = content(tmp_path)
    with pytest.raises(UserError, match="name another folder with --out"):
        draw_pictures(load(tiny_checkpoint), plan_jobs(paths, {}), out, 0.1)
    assert content(tmp_path) == before


def test_every_picture_has_an_id_and_an_output_of_its_own(tmp_path):
    names = [
        "a.jpg",
        "a.png",
        "A.png",
        "a.png.jpg",
        "cam1/0001.jpg",
        "cam2/0001.jpg",
        "cam2/7.jpg",
        "cam2/../b.jpg",
        "9" * 30 + ".jpg",
    ]
    paths = [tmp_path / name for name in names]
    jobs = plan_jobs(paths, {})
    targets = "a.jpg a.png.jpg A_2.jpg a.png.jpg.jpg cam1/0001.jpg cam2/0001.jpg cam2/7.jpg b.jpg"
    assert " ".join(str(job.target) for job in jobs) == f"{targets} {'9' * 30}.jpg"
    ids = [job.image_id for job in jobs]
    assert ids == ["a", "a.png", "A_2", "a.png.jpg", "cam1/0001", "cam2/0001", 7, "b", "9" * 30]
    # The data set's own ids first, each once.
    jobs = plan_jobs(paths, {paths[0]: 7, paths[1]: 7, paths[3]: "b"})
    assert [job.image_id for job in jobs][:4] == [7, "a.png", "A_2", "b"]
    assert len({job.image_id for job in jobs}) == len(jobs)
    # Its id and its name are those of other pictures.
    ids = [job.image_id for job in plan_jobs(paths[:4], {paths[1]: "a", paths[2]: "a.jpg"})]
    assert ids == [str(paths[0]), "a", "a.jpg", "a.png.jpg"]
    (alone,) = plan_jobs([tmp_path / "000000000139.jpg"], {})
    assert alone.image_id == 139 and str(alone.target) == "000000000139.jpg"


def test_pictures_of_the_data_set_have_its_own_ids(tmp_path, capsys):
    boxes = {stem: [("cat", 1, 1, 30, 20)] for stem in ("p", "q")}
    write_voc(tmp_path / "voc", boxes, name="test")
    write_coco(tmp_path / "coco" / "test.json", boxes, {"cat": 3})
    for stem in boxes:
        write_picture(tmp_path / "coco" / "test" / f"{stem}.jpg")
        write_picture(tmp_path / "coco" / "other" / f"{stem}.jpg")
    coco = DataConfig(
        dataset_type="coco",
        root=str(tmp_path / "coco"),
        classes=["cat"],
        test_annotations="test.json",
        test_images="test",
    )
    coco.train_annotations, coco.train_images = coco.test_annotations, coco.test_images
    pictures = sorted((tmp_path / "coco").rglob("*.jpg"))
    assert find_own_ids(pictures, coco) == {pictures[2]: 10, pictures[3]: 11}
    voc = DataConfig(dataset_type="voc", root=str(tmp_path / "voc"), classes=["cat"])
    link = tmp_path / "link.jpg"
    link.symlink_to(tmp_path / "voc" / "JPEGImages" / "q.jpg")
    assert find_own_ids([link], voc) == {link: "q"} and find_own_ids(pictures, voc) == {}
    assert not capsys.readouterr().out  # nothing is said of training data, which that picture does not need
    (tmp_path / "voc" / "Annotations" / "q.xml").unlink()
    assert find_own_ids([link], voc) == {} and "note: no image ids of the test annotations" in capsys.readouterr().out
    missing = dataclasses.replace(voc, dataset_type="shapes", root=str(tmp_path / "voc" / "JPEGImages"))
    before = content(tmp_path)
    assert find_own_ids([link], missing) == {} and content(tmp_path) == before


def test_the_list_of_results_is_whole_at_any_time(tmp_path):
    path, expected = tmp_path / "list.json", []
    path.write_text(EMPTY_LIST)
    for count in (0, 2, 0, 1, 3):
        records = [{"image_id": "é", "n": i} for i in range(count)]
        append(path, records)
        expected += records
        assert json.loads(path.read_text()) == expected
    assert path.read_text().count("\n") == 1 + len(expected) + 1


def test_a_name_in_another_script_is_drawn_with_a_font_that_has_its_letters(
    tiny_checkpoint, picture, tmp_path, monkeypatch, capsys
):
    standard = font_of("cat")
    assert standard.endswith("DejaVuSans.ttf") and font_of("Кошка") == font_of("القط\u200d") == standard
    bold = standard.replace("Sans.ttf", "Sans-Bold.ttf")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(broken), bold])
    names = ("𝗖𝗮𝘁", "\ue000猫\n2")  # DejaVu Sans has no such letters; its bold style has the first ones
    font_of.cache_clear()
    assert font_of(names[0]) == bold and font_of(names[1]) is None
    image = torch.full((3, 240, 320), 40, dtype=torch.uint8)
    as_number = draw(image, FOUND, ["class 1", "class 2"], 0.2)
    with_letters = draw(image, FOUND, names, 0.2)
    assert not torch.equal(with_letters, as_number)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    font_of.cache_clear()
    assert torch.equal(draw(image, FOUND, names, 0.2), as_number)
    detector = load(tiny_checkpoint)
    detector.classes = ("cat", *names)
    draw_pictures(detector, plan_jobs([picture], {}), tmp_path / "out", 0.1)
    assert capsys.readouterr().out.count("no font here has their letters") == 1
    font_of.cache_clear()


@pytest.mark.parametrize("count", [1, 2, 5, 20, 80])
def test_every_class_has_its_colour(count):
    colours = class_colours(count)
    assert len(set(colours)) == count and all(0 <= c <= 255 for colour in colours for c in colour)


def test_drawing_leaves_the_picture_alone_and_shows_what_is_above_the_threshold():
    image = torch.full((3, 240, 320), 40, dtype=torch.uint8)
    before = image.clone()
    some, all_of_them = draw(image, FOUND, ["cat", "dog"], 0.4), draw(image, FOUND, ["cat", "dog"], 0.2)
    assert torch.equal(image, before) and some.shape == image.shape and some.dtype == torch.uint8
    right = slice(180, 300)  # where the second box is
    assert torch.equal(some[:, :100, right], image[:, :100, right])
    assert not torch.equal(all_of_them[:, :100, right], image[:, :100, right])
    cat, dog = (torch.tensor(colour, dtype=torch.uint8) for colour in class_colours(2))
    assert torch.equal(some[:, 160, 32], dog) and torch.equal(all_of_them[:, 80, 192], cat)


@pytest.mark.parametrize("side", [100, 400, 1200])
@pytest.mark.parametrize("top", [0.0, 0.5])
@pytest.mark.parametrize("left", [0.0, 0.9])
def test_a_label_is_whole_within_the_picture_and_grows_with_it(side, top, left):
    """Were it cut off, it would have fewer pixels than where there is room."""

    def label(x, y):
        """Number of pixels of the label's own, none of them the box's: fill, letters and what blends between."""
        one = Detections(torch.tensor([[x, y, x + 0.1, y + 0.3]]), torch.tensor([0.9]), torch.tensor([2]))
        drawn = draw(torch.full((3, side, side), 9, dtype=torch.uint8), one, ["cat", "dog"], 0.4)
        changed = (drawn != 9).any(0)
        rows = changed.sum(1) > 0.12 * side  # wider than the box
        return int(changed[rows].sum()), int(rows.sum())

    (pixels, rows), (expected, height) = label(left, top), label(0.3, 0.5)
    assert rows == pytest.approx(height, abs=1 + side // 150) and pixels == pytest.approx(expected, rel=0.1)
    assert rows >= max(SMALLEST_TEXT, side // 28)


def test_a_label_is_read_on_bright_and_dark_colours():
    image = torch.full((3, 200, 200), 90, dtype=torch.uint8)
    for count in (1, 3):
        names, palette = [f"class {i}" for i in range(count)], class_colours(count)
        for k, colour in enumerate(palette, start=1):
            one = Detections(torch.tensor([[0.1, 0.5, 0.9, 0.9]]), torch.tensor([0.9]), torch.tensor([k]))
            drawn = draw(image, one, names, 0.5)
            dark, bright = (drawn < 40).all(0).sum(), (drawn > 215).all(0).sum()
            light_label = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128
            assert (dark if light_label else bright) > 20 and (bright if light_label else dark) == 0


def test_drawing_nothing_is_the_picture():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(draw(image, FOUND, ["cat", "dog"], 0.95), image)


def test_pycocotools_reads_the_results():
    results = coco_results("dog_1", to_pixels(FOUND, 80, 60), [17, 18])
    truth = COCO()
    truth.dataset = {
        "images": [{"id": "dog_1"}],
        "categories": [{"id": 17}, {"id": 18}],
        "annotations": [],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        loaded = truth.loadRes(results)
    annotations = loaded.loadAnns(loaded.getAnnIds(imgIds=["dog_1"]))
    assert [a["category_id"] for a in annotations] == [18, 17]
    assert annotations[0]["bbox"] == pytest.approx([8, 6, 32, 48]) and annotations[0]["area"] == pytest.approx(32 * 48)
    assert annotations[0]["score"] == FOUND.scores[0].item()
