import functools
import logging
import multiprocessing
import os
import pickle
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import read_voc, write_coco, write_voc
from torch.utils.data import Dataset

from lib import UserError, datasets, runtime
from lib.config import AugmentConfig, Config, DataConfig
from lib.datasets import (
    DetectionDataset,
    EpochSampler,
    collate,
    eval_loader,
    load_annotations,
    load_split,
    make_loader,
    refuse_seen,
    save_split,
    split_digest,
    split_indices,
    train_loader,
)
from lib.distributed import World
from lib.images import UnreadableImage
from lib.shapes import CLASSES
from lib.transforms import EvalTransform, TrainTransform

OBJECTS = {f"{i:03d}": [("cat", 5, 5, 30, 25), ("dog", 20, 4, 40, 28, 1)][: i % 3] for i in range(10)}

HERE = DataConfig(workers=0)
SKIP = DataConfig(workers=0, on_error="skip", max_skipped=1.0)


@pytest.fixture
def annotations(tmp_path):
    write_voc(tmp_path / "voc", OBJECTS)
    return read_voc(tmp_path / "voc", ["trainval"], ["cat", "dog"])


def voc_config(tmp_path, **options):
    return DataConfig(dataset_type="voc", root=str(tmp_path), **options)


def test_shapes_are_drawn_and_then_read(tmp_path):
    data = DataConfig(dataset_type="shapes", root=str(tmp_path / "shapes"), shapes_train=4, shapes_test=2)
    train, test = load_annotations(data, "train"), load_annotations(data, "test")
    assert (len(train), len(test)) == (4, 2) and train.classes == test.classes == CLASSES


def test_the_classes_of_the_test_set_are_those_of_the_training_set(tmp_path):
    write_voc(tmp_path, {"a": [("ant", 1, 1, 9, 9)], "b": [("dog", 1, 1, 9, 9)]})
    write_voc(tmp_path, {"c": [("dog", 1, 1, 9, 9)]}, "test")
    test = load_annotations(voc_config(tmp_path), "test")
    assert test.classes == ("ant", "dog") and test.objects.labels.tolist() == [2]
    write_voc(tmp_path, {"d": [("dig", 1, 1, 9, 9)]}, "test")
    with pytest.raises(UserError, match=r"d\.xml: unknown class 'dig' \(did you mean 'dog'"):
        load_annotations(voc_config(tmp_path), "test")


def test_coco_is_read_from_the_paths_of_the_configuration(tmp_path):
    write_voc(tmp_path, OBJECTS)
    write_coco(tmp_path / "a" / "train.json", OBJECTS, {"dog": 9, "cat": 4})
    write_coco(tmp_path / "a" / "test.json", {"001": OBJECTS["001"]}, {"dog": 9, "cat": 4})
    data = DataConfig(
        dataset_type="coco", root=str(tmp_path), train_annotations="a/train.json", train_images="JPEGImages"
    )
    data = replace(data, test_annotations="a/test.json", test_images="JPEGImages")
    train, test = load_annotations(data, "train"), load_annotations(data, "test")
    assert (len(train), len(test)) == (10, 1) and train.classes == test.classes == ("cat", "dog")
    voc = load_annotations(voc_config(tmp_path, test_portion=0), "train")
    assert voc.fingerprint() == train.fingerprint()


def test_num_classes_is_checked_against_the_data(tmp_path):
    write_voc(tmp_path, OBJECTS)
    assert len(load_annotations(voc_config(tmp_path, num_classes=2, test_portion=0), "train")) == 10
    with pytest.raises(UserError, match=r"data\.num_classes: 3, but .* has 2 classes \(cat, dog\)"):
        load_annotations(voc_config(tmp_path, num_classes=3), "train")


def ids(annotations):
    return [annotations.ids[i] for i in range(len(annotations))]


