import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lib.config import AugmentConfig
from lib.transforms import (
    GREY,
    EvalTransform,
    TrainTransform,
    View,
    distort,
    draw_distortion,
    random_iou_crop,
    random_zoom_out,
    resize_view,
)

seeds = st.integers(0, 2**31)


def random_boxes(width, height, count, seed=0):
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values
    boxes = corners.flatten(1) * torch.tensor([width, height, width, height])
    return boxes[(boxes[:, 2] - boxes[:, 0] > 2) & (boxes[:, 3] - boxes[:, 1] > 2)]


def smooth_picture(width, height):
    y, x = np.mgrid[:height, :width] / 12
    waves = [np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(y)]
    return torch.from_numpy(np.stack(waves) * 60 + 128).to(torch.uint8)


def slow_iou_crop(view, boxes, rule):
    """v2.RandomIoUCrop's loop, trial by trial, on the random numbers in the order `random_iou_crop` draws them."""
    while True:
        least_iou = rule.options[int(torch.randint(len(rule.options), ()))]
        if least_iou >= 1:
            return view, torch.ones(len(boxes), dtype=torch.bool)
        for a, b, c, d in torch.rand(rule.trials, 4).double().tolist():
            width = int(view.width * (rule.min_scale + (rule.max_scale - rule.min_scale) * a))
            height = int(view.height * (rule.min_scale + (rule.max_scale - rule.min_scale) * b))
            if not width or not height or not rule.min_aspect_ratio <= width / height <= rule.max_aspect_ratio:
                continue
            left, top = view.left + int((view.width - width) * c), view.top + int((view.height - height) * d)
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2
            low, high = torch.tensor([left, top]), torch.tensor([left + width, top + height])
            inside = ((low < centres) & (centres < high)).all(1)
            crop = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
            if inside.any() and box_iou(boxes[inside], crop).max() >= least_iou:
                return View(left, top, width, height), inside


@given(seed=seeds, count=st.integers(1, 6))
@settings(max_examples=25)
def test_iou_crop_is_the_first_trial_that_the_slow_loop_accepts(seed, count):
    view, boxes, rule = View(-30, -20, 200, 150), random_boxes(120, 100, count, seed), v2.RandomIoUCrop()
    if len(boxes) == 0:
        return
    torch.manual_seed(seed)
    expected, expected_seen = slow_iou_crop(view, boxes, rule)
    torch.manual_seed(seed)
    crop, seen = random_iou_crop(view, boxes, rule)
    assert crop == expected and torch.equal(seen, expected_seen)


def test_iou_crop_follows_the_law_of_v2():
    boxes, rule, draws = random_boxes(120, 100, 4, seed=1), v2.RandomIoUCrop(), 100
    picture = tv_tensors.Image(torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 100, 120))
    framed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(100, 120))
    torch.manual_seed(0)
    theirs = np.array([rule(picture, framed)[0].shape[-2:] for _ in range(draws)])
    ours = [random_iou_crop(View(0, 0, 120, 100), boxes, rule)[0] for _ in range(draws)]
    ours = np.array([(view.height, view.width) for view in ours])
    error = np.sqrt((theirs.var(0) + ours.var(0)) / draws)
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 4 * error).all()
    whole = [(sizes == (100, 120)).all(1).mean() for sizes in (theirs, ours)]
    assert abs(whole[0] - whole[1]) < 4 * np.sqrt(0.5 / draws)


@given(seed=seeds, p=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=25)
def test_zoom_out_is_that_of_v2(seed, p):
    width, height, boxes = 40, 30, random_boxes(40, 30, 3)
    rule = v2.RandomZoomOut(p=p)
    torch.manual_seed(seed)
    framed = rule(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)))
    torch.manual_seed(seed)
    view = random_zoom_out(width, height, rule)
    assert framed.canvas_size == (view.height, view.width)
    offset = torch.tensor([view.left, view.top, view.left, view.top])
    torch.testing.assert_close(framed.as_subclass(torch.Tensor), boxes - offset, atol=1e-4, rtol=0)


def render(image, boxes, view, size):
    patch, placed, padding = resize_view(image, boxes, view, size)
    return F.pad(patch, padding, fill=GREY), F.pad(placed, padding).as_subclass(torch.Tensor)


