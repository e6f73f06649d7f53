"""Data: the VOC layout in folders and zips with its faults, augmentation, and batches that seed and epoch decide."""

from __future__ import annotations

import multiprocessing
import warnings
import zipfile
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training.voc_folder import CAT, DOG, PERSON, make_voc, save_mask, zip_folder

from wsss_ops.training.batches import Batch, TrainingBatches, augment, normalize
from wsss_ops.training.data import Dataset, VocDataset, fingerprint, open_dataset
from wsss_ops.training.processes import Processes

ALONE = Processes()


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("voc"))


def test_folder_and_zip_hold_the_same(voc: Path, tmp_path: Path) -> None:
    archive = zip_folder(voc, tmp_path / "voc.zip")
    for split, images in (("train", 16), ("dev", 4), ("val", 12)):
        folder, packed = open_dataset(voc, split), open_dataset(archive, split)
        inside = open_dataset(voc / "VOC2012", split)
        assert len(folder) == len(packed) == len(inside) == images
        for one, other in zip(folder, packed, strict=True):
            assert one.name == other.name
            for part in ("image", "mask", "tags"):
                assert torch.equal(getattr(one, part), getattr(other, part))
        assert fingerprint(folder) == fingerprint(packed)
    assert fingerprint(open_dataset(voc, "dev")) != fingerprint(open_dataset(voc, "val"))


def test_splits_are_disjoint_and_dev_is_the_end_of_train_aug(voc: Path) -> None:
    train, dev, val = (open_dataset(voc, split).ids for split in ("train", "dev", "val"))
    listed = (voc / "VOC2012/ImageSets/Segmentation/train_aug.txt").read_text().split()
    assert train + dev == listed
    assert not set(val) & set(listed)


def test_sample_types_and_report_classes(voc: Path) -> None:
    data = open_dataset(voc, "val")
    sample = data[1]
    assert sample.image.dtype == sample.mask.dtype == torch.uint8
    assert sample.image.shape[1:] == sample.mask.shape
    assert sample.tags.dtype == torch.bool
    assert sample.tags.shape == (20,)
    assert data.report_classes == (0, CAT, DOG, PERSON)  # fewer than ten images each: any that occurs
    assert set(np.unique(sample.mask).tolist()) <= {0, CAT, DOG, PERSON, 255}


def test_only_frequent_classes_are_reported_where_there_are_some(tmp_path: Path) -> None:
    root = make_voc(tmp_path, validation=24)
    labels = np.load(root / "VOC2012/cls_labels.npz")
    changed = labels["labels"].copy()
    changed[20:] = 0
    changed[20:30, CAT - 1] = 1
    changed[20:29, DOG - 1] = 1
    np.savez(root / "VOC2012/cls_labels.npz", ids=labels["ids"], labels=changed)
    assert open_dataset(root, "val", check="headers").report_classes == (0, CAT)