def test_data_without_a_test_set_gives_a_part_of_it(tmp_path):
    write_voc(tmp_path / "a", OBJECTS)
    write_voc(tmp_path / "b", OBJECTS | {f"x{i}": [] for i in range(10)})
    train, test = (load_annotations(voc_config(tmp_path / "a", test_portion=0.3), s) for s in ("train", "test"))
    assert len(test) == 3 and set(ids(train)) | set(ids(test)) == set(OBJECTS) and not set(ids(train)) & set(ids(test))
    assert train.classes == test.classes == ("cat", "dog") and train.held_out == test.held_out == tuple(ids(test))
    whole = read_voc(tmp_path / "a", ["trainval"])
    for part in (train, test):
        rows = [ids(whole).index(name) for name in ids(part)]
        assert all(
            torch.equal(part.objects.of(i)[k], whole.objects.of(row)[k])
            for i, row in enumerate(rows)
            for k in ("boxes", "labels")
        )
        assert any("3 of 10 images are kept for the test (data.test_portion=0.3)" in note for note in part.notes)
    # Neither trained nor searched on, and another portion is noticed.
    split = split_indices(train, [0.7, 0.3], 5)
    save_split(tmp_path / "split.json", train, *split)
    assert load_split(tmp_path / "split.json", train) == split
    other = load_annotations(voc_config(tmp_path / "a", test_portion=0.6), "train")
    for refuse in (load_split, refuse_seen):
        with pytest.raises(UserError, match=r"3 images of the test set took part .*data\.test_portion"):
            refuse(tmp_path / "split.json", other)
    refuse_seen(tmp_path / "split.json", train)
    for portion, split in ((0.0, "test"), (0.96, "train")):
        with pytest.raises(UserError, match=r"no test data here, and .* of 10 images are kept for the test"):
            load_annotations(voc_config(tmp_path / "a", test_portion=portion), split)
    for portion, split in ((0, "train"), (1, "test")):
        assert len(load_annotations(voc_config(tmp_path / "a", test_portion=portion), split)) == 10


def test_a_class_that_the_test_set_lacks_is_a_class_without_objects(tmp_path):
    write_voc(tmp_path, OBJECTS)
    write_coco(tmp_path / "train.json", OBJECTS, {"dog": 9, "cat": 4})
    write_coco(tmp_path / "test.json", {"001": [("dog", 1, 2, 9, 9)]}, {"dog": 9})
    data = DataConfig(dataset_type="coco", root=str(tmp_path))
    test = load_annotations(data, "test")
    assert (test.classes, test.category_ids) == (("cat", "dog"), (4, 9)) and test.objects.labels.tolist() == [2]
    # What a detector knows decides, where the training data is elsewhere.
    (tmp_path / "train.json").unlink()
    write_coco(tmp_path / "train.json", {}, {})
    test = load_annotations(replace(data, classes=["eel", "dog"]), "test")
    assert test.category_ids == (10, 9) and test.objects.labels.tolist() == [2]
    with pytest.raises(UserError, match=r"test\.json: unknown class 'dog' \(did you mean 'dogs'"):
        load_annotations(replace(data, classes=["dogs"]), "test")


class Ids:
    """All that the split asks of annotations."""

    held_out = ()

    def __init__(self, ids):
        self.ids = list(ids)

    def __len__(self):
        return len(self.ids)