def render_with_v2(image, boxes, view, size):
    """The whole canvas is made, then cropped, then resized."""
    height, width = image.shape[-2:]
    left, top = max(-view.left, 0), max(-view.top, 0)
    margin = [left, top, max(view.left + view.width - width, 0), max(view.top + view.height - height, 0)]
    framed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
    whole = v2.Compose([v2.Pad(margin, fill=GREY)])
    canvas, framed = whole(tv_tensors.Image(image), framed)
    where = (view.top + top, view.left + left, view.height, view.width)
    canvas, framed = F.crop(canvas, *where), F.crop(framed, *where)
    resized = F.resize(canvas, [size, size], antialias=True), F.resize(framed, [size, size])
    return resized[0], resized[1].as_subclass(torch.Tensor)


@pytest.mark.parametrize("view", [View(0, 0, 90, 70), View(13, 7, 50, 41), View(30, 0, 60, 70)])
@pytest.mark.parametrize("size", [32, 128])
def test_a_view_inside_the_picture_is_crop_and_resize(view, size):
    image, boxes = smooth_picture(90, 70), random_boxes(90, 70, 5)
    ours, theirs = render(image, boxes, view, size), render_with_v2(image, boxes, view, size)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("view", [View(-40, -25, 200, 160), View(-10, 20, 60, 60), View(-200, -100, 360, 280)])
def test_a_view_beyond_the_picture_is_the_v2_canvas_up_to_a_pixel(view):
    image, boxes, size = smooth_picture(90, 70), random_boxes(90, 70, 5), 96
    ours, theirs = render(image, boxes, view, size), render_with_v2(image, boxes, view, size)
    assert ours[0].shape == (3, size, size)
    assert (ours[1] - theirs[1]).abs().max() < 1
    difference = (ours[0].float() - theirs[0].float()).abs()
    assert difference.mean() < 4
    grey = [float((picture == GREY).all(0).float().mean()) for picture in (ours[0], theirs[0])]
    assert abs(grey[0] - grey[1]) < 0.04


