"""A little VOC-layout data set of drawn shapes, for tests."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CAT, DOG, PERSON = 8, 12, 15


def make_voc(root: Path, training: int = 20, validation: int = 12, side: int = 40) -> Path:
    """Writes root/VOC2012 with disks of cats (red), dogs (green) and persons (blue), and returns root."""
    generator = np.random.default_rng(0)
    base = root / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    ids = [f"2007_{number:06d}" for number in range(training + validation)]
    labels = np.zeros((len(ids), 20), np.uint8)
    for number, name in enumerate(ids):
        height, width = side, side - 4 * (number % 3)
        mask = np.zeros((height, width), np.uint8)
        image = generator.integers(90, 130, (height, width, 3)).astype(np.uint8)
        rows, columns = np.mgrid[:height, :width]
        for channel, index in enumerate((CAT, DOG, PERSON)):
            if (number + channel) % 3 == 0 or generator.random() < 0.3:
                y, x = generator.integers(8, side - 12, 2)
                disk = (rows - y) ** 2 + (columns - x) ** 2 < 36
                mask[disk] = index
                image[disk, channel] = 230
                labels[number, index - 1] = 1
        mask[0, :3] = 255
        labels[number] = np.isin(np.arange(1, 21), mask)
        save_mask(base / f"SegmentationClassAug/{name}.png", mask)
        Image.fromarray(image).save(base / f"JPEGImages/{name}.jpg", quality=95)
    lists = base / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").write_text("\n".join(ids[:training]) + "\n")
    (lists / "val.txt").write_text("\n".join(ids[training:]) + "\n")
    np.savez(base / "cls_labels.npz", ids=np.array(ids), labels=labels)
    return root


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Saves a palette PNG."""
    picture = Image.fromarray(mask, "P")
    picture.putpalette([value for index in range(256) for value in (index, index, index)])
    picture.save(path)


def zip_folder(root: Path, target: Path) -> Path:
    """Packs root into a zip, names relative to root."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
    return target