@given(count=st.integers(2, 80), share=st.floats(0.05, 0.95), rest=st.floats(0.05, 1), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_the_split_is_exact_and_never_leaks(count, share, rest, seed):
    portions = [share, (1 - share) * rest]
    annotations = Ids(f"image{i}" for i in range(count))
    try:
        train, search = split_indices(annotations, portions, seed)
    except UserError:
        assert min(portions) * count < 1
        return
    assert not set(train) & set(search)
    assert len(train) == round(share * count) and len(train) + len(search) == round(sum(portions) * count)
    if rest == 1:
        assert sorted(train + search) == list(range(count))
    backwards = Ids(reversed(annotations.ids))
    again = split_indices(backwards, portions, seed)
    for rows, others in zip((train, search), again, strict=True):
        assert {annotations.ids[i] for i in rows} == {backwards.ids[i] for i in others}


def test_the_split_follows_the_seed():
    annotations = Ids(map(str, range(50)))
    assert split_indices(annotations, [0.8, 0.2], 0) != split_indices(annotations, [0.8, 0.2], 1)


def test_a_portion_of_no_image_is_named():
    with pytest.raises(UserError, match=r"data\.data_portion: 0\.01 of 10 images rounds to zero images"):
        split_indices(Ids("abcdefghij"), [0.99, 0.01], 0)


def test_a_saved_split_comes_back_by_image_id(tmp_path, annotations):
    train, search = split_indices(annotations, [0.7, 0.3], 0)
    save_split(tmp_path / "split.json", annotations, train, search)
    assert load_split(tmp_path / "split.json", annotations) == (train, search)
    shifted = Ids(["extra", *annotations.ids])
    assert load_split(tmp_path / "split.json", shifted) == ([i + 1 for i in train], [i + 1 for i in search])
    digest = split_digest(annotations, train, search)
    assert load_split(tmp_path / "split.json", annotations, digest) == (train, search)
    with pytest.raises(UserError, match=r"split\.json: is not the split that .*last\.pt was trained with"):
        load_split(tmp_path / "split.json", annotations, split_digest(annotations, search, train))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "split/1", "train": ["000"], "search": ["00x"]}', "image '00x' is not in the data"),
        ('{"format": "split/1", "train": ["000"], "search": ["000"]}', "both sides"),
        ('{"format": "split/2", "train": [], "search": []}', "split/2"),
        ('{"format": "split/1"', "cannot be read as JSON"),
        ("[]", 'expected a JSON object with "format": "split/1"'),
        ('{"format": "split/1", "train": ["000", "000"], "search": ["001"]}', "each once"),
        ('{"format": "split/1", "train": [["000"]], "search": ["001"]}', r"train\[0\]: expected text"),
        ('{"format": "split/1", "train": ["000"], "train": ["001"], "search": []}', "'train' stands there twice"),
    ],
)
def test_a_wrong_split_file_is_refused(tmp_path, annotations, content, message):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_split(path, annotations)
    with pytest.raises(UserError, match="nowhere"):
        load_split(tmp_path / "nowhere.json", annotations)


def same(one, other):
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


def test_a_sample_is_a_function_of_seed_epoch_and_row(annotations):
    dataset = DetectionDataset(annotations, range(10), TrainTransform(32), HERE, seed=3)
    first = dataset[1, 4]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(dataset[1, 4], first)
    assert torch.equal(torch.get_rng_state(), state)
    other_seed = DetectionDataset(annotations, range(10), TrainTransform(32), HERE, seed=4)
    assert not same(dataset[2, 4], first) and not same(other_seed[1, 4], first)


def test_ignored_objects_are_not_trained_on(annotations):
    dataset = DetectionDataset(annotations, range(10), EvalTransform(32), HERE)
    assert [len(dataset[0, row][2]) for row in range(3)] == [0, 1, 1]
    assert annotations.objects.of(2)["labels"].tolist() == [1, 2] and dataset[0, 2][2].tolist() == [1]