def test_labels_come_from_masks_where_there_is_no_label_file(voc: Path, tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    (root / "VOC2012/cls_labels.npz").unlink()
    assert torch.equal(open_dataset(root, "train").tags, open_dataset(voc, "train").tags)


def test_a_label_without_pixels_is_a_warning_with_the_count(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    labels = np.load(root / "VOC2012/cls_labels.npz")
    changed = labels["labels"].copy()
    changed[:3, 0] = 1
    np.savez(root / "VOC2012/cls_labels.npz", ids=labels["ids"], labels=changed)
    with pytest.warns(UserWarning, match="3 of 16 images"):
        open_dataset(root, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(root, "val")


def test_every_faulty_file_is_named_in_one_error(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    base = root / "VOC2012"

    def photo(number: int) -> Path:
        return base / f"JPEGImages/2007_{number:06d}.jpg"

    def mask(number: int) -> Path:
        return base / f"SegmentationClassAug/2007_{number:06d}.png"

    photo(1).unlink()
    photo(2).write_bytes(photo(2).read_bytes()[:-100])
    mask(3).write_bytes(b"nonsense")
    Image.new("RGB", (9, 9)).save(photo(4))
    save_mask(mask(5), np.full((40, 32), 21, np.uint8))
    Image.new("RGB", (40, 40)).save(mask(6))
    with pytest.raises(ValueError, match="6 faulty images") as error:
        open_dataset(root, "train")
    for file in (photo(1), photo(2), mask(3), mask(4), mask(5), mask(6)):
        assert str(file) in str(error.value)
    assert "value 21" in str(error.value)
    with pytest.raises(ValueError, match="3 faulty images"):  # missing, unreadable, of another size
        open_dataset(root, "train", check="headers")


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for photo in (root / "VOC2012/JPEGImages").iterdir():
        photo.unlink()
    with pytest.raises(ValueError, match=r"16 faulty images(.|\n)*and 6 more"):
        open_dataset(root, "train")


IDS = np.array([f"2007_{number:06d}" for number in range(32)])


def save_labels(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda file: np.savez(file, **arrays)


@pytest.mark.parametrize("check", ["headers", "full"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save_labels(ids=IDS, labels=np.ones((32, 19))), r"got float64 \[32, 19\] for ids \[32\]"),
        (save_labels(ids=IDS, labels=np.ones((31, 20))), r"got float64 \[31, 20\] for ids \[32\]"),
        (save_labels(ids=IDS[0], labels=np.ones((1, 20))), r"got float64 \[1, 20\] for ids \[\]"),
        (save_labels(ids=IDS, labels=np.full((32, 20), "1")), r"got <U1 \[32, 20\]"),
        (save_labels(names=IDS, labels=np.ones((32, 20))), "it has no ids"),
        (save_labels(), "it has no ids and no labels"),
        (save_labels(ids=IDS.astype(object), labels=np.ones((32, 20))), "Object arrays cannot be loaded"),
        (lambda file: file.write_bytes(b"no archive"), "it is no npz archive"),
        (lambda file: file.write_bytes(b""), "it is no npz archive"),
    ],
)
def test_a_faulty_label_file_is_named(tmp_path: Path, check: str, write: Callable[[Path], None], message: str) -> None:
    file = make_voc(tmp_path) / "VOC2012" / "cls_labels.npz"
    write(file)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        open_dataset(tmp_path, "train", check=check)


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = make_voc(tmp_path) / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    file.write_bytes(b"2007_000020\xff\n")
    with pytest.raises(ValueError, match=f"{file} cannot be read: 'utf-8' codec"):
        open_dataset(tmp_path, "train")


def test_a_compressed_member_that_is_damaged_is_named(voc: Path, tmp_path: Path) -> None:
    name = "VOC2012/JPEGImages/2007_000003.jpg"
    with zipfile.ZipFile(tmp_path / "voc.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(voc.rglob("*")):
            archive.write(file, file.relative_to(voc))
        start = archive.getinfo(name).header_offset + 30 + len(name)
    content = bytearray((tmp_path / "voc.zip").read_bytes())
    content[start : start + 8] = b"\xff" * 8
    (tmp_path / "voc.zip").write_bytes(content)
    with pytest.raises(ValueError, match=f"1 faulty image(.|\n)*{name} cannot be decoded"):
        open_dataset(tmp_path / "voc.zip", "train")


def test_a_broken_member_of_a_zip_is_named(voc: Path, tmp_path: Path) -> None:
    archive = zip_folder(voc, tmp_path / "voc.zip")
    content = bytearray(archive.read_bytes())
    photo = (voc / "VOC2012/JPEGImages/2007_000003.jpg").read_bytes()
    place = content.index(photo) + len(photo) // 2
    content[place : place + 8] = b"\x00" * 8
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 faulty image(.|\n)*JPEGImages/2007_000003.jpg"):
        open_dataset(archive, "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "no such file"),
        (lambda p: p, "not a VOC layout"),
        (lambda p: (p / "x.zip").write_bytes(b"no zip") and p / "x.zip", "not a readable zip"),
    ],
)
def test_what_is_no_voc_layout_is_told(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(make(tmp_path), "train")


def test_unknown_names_are_rejected(voc: Path) -> None:
    with pytest.raises(ValueError, match="split must be"):
        open_dataset(voc, "test")
    with pytest.raises(ValueError, match="check must be"):
        VocDataset(voc, "val", check="no")


def test_scenes_are_the_default() -> None:
    data = open_dataset(None, "dev")
    assert data[0].tags.shape == (len(data.classes) - 1,)
    assert torch.equal(data.tags[0], data[0].tags)


def _digest(data: Dataset, start: int, results: Queue[int]) -> None:
    results.put(sum(int(data[index % len(data)].image.sum()) for index in range(start, start + 40)))


def test_processes_read_a_zip_at_the_same_time(voc: Path, tmp_path: Path) -> None:
    data = open_dataset(zip_folder(voc, tmp_path / "voc.zip"), "train")
    assert len(data[0].image) == 3  # the archive is open when the processes are forked
    for method, count in (("fork", 3), ("spawn", 1)):
        context = multiprocessing.get_context(method)
        results = context.Queue()
        readers = [context.Process(target=_digest, args=(data, 0, results)) for _ in range(count)]
        for reader in readers:
            reader.start()
        sums = {results.get(timeout=300) for _ in readers}
        for reader in readers:
            reader.join()
        assert sums == {sum(int(data[index % len(data)].image.sum()) for index in range(40))}


def test_augmentation_keeps_what_lies_outside_the_image_at_zero_and_invalid() -> None:
    image = torch.full((3, 20, 50), 200, dtype=torch.uint8)
    seen = set()
    for seed in range(30):
        crop, valid, _ = augment(image, torch.zeros_like(image[0]), 32, np.random.default_rng(seed))
        assert crop.shape == (3, 32, 32)
        assert crop.dtype == torch.float32
        assert (crop[:, ~valid] == 0).all()
        assert (crop[:, valid] != 0).all()
        rows, columns = valid.any(1), valid.any(0)
        assert torch.equal(valid, rows[:, None] & columns)
        assert 32 * 0.7 * 20 / 50 - 1 <= rows.sum() <= 32 * 1.4 * 20 / 50 + 1
        seen.add(int(rows.nonzero()[0]))
    assert len(seen) > 3


def test_normalized_images_have_imagenet_statistics() -> None:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    expected = -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225])
    torch.testing.assert_close(normalize(image)[:, 0, 0], expected)


def test_batches_are_a_function_of_seed_and_epoch(voc: Path) -> None:
    data = open_dataset(voc, "train")
    data.tags = torch.eye(len(data), 20, dtype=torch.bool)  # so that they tell which image it is

    def epoch(
        number: int, first_step: int = 0, workers: int = 0, seed: int = 3, place: Processes = ALONE
    ) -> list[Batch]:
        batches = TrainingBatches(data, size=24, batch_size=4, seed=seed, workers=workers, processes=place, masks=True)
        list(batches.epoch(7))  # what came before does not matter
        return list(batches.epoch(number, first_step))

    one = epoch(1)
    assert len(one) == 4
    assert sorted(torch.cat([batch.tags.argmax(1) for batch in one]).tolist()) == list(range(16))
    for again in (epoch(1), epoch(1, workers=2)):
        for batch, other in zip(one, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    for batch, other in zip(one[2:], epoch(1, first_step=2), strict=True):
        assert torch.equal(batch.images, other.images)
    assert not torch.equal(one[0].images, epoch(2)[0].images)
    assert not torch.equal(one[0].images, epoch(1, seed=4)[0].images)
    shares = [epoch(1, place=Processes(rank, 2)) for rank in range(2)]
    for batch, *parts in zip(one, *shares, strict=True):
        assert torch.equal(torch.stack([p.images for p in parts], 1).flatten(0, 1), batch.images)


@pytest.mark.parametrize(("batch_size", "count"), [(3, 2), (0, 1), (17, 1)])
def test_batch_sizes_that_cannot_be_are_rejected(voc: Path, batch_size: int, count: int) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        TrainingBatches(open_dataset(voc, "train"), size=24, batch_size=batch_size, seed=0, workers=0,
                        processes=Processes(0, count))  # fmt: skip
