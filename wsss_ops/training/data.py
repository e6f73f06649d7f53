"""Data sets with image-level labels and pixel masks: PASCAL VOC layout from a folder or a zip, or generated scenes."""

import functools
import hashlib
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255
SPLITS = ("train", "dev", "val")
DEV_IMAGES = 200
REPORT_IMAGES = 10
FULL_CHECK_IMAGES = 5000
LABELS = "cls_labels.npz"
# What reading and decoding a file raise where it is damaged or may not be read.
UNREADABLE = (EOFError, OSError, SyntaxError, ValueError, zipfile.BadZipFile, zlib.error)


class Sample(NamedTuple):
    """One image with its annotation."""

    image: Tensor  # uint8 [3, H, W]
    mask: Tensor  # uint8 [H, W], 0 background, 255 void
    tags: Tensor  # bool [C-1], the foreground classes present
    name: str


class Dataset(Protocol):
    """What training and evaluation ask of a data set."""

    classes: tuple[str, ...]  # background first
    tags: Tensor  # bool [M, C-1], known without decoding an image
    report_classes: tuple[int, ...]  # the classes that mIoU is averaged over

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """That of the sample, which is not read for it."""
        ...


def with_background(tags: Tensor) -> Tensor:
    """tags [..., C-1] of the foreground -> [..., C], the background always present, of the dtype of tags."""
    return torch.cat([torch.ones_like(tags[..., :1]), tags], -1)


def open_dataset(path: str | os.PathLike[str] | None, split: str, *, check: str = "auto") -> Dataset:
    """Opens a split ("train", "dev" or "val") of a VOC-layout folder or zip, or of the generated scenes (path None).

    check: see `VocDataset`. Raises ValueError for an unknown split and for data that are not in order.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if path is None:
        from wsss_ops.training.scenes import SceneDataset

        return SceneDataset(split=split)
    return VocDataset(path, split, check=check)


def fingerprint(dataset: Dataset) -> str:
    """A short text that differs between data sets of other classes, sizes or labels."""
    digest = hashlib.sha256(repr(tuple(dataset.classes)).encode())
    digest.update(np.packbits(dataset.tags.numpy()).tobytes())
    return f"{len(dataset)} images, labels {digest.hexdigest()[:12]}"


class _Folder:
    def __init__(self, root: Path) -> None:
        candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
        found = [folder for folder in candidates if (folder / "ImageSets" / "Segmentation").is_dir()]
        if not found:
            raise ValueError(f"{root}: no ImageSets/Segmentation in it or in its VOC2012; this is not a VOC layout")
        self.root = found[0]

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def location(self, name: str) -> str:
        return str(self.root / name)


class _Zip:
    """Reads members in place. Every process opens the archive for itself: a file offset shared over fork would race."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: dict[int, zipfile.ZipFile] = {}
        try:
            names = self._archive().namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a readable zip archive ({error})") from error
        lists = [name for name in names if "ImageSets/Segmentation/" in name]
        if not lists:
            raise ValueError(f"{path}: no ImageSets/Segmentation inside; this is not a VOC layout")
        self._prefix = min(lists, key=len).split("ImageSets/")[0]
        self._names = frozenset(names)

    def _archive(self) -> zipfile.ZipFile:
        process = os.getpid()
        if process not in self._opened:
            self._opened = {process: zipfile.ZipFile(self.path)}
        return self._opened[process]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}

    def exists(self, name: str) -> bool:
        return self._prefix + name in self._names

    def read(self, name: str) -> bytes:
        return self._archive().read(self._prefix + name)

    def location(self, name: str) -> str:
        return f"{self.path}:{self._prefix}{name}"