def test_a_batch_is_padded_with_background(annotations):
    dataset = DetectionDataset(annotations, range(10), EvalTransform(32), HERE)
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch.images.shape == (2, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.labels.tolist() == [[0], [1]]
    torch.testing.assert_close(batch.boxes[1], torch.tensor([[5 / 48, 5 / 32, 30 / 48, 25 / 32]]))
    assert batch.boxes[0].tolist() == [[0, 0, 0, 0]] and batch.index.tolist() == [0, 1]
    empty = collate([dataset[0, 0], dataset[0, 3]])
    assert empty.boxes.shape == (2, 0, 4) and empty.labels.shape == (2, 0)
    assert torch.equal(batch.to("cpu").images, batch.images)


def spoil(annotations, row):
    path = Path(annotations.paths[row])
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_jpeg_is_one_line_that_names_it(annotations, workers):
    spoil(annotations, 3)
    with pytest.raises(UserError) as error:
        list(eval_loader(annotations, range(10), 32, 4, DataConfig(workers=workers)))
    assert "003.jpg: cannot be read" in str(error.value) and "\n" not in str(error.value)


def test_a_picture_of_another_size_or_none_is_named(annotations):
    dataset = DetectionDataset(annotations, range(10), EvalTransform(32), HERE)
    annotations.sizes[1] = torch.tensor([32, 48])
    with pytest.raises(UnreadableImage, match=r"001\.jpg: is 48 x 32 pixels, its annotation says 32 x 48"):
        dataset[0, 1]
    Path(annotations.paths[2]).unlink()
    with pytest.raises(UnreadableImage, match=r"002\.jpg: cannot be read: .*No such file"):
        dataset[0, 2]


def test_a_neighbour_stands_in_for_a_broken_picture_in_training(annotations, caplog):
    spoil(annotations, 3)
    spoil(annotations, 5)
    dataset = DetectionDataset(annotations, [1, 3, 5, 8], TrainTransform(32), SKIP)
    with caplog.at_level(logging.WARNING):
        rows = [dataset[epoch, row][3] for epoch in (1, 2) for row in (1, 3, 5, 8)]
    assert rows == [1, 8, 8, 8] * 2
    assert ["003.jpg" in m or "005.jpg" in m for m in caplog.messages] == [True, True]
    spoil(annotations, 8)
    last = DetectionDataset(annotations, [3, 5, 8], TrainTransform(32), SKIP)
    with pytest.raises(UserError, match="so far 3 of 3 pictures"):
        last[1, 5]


def test_a_broken_picture_is_black_in_evaluation(annotations, caplog):
    spoil(annotations, 3)
    batch = next(iter(eval_loader(annotations, [2, 3, 4], 32, 8, SKIP)))
    assert batch.index.tolist() == [2, 3, 4]
    assert batch.images[1].max() == 0 and batch.images[0].max() > 0
    assert len(caplog.messages) == 1


def test_cached_pictures_are_decoded_once_and_within_the_budget(annotations, monkeypatch):
    monkeypatch.setattr(datasets, "CACHE_BYTES", 2 * 3 * 32 * 48)
    dataset = DetectionDataset(annotations, range(10), TrainTransform(32), DataConfig(cache=True))
    plain = DetectionDataset(annotations, range(10), TrainTransform(32), HERE)
    expected = [plain[1, row] for row in range(3)]
    assert all(same(dataset[1, row], expected[row]) for row in (0, 2, 0))
    other = multiprocessing.get_context("fork").Process(target=dataset.read_image, args=(1,))
    other.start()
    other.join()
    for row in range(3):
        spoil(annotations, row)
    # Row 1 is in memory that the other process has written.
    assert all(same(dataset[1, row], expected[row]) for row in (0, 1))
    for lost, of in ((2, dataset), (0, pickle.loads(pickle.dumps(dataset)))):  # the latter as in a spawned process
        with pytest.raises(UserError):
            of[1, lost]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 5")  # more than this machine has cores
@pytest.mark.parametrize(("device", "processes"), [("cpu", 1), ("cuda:0", 5)])
def test_auto_loads_with_a_share_of_the_cores(annotations, monkeypatch, device, processes):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert DataConfig().workers == "auto"
    assert eval_loader(annotations, range(10), 32, 4, DataConfig(), device).num_workers == processes


def rows_of(sampler):
    return [[row for _, row in batch] for batch in sampler]


@given(count=st.integers(1, 40), batch=st.integers(1, 9), size=st.integers(1, 4), epoch=st.integers(1, 9))
@settings(max_examples=50)
def test_ranks_share_every_batch_evenly(count, batch, size, epoch):
    indices = [3 * i for i in range(count)]
    ranks = [EpochSampler(indices, batch, 5, World(rank, size)) for rank in range(size)]
    whole = EpochSampler(indices, batch * size, 5, World())
    for sampler in (*ranks, whole):
        sampler.set_epoch(epoch)
    batches = [rows_of(sampler) for sampler in ranks]
    assert len({len(found) for found in batches}) == 1 and len(batches[0]) == len(ranks[0]) >= 1
    seen = [row for found in batches for rows in found for row in rows]
    if count >= batch * size:
        assert len(set(seen)) == len(seen) == count // (batch * size) * batch * size
    else:
        assert set(seen) == set(indices) and len(seen) < max(count + size, 2 * size + 1)
    if count >= batch * size or count % size == 0:
        joined = [{row for found in batches for row in found[k]} for k in range(len(whole))]
        assert joined == [set(rows) for rows in rows_of(whole)]


def test_the_order_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler(range(30), 4, 1, World())
    other = EpochSampler(range(30), 4, 2, World())
    first = list(sampler)
    assert {epoch for batch in first for epoch, _ in batch} == {1}
    assert list(sampler) == first and rows_of(other) != rows_of(sampler)
    sampler.set_epoch(2)
    assert rows_of(sampler) != [[row for _, row in batch] for batch in first]
    sampler.set_epoch(1, start_batch=5)
    assert len(sampler) == 2 and list(sampler) == first[5:]
    sampler.set_epoch(1)
    assert list(sampler) == first and sampler.batches_per_epoch == 7


def test_a_batch_has_pictures_of_one_size(annotations):
    """Each picture is resized once, from the source to the size of its batch."""
    loader = train_loader(annotations, range(8), 64, 2, Config(data=DataConfig(workers=0)), "cpu")
    loader.batch_sampler.image_size = lambda number: 32 if number == 1 else 64
    batches = list(loader)
    assert [batch.images.shape[-2:] for batch in batches] == [(64, 64), (32, 32), (64, 64), (64, 64)]
    alone = DetectionDataset(annotations, range(8), TrainTransform(32, AugmentConfig()), HERE)
    image, *_ = alone[1, int(batches[1].index[0])]
    assert torch.equal(image, batches[1].images[0])


def epochs_of(loader, start=0):
    found = []
    for epoch in (1, 2):
        loader.batch_sampler.set_epoch(epoch, start if epoch == 1 else 0)
        found += [(batch.images, batch.boxes, batch.labels, batch.index) for batch in loader]
    return found


def loader_of(annotations, batch_size=3, device="cpu", **options):
    config = Config(data=DataConfig(**{"workers": 0, **options}), seed=1)
    return train_loader(annotations, range(10), 24, batch_size, config, device)


def test_workers_and_a_resume_change_nothing(annotations):
    alone = epochs_of(loader_of(annotations))
    shared = epochs_of(loader_of(annotations, workers=2, cache=True))
    resumed = epochs_of(loader_of(annotations), start=2)
    assert len(alone) == 6
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert all(same(a, b) for a, b in zip(alone[2:], resumed, strict=True))
    assert not same(alone[0], alone[3])


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_for_a_gpu_a_resumed_run_has_the_same_distortions(annotations):
    def distorted(start):
        loader = loader_of(annotations, device="cuda", augment=AugmentConfig(distort=0.9))
        loader.batch_sampler.set_epoch(1, start)
        return [(batch.images, batch.to("cpu").images) for batch in loader]

    whole, resumed = distorted(0), distorted(1)
    assert all(same(a, b) for a, b in zip(whole[1:], resumed, strict=True))
    assert not any(torch.equal(before, after) for before, after in whole)


def test_loading_takes_nothing_from_the_global_generator(annotations):
    loader = loader_of(annotations)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_process_has_its_share_of_every_batch(annotations, monkeypatch):
    alone = [set(batch.index.tolist()) for batch in loader_of(annotations, batch_size=4)]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(datasets.distributed, "world", lambda rank=rank: World(rank, 2))
        shares.append([batch.index.tolist() for batch in loader_of(annotations, batch_size=4)])
    assert [len(rows) for rows in shares[0]] == [2, 2]
    assert [{*one, *other} for one, other in zip(*shares, strict=True)] == alone


def test_evaluation_goes_through_every_picture_in_order(annotations):
    batches = list(eval_loader(annotations, [7, 0, 9, 2, 4], 24, 2, HERE))
    assert [batch.index.tolist() for batch in batches] == [[7, 0], [9, 2], [4]]
    assert list(eval_loader(annotations, [], 24, 2, HERE)) == []


class Worker(Dataset):
    """Samples that tell about the process that made them."""

    def __getitem__(self, key):
        state = torch.tensor([torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN])
        return torch.zeros(0), torch.zeros(0, 4), state, 0


def test_workers_have_one_thread_and_leave_ctrl_c_to_the_main_process():
    before = signal.getsignal(signal.SIGINT)  # a job in the background may have been started without it
    (batch,) = make_loader(Worker(), [[(0, 0)]], 1, "cpu")
    assert batch.labels.tolist() == [[1, True]]
    assert signal.getsignal(signal.SIGINT) == before


def test_the_configured_augmentation_is_the_one_that_is_used(annotations):
    off = AugmentConfig(zoom_out=0, iou_crop=0, distort=0, flip=0)
    plain = {
        int(i): image
        for b in eval_loader(annotations, range(10), 24, 5, HERE)
        for i, image in zip(b.index, b.images, strict=True)
    }
    for augment, unchanged in ((off, True), (AugmentConfig(), False)):
        batches = list(loader_of(annotations, batch_size=5, augment=augment))
        pairs = [(plain[int(i)], image) for b in batches for i, image in zip(b.index, b.images, strict=True)]
        assert len(pairs) == 10 and all(torch.equal(a, b) for a, b in pairs) == unchanged


@pytest.mark.parametrize(("count", "batch", "size"), [(1, 4, 1), (1, 4, 2), (2, 4, 2), (5, 2, 1), (3, 2, 1)])
def test_no_process_ever_has_a_batch_of_one(count, batch, size):
    """BatchNorm needs two images: a single picture counts twice."""
    for rank in range(size):
        sampler = EpochSampler(range(count), batch, 0, World(rank, size))
        for epoch in (1, 2):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler) >= 1 and all(len(keys) >= 2 for keys in batches)
            assert {row for keys in batches for _, row in keys} <= set(range(count))


class Faulty(Dataset):
    """Its third sample comes with a fault of the loader process."""

    def __init__(self, fault):
        self.fault = fault

    def __getitem__(self, key):
        if key[1] == 2:
            self.fault()
        return torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(1, 4), torch.ones(1, dtype=torch.int64), key[1]


def fill_shared_memory():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # stands in for Docker's 64 MB


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def give_up():
    runtime._give_up(RuntimeError("no room"), None)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(fill_shared_memory, "</torch_|shared memory"), (be_killed, "DataLoader worker"), (give_up, "DataLoader worker")],
)
def test_a_fault_of_a_loader_process_is_an_error_and_never_a_wait(fault, words, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = make_loader(Faulty(fault), [[(0, i)] for i in range(4)], 1, "cpu")
    with pytest.raises(RuntimeError, match=words):
        list(loader)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_loader_process_goes_on_after_a_signal_to_all_processes(number):
    """The main process, which had it too, may still need batches before it has saved."""
    loader = make_loader(Faulty(functools.partial(signal_oneself, number)), [[(0, i)] for i in range(6)], 1, "cpu")
    assert [batch.index.item() for batch in loader] == list(range(6))


def signal_oneself(number):
    os.kill(os.getpid(), number)
