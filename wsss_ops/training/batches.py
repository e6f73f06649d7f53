"""Augmented training batches whose every number is a function of seed, epoch and image index.

So a resumed run sees exactly what an unbroken one sees, whatever the number of worker processes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from wsss_ops.training.data import VOID, Dataset, Sample
from wsss_ops.training.processes import Processes

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
KEEP_BYTES = 64 << 20  # a data set of less is read once and kept


class Batch(NamedTuple):
    """One process's share of a training batch."""

    images: Tensor  # float32 [N, 3, S, S], normalised
    tags: Tensor  # float32 [N, C-1]
    valid: Tensor  # bool [N, S, S], false on crop padding
    masks: Tensor | None = None  # uint8 [N, S, S], 255 for void and crop padding; None for systems that use none

    def to(self, device: torch.device) -> "Batch":
        images = self.images.to(device, memory_format=torch.channels_last, non_blocking=True)
        tags, valid = (part.to(device, non_blocking=True) for part in (self.tags, self.valid))
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return Batch(images, tags, valid, masks)


def normalize(images: Tensor) -> Tensor:
    """uint8 or 0..255 float [..., 3, H, W] -> float32 with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() / 255 - mean) / std


def augment(
    image: Tensor, mask: Tensor, size: int, generator: np.random.Generator, scale: tuple[float, float] = (0.7, 1.4)
) -> tuple[Tensor, Tensor, Tensor]:
    """Random resize, crop with padding, flip and colour jitter of one image, and the same geometry for its mask.

    image: uint8 [3, H, W]; its long side becomes size times a factor drawn log-uniformly from scale. mask: uint8
    [H, W]. Returns float32 [3, size, size], normalised, zero on padding; bool [size, size], false on padding; and uint8
    [size, size], the mask by nearest neighbours, 255 on padding.
    """
    factor = np.exp(generator.uniform(np.log(scale[0]), np.log(scale[1]))) * size / max(image.shape[1:])
    height, width = (max(1, round(side * factor)) for side in image.shape[1:])
    resized = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    picture = normalize(_jitter(resized.float(), generator))
    labels = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")[0, 0]
    if generator.random() < 0.5:
        picture, labels = picture.flip(-1), labels.flip(-1)
    top, left = (_offset(side - size, generator) for side in (height, width))
    seen = slice(max(0, top), max(0, top) + size), slice(max(0, left), max(0, left) + size)
    inner = picture[:, seen[0], seen[1]]
    rows, columns = slice(max(0, -top), max(0, -top) + inner.shape[1]), slice(max(0, -left), None)
    columns = slice(columns.start, columns.start + inner.shape[2])
    crop, valid = torch.zeros(3, size, size), torch.zeros(size, size, dtype=torch.bool)
    cut = torch.full((size, size), VOID, dtype=torch.uint8)
    crop[:, rows, columns] = inner
    valid[rows, columns] = True
    cut[rows, columns] = labels[seen]
    return crop, valid, cut


def _offset(excess: int, generator: np.random.Generator) -> int:
    """Where the crop begins along one side: inside the image, or before it where the image is smaller."""
    return int(generator.integers(min(0, excess), max(0, excess) + 1))


def _jitter(image: Tensor, generator: np.random.Generator, strength: float = 0.2) -> Tensor:
    brightness, contrast, saturation = (float(f) for f in generator.uniform(1 - strength, 1 + strength, 3))
    image = image * brightness
    image = image.mean() + (image - image.mean()) * contrast
    grey = image.mean(0, keepdim=True)
    return (grey + (image - grey) * saturation).clamp(0, 255)


class _Views(torch.utils.data.Dataset):
    """Augmented views, addressed by (epoch, index): a pure function, so that workers need no state."""

    def __init__(self, dataset: Dataset, size: int, seed: int, masks: bool) -> None:
        self.dataset, self.size, self.seed, self.masks = dataset, size, seed, masks
        self.kept: dict[int, Sample] = {}

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        sample = self.kept.get(key[1]) or self.dataset[key[1]]
        if sample.image.numel() * len(self.dataset) <= KEEP_BYTES:
            self.kept[key[1]] = sample
        generator = np.random.default_rng((self.seed, *key))
        image, valid, mask = augment(sample.image, sample.mask, self.size, generator)
        parts = (image, sample.tags.float(), valid)
        return (*parts, mask) if self.masks else parts


class TrainingBatches:
    """The batches of a training run, epoch by epoch; an incomplete last batch is left out.

    batch_size counts the images of all processes together. masks: whether batches have the data set's masks; only
    systems that train on pseudo-labels shall see any. Raises ValueError where it cannot be divided among them or
    exceeds the data set.
    """

    def __init__(self, dataset: Dataset, *, size: int, batch_size: int, seed: int, workers: int,
                 processes: Processes, masks: bool = False) -> None:  # fmt: skip
        if batch_size % processes.count or not 0 < batch_size <= len(dataset):
            shared = f"a multiple of the {processes.count} processes, " if processes.count > 1 else ""
            most = f"at most the {len(dataset)} training images"
            raise ValueError(f"batch_size must be {shared}at least 1 and {most}, got {batch_size}")
        self.images, self.batch_size, self.seed, self.processes = len(dataset), batch_size, seed, processes
        self.steps = self.images // batch_size
        self._keys: list[list[tuple[int, int]]] = []
        self._loader = DataLoader(
            _Views(dataset, size, seed, masks), batch_sampler=_Listed(self._keys), num_workers=workers,
            persistent_workers=workers > 0, pin_memory=processes.device.type == "cuda",
        )  # fmt: skip

    def order(self, epoch: int) -> list[int]:
        """The image indices of an epoch in their order, of all processes."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.images).tolist()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's share of the batches of an epoch, from first_step on."""
        order, step_images = self.order(epoch), self.batch_size
        starts = range(first_step * step_images, self.steps * step_images, step_images)
        mine = slice(self.processes.rank, None, self.processes.count)
        self._keys[:] = [[(epoch, index) for index in order[start : start + step_images][mine]] for start in starts]
        for parts in self._loader:
            yield Batch(*parts).to(self.processes.device)


class _Listed:
    """A batch sampler over a list that its owner fills before every epoch."""

    def __init__(self, keys: list[list[tuple[int, int]]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)