class VocDataset:
    """PASCAL VOC layout, from a folder or from a zip that is read in place.

    path: the zip, the folder that holds VOC2012, or VOC2012 itself. Masks are SegmentationClassAug/ID.png where that
    folder exists, else SegmentationClass/ID.png. Labels come from cls_labels.npz (`ids`, `labels` [n, 20]) where
    present, else from the masks. Training ids are those of train_aug.txt, else train.txt; the last 200 of them, at
    most a fifth, are the development split.

    report_classes: background and the classes of at least 10 validation images; where no class has so many, those
    of any validation image.

    check: "headers" looks for missing files, broken headers and sizes of photo and mask that differ; "full" decodes
    every file as well, which also finds truncated ones, mask values that are no class, and masks that lack a class of
    the labels (a warning); "auto" is full up to 5000 images, about 2 ms each. Raises ValueError naming the bad files.
    """

    classes: tuple[str, ...] = VOC_CLASSES

    def __init__(self, path: str | os.PathLike[str], split: str, *, check: str = "auto") -> None:
        if check not in ("auto", "headers", "full"):
            raise ValueError(f'check must be "auto", "headers" or "full", got {check!r}')
        root = Path(path)
        if not root.exists():
            raise ValueError(f"{root}: there is no such file or folder")
        self._files = _Folder(root) if root.is_dir() else _Zip(root)
        validation = self._read_list("val")
        self.ids = validation if split == "val" else self._training_ids(split)
        self._masks = "SegmentationClassAug"
        if not self._files.exists(self._mask_file(self.ids[0])):
            self._masks = "SegmentationClass"
        full = check == "full" or (check == "auto" and len(self.ids) <= FULL_CHECK_IMAGES)
        _raise_faults(root, _in_parallel(functools.partial(self._fault, full=full), self.ids, "checking images"))
        labelled = self._files.exists(LABELS)
        self.tags = self._labels(self.ids)
        self.report_classes = _report_classes(self._labels(validation))
        if full and labelled:
            self._warn_of_lacking_masks()

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        return self.ids[index]

    def __getitem__(self, index: int) -> Sample:
        name = self.ids[index]
        image = np.array(self._decode(self._image_file(name)).convert("RGB"))
        mask = self._mask(name)
        return Sample(torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask),
                      self.tags[index], name)  # fmt: skip

    def _image_file(self, name: str) -> str:
        return f"JPEGImages/{name}.jpg"

    def _mask_file(self, name: str) -> str:
        return f"{self._masks}/{name}.png"

    def _read_list(self, split: str) -> list[str]:
        name = f"ImageSets/Segmentation/{split}.txt"
        if not self._files.exists(name):
            raise ValueError(f"{self._files.location(name)} is missing")
        try:
            ids = self._files.read(name).decode().split()
        except UNREADABLE as error:
            raise ValueError(f"{self._files.location(name)} cannot be read: {error}") from error
        if not ids:
            raise ValueError(f"{self._files.location(name)} names no image")
        return ids

    def _training_ids(self, split: str) -> list[str]:
        augmented = self._files.exists("ImageSets/Segmentation/train_aug.txt")
        ids = self._read_list("train_aug" if augmented else "train")
        held_out = max(1, min(DEV_IMAGES, len(ids) // 5))
        if len(ids) < 2:
            raise ValueError("the training list needs at least two images, one of them for the development split")
        return ids[-held_out:] if split == "dev" else ids[:-held_out]

    def _decode(self, file: str, *, pixels: bool = True) -> Image.Image:
        try:
            picture = Image.open(io.BytesIO(self._files.read(file)))
            if pixels:
                picture.load()
        except UNREADABLE as error:
            raise ValueError(f"{self._files.location(file)} cannot be decoded: {error}") from error
        return picture

    def _mask(self, name: str) -> np.ndarray:
        file = self._mask_file(name)
        picture = self._decode(file)
        if picture.mode not in ("P", "L"):
            raise ValueError(f"{self._files.location(file)}: a palette or grey PNG is needed, got mode {picture.mode}")
        mask = np.array(picture)
        wrong = mask[(mask >= len(self.classes)) & (mask != VOID)]
        if wrong.size:
            raise ValueError(f"{self._files.location(file)}: value {wrong[0]} is neither a class nor void")
        return mask

    def _fault(self, name: str, full: bool) -> str | None:
        files = (self._image_file(name), self._mask_file(name))
        for file in files:
            if not self._files.exists(file):
                return f"{self._files.location(file)} is missing"
        try:
            size = self._decode(files[0], pixels=full).size
            other = self._mask(name).shape[::-1] if full else self._decode(files[1], pixels=False).size
        except ValueError as error:
            return str(error)
        if size != other:
            return f"{self._files.location(files[1])}: mask is {other[0]}x{other[1]}, photo {size[0]}x{size[1]}"
        return None

    def _labels(self, ids: list[str]) -> Tensor:
        if not self._files.exists(LABELS):
            present = _in_parallel(self._classes_of_mask, ids, "labels from masks")
            return torch.from_numpy(np.stack(present))
        labels = self._read_labels()
        unlabelled = [name for name in ids if name not in labels]
        if unlabelled:
            raise ValueError(f"{self._files.location(LABELS)} has no labels for {_some(unlabelled)}")
        return torch.from_numpy(np.stack([labels[name] for name in ids]))

    def _read_labels(self) -> dict[str, np.ndarray]:
        """The bool [C-1] of each id in the label file."""
        location = self._files.location(LABELS)
        try:
            content = self._files.read(LABELS)
            if not zipfile.is_zipfile(io.BytesIO(content)):
                raise ValueError("it is no npz archive")
            with np.load(io.BytesIO(content)) as archive:
                lacking = [name for name in ("ids", "labels") if name not in archive.files]
                if lacking:
                    raise ValueError(f"it has no {' and no '.join(lacking)}")
                ids, labels = np.asarray(archive["ids"]), np.asarray(archive["labels"])
        except UNREADABLE as error:
            raise ValueError(f"{location} cannot be read: {error}") from error
        classes = len(self.classes) - 1
        if ids.ndim != 1 or labels.shape != (len(ids), classes) or labels.dtype.kind not in "biuf":
            raise ValueError(
                f"{location}: labels must be numbers [n, {classes}] for ids [n], got {labels.dtype} "
                f"{list(labels.shape)} for ids {list(ids.shape)}"
            )
        return dict(zip(ids.tolist(), labels != 0, strict=True))

    def _classes_of_mask(self, name: str) -> np.ndarray:
        counts = np.bincount(self._mask(name).ravel(), minlength=len(self.classes))
        return counts[1 : len(self.classes)] > 0

    def _warn_of_lacking_masks(self) -> None:
        present = np.stack(_in_parallel(self._classes_of_mask, self.ids, "labels against masks"))
        lacking = int((self.tags.numpy() & ~present).any(1).sum())
        if lacking:
            text = f"{lacking} of {len(self)} images have a label whose class their mask lacks: used as they are"
            warnings.warn(text, stacklevel=3)


def _report_classes(validation_tags: Tensor) -> tuple[int, ...]:
    images = validation_tags.sum(0)
    enough = images >= (REPORT_IMAGES if images.max() >= REPORT_IMAGES else 1)
    return (0, *(int(index) + 1 for index in enough.nonzero()))


def _in_parallel(function: Callable[[str], object], names: Iterable[str], title: str) -> list:
    names = list(names)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(tqdm(pool.map(function, names), title, len(names), leave=False, disable=None))


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _raise_faults(root: Path, faults: list[str | None]) -> None:
    found = [fault for fault in faults if fault]
    if found:
        more = [f"... and {len(found) - 10} more"] if len(found) > 10 else []
        raise ValueError(
            "\n  ".join([f"{root}: {len(found)} faulty image{'s' * (len(found) > 1)}:", *found[:10], *more])
        )