def coloured_picture():
    """Six rectangles, each of the colour 40 x its label, on black."""
    image, boxes = torch.zeros(3, 120, 160, dtype=torch.uint8), []
    for label in range(1, 7):
        x, y = 52 * ((label - 1) % 3) + 4, 58 * ((label - 1) // 3) + 6
        image[:, y : y + 44, x : x + 40] = 40 * label
        boxes.append([x, y, x + 40, y + 44])
    return image, torch.tensor(boxes, dtype=torch.float32), torch.arange(1, 7)


def test_boxes_labels_and_pixels_stay_together():
    image, boxes, labels = coloured_picture()
    transform = TrainTransform(96)
    transform.distort = v2.Identity()
    seen, mirrored = set(), 0
    for seed in range(60):
        torch.manual_seed(seed)
        picture, found, names = transform(image, boxes, labels)
        assert len(found) == len(names)
        for (x1, y1, x2, y2), label in zip(found.tolist(), names.tolist(), strict=True):
            colour = picture[:, int((y1 + y2) * 48), int((x1 + x2) * 48)]
            assert (colour.int() - 40 * label).abs().max() <= 8
            seen.add(label)
        left_to_right = found[names.argsort()][:2, 0]
        mirrored += len(names) == 6 and bool(left_to_right[0] > left_to_right[1])
    assert seen == {1, 2, 3, 4, 5, 6} and mirrored > 5


@given(seed=seeds, width=st.integers(1, 90), height=st.integers(1, 90), count=st.integers(0, 4))
@settings(max_examples=25)
def test_any_picture_gives_a_valid_sample(seed, width, height, count):
    boxes = random_boxes(width, height, count, seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    torch.manual_seed(seed)
    picture, found, labels = TrainTransform(40)(image, boxes, torch.arange(len(boxes)))
    assert picture.shape == (3, 40, 40) and picture.dtype == torch.uint8 and type(picture) is torch.Tensor
    assert found.shape == (len(labels), 4) and found.dtype == torch.float32 and type(found) is torch.Tensor
    assert len(set(labels.tolist())) == len(labels)
    assert (found >= 0).all() and (found <= 1).all()
    assert (found[:, 2:] - found[:, :2] >= 1 / 40 - 1e-6).all()


def test_evaluation_only_resizes():
    image, boxes, labels = smooth_picture(90, 70), random_boxes(90, 70, 3), torch.tensor([2, 1, 2])
    picture, found, names = EvalTransform(50)(image, boxes, labels)
    assert torch.equal(picture, F.resize(image, [50, 50], antialias=True))
    torch.testing.assert_close(found, boxes / torch.tensor([90.0, 70, 90, 70]))
    assert torch.equal(names, labels)


def test_spawned_workers_can_have_them():
    image, boxes, labels = coloured_picture()
    for transform in (TrainTransform(32), EvalTransform(32)):
        torch.manual_seed(0)
        expected = transform(image, boxes, labels)
        torch.manual_seed(0)
        copied = pickle.loads(pickle.dumps(transform))(image, boxes, labels)
        assert all(torch.equal(a, b) for a, b in zip(expected, copied, strict=True))


def distort_with_v2(picture, settings):
    """One picture (3, H, W) by torchvision's functions, in floating point, the fill around its region as it was."""
    brightness, contrast, saturation, hue, contrast_first, *channels = settings[:8].tolist()
    left, top, right, bottom = settings[8:].int().tolist()
    x = F.adjust_brightness(picture[:, top:bottom, left:right] / 255, brightness)
    x = F.adjust_contrast(x, contrast) if contrast_first else x
    x = F.adjust_hue(F.adjust_saturation(x, saturation), hue)
    x = x if contrast_first else F.adjust_contrast(x, contrast)
    expected = picture.clone()
    expected[:, top:bottom, left:right] = (255 * F.permute_channels(x, [int(c) for c in channels])).round()
    return expected


def test_a_batch_is_distorted_as_each_picture_by_itself():
    torch.manual_seed(0)
    rule = v2.RandomPhotometricDistort(p=0.7)
    pictures = torch.randint(0, 256, (24, 3, 20, 30), dtype=torch.uint8)
    pictures[:8] = smooth_picture(30, 20)
    pictures[8] = 90  # grey has no hue
    region = torch.tensor([3.0, 2, 28, 19])
    settings = torch.stack([torch.cat([draw_distortion(rule), region]) for _ in pictures])
    settings[0, :8] = torch.tensor([1.0, 1, 1, 0, 0, 0, 1, 2])  # nothing was drawn
    found = distort(pictures, settings)
    expected = torch.stack([distort_with_v2(*pair) for pair in zip(pictures, settings, strict=True)])
    assert found.dtype == torch.uint8 and torch.equal(found[0], pictures[0])
    assert (found.int() - expected.int()).abs().max() <= 1


def test_distortions_follow_the_law_of_v2():
    rule, picture = v2.RandomPhotometricDistort(p=0.4), [torch.zeros(3, 1, 1)]
    draw = getattr(rule, "make_params", None) or rule._get_params
    torch.manual_seed(0)
    theirs = []
    for _ in range(1000):
        *factors, first, channels = draw(picture).values()  # brightness, contrast, saturation, hue
        factors = [neutral if x is None else x for x, neutral in zip(factors, (1.0, 1.0, 1.0, 0.0), strict=True)]
        theirs.append([*factors, first, *([0, 1, 2] if channels is None else channels.tolist())])
    theirs, ours = torch.tensor(theirs), torch.stack([draw_distortion(rule) for _ in range(1000)])
    for power in (1, 2, 3):
        a, b = theirs.double() ** power, ours.double() ** power
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * ((a.var(0) + b.var(0)) / 1000).sqrt()).all()


@given(seed=seeds)
@settings(max_examples=15)
def test_what_is_distorted_later_has_the_same_geometry(seed):
    image, boxes, labels = coloured_picture()
    torch.manual_seed(seed)
    expected = TrainTransform(96, AugmentConfig(distort=0))(image, boxes, labels)
    torch.manual_seed(seed)
    later = TrainTransform(96, AugmentConfig(distort=1), distort_later=True)
    picture, found, names, how = later(image, boxes, labels)
    # Up to the flip, which is drawn after the distortion.
    if not torch.equal(picture, expected[0]):
        assert torch.equal(picture.flip(2), expected[0])
    else:
        assert torch.equal(found, expected[1]) and torch.equal(names, expected[2])
    left, top, right, bottom = how[8:].int().tolist()
    distorted = distort(picture[None], how[None])[0]
    distorted[:, top:bottom, left:right] = GREY
    picture[:, top:bottom, left:right] = GREY
    assert (picture == GREY).all() and torch.equal(distorted, picture)
